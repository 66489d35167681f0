"""Linear codes at a latent's rate, block PCA and average pooling: what a trained autoencoder has to beat."""

from collections.abc import Iterable

import numpy as np
from einops import rearrange


class BlockPCA:
    """The best linear code at a latent's rate: what any trained autoencoder has to beat.

    A latent with k channels at 1/4 of the resolution holds k numbers for each block of 4 x 4 x 4 voxels. So does this
    code: the k leading principal components of the blocks, whose C * 4^3 values include all channels.

    Volumes are padded to whole blocks by repeating their edge voxels, and cropped back. On Task04_Hippocampus that is
    1.2 dB stronger than padding by zeros, so give it volumes without padding of their own: it would weaken the
    baseline, and nobody gains by beating a weak one.
    """

    block: int
    mean: np.ndarray  # (C * block^3,)
    components: np.ndarray  # (num_components, C * block^3), orthonormal rows, the largest variance first

    def fit(self, volumes: Iterable[np.ndarray], num_components: int, block: int = 4) -> "BlockPCA":
        """Fit mean and components on the training volumes, one pass, one volume in memory at a time.

        Args:
            volumes: (C, D, H, W) each, the same C, any size.
            num_components: numbers kept per block, 1 to C * block^3: the latent's channels.
            block: edge of a block in voxels: the autoencoder's downsampling factor.

        Returns:
            This object.

        Raises:
            ValueError: no volumes, or more components than values in a block.
        """
        count = 0
        total: np.ndarray = np.zeros(1)
        products: np.ndarray = np.zeros((1, 1))
        for volume in volumes:
            vectors = _blocks(_pad_to_blocks(volume, block), block).astype(np.float64)  # (N, C * block^3)
            count += len(vectors)
            total = total + vectors.sum(0)
            products = products + vectors.T @ vectors
        if count == 0:
            raise ValueError("BlockPCA.fit was given no volumes.")
        if not 1 <= num_components <= len(total):
            raise ValueError(f"{num_components} components of blocks of {len(total)} values: keep 1 to {len(total)}.")
        self.block = block
        self.mean = total / count
        _, vectors = np.linalg.eigh(products / count - np.outer(self.mean, self.mean))  # ascending variance
        self.components = vectors.T[::-1][:num_components]
        return self

    def reconstruct(self, volume: np.ndarray) -> np.ndarray:
        """Encode and decode a volume, (C, D, H, W) of any size; return float32 of the same shape."""
        padded = _pad_to_blocks(volume, self.block)
        centred = _blocks(padded, self.block) - self.mean  # (N, C * block^3)
        vectors = centred @ self.components.T @ self.components + self.mean
        _, depth, height, _ = padded.shape
        restored = rearrange(
            vectors,
            "(d h w) (c p q r) -> c (d p) (h q) (w r)",
            d=depth // self.block,
            h=height // self.block,
            p=self.block,
            q=self.block,
            r=self.block,
        )
        return _crop_like(restored, volume).astype(np.float32)


def average_pooling(volume: np.ndarray, factor: int = 4) -> np.ndarray:
    """Replace each block of `factor`^3 voxels by its mean, per channel: the code that keeps one number per block.

    Args:
        volume: (C, D, H, W), any size; its last blocks may be smaller and are averaged over their own voxels.
        factor: edge of a block in voxels.

    Returns:
        float32 of the same shape.
    """
    pooled = volume.astype(np.float64)
    for axis in (1, 2, 3):
        starts = np.arange(0, volume.shape[axis], factor)
        sizes = np.diff(np.append(starts, volume.shape[axis]))
        sums = np.add.reduceat(pooled, starts, axis)
        means = sums / sizes.reshape([-1 if a == axis else 1 for a in range(4)])
        pooled = np.repeat(means, sizes, axis)
    return pooled.astype(np.float32)


def _pad_to_blocks(volume: np.ndarray, block: int) -> np.ndarray:
    # Repeated edges cost less than zeros: no step for the components to spend themselves on.
    return np.pad(volume, [(0, 0)] + [(0, -size % block) for size in volume.shape[1:]], mode="edge")


def _blocks(padded: np.ndarray, block: int) -> np.ndarray:
    return rearrange(padded, "c (d p) (h q) (w r) -> (d h w) (c p q r)", p=block, q=block, r=block)


def _crop_like(padded: np.ndarray, volume: np.ndarray) -> np.ndarray:
    return padded[:, : volume.shape[1], : volume.shape[2], : volume.shape[3]]
