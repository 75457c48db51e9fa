"""Bernoulli negative log-likelihood from logits, forward and backward, in one pass each.

Shape suffixes: B batch, D columns (everything but the batch), N rows of targets (a data set that
indices choose from, else N = B), S splits of a row, R × C one tile.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae_kernels.triton_kernels.device_math import is_new, softplus_and_sigmoid
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


@triton.jit
def forward_kernel(
    logits_BD,
    target_ND,
    indices_B,
    nll_BS,
    grad_logits_BD,
    row_weight,
    B,
    N,
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
    """Reads logits `[B, D]` and target `[N, D]` (any strides) once; writes nll `[B, S]` float32
    and, unless it is None, grad_logits = row_weight · (sigmoid(logits) − target), `[B, D]`.

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
        logits_at = row[:, None] * logits_stride_b + column[None, :] * logits_stride_d
        target_at = target_row[:, None] * target_stride_b + column[None, :] * target_stride_d
        # What is not there is a certain 0 of a target that is 0, which costs nothing.
        x = tl.load(logits_BD + logits_at, mask=mask, other=-1e4).to(tl.float32)
        t = tl.load(target_ND + target_at, mask=mask, other=0).to(tl.float32) * TARGET_SCALE

        softplus, sigmoid = softplus_and_sigmoid(x)
        nll_RC += softplus - x * t
        if grad_logits_BD is not None:
            grad_logits = tl.where(exists, row_weight, float("nan"))[:, None] * (sigmoid - t)
            out_at = row[:, None] * D + column[None, :]
            out_type = grad_logits_BD.dtype.element_ty
            tl.store(grad_logits_BD + out_at, grad_logits.to(out_type), mask=mask)
    nll = tl.where(exists, tl.sum(nll_RC, axis=1), float("nan"))
    tl.store(nll_BS + row * tl.num_programs(1) + split, nll, mask=row < B)


@triton.jit
def differentiate(logits_RC, target_RC, grad_logits_RC, grad_nll, mask, TARGET_SCALE: tl.constexpr):
    """One tile from pointers to its elements."""
    x = tl.load(logits_RC, mask=mask, other=0.0).to(tl.float32)
    t = tl.load(target_RC, mask=mask, other=0).to(tl.float32) * TARGET_SCALE
    _, sigmoid = softplus_and_sigmoid(x)
    grad_logits = grad_nll[:, None] * (sigmoid - t)
    tl.store(grad_logits_RC, grad_logits.to(grad_logits_RC.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    logits_BD,
    target_ND,
    indices_B,
    grad_nll_B,
    grad_logits_BD,
    B,
    N,
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
    start = tl.program_id(1) * BLOCK_C
    column = start + tl.arange(0, BLOCK_C).to(tl.int64)
    target_row, exists = target_rows(indices_B, row, B, N)
    grad_nll = tl.load(grad_nll_B + row * grad_nll_stride_b, mask=row < B, other=0.0)
    grad_nll = tl.where(exists, grad_nll, float("nan"))
    mask = (row < B)[:, None] & within(start, D, BLOCK_C)[None, :]
    logits_at = row[:, None] * logits_stride_b + column[None, :] * logits_stride_d
    target_at = target_row[:, None] * target_stride_b + column[None, :] * target_stride_d
    out_at = row[:, None] * D + column[None, :]
    differentiate(
        logits_BD + logits_at,
        target_ND + target_at,
        grad_logits_BD + out_at,
        grad_nll,
        mask,
        TARGET_SCALE,
    )


@triton.jit
def update_kernel(
    logits_BD,
    target_ND,
    indices_B,
    grad_nll_B,
    grad_logits_BD,
    row_weight,
    B,
    N,
    D,
    logits_stride_b,
    logits_stride_d,
    target_stride_b,
    target_stride_d,
    grad_nll_stride_b,
    columns_per_split,
    TARGET_SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Writes grad_logits anew in the rows whose grad_nll is not row_weight, for which the forward
    kernel wrote it. Program (i, s): rows iROWS … iROWS+ROWS−1, split s; most return at once."""
    begin = tl.program_id(0) * ROWS
    if any_is_new(grad_nll_B, grad_nll_stride_b, row_weight, begin, B, ROWS):
        first = tl.program_id(1) * columns_per_split
        for r in range(begin, min(begin + ROWS, B), BLOCK_R):
            row = r + tl.arange(0, BLOCK_R).to(tl.int64)
            target_row, exists = target_rows(indices_B, row, B, N)
            grad_nll = tl.load(grad_nll_B + row * grad_nll_stride_b, mask=row < B, other=0.0)
            changed = is_new(grad_nll, row_weight) & (row < B)
            grad_nll = tl.where(exists, grad_nll, float("nan"))
            for start in range(first, min(first + columns_per_split, D), BLOCK_C):
                column = start + tl.arange(0, BLOCK_C).to(tl.int64)
                mask = changed[:, None] & within(start, D, BLOCK_C)[None, :]
                logits_at = row[:, None] * logits_stride_b + column[None, :] * logits_stride_d
                target_at = target_row[:, None] * target_stride_b
                target_at += column[None, :] * target_stride_d
                out_at = row[:, None] * D + column[None, :]
                differentiate(
                    logits_BD + logits_at,
                    target_ND + target_at,
                    grad_logits_BD + out_at,
                    grad_nll,
                    mask,
                    TARGET_SCALE,
                )


def forward(
    logits: Tensor,
    target: Tensor,
    indices: Tensor | None = None,
    row_weight: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One launch. Returns nll `[B]` float32, and the gradient of row_weight · Σ nll, contiguous and
    like `logits`, where a row_weight is given."""
    logits_BD, target_ND, indices = _rows(logits, target, indices)
    B, D = logits_BD.shape
    tiles = tiling(B, D)
    nll_BS = torch.empty(B, tiles.splits, dtype=torch.float32, device=logits.device)
    grad_logits = None if row_weight is None else _like(logits)
    with on_device(logits):
        forward_kernel[(tiles.row_programs, tiles.splits)](
            logits_BD,
            readable(target_ND),
            indices,
            nll_BS,
            grad_logits,
            row_weight,
            B,
            len(target_ND),
            D,
            *logits_BD.stride(),
            *target_ND.stride(),
            tiles.columns_per_split,
            **_constants(target, tiles),
        )
    return nll_BS.view(B) if tiles.splits == 1 else nll_BS.sum(1), grad_logits


def backward(
    logits: Tensor, target: Tensor, grad_nll: Tensor, indices: Tensor | None = None
) -> Tensor:
    """One launch. Returns grad_logits, contiguous, like `logits`."""
    logits_BD, target_ND, indices = _rows(logits, target, indices)
    B, D = logits_BD.shape
    tiles = tiling(B, D, loops=False)
    grad_logits = _like(logits)
    with on_device(logits):
        backward_kernel[(tiles.row_programs, tiles.column_programs)](
            logits_BD,
            readable(target_ND),
            indices,
            grad_nll,
            grad_logits,
            B,
            len(target_ND),
            D,
            *logits_BD.stride(),
            *target_ND.stride(),
            grad_nll.stride(0),
            **_constants(target, tiles),
        )
    return grad_logits


def update(
    grad_logits: Tensor,
    logits: Tensor,
    target: Tensor,
    grad_nll: Tensor,
    row_weight: float,
    indices: Tensor | None = None,
) -> None:
    """One launch. Makes of a `grad_logits` that `forward` wrote what `backward` would return."""
    logits_BD, target_ND, indices = _rows(logits, target, indices)
    B, D = logits_BD.shape
    tiles = tiling(B, D)
    programs, rows_each = few_programs(tiles)
    with on_device(logits):
        update_kernel[(programs, tiles.splits)](
            logits_BD,
            readable(target_ND),
            indices,
            grad_nll,
            grad_logits,
            row_weight,
            B,
            len(target_ND),
            D,
            *logits_BD.stride(),
            *target_ND.stride(),
            grad_nll.stride(0),
            tiles.columns_per_split,
            ROWS=rows_each,
            **_constants(target, tiles),
        )


def _rows(
    logits: Tensor, target: Tensor, indices: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    target, indices = gathered(target, indices, leading=1)
    return rows(logits), rows(target), indices


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _constants(target: Tensor, tiles: Tiling) -> dict[str, Any]:
    return {
        "TARGET_SCALE": 1.0 / 255.0 if target.dtype == torch.uint8 else 1.0,
        "BLOCK_R": tiles.block_r,
        "BLOCK_C": tiles.block_c,
        **OPTIONS,
    }
