"""Images of a data set, gathered and binarised in one pass.

Shape suffixes: B rows to write, N rows of images (a data set that indices choose from, else
N = B), D columns (everything but the first dimension), R × C one tile.

A column's draw belongs to its place in `[B, …]`, wherever that lies in memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae_kernels.layout import empty_rows, in_memory_order, is_channels_last
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
    planes,
    images_stride_b,
    images_stride_d,
    WHITE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Reads images `[N, D]` (any strides), of which row b is number `indices_B[b]` unless indices
    are None; writes float32 `[B, D]`, 1 where draw · WHITE < pixel, else 0. One tile a program.
    With CHANNELS_LAST a row of both lies in memory as `[D / planes, planes]`.

    `seed_ptr`, `offset_ptr`: int64 scalars.
    """
    row, first = tile_of(D, BLOCK_R, BLOCK_C)
    image, exists = target_rows(indices_B, row, B, N)
    column = first + tl.arange(0, BLOCK_C)
    mask = (row < B)[:, None] & (column < D)[None, :]
    if CHANNELS_LAST:
        pixels = D // planes
        column = column % pixels * planes + column // pixels
    column = column.to(tl.int64)
    images_at = image[:, None] * images_stride_b + column[None, :] * images_stride_d
    pixel = tl.load(images_ND + images_at, mask=mask, other=0).to(tl.float32)

    seed = tl.load(seed_ptr).to(tl.uint64)
    position = tl.load(offset_ptr) + row
    draw = row_uniforms(seed, position, first, D, BLOCK_R, BLOCK_C)
    bit = tl.where(draw * WHITE < pixel, 1.0, 0.0)
    bit = tl.where(exists[:, None], bit, float("nan"))
    tl.store(out_BD + row[:, None] * D + column[None, :], bit, mask=mask)


def binarize(images: Tensor, seed: Tensor, offset: Tensor, indices: Tensor | None = None) -> Tensor:
    """One launch. Float32 zeros and ones like the images that are chosen, in `images`' order of
    memory if that is channels_last, else contiguous."""
    batch = len(images) if indices is None else len(indices)
    last = is_channels_last(images)
    out = empty_rows(batch, like=images)
    planes = images.shape[1] if last else 1
    images, indices = gathered(in_memory_order(images)[0], indices, leading=1)
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
            planes,
            *images_ND.stride(),
            CHANNELS_LAST=last,
            WHITE=255.0 if images.dtype == torch.uint8 else 1.0,
            **blocks,
            **OPTIONS,
        )
    return out
