"""Gaussian negative log-likelihood, forward and backward, in one pass each.

Shape suffixes: B batch, D columns (everything but the batch), S splits of a row, R × C one tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae_kernels.triton_kernels.device_math import standardized
from fastvae_kernels.triton_kernels.launch import OPTIONS, on_device, readable, rows, tiling

LOG_2PI = tl.constexpr(1.8378770664093453)


@triton.jit
def forward_kernel(
    mean_BD,
    target_BD,
    logvar_BD,
    nll_BS,
    B,
    D,
    mean_stride_b,
    mean_stride_d,
    target_stride_b,
    target_stride_d,
    logvar_stride_b,
    logvar_stride_d,
    columns_per_split,
    TARGET_SCALE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Reads mean, target and logvar `[B, D]` once (strides 0 for one logvar); writes nll `[B, S]`.

    Program (i, s): rows iR … iR+R−1, split s. The target is multiplied by TARGET_SCALE.
    """
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    split = tl.program_id(1)
    first = split * columns_per_split
    nll = tl.zeros([BLOCK_R], tl.float32)
    for start in range(first, min(first + columns_per_split, D), BLOCK_C):
        column = start + tl.arange(0, BLOCK_C).to(tl.int64)
        mask = (row < B)[:, None] & (column < D)[None, :]
        mean_at = row[:, None] * mean_stride_b + column[None, :] * mean_stride_d
        target_at = row[:, None] * target_stride_b + column[None, :] * target_stride_d
        logvar_at = row[:, None] * logvar_stride_b + column[None, :] * logvar_stride_d
        mean = tl.load(mean_BD + mean_at, mask=mask, other=0.0).to(tl.float32)
        t = tl.load(target_BD + target_at, mask=mask, other=0).to(tl.float32) * TARGET_SCALE
        logvar = tl.load(logvar_BD + logvar_at, mask=mask, other=0.0).to(tl.float32)

        standard, _ = standardized(t - mean, logvar)
        element = standard * standard + (logvar + LOG_2PI)
        nll += tl.sum(tl.where(mask, element, 0.0), axis=1)
    tl.store(nll_BS + row * tl.num_programs(1) + split, 0.5 * nll, mask=row < B)


@triton.jit
def backward_kernel(
    mean_BD,
    target_BD,
    logvar_BD,
    grad_nll_B,
    grad_mean_BD,
    grad_logvar_BD,
    B,
    D,
    mean_stride_b,
    mean_stride_d,
    target_stride_b,
    target_stride_d,
    logvar_stride_b,
    logvar_stride_d,
    grad_nll_stride_b,
    WRITE_GRAD_LOGVAR: tl.constexpr,
    TARGET_SCALE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Writes grad_mean = grad_nll·(mean − x)/σ² and, where logvar has a value for each element,
    grad_logvar = ½ grad_nll·[1 − (mean − x)²/σ²], both `[B, D]`. One tile a program."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
    mask = (row < B)[:, None] & (column < D)[None, :]
    mean_at = row[:, None] * mean_stride_b + column[None, :] * mean_stride_d
    target_at = row[:, None] * target_stride_b + column[None, :] * target_stride_d
    logvar_at = row[:, None] * logvar_stride_b + column[None, :] * logvar_stride_d
    mean = tl.load(mean_BD + mean_at, mask=mask, other=0.0).to(tl.float32)
    t = tl.load(target_BD + target_at, mask=mask, other=0).to(tl.float32) * TARGET_SCALE
    logvar = tl.load(logvar_BD + logvar_at, mask=mask, other=0.0).to(tl.float32)
    grad_nll = tl.load(grad_nll_B + row * grad_nll_stride_b, mask=row < B, other=0.0)[:, None]

    standard, inverse_sigma = standardized(mean - t, logvar)
    out_at = row[:, None] * D + column[None, :]
    grad_mean = grad_nll * (standard * inverse_sigma)
    tl.store(grad_mean_BD + out_at, grad_mean.to(grad_mean_BD.dtype.element_ty), mask=mask)
    if WRITE_GRAD_LOGVAR:
        grad_logvar = 0.5 * grad_nll * (1.0 - standard * standard)
        tl.store(
            grad_logvar_BD + out_at, grad_logvar.to(grad_logvar_BD.dtype.element_ty), mask=mask
        )


def forward(mean: Tensor, target: Tensor, logvar: Tensor) -> Tensor:
    """One launch. Returns nll `[B]` float32."""
    mean_BD, target_BD = rows(mean), rows(target)
    logvar_BD = _logvar_rows(logvar, mean_BD)
    B, D = mean_BD.shape
    tiles = tiling(B, D)
    nll_BS = torch.empty(B, tiles.splits, dtype=torch.float32, device=mean.device)
    with on_device(mean):
        forward_kernel[(tiles.row_programs, tiles.splits)](
            mean_BD,
            readable(target_BD),
            logvar_BD,
            nll_BS,
            B,
            D,
            *mean_BD.stride(),
            *target_BD.stride(),
            *logvar_BD.stride(),
            tiles.columns_per_split,
            TARGET_SCALE=1.0 / 255.0 if target.dtype == torch.uint8 else 1.0,
            BLOCK_R=tiles.block_r,
            BLOCK_C=tiles.block_c,
            **OPTIONS,
        )
    return nll_BS.view(B) if tiles.splits == 1 else nll_BS.sum(1)


def backward(
    mean: Tensor, target: Tensor, logvar: Tensor, nll: Tensor, grad_nll: Tensor
) -> tuple[Tensor, Tensor]:
    """One launch. Returns grad_mean (contiguous, like `mean`) and grad_logvar (like `logvar`)."""
    mean_BD, target_BD = rows(mean), rows(target)
    logvar_BD = _logvar_rows(logvar, mean_BD)
    B, D = mean_BD.shape
    tiles = tiling(B, D)
    shared = logvar.dim() == 0
    grad_mean = torch.empty(mean.shape, dtype=mean.dtype, device=mean.device)
    grad_logvar = torch.empty(logvar.shape, dtype=logvar.dtype, device=mean.device)
    with on_device(mean):
        backward_kernel[(tiles.row_programs, tiles.column_programs)](
            mean_BD,
            readable(target_BD),
            logvar_BD,
            grad_nll,
            grad_mean,
            grad_logvar,
            B,
            D,
            *mean_BD.stride(),
            *target_BD.stride(),
            *logvar_BD.stride(),
            grad_nll.stride(0),
            WRITE_GRAD_LOGVAR=not shared,
            TARGET_SCALE=1.0 / 255.0 if target.dtype == torch.uint8 else 1.0,
            BLOCK_R=tiles.block_r,
            BLOCK_C=tiles.block_c,
            **OPTIONS,
        )
    if shared:
        # nll_b = ½ [SSE_b/σ² + D (log σ² + log 2π)] holds the sum that the derivative needs, so
        # one variance costs B numbers and no second pass: ∂nll_b/∂log σ² = ½ (D − SSE_b/σ²).
        half_sse_B = nll - 0.5 * D * (logvar.float() + LOG_2PI.value)
        grad_logvar = (grad_nll * (0.5 * D - half_sse_B)).sum().to(logvar.dtype)
    return grad_mean, grad_logvar


def _logvar_rows(logvar: Tensor, mean_BD: Tensor) -> Tensor:
    """One variance is read with strides of 0."""
    return logvar.expand(mean_BD.shape) if logvar.dim() == 0 else rows(logvar)
