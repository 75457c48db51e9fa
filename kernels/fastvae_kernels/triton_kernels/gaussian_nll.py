"""Gaussian negative log-likelihood, forward and backward, in one pass each.

Shape suffixes: B batch, D columns (everything but the batch), N rows of targets (a data set that
indices choose from, else N = B), S splits of a row, R × C one tile.

With ONE_VARIANCE, logvar is a single number for all elements, which a tile reads once.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae_kernels.triton_kernels.device_math import exp, is_new, standardized, standardized_by
from fastvae_kernels.triton_kernels.device_memory import any_is_new, target_rows, within
from fastvae_kernels.triton_kernels.launch import (
    OPTIONS,
    Tiling,
    few_programs,
    gathered,
    on_device,
    readable,
    rows,
    tiling,
)

LOG_2PI = tl.constexpr(1.8378770664093453)


@triton.jit
def errors(
    mean_RC, target_RC, logvar_RC, mask, TARGET_SCALE: tl.constexpr, ONE_VARIANCE: tl.constexpr
):
    """(mean − x)/σ, (mean − x)/σ² and log σ² of one tile, from pointers to its elements."""
    mean = tl.load(mean_RC, mask=mask, other=0.0).to(tl.float32)
    t = tl.load(target_RC, mask=mask, other=0).to(tl.float32) * TARGET_SCALE
    error = mean - t
    if ONE_VARIANCE:
        logvar = tl.load(logvar_RC).to(tl.float32)
        standard, slope = standardized_by(error, exp(-0.5 * logvar))
    else:
        logvar = tl.load(logvar_RC, mask=mask, other=0.0).to(tl.float32)
        standard, inverse_sigma = standardized(error, logvar)
        slope = standard * inverse_sigma
    return standard, slope, logvar


@triton.jit
def write_gradients(standard, slope, weight_R, grad_mean_BD, grad_logvar_BD, out_at, mask):
    """weight·(mean − x)/σ² and, unless it is None, ½ weight·[1 − (mean − x)²/σ²]."""
    grad_mean = weight_R[:, None] * slope
    tl.store(grad_mean_BD + out_at, grad_mean.to(grad_mean_BD.dtype.element_ty), mask=mask)
    if grad_logvar_BD is not None:
        grad_logvar = 0.5 * weight_R[:, None] * (1.0 - standard * standard)
        out_type = grad_logvar_BD.dtype.element_ty
        tl.store(grad_logvar_BD + out_at, grad_logvar.to(out_type), mask=mask)


@triton.jit
def forward_kernel(
    mean_BD,
    target_ND,
    logvar_BD,
    indices_B,
    nll_BS,
    grad_mean_BD,
    grad_logvar_BD,
    row_weight,
    B,
    N,
    D,
    mean_stride_b,
    mean_stride_d,
    target_stride_b,
    target_stride_d,
    logvar_stride_b,
    logvar_stride_d,
    columns_per_split,
    TARGET_SCALE: tl.constexpr,
    ONE_VARIANCE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Reads mean, logvar `[B, D]` and target `[N, D]` (any strides; 0 for one logvar) once; writes
    nll `[B, S]` float32 and, unless they are None, the gradients that `write_gradients` has, of
    row_weight · Σ nll, `[B, D]`.

    Program (i, s): rows iR … iR+R−1, split s. The target is multiplied by TARGET_SCALE.
    """
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    target_row, exists = target_rows(indices_B, row, B, N)
    split = tl.program_id(1)
    first = split * columns_per_split
    nll_RC = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(first, min(first + columns_per_split, D), BLOCK_C):
        column = start + tl.arange(0, BLOCK_C).to(tl.int64)
        mask = (row < B)[:, None] & within(start, D, BLOCK_C)[None, :]
        mean_at = row[:, None] * mean_stride_b + column[None, :] * mean_stride_d
        target_at = target_row[:, None] * target_stride_b + column[None, :] * target_stride_d
        logvar_at = row[:, None] * logvar_stride_b + column[None, :] * logvar_stride_d
        standard, slope, logvar = errors(
            mean_BD + mean_at,
            target_ND + target_at,
            logvar_BD if ONE_VARIANCE else logvar_BD + logvar_at,
            mask,
            TARGET_SCALE,
            ONE_VARIANCE,
        )
        # What is not there has no error, and a variance of each is 1 there: it costs nothing.
        nll_RC += standard * standard if ONE_VARIANCE else standard * standard + logvar
        if grad_mean_BD is not None:
            weight = tl.where(exists, row_weight, float("nan"))
            out_at = row[:, None] * D + column[None, :]
            write_gradients(standard, slope, weight, grad_mean_BD, grad_logvar_BD, out_at, mask)
    # log 2π of each element and, if it is one for all, log σ²: once for all that are here.
    constant = LOG_2PI
    if ONE_VARIANCE:
        constant += tl.load(logvar_BD).to(tl.float32)
    constant *= tl.cast(min(first + columns_per_split, D) - first, tl.float32)
    nll = tl.where(exists, 0.5 * (tl.sum(nll_RC, axis=1) + constant), float("nan"))
    tl.store(nll_BS + row * tl.num_programs(1) + split, nll, mask=row < B)


@triton.jit
def backward_kernel(
    mean_BD,
    target_ND,
    logvar_BD,
    indices_B,
    grad_nll_B,
    grad_mean_BD,
    grad_logvar_BD,
    B,
    N,
    D,
    mean_stride_b,
    mean_stride_d,
    target_stride_b,
    target_stride_d,
    logvar_stride_b,
    logvar_stride_d,
    grad_nll_stride_b,
    TARGET_SCALE: tl.constexpr,
    ONE_VARIANCE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Writes the gradients of Σ grad_nll · nll, `[B, D]`. One tile a program."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    start = tl.program_id(1) * BLOCK_C
    column = start + tl.arange(0, BLOCK_C).to(tl.int64)
    target_row, exists = target_rows(indices_B, row, B, N)
    grad_nll = tl.load(grad_nll_B + row * grad_nll_stride_b, mask=row < B, other=0.0)
    weight = tl.where(exists, grad_nll, float("nan"))
    mask = (row < B)[:, None] & within(start, D, BLOCK_C)[None, :]
    mean_at = row[:, None] * mean_stride_b + column[None, :] * mean_stride_d
    target_at = target_row[:, None] * target_stride_b + column[None, :] * target_stride_d
    logvar_at = row[:, None] * logvar_stride_b + column[None, :] * logvar_stride_d
    standard, slope, _ = errors(
        mean_BD + mean_at,
        target_ND + target_at,
        logvar_BD if ONE_VARIANCE else logvar_BD + logvar_at,
        mask,
        TARGET_SCALE,
        ONE_VARIANCE,
    )
    out_at = row[:, None] * D + column[None, :]
    write_gradients(standard, slope, weight, grad_mean_BD, grad_logvar_BD, out_at, mask)


@triton.jit
def update_kernel(
    mean_BD,
    target_ND,
    logvar_BD,
    indices_B,
    grad_nll_B,
    grad_mean_BD,
    grad_logvar_BD,
    row_weight,
    B,
    N,
    D,
    mean_stride_b,
    mean_stride_d,
    target_stride_b,
    target_stride_d,
    logvar_stride_b,
    logvar_stride_d,
    grad_nll_stride_b,
    columns_per_split,
    TARGET_SCALE: tl.constexpr,
    ONE_VARIANCE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Writes the gradients anew in the rows whose grad_nll is not row_weight, for which the forward
    kernel wrote them. Program (i, s): rows iROWS … iROWS+ROWS−1, split s; most return at once."""
    begin = tl.program_id(0) * ROWS
    if any_is_new(grad_nll_B, grad_nll_stride_b, row_weight, begin, B, ROWS):
        first = tl.program_id(1) * columns_per_split
        for r in range(begin, min(begin + ROWS, B), BLOCK_R):
            row = r + tl.arange(0, BLOCK_R).to(tl.int64)
            target_row, exists = target_rows(indices_B, row, B, N)
            grad_nll = tl.load(grad_nll_B + row * grad_nll_stride_b, mask=row < B, other=0.0)
            changed = is_new(grad_nll, row_weight) & (row < B)
            weight = tl.where(exists, grad_nll, float("nan"))
            for start in range(first, min(first + columns_per_split, D), BLOCK_C):
                column = start + tl.arange(0, BLOCK_C).to(tl.int64)
                mask = changed[:, None] & within(start, D, BLOCK_C)[None, :]
                mean_at = row[:, None] * mean_stride_b + column[None, :] * mean_stride_d
                target_at = target_row[:, None] * target_stride_b
                target_at += column[None, :] * target_stride_d
                logvar_at = row[:, None] * logvar_stride_b + column[None, :] * logvar_stride_d
                standard, slope, _ = errors(
                    mean_BD + mean_at,
                    target_ND + target_at,
                    logvar_BD if ONE_VARIANCE else logvar_BD + logvar_at,
                    mask,
                    TARGET_SCALE,
                    ONE_VARIANCE,
                )
                out_at = row[:, None] * D + column[None, :]
                write_gradients(standard, slope, weight, grad_mean_BD, grad_logvar_BD, out_at, mask)


def forward(
    mean: Tensor,
    target: Tensor,
    logvar: Tensor,
    indices: Tensor | None = None,
    row_weight: float | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """One launch. Returns nll `[B]` float32 and, where a row_weight is given, the gradients of
    row_weight · Σ nll for `mean` and, unless it is one number, for `logvar`: contiguous."""
    mean_BD, target_ND, logvar_BD, indices = _rows(mean, target, logvar, indices)
    B, D = mean_BD.shape
    tiles = tiling(B, D)
    nll_BS = torch.empty(B, tiles.splits, dtype=torch.float32, device=mean.device)
    grads = (None, None) if row_weight is None else _gradients(mean, logvar)
    with on_device(mean):
        forward_kernel[(tiles.row_programs, tiles.splits)](
            mean_BD,
            readable(target_ND),
            logvar_BD,
            indices,
            nll_BS,
            *grads,
            row_weight,
            B,
            len(target_ND),
            D,
            *mean_BD.stride(),
            *target_ND.stride(),
            *logvar_BD.stride(),
            tiles.columns_per_split,
            **_constants(target, logvar, tiles),
        )
    return nll_BS.view(B) if tiles.splits == 1 else nll_BS.sum(1), *grads


def backward(
    mean: Tensor,
    target: Tensor,
    logvar: Tensor,
    grad_nll: Tensor,
    indices: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One launch. Returns grad_mean (like `mean`) and, unless logvar is one number, grad_logvar
    (like `logvar`): contiguous."""
    mean_BD, target_ND, logvar_BD, indices = _rows(mean, target, logvar, indices)
    B, D = mean_BD.shape
    tiles = tiling(B, D, loops=False)
    grad_mean, grad_logvar = _gradients(mean, logvar)
    with on_device(mean):
        backward_kernel[(tiles.row_programs, tiles.column_programs)](
            mean_BD,
            readable(target_ND),
            logvar_BD,
            indices,
            grad_nll,
            grad_mean,
            grad_logvar,
            B,
            len(target_ND),
            D,
            *mean_BD.stride(),
            *target_ND.stride(),
            *logvar_BD.stride(),
            grad_nll.stride(0),
            **_constants(target, logvar, tiles),
        )
    return grad_mean, grad_logvar


def update(
    grad_mean: Tensor,
    grad_logvar: Tensor | None,
    mean: Tensor,
    target: Tensor,
    logvar: Tensor,
    grad_nll: Tensor,
    row_weight: float,
    indices: Tensor | None = None,
) -> None:
    """One launch. Makes of gradients that `forward` wrote what `backward` would return."""
    mean_BD, target_ND, logvar_BD, indices = _rows(mean, target, logvar, indices)
    B, D = mean_BD.shape
    tiles = tiling(B, D)
    programs, rows_each = few_programs(tiles)
    with on_device(mean):
        update_kernel[(programs, tiles.splits)](
            mean_BD,
            readable(target_ND),
            logvar_BD,
            indices,
            grad_nll,
            grad_mean,
            grad_logvar,
            row_weight,
            B,
            len(target_ND),
            D,
            *mean_BD.stride(),
            *target_ND.stride(),
            *logvar_BD.stride(),
            grad_nll.stride(0),
            tiles.columns_per_split,
            ROWS=rows_each,
            **_constants(target, logvar, tiles),
        )


def _gradients(mean: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor | None]:
    """Memory for those that the kernels write."""
    grad_mean = torch.empty(mean.shape, dtype=mean.dtype, device=mean.device)
    if logvar.dim() == 0:
        return grad_mean, None
    return grad_mean, torch.empty(logvar.shape, dtype=logvar.dtype, device=mean.device)


def _rows(
    mean: Tensor, target: Tensor, logvar: Tensor, indices: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    target, indices = gathered(target, indices, leading=1)
    mean_BD = rows(mean)
    logvar_BD = logvar.expand(mean_BD.shape) if logvar.dim() == 0 else rows(logvar)
    return mean_BD, rows(target), logvar_BD, indices


def _constants(target: Tensor, logvar: Tensor, tiles: Tiling) -> dict[str, Any]:
    return {
        "TARGET_SCALE": 1.0 / 255.0 if target.dtype == torch.uint8 else 1.0,
        "ONE_VARIANCE": logvar.dim() == 0,
        "BLOCK_R": tiles.block_r,
        "BLOCK_C": tiles.block_c,
        **OPTIONS,
    }
