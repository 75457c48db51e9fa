"""Negative log-likelihood of a mixture of discretised logistics, forward and backward.

Shape suffixes: B batch, P parameter channels, C colour channels, N pixels, S splits of a row,
T rows of targets (a data set that indices choose from, else T = B), R × C one tile of rows and
pixels. Of M components, number m of parameter group g is channel g·M + m of P; group 0 holds the
logits, groups 1 + 2c and 2 + 2c the means and log-scales of colour c, and group
1 + 2C + c(c−1)/2 + j the coupling of colour c to an earlier colour j.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae_kernels.reference.logistic_mixture_nll import LOG_SCALE_FLOOR
from fastvae_kernels.triton_kernels.device_math import (
    add_to_log_sum,
    exp,
    logistic_bin,
    nearest_level,
    position_of_level,
    tanh,
)
from fastvae_kernels.triton_kernels.device_memory import target_rows
from fastvae_kernels.triton_kernels.launch import OPTIONS, gathered, on_device, readable

FLOOR = tl.constexpr(LOG_SCALE_FLOOR)
# One program takes this many pixels, 2 a thread: each is a hundred loads and a thousand operations.
TILE = 256


@triton.jit
def forward_kernel(
    parameters_BPN,
    target_TCN,
    indices_B,
    nll_BS,
    log_sums_B2N,
    B,
    T,
    N,
    M,
    parameters_stride_b,
    parameters_stride_p,
    parameters_stride_n,
    target_stride_b,
    target_stride_c,
    target_stride_n,
    CHANNELS: tl.constexpr,
    LEVELS: tl.constexpr,
    TARGET_SCALE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Reads parameters and target (any strides) once; writes nll `[B, S]` and log_sums `[B, 2, N]`,
    log Σ exp(logit) and log Σ exp(logit) p(pixel | component), both summed online.

    The target is multiplied by TARGET_SCALE and read as the nearest level. One tile a program.
    """
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    pixel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
    mask = (row < B)[:, None] & (pixel < N)[None, :]
    target_row, exists = target_rows(indices_B, row, B, T)
    target_at = target_row[:, None] * target_stride_b + pixel[None, :] * target_stride_n
    at = row[:, None] * parameters_stride_b + pixel[None, :] * parameters_stride_n
    component = tl.cast(parameters_stride_p, tl.int64)
    group = component * M

    levels = tl.tuple([])
    for c in tl.static_range(CHANNELS):
        colour_at = target_at + tl.cast(target_stride_c, tl.int64) * c
        t = tl.load(target_TCN + colour_at, mask=mask, other=0).to(tl.float32) * TARGET_SCALE
        levels += (nearest_level(t, LEVELS),)

    # The maxima begin below every logit and above −∞, which would give NaN.
    prior_max = tl.full([BLOCK_R, BLOCK_C], -3e38, tl.float32)
    joint_max = prior_max
    prior_sum = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    joint_sum = prior_sum
    for _ in range(M):
        logit = tl.load(parameters_BPN + at, mask=mask, other=0.0).to(tl.float32)
        log_joint = logit
        factors = tl.full([BLOCK_R, BLOCK_C], 1.0, tl.float32)
        for c in tl.static_range(CHANNELS):
            mean_at = at + group * (1 + 2 * c)
            mean = tl.load(parameters_BPN + mean_at, mask=mask, other=0.0).to(tl.float32)
            log_scale = tl.load(parameters_BPN + (mean_at + group), mask=mask, other=0.0)
            for j in tl.static_range(c):
                pair_at = at + group * (1 + 2 * CHANNELS + c * (c - 1) // 2 + j)
                raw = tl.load(parameters_BPN + pair_at, mask=mask, other=0.0).to(tl.float32)
                coupling, _ = tanh(raw)
                mean += coupling * position_of_level(levels[j], LEVELS)
            linear, factor, _, _ = logistic_bin(
                levels[c], mean, log_scale.to(tl.float32), LEVELS, FLOOR
            )
            log_joint += linear
            factors *= factor
        log_joint += tl.log(factors)
        prior_max, prior_sum = add_to_log_sum(prior_max, prior_sum, logit)
        joint_max, joint_sum = add_to_log_sum(joint_max, joint_sum, log_joint)
        at += component

    log_prior = prior_max + tl.log(prior_sum)
    log_joint = joint_max + tl.log(joint_sum)
    nll = tl.sum(tl.where(mask, log_prior - log_joint, 0.0), axis=1)
    nll = tl.where(exists, nll, float("nan"))
    tl.store(nll_BS + row * tl.num_programs(1) + tl.program_id(1), nll, mask=row < B)
    out_at = row[:, None] * 2 * N + pixel[None, :]
    tl.store(log_sums_B2N + out_at, log_prior, mask=mask)
    tl.store(log_sums_B2N + out_at + N, log_joint, mask=mask)


@triton.jit
def backward_kernel(
    parameters_BPN,
    target_TCN,
    indices_B,
    log_sums_B2N,
    grad_nll_B,
    grad_parameters_BPN,
    B,
    T,
    N,
    M,
    parameters_stride_b,
    parameters_stride_p,
    parameters_stride_n,
    target_stride_b,
    target_stride_c,
    target_stride_n,
    grad_nll_stride_b,
    CHANNELS: tl.constexpr,
    LEVELS: tl.constexpr,
    TARGET_SCALE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Reads what the forward kernel read and log_sums `[B, 2, N]`; writes grad_parameters
    `[B, P, N]`: for a logit the prior less the posterior probability of its component, for all
    else the posterior times the gradient of −log p(pixel | component). One tile a program."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    pixel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
    mask = (row < B)[:, None] & (pixel < N)[None, :]
    target_row, exists = target_rows(indices_B, row, B, T)
    target_at = target_row[:, None] * target_stride_b + pixel[None, :] * target_stride_n
    at = row[:, None] * parameters_stride_b + pixel[None, :] * parameters_stride_n
    component = tl.cast(parameters_stride_p, tl.int64)
    group = component * M

    levels = tl.tuple([])
    for c in tl.static_range(CHANNELS):
        colour_at = target_at + tl.cast(target_stride_c, tl.int64) * c
        t = tl.load(target_TCN + colour_at, mask=mask, other=0).to(tl.float32) * TARGET_SCALE
        levels += (nearest_level(t, LEVELS),)
    sums_at = row[:, None] * 2 * N + pixel[None, :]
    log_prior_sum = tl.load(log_sums_B2N + sums_at, mask=mask, other=0.0)
    log_joint_sum = tl.load(log_sums_B2N + sums_at + N, mask=mask, other=0.0)
    grad_nll = tl.load(grad_nll_B + row * grad_nll_stride_b, mask=row < B, other=0.0)
    grad_nll = tl.where(exists, grad_nll, float("nan"))[:, None]

    out_group = tl.cast(N, tl.int64) * M
    GROUPS: tl.constexpr = 1 + 2 * CHANNELS + CHANNELS * (CHANNELS - 1) // 2
    out_at = row[:, None] * (out_group * GROUPS) + pixel[None, :]
    out_type = grad_parameters_BPN.dtype.element_ty
    for _ in range(M):
        logit = tl.load(parameters_BPN + at, mask=mask, other=0.0).to(tl.float32)
        log_joint = logit
        factors = tl.full([BLOCK_R, BLOCK_C], 1.0, tl.float32)
        grads = tl.tuple([])
        slopes = tl.tuple([])
        for c in tl.static_range(CHANNELS):
            mean_at = at + group * (1 + 2 * c)
            mean = tl.load(parameters_BPN + mean_at, mask=mask, other=0.0).to(tl.float32)
            log_scale = tl.load(parameters_BPN + (mean_at + group), mask=mask, other=0.0)
            for j in tl.static_range(c):
                pair_at = at + group * (1 + 2 * CHANNELS + c * (c - 1) // 2 + j)
                raw = tl.load(parameters_BPN + pair_at, mask=mask, other=0.0).to(tl.float32)
                coupling, slope = tanh(raw)
                mean += coupling * position_of_level(levels[j], LEVELS)
                slopes += (slope,)
            linear, factor, grad_mean, grad_log_scale = logistic_bin(
                levels[c], mean, log_scale.to(tl.float32), LEVELS, FLOOR
            )
            log_joint += linear
            factors *= factor
            grads += (grad_mean, grad_log_scale)
        log_joint += tl.log(factors)
        prior = grad_nll * exp(logit - log_prior_sum)
        posterior = grad_nll * exp(log_joint - log_joint_sum)

        grad_p = grad_parameters_BPN + out_at
        tl.store(grad_p, (prior - posterior).to(out_type), mask=mask)
        for c in tl.static_range(CHANNELS):
            grad_mean = -posterior * grads[2 * c]
            grad_log_scale = -posterior * grads[2 * c + 1]
            grad_p += out_group
            tl.store(grad_p, grad_mean.to(out_type), mask=mask)
            grad_p += out_group
            tl.store(grad_p, grad_log_scale.to(out_type), mask=mask)
        for c in tl.static_range(CHANNELS):
            for j in tl.static_range(c):
                x = position_of_level(levels[j], LEVELS)
                grad_raw = -posterior * grads[2 * c] * x * slopes[c * (c - 1) // 2 + j]
                grad_p += out_group
                tl.store(grad_p, grad_raw.to(out_type), mask=mask)
        at += component
        out_at += N


def forward(
    parameters: Tensor,
    target: Tensor,
    mixtures: int,
    levels: int,
    indices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One launch. Returns nll `[B]` and log_sums `[B, 2, N]`, float32."""
    target, indices = gathered(target, indices, leading=2)
    parameters_BPN, target_TCN = parameters.flatten(2), target.flatten(2)
    B, _, N = parameters_BPN.shape
    block_r, block_c = tile(B, N)
    splits = triton.cdiv(N, block_c)
    nll_BS = torch.empty(B, splits, dtype=torch.float32, device=parameters.device)
    log_sums_B2N = torch.empty(B, 2, N, dtype=torch.float32, device=parameters.device)
    with on_device(parameters):
        forward_kernel[(triton.cdiv(B, block_r), splits)](
            parameters_BPN,
            readable(target_TCN),
            indices,
            nll_BS,
            log_sums_B2N,
            B,
            len(target_TCN),
            N,
            mixtures,
            *parameters_BPN.stride(),
            *target_TCN.stride(),
            CHANNELS=target.shape[1],
            LEVELS=levels,
            TARGET_SCALE=levels - 1.0 if target.is_floating_point() else 1.0,
            BLOCK_R=block_r,
            BLOCK_C=block_c,
            **OPTIONS,
        )
    return nll_BS.view(B) if splits == 1 else nll_BS.sum(1), log_sums_B2N


def backward(
    parameters: Tensor,
    target: Tensor,
    log_sums: Tensor,
    grad_nll: Tensor,
    mixtures: int,
    levels: int,
    indices: Tensor | None = None,
) -> Tensor:
    """One launch. Returns grad_parameters, contiguous, like `parameters`."""
    target, indices = gathered(target, indices, leading=2)
    parameters_BPN, target_TCN = parameters.flatten(2), target.flatten(2)
    B, _, N = parameters_BPN.shape
    block_r, block_c = tile(B, N)
    grad_parameters = torch.empty(
        parameters.shape, dtype=parameters.dtype, device=parameters.device
    )
    with on_device(parameters):
        backward_kernel[(triton.cdiv(B, block_r), triton.cdiv(N, block_c))](
            parameters_BPN,
            readable(target_TCN),
            indices,
            log_sums.contiguous(),
            grad_nll,
            grad_parameters,
            B,
            len(target_TCN),
            N,
            mixtures,
            *parameters_BPN.stride(),
            *target_TCN.stride(),
            grad_nll.stride(0),
            CHANNELS=target.shape[1],
            LEVELS=levels,
            TARGET_SCALE=levels - 1.0 if target.is_floating_point() else 1.0,
            BLOCK_R=block_r,
            BLOCK_C=block_c,
            **OPTIONS,
        )
    return grad_parameters


def tile(batch: int, pixels: int) -> tuple[int, int]:
    """BLOCK_R and BLOCK_C: a part of one image, or several small images whole."""
    block_c = min(TILE, triton.next_power_of_2(pixels))
    return min(TILE // block_c, triton.next_power_of_2(batch)), block_c
