"""Zeros and ones drawn from grey images, written plainly."""

import math

import torch
from torch import Tensor

from fastvae_kernels import philox
from fastvae_kernels.layout import laid_out
from fastvae_kernels.reference._common import chosen


def binarize(images: Tensor, seed: Tensor, offset: Tensor, indices: Tensor | None = None) -> Tensor:
    """1 where a uniform draw is below the pixel, else 0: float32, like `images` `[B, …]`, and
    channels_last if they are.

    `images`: uint8 (read as / 255), bool or floating in [0, 1]; with `indices` `[B]` a data set
    `[N, …]`, of which row b is number indices[b]. `seed`, `offset`: int64, one element, on the
    same device.
    """
    x = chosen(images, indices)
    draws = philox.row_uniforms(len(x), math.prod(x.shape[1:]), seed, offset).view(x.shape)
    # Compared as floats: 0 is never and 255 (or 1.0) always white, since the draws stay below 1.
    if x.dtype == torch.uint8:
        draws = draws * 255.0
    return laid_out((draws < x.float()).float(), like=images)
