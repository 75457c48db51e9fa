"""Uniforms and normals as `fastvae_kernels.philox` defines them, in one launch.

Shape suffixes: B rows, D columns, R × C one tile, G = C / 4 groups of four columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae_kernels.triton_kernels.device_math import philox4x32, row_normals
from fastvae_kernels.triton_kernels.launch import OPTIONS, TILE, on_device


@triton.jit
def row_uniforms(seed, position_R, first_column, D, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Uniforms of rows `position_R` (int64), BLOCK_C columns from `first_column` on.

    `first_column` and BLOCK_C are multiples of four. Returns float32 `[BLOCK_R, BLOCK_C]`,
    multiples of 2^-24 below 1.
    """
    groups = tl.cdiv(D, 4)
    group_G = first_column // 4 + tl.arange(0, BLOCK_C // 4)
    call_RG = position_R[:, None] * groups + group_G[None, :]
    low_RG = call_RG.to(tl.uint32)
    high_RG = (call_RG >> 32).to(tl.uint32)
    zero_RG = low_RG * 0
    a, b, c, d = philox4x32(seed, low_RG, high_RG, zero_RG, zero_RG)
    # join stacks on a new last axis: [R, G, 2, 2] → columns 4g, 4g+1, 4g+2, 4g+3.
    bits = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (BLOCK_R, BLOCK_C))
    # 24 bits are a float32 as they are; an int32 is converted in one instruction.
    return (bits >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def tile_of(D, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """This program's rows (int64) and its first column; tiles of one row follow each other."""
    tiles = tl.cdiv(D, BLOCK_C)
    program = tl.program_id(0)
    row_R = (program // tiles).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    return row_R, program % tiles * BLOCK_C


@triton.jit
def noise_kernel(
    seed_ptr,
    offset_ptr,
    out_BD,
    B,
    D,
    IS_NORMAL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Writes float32 `[B, D]`: standard normals, or uniforms on [0, 1). One tile a program.

    `seed_ptr`, `offset_ptr`: int64 scalars.
    """
    row, first = tile_of(D, BLOCK_R, BLOCK_C)
    seed = tl.load(seed_ptr).to(tl.uint64)
    position = tl.load(offset_ptr) + row
    if IS_NORMAL:
        noise = row_normals(seed, position, 0, first, D, BLOCK_R, BLOCK_C)
    else:
        noise = row_uniforms(seed, position, first, D, BLOCK_R, BLOCK_C)
    column = first + tl.arange(0, BLOCK_C)
    mask = (row < B)[:, None] & (column < D)[None, :]
    tl.store(out_BD + row[:, None] * D + column[None, :], noise, mask=mask)


def uniform(rows: int, columns: int, seed: Tensor, offset: Tensor) -> Tensor:
    """One launch. Float32 `[rows, columns]` on `seed`'s device."""
    return _drawn(rows, columns, seed, offset, is_normal=False)


def normal(rows: int, columns: int, seed: Tensor, offset: Tensor) -> Tensor:
    """One launch. Float32 `[rows, columns]` on `seed`'s device."""
    return _drawn(rows, columns, seed, offset, is_normal=True)


def _drawn(rows: int, columns: int, seed: Tensor, offset: Tensor, is_normal: bool) -> Tensor:
    out = torch.empty(rows, columns, dtype=torch.float32, device=seed.device)
    programs, blocks = cut(rows, columns)
    with on_device(out):
        noise_kernel[(programs,)](
            seed, offset, out, rows, columns, IS_NORMAL=is_normal, **blocks, **OPTIONS
        )
    return out


def cut(rows: int, columns: int) -> tuple[int, dict[str, int]]:
    """How many programs of one tile each `[rows, columns]` takes, and the tile's constants.

    No sums hold a row together here, so that of the widths from 64 to TILE the one that idles the
    fewest lanes can be taken: 64 for rows of 784, which fill 94 % of them, and not 1024. Where
    rows are too few for that, a tile is as wide as it needs to be.
    """
    most_rows = 1 << (rows - 1).bit_length()
    most = min(TILE, max(4, 1 << (columns - 1).bit_length()))
    least = min(most, max(64, TILE // most_rows))
    widths = (most >> i for i in range(most.bit_length()) if most >> i >= least)
    block_c = min(widths, key=lambda width: -(-columns // width) * width)  # the widest of equals
    block_r = min(TILE // block_c, most_rows)
    programs = -(-rows // block_r) * -(-columns // block_c)
    return programs, {"BLOCK_R": block_r, "BLOCK_C": block_c}
