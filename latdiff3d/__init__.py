"""Latent diffusion on 3D medical volumes, built on MONAI: from NIfTI volumes and masks to synthetic volumes."""

__version__ = "0.1.0"
