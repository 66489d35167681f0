"""A 3 × 3 × 3 convolution with half the multiplications: Winograd's minimal filtering, along depth.

m planes of the result are 3 m two-dimensional convolutions, or m + 2 of sums of planes with sums of kernels (Lavin and
Gray, https://arxiv.org/abs/1509.09308, in one dimension of three). The sums are small matrix products; the convolutions
in between are PyTorch's.
"""

import math
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

# Where the polynomials are evaluated, by m, beside infinity; small numbers and their inverses keep rounding small.
POINTS = {4: (0.0, 1.0, -1.0, 0.5, -0.5), 6: (0.0, 1.0, -1.0, 0.5, -0.5, 2.0, -2.0)}

Matrix = list[list[float]]


def convolved(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return `F.conv3d(x, weight, bias, padding=1)`, but for rounding: in float32 some 4e-6 of its length.

    For the way back it keeps sums in place of `x` and the weight: from a depth of 4 on at most twice as much as `x`,
    and 8/3 of the weight.

    Args:
        x: (B, C, D, H, W).
        weight: (C', C, 3, 3, 3).
        bias: (C',) or None.
    """
    batch, channels, depth, height, width = x.shape
    of_planes, of_kernel, of_products = (x.new_tensor(matrix) for matrix in _maps(depth))
    num_products = len(of_kernel)  # a tile, of m planes
    planes = x.transpose(1, 2).reshape(batch, depth, -1)
    tiles = _Map.apply(of_planes, planes).view(-1, num_products * channels, height, width)  # B·tiles first
    kernel = _Map.apply(of_kernel, weight.movedim(2, 0).reshape(3, -1)).view(-1, channels, 3, 3)
    products = F.conv2d(tiles, kernel, padding=1, groups=num_products).view(batch, -1, len(weight) * height * width)
    y = _Map.apply(of_products, products).view(batch, depth, -1, height, width).transpose(1, 2)
    return (y if bias is None else y + bias.view(-1, 1, 1, 1)).contiguous()


@torch.compiler.assume_constant_result
def _maps(depth: int) -> tuple[Matrix, Matrix, Matrix]:
    """Return three matrices for a depth of D, which is cut into tiles of m planes.

    Returns:
        (tiles · (m + 2), D), from a volume's planes to what is convolved;
        (m + 2, 3), from a kernel's planes to what convolves;
        (D, tiles · (m + 2)), from the products to the result's planes.
    """
    m = min(POINTS, key=lambda m: math.ceil(depth / m) * (m + 2))  # the fewest products
    num_tiles = math.ceil(depth / m)
    of_planes = np.zeros((num_tiles, m + 2, num_tiles * m + 2))  # with the padding's
    of_products = np.zeros((num_tiles, m, num_tiles, m + 2))
    for tile in range(num_tiles):
        of_planes[tile, :, m * tile : m * tile + m + 2] = np.linalg.inv(_evaluation(m, m + 2)).T
        of_products[tile, :, tile] = _evaluation(m, m).T
    inner = of_planes[:, :, 1 : depth + 1].reshape(-1, depth)
    return inner.tolist(), _evaluation(m, 3).tolist(), of_products.reshape(num_tiles * m, -1)[:depth].tolist()


def _evaluation(m: int, num_coefficients: int) -> np.ndarray:
    """Return the matrix (m + 2, num_coefficients) from a polynomial's coefficients to its values, infinity's last."""
    values = np.vander(POINTS[m], num_coefficients, increasing=True)
    return np.vstack([values, np.eye(num_coefficients)[-1:]])


class _Map(torch.autograd.Function):
    """A constant matrix times x, that saves no tensor.

    The last tensor saved is then the convolution's input, and activation checkpointing stops there on its way back:
    without running the convolution again.
    """

    @staticmethod
    def forward(ctx: Any, matrix: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        ctx.matrix = matrix
        return matrix @ x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, _Map.apply(ctx.matrix.T, gradient)
