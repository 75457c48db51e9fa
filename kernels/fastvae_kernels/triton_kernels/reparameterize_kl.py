"""Reparameterisation and KL divergence, forward and backward, in one pass each.

Shape suffixes: S samples, B batch, D columns (everything but the batch), P parts of a row that
programs of their own sum, R × C one tile.

The number of samples is an ordinary argument, so that a new one compiles nothing (nor does a
multiple of 16, which Triton would tell apart); Triton makes a constant of every 1, and the loop
over one sample is no loop. HAS_PRIOR is a constant: without a prior nothing of it is read, and its
pointers are any.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae_kernels.triton_kernels.device_math import (
    exp,
    row_normals,
    standardized,
    twice_gaussian_kl,
)
from fastvae_kernels.triton_kernels.device_memory import within
from fastvae_kernels.triton_kernels.launch import OPTIONS, on_device, rows, tiling


@triton.jit(do_not_specialize_on_alignment=["num_samples"])
def forward_kernel(
    mu_BD,
    logvar_BD,
    prior_mu_BD,
    prior_logvar_BD,
    seed_ptr,
    offset_ptr,
    z_SBD,
    kl_BP,
    num_samples,
    B,
    D,
    mu_stride_b,
    mu_stride_d,
    logvar_stride_b,
    logvar_stride_d,
    prior_mu_stride_b,
    prior_mu_stride_d,
    prior_logvar_stride_b,
    prior_logvar_stride_d,
    columns_per_split,
    HAS_PRIOR: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Reads mu, logvar and the prior's `[B, D]` (any strides) once; writes z `[S, B, D]` and kl
    `[B, P]`.

    `seed_ptr`, `offset_ptr`: int64 scalars. Program (i, p): rows iR … iR+R−1, part p.
    """
    seed = tl.load(seed_ptr).to(tl.uint64)
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    position = tl.load(offset_ptr) + row
    split = tl.program_id(1)
    first = split * columns_per_split
    kl_RC = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(first, min(first + columns_per_split, D), BLOCK_C):
        column = start + tl.arange(0, BLOCK_C).to(tl.int64)
        mask = (row < B)[:, None] & within(start, D, BLOCK_C)[None, :]
        mu_at = row[:, None] * mu_stride_b + column[None, :] * mu_stride_d
        logvar_at = row[:, None] * logvar_stride_b + column[None, :] * logvar_stride_d
        mu = tl.load(mu_BD + mu_at, mask=mask, other=0.0).to(tl.float32)
        logvar = tl.load(logvar_BD + logvar_at, mask=mask, other=0.0).to(tl.float32)
        sigma = exp(0.5 * logvar)
        if HAS_PRIOR:
            at = row[:, None] * prior_mu_stride_b + column[None, :] * prior_mu_stride_d
            prior_mu = tl.load(prior_mu_BD + at, mask=mask, other=0.0).to(tl.float32)
            at = row[:, None] * prior_logvar_stride_b + column[None, :] * prior_logvar_stride_d
            prior_logvar = tl.load(prior_logvar_BD + at, mask=mask, other=0.0).to(tl.float32)
            standard, _ = standardized(mu - prior_mu, prior_logvar)
            delta = logvar - prior_logvar
            kl_RC += twice_gaussian_kl(standard, exp(0.5 * delta), delta)
        else:
            kl_RC += twice_gaussian_kl(mu, sigma, logvar)

        z_at = row[:, None] * D + column[None, :]
        TOGETHER: tl.constexpr = 128 // z_SBD.dtype.element_ty.primitive_bitwidth
        for s in range(num_samples):
            epsilon = row_normals(seed, position, s, start, D, BLOCK_R, BLOCK_C, TOGETHER)
            z = mu + sigma * epsilon
            s_at = tl.cast(s, tl.int64) * B * D + z_at
            tl.store(z_SBD + s_at, z.to(z_SBD.dtype.element_ty), mask=mask)
    kl = 0.5 * tl.sum(kl_RC, axis=1)
    tl.store(kl_BP + row * tl.num_programs(1) + split, kl, mask=row < B)


@triton.jit(do_not_specialize_on_alignment=["num_samples"])
def backward_kernel(
    mu_BD,
    logvar_BD,
    prior_mu_BD,
    prior_logvar_BD,
    seed_ptr,
    offset_ptr,
    grad_z_SBD,
    grad_kl_B,
    grad_mu_BD,
    grad_logvar_BD,
    grad_prior_mu_BD,
    grad_prior_logvar_BD,
    num_samples,
    B,
    D,
    mu_stride_b,
    mu_stride_d,
    logvar_stride_b,
    logvar_stride_d,
    prior_mu_stride_b,
    prior_mu_stride_d,
    prior_logvar_stride_b,
    prior_logvar_stride_d,
    grad_z_stride_s,
    grad_z_stride_b,
    grad_z_stride_d,
    grad_kl_stride_b,
    grad_stride_b,
    HAS_PRIOR: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Reads mu, logvar and the prior's `[B, D]`, grad_z `[S, B, D]` and grad_kl `[B]` once; the
    noise is drawn again.

    With e = (μ − μₚ)/σₚ and r = σ²/σₚ² (μₚ = 0 and σₚ = 1 without a prior) writes, all `[B, D]`,
    grad_mu = Σ grad_z + grad_kl·e/σₚ, grad_logvar = ½ [Σ grad_z·ε·σ + grad_kl·(r − 1)],
    grad_prior_mu = −grad_kl·e/σₚ, grad_prior_logvar = −½ grad_kl·(r − 1 + e²).
    The rows of the first two lie `grad_stride_b` apart. Program (i, j): one tile.
    """
    seed = tl.load(seed_ptr).to(tl.uint64)
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    position = tl.load(offset_ptr) + row
    start = tl.program_id(1) * BLOCK_C
    column = start + tl.arange(0, BLOCK_C).to(tl.int64)
    mask = (row < B)[:, None] & within(start, D, BLOCK_C)[None, :]
    mu_at = row[:, None] * mu_stride_b + column[None, :] * mu_stride_d
    logvar_at = row[:, None] * logvar_stride_b + column[None, :] * logvar_stride_d
    grad_z_at = row[:, None] * grad_z_stride_b + column[None, :] * grad_z_stride_d
    mu = tl.load(mu_BD + mu_at, mask=mask, other=0.0).to(tl.float32)
    logvar = tl.load(logvar_BD + logvar_at, mask=mask, other=0.0).to(tl.float32)
    grad_kl = tl.load(grad_kl_B + row * grad_kl_stride_b, mask=row < B, other=0.0)[:, None]

    sigma = exp(0.5 * logvar)
    # What has no weight has no gradient, also where σ overflows: 0 · ∞ must not become NaN.
    if HAS_PRIOR:
        at = row[:, None] * prior_mu_stride_b + column[None, :] * prior_mu_stride_d
        prior_mu = tl.load(prior_mu_BD + at, mask=mask, other=0.0).to(tl.float32)
        at = row[:, None] * prior_logvar_stride_b + column[None, :] * prior_logvar_stride_d
        prior_logvar = tl.load(prior_logvar_BD + at, mask=mask, other=0.0).to(tl.float32)
        standard, inverse_sigma = standardized(mu - prior_mu, prior_logvar)
        ratio = exp(logvar - prior_logvar)
        grad_mu = tl.where(grad_kl == 0.0, 0.0, grad_kl * (standard * inverse_sigma))
        from_ratio = tl.where(grad_kl == 0.0, 0.0, grad_kl * (ratio - 1.0))
        from_square = tl.where(grad_kl == 0.0, 0.0, grad_kl * (standard * standard))
        grad_prior_mu = -grad_mu
        grad_prior_logvar = -0.5 * (from_ratio + from_square)
    else:
        grad_mu = grad_kl * mu
        from_ratio = tl.where(grad_kl == 0.0, 0.0, grad_kl * (sigma * sigma - 1.0))

    TOGETHER: tl.constexpr = 128 // grad_z_SBD.dtype.element_ty.primitive_bitwidth
    noise = tl.full([BLOCK_R, BLOCK_C], -0.0, tl.float32)  # x + −0 is x: one sample adds nothing
    for s in range(num_samples):
        s_at = tl.cast(s, tl.int64) * grad_z_stride_s + grad_z_at
        grad_z = tl.load(grad_z_SBD + s_at, mask=mask, other=0.0).to(tl.float32)
        grad_mu += grad_z
        noise += grad_z * row_normals(seed, position, s, start, D, BLOCK_R, BLOCK_C, TOGETHER)
    from_z = tl.where(noise == 0.0, 0.0, noise * sigma)
    grad_logvar = 0.5 * (from_z + from_ratio)

    out_at = row[:, None] * grad_stride_b + column[None, :]
    tl.store(grad_mu_BD + out_at, grad_mu.to(grad_mu_BD.dtype.element_ty), mask=mask)
    tl.store(grad_logvar_BD + out_at, grad_logvar.to(grad_logvar_BD.dtype.element_ty), mask=mask)
    if HAS_PRIOR:
        out_at = row[:, None] * D + column[None, :]
        grad_prior_mu = grad_prior_mu.to(grad_prior_mu_BD.dtype.element_ty)
        tl.store(grad_prior_mu_BD + out_at, grad_prior_mu, mask=mask)
        grad_prior_logvar = grad_prior_logvar.to(grad_prior_logvar_BD.dtype.element_ty)
        tl.store(grad_prior_logvar_BD + out_at, grad_prior_logvar, mask=mask)


def forward(
    mu: Tensor,
    logvar: Tensor,
    seed: Tensor,
    offset: Tensor,
    num_samples: int | None = None,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One launch. Returns z (contiguous; like `mu`, or `[num_samples, B, …]`) and kl `[B]`
    float32."""
    mu_BD, logvar_BD = rows(mu), rows(logvar)
    prior_mu_BD, prior_logvar_BD, has_prior = _prior_rows(mu_BD, prior_mu, prior_logvar)
    B, D = mu_BD.shape
    tiles = tiling(B, D)
    samples = () if num_samples is None else (num_samples,)
    z = torch.empty((*samples, *mu.shape), dtype=mu.dtype, device=mu.device)
    kl_BP = torch.empty(B, tiles.splits, dtype=torch.float32, device=mu.device)
    with on_device(mu):
        forward_kernel[(tiles.row_programs, tiles.splits)](
            mu_BD,
            logvar_BD,
            prior_mu_BD,
            prior_logvar_BD,
            seed,
            offset,
            z,
            kl_BP,
            num_samples or 1,
            B,
            D,
            *mu_BD.stride(),
            *logvar_BD.stride(),
            *prior_mu_BD.stride(),
            *prior_logvar_BD.stride(),
            tiles.columns_per_split,
            HAS_PRIOR=has_prior,
            BLOCK_R=tiles.block_r,
            BLOCK_C=tiles.block_c,
            **OPTIONS,
        )
    # A row shared by several programs is summed in a fixed order, not by atomics.
    return z, kl_BP.view(B) if tiles.splits == 1 else kl_BP.sum(1)


def backward(
    mu: Tensor,
    logvar: Tensor,
    seed: Tensor,
    offset: Tensor,
    grad_z: Tensor,
    grad_kl: Tensor,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """One launch. Returns grad_mu, grad_logvar and, where there is a prior, grad_prior_mu and
    grad_prior_logvar: each like its input, and contiguous. `grad_z` is like z.

    The first two are written to `out` if that is given: like `mu`, contiguous but for the stride
    of the batch, which they share.
    """
    mu_BD, logvar_BD = rows(mu), rows(logvar)
    prior_mu_BD, prior_logvar_BD, has_prior = _prior_rows(mu_BD, prior_mu, prior_logvar)
    grad_z_SBD = rows(grad_z if grad_z.dim() > mu.dim() else grad_z.unsqueeze(0), leading=2)
    B, D = mu_BD.shape
    S = grad_z_SBD.shape[0]
    tiles = tiling(B, D, loops=False)
    inputs: tuple[Tensor, ...] = () if out else (mu, logvar)
    if prior_mu is not None and prior_logvar is not None:
        inputs += (prior_mu, prior_logvar)
    grads: tuple[Tensor, ...] = out or ()
    grads += tuple(torch.empty(x.shape, dtype=x.dtype, device=mu.device) for x in inputs)
    with on_device(mu):
        backward_kernel[(tiles.row_programs, tiles.column_programs)](
            mu_BD,
            logvar_BD,
            prior_mu_BD,
            prior_logvar_BD,
            seed,
            offset,
            grad_z_SBD,
            grad_kl,
            *(grads if has_prior else 2 * grads),
            S,
            B,
            D,
            *mu_BD.stride(),
            *logvar_BD.stride(),
            *prior_mu_BD.stride(),
            *prior_logvar_BD.stride(),
            # One sample is read at 0, whatever its stride: nothing is compiled again for it.
            grad_z_SBD.stride(0) if S > 1 else 0,
            *grad_z_SBD.stride()[1:],
            grad_kl.stride(0),
            rows(grads[0]).stride(0),
            HAS_PRIOR=has_prior,
            BLOCK_R=tiles.block_r,
            BLOCK_C=tiles.block_c,
            **OPTIONS,
        )
    return grads


def _prior_rows(
    mu_BD: Tensor, prior_mu: Tensor | None, prior_logvar: Tensor | None
) -> tuple[Tensor, Tensor, bool]:
    """The prior's rows and True; without one `mu`'s twice, which nobody reads, and False."""
    if prior_mu is None or prior_logvar is None:
        return mu_BD, mu_BD, False
    return rows(prior_mu), rows(prior_logvar), True
