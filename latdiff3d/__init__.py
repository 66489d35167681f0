"""Latent diffusion on 3D medical volumes, built on MONAI: from NIfTI volumes and masks to synthetic volumes.

    model = latdiff3d.load("runs/dm", num_steps=12)
    sample = model.sample("case_seg.nii.gz", seed=0)
    volume, affine = sample.on_mask_grid()  # (C, D, H, W) in [0, 1], voxel to RAS mm

`load` is `latdiff3d.synthesis.Model.load`, imported at its first use: `import latdiff3d` alone imports no PyTorch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latdiff3d.synthesis import Model

    load = Model.load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from latdiff3d.synthesis import Model

        return Model.load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
