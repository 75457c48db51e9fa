"""Bernoulli negative log-likelihood from logits, forward and backward, in one pass each.

Shape suffixes: B batch, D columns (everything but the batch), S splits of a row, R × C one tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae_kernels.triton_kernels.device_math import softplus_and_sigmoid
from fastvae_kernels.triton_kernels.launch import OPTIONS, on_device, readable, rows, tiling


@triton.jit
def forward_kernel(
    logits_BD,
    target_BD,
    nll_BS,
    B,
    D,
    logits_stride_b,
    logits_stride_d,
    target_stride_b,
    target_stride_d,
    columns_per_split,
    TARGET_SCALE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Reads logits and target `[B, D]` (any strides) once; writes nll `[B, S]` float32.

    Program (i, s): rows iR … iR+R−1, split s. The target is multiplied by TARGET_SCALE.
    """
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    split = tl.program_id(1)
    first = split * columns_per_split
    nll = tl.zeros([BLOCK_R], tl.float32)
    for start in range(first, min(first + columns_per_split, D), BLOCK_C):
        column = start + tl.arange(0, BLOCK_C).to(tl.int64)
        mask = (row < B)[:, None] & (column < D)[None, :]
        logits_at = row[:, None] * logits_stride_b + column[None, :] * logits_stride_d
        target_at = row[:, None] * target_stride_b + column[None, :] * target_stride_d
        x = tl.load(logits_BD + logits_at, mask=mask, other=0.0).to(tl.float32)
        t = tl.load(target_BD + target_at, mask=mask, other=0).to(tl.float32) * TARGET_SCALE

        softplus, _ = softplus_and_sigmoid(x)
        nll += tl.sum(tl.where(mask, softplus - x * t, 0.0), axis=1)
    tl.store(nll_BS + row * tl.num_programs(1) + split, nll, mask=row < B)


@triton.jit
def backward_kernel(
    logits_BD,
    target_BD,
    grad_nll_B,
    grad_logits_BD,
    B,
    D,
    logits_stride_b,
    logits_stride_d,
    target_stride_b,
    target_stride_d,
    grad_nll_stride_b,
    TARGET_SCALE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Writes grad_logits = grad_nll · (sigmoid(logits) − target), `[B, D]`. One tile a program."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
    mask = (row < B)[:, None] & (column < D)[None, :]
    logits_at = row[:, None] * logits_stride_b + column[None, :] * logits_stride_d
    target_at = row[:, None] * target_stride_b + column[None, :] * target_stride_d
    x = tl.load(logits_BD + logits_at, mask=mask, other=0.0).to(tl.float32)
    t = tl.load(target_BD + target_at, mask=mask, other=0).to(tl.float32) * TARGET_SCALE
    grad_nll = tl.load(grad_nll_B + row * grad_nll_stride_b, mask=row < B, other=0.0)

    _, sigmoid = softplus_and_sigmoid(x)
    grad_logits = grad_nll[:, None] * (sigmoid - t)

    out_at = row[:, None] * D + column[None, :]
    tl.store(grad_logits_BD + out_at, grad_logits.to(grad_logits_BD.dtype.element_ty), mask=mask)


def forward(logits: Tensor, target: Tensor) -> Tensor:
    """One launch. Returns nll `[B]` float32."""
    logits_BD, target_BD = rows(logits), rows(target)
    B, D = logits_BD.shape
    tiles = tiling(B, D)
    nll_BS = torch.empty(B, tiles.splits, dtype=torch.float32, device=logits.device)
    with on_device(logits):
        forward_kernel[(tiles.row_programs, tiles.splits)](
            logits_BD,
            readable(target_BD),
            nll_BS,
            B,
            D,
            *logits_BD.stride(),
            *target_BD.stride(),
            tiles.columns_per_split,
            TARGET_SCALE=1.0 / 255.0 if target.dtype == torch.uint8 else 1.0,
            BLOCK_R=tiles.block_r,
            BLOCK_C=tiles.block_c,
            **OPTIONS,
        )
    return nll_BS.view(B) if tiles.splits == 1 else nll_BS.sum(1)


def backward(logits: Tensor, target: Tensor, grad_nll: Tensor) -> Tensor:
    """One launch. Returns grad_logits, contiguous, like `logits`."""
    logits_BD, target_BD = rows(logits), rows(target)
    B, D = logits_BD.shape
    tiles = tiling(B, D)
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    with on_device(logits):
        backward_kernel[(tiles.row_programs, tiles.column_programs)](
            logits_BD,
            readable(target_BD),
            grad_nll,
            grad_logits,
            B,
            D,
            *logits_BD.stride(),
            *target_BD.stride(),
            grad_nll.stride(0),
            TARGET_SCALE=1.0 / 255.0 if target.dtype == torch.uint8 else 1.0,
            BLOCK_R=tiles.block_r,
            BLOCK_C=tiles.block_c,
            **OPTIONS,
        )
    return grad_logits
