"""Images of a data set, gathered and binarised in one pass.

Shape suffixes: B rows to write, N rows of images (a data set that indices choose from, else
N = B), D columns (everything but the first dimension), R × C one tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae_kernels.triton_kernels.device_memory import target_rows
from fastvae_kernels.triton_kernels.launch import OPTIONS, gathered, on_device, readable, rows
from fastvae_kernels.triton_kernels.noise import cut, row_uniforms, tile_of


@triton.jit
def binarize_kernel(
    images_ND,
    indices_B,
    seed_ptr,
    offset_ptr,
    out_BD,
    B,
    N,
    D,
    images_stride_b,
    images_stride_d,
    WHITE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Reads images `[N, D]` (any strides), of which row b is number `indices_B[b]` unless indices
    are None; writes float32 `[B, D]`, 1 where draw · WHITE < pixel, else 0. One tile a program.

    `seed_ptr`, `offset_ptr`: int64 scalars.
    """
    row, first = tile_of(D, BLOCK_R, BLOCK_C)
    image, exists = target_rows(indices_B, row, B, N)
    column = first + tl.arange(0, BLOCK_C).to(tl.int64)
    mask = (row < B)[:, None] & (column < D)[None, :]
    images_at = image[:, None] * images_stride_b + column[None, :] * images_stride_d
    pixel = tl.load(images_ND + images_at, mask=mask, other=0).to(tl.float32)

    seed = tl.load(seed_ptr).to(tl.uint64)
    position = tl.load(offset_ptr) + row
    draw = row_uniforms(seed, position, first, D, BLOCK_R, BLOCK_C)
    bit = tl.where(draw * WHITE < pixel, 1.0, 0.0)
    bit = tl.where(exists[:, None], bit, float("nan"))
    tl.store(out_BD + row[:, None] * D + column[None, :], bit, mask=mask)


def binarize(images: Tensor, seed: Tensor, offset: Tensor, indices: Tensor | None = None) -> Tensor:
    """One launch. Float32 zeros and ones, contiguous, like the images that are chosen."""
    batch = len(images) if indices is None else len(indices)
    out = torch.empty((batch, *images.shape[1:]), dtype=torch.float32, device=images.device)
    images, indices = gathered(images, indices, leading=1)
    images_ND = rows(images)
    N, D = images_ND.shape
    programs, blocks = cut(batch, D)
    with on_device(images):
        binarize_kernel[(programs,)](
            readable(images_ND),
            indices,
            seed,
            offset,
            out,
            batch,
            N,
            D,
            *images_ND.stride(),
            WHITE=255.0 if images.dtype == torch.uint8 else 1.0,
            **blocks,
            **OPTIONS,
        )
    return out
