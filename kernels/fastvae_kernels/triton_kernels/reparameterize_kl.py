"""Reparameterisation and KL divergence, forward and backward, in one pass each.

Shape suffixes: B batch, D columns (everything but the batch), S splits of a row, R × C one tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae_kernels.triton_kernels.device_math import gaussian_kl, row_normals
from fastvae_kernels.triton_kernels.launch import OPTIONS, on_device, rows, tiling


@triton.jit
def forward_kernel(
    mu_BD,
    logvar_BD,
    seed_ptr,
    offset_ptr,
    z_BD,
    kl_BS,
    B,
    D,
    mu_stride_b,
    mu_stride_d,
    logvar_stride_b,
    logvar_stride_d,
    columns_per_split,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Reads mu and logvar `[B, D]` (any strides) once; writes z `[B, D]` and kl `[B, S]`.

    `seed_ptr`, `offset_ptr`: int64 scalars. Program (i, s): rows iR … iR+R−1, split s.
    """
    seed = tl.load(seed_ptr).to(tl.uint64)
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    position = tl.load(offset_ptr) + row
    split = tl.program_id(1)
    first = split * columns_per_split
    kl = tl.zeros([BLOCK_R], tl.float32)
    for start in range(first, min(first + columns_per_split, D), BLOCK_C):
        column = start + tl.arange(0, BLOCK_C).to(tl.int64)
        mask = (row < B)[:, None] & (column < D)[None, :]
        mu_at = row[:, None] * mu_stride_b + column[None, :] * mu_stride_d
        logvar_at = row[:, None] * logvar_stride_b + column[None, :] * logvar_stride_d
        mu = tl.load(mu_BD + mu_at, mask=mask, other=0.0).to(tl.float32)
        logvar = tl.load(logvar_BD + logvar_at, mask=mask, other=0.0).to(tl.float32)

        epsilon = row_normals(seed, position, start, D, BLOCK_R, BLOCK_C)
        z = mu + tl.exp(0.5 * logvar) * epsilon
        kl += tl.sum(gaussian_kl(mu, logvar), axis=1)

        z_at = row[:, None] * D + column[None, :]
        tl.store(z_BD + z_at, z.to(z_BD.dtype.element_ty), mask=mask)
    tl.store(kl_BS + row * tl.num_programs(1) + split, kl, mask=row < B)


@triton.jit
def backward_kernel(
    mu_BD,
    logvar_BD,
    seed_ptr,
    offset_ptr,
    grad_z_BD,
    grad_kl_B,
    grad_mu_BD,
    grad_logvar_BD,
    B,
    D,
    mu_stride_b,
    mu_stride_d,
    logvar_stride_b,
    logvar_stride_d,
    grad_z_stride_b,
    grad_z_stride_d,
    grad_kl_stride_b,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Reads mu, logvar, grad_z `[B, D]` and grad_kl `[B]` once; the noise is drawn again.

    Writes grad_mu = grad_z + grad_kl·μ and
    grad_logvar = ½ [grad_z·ε·σ + grad_kl·(σ² − 1)], both `[B, D]`. Program (i, j): one tile.
    """
    seed = tl.load(seed_ptr).to(tl.uint64)
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    position = tl.load(offset_ptr) + row
    start = tl.program_id(1) * BLOCK_C
    column = start + tl.arange(0, BLOCK_C).to(tl.int64)
    mask = (row < B)[:, None] & (column < D)[None, :]
    mu_at = row[:, None] * mu_stride_b + column[None, :] * mu_stride_d
    logvar_at = row[:, None] * logvar_stride_b + column[None, :] * logvar_stride_d
    grad_z_at = row[:, None] * grad_z_stride_b + column[None, :] * grad_z_stride_d
    mu = tl.load(mu_BD + mu_at, mask=mask, other=0.0).to(tl.float32)
    logvar = tl.load(logvar_BD + logvar_at, mask=mask, other=0.0).to(tl.float32)
    grad_z = tl.load(grad_z_BD + grad_z_at, mask=mask, other=0.0).to(tl.float32)
    grad_kl = tl.load(grad_kl_B + row * grad_kl_stride_b, mask=row < B, other=0.0)[:, None]

    epsilon = row_normals(seed, position, start, D, BLOCK_R, BLOCK_C)
    grad_mu = grad_z + grad_kl * mu
    # What has no weight has no gradient, also where σ overflows: 0 · ∞ must not become NaN.
    from_z = tl.where(grad_z == 0.0, 0.0, grad_z * epsilon * tl.exp(0.5 * logvar))
    from_kl = tl.where(grad_kl == 0.0, 0.0, grad_kl * (tl.exp(logvar) - 1.0))
    grad_logvar = 0.5 * (from_z + from_kl)

    out_at = row[:, None] * D + column[None, :]
    tl.store(grad_mu_BD + out_at, grad_mu.to(grad_mu_BD.dtype.element_ty), mask=mask)
    tl.store(grad_logvar_BD + out_at, grad_logvar.to(grad_logvar_BD.dtype.element_ty), mask=mask)


def forward(mu: Tensor, logvar: Tensor, seed: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """One launch. Returns z (contiguous, like `mu`) and kl `[B]` float32."""
    mu_BD, logvar_BD = rows(mu), rows(logvar)
    B, D = mu_BD.shape
    tiles = tiling(B, D)
    z = torch.empty(mu.shape, dtype=mu.dtype, device=mu.device)
    kl_BS = torch.empty(B, tiles.splits, dtype=torch.float32, device=mu.device)
    with on_device(mu):
        forward_kernel[(tiles.row_programs, tiles.splits)](
            mu_BD,
            logvar_BD,
            seed,
            offset,
            z,
            kl_BS,
            B,
            D,
            *mu_BD.stride(),
            *logvar_BD.stride(),
            tiles.columns_per_split,
            BLOCK_R=tiles.block_r,
            BLOCK_C=tiles.block_c,
            **OPTIONS,
        )
    # A row shared by several programs is summed in a fixed order, not by atomics.
    return z, kl_BS.view(B) if tiles.splits == 1 else kl_BS.sum(1)


def backward(
    mu: Tensor, logvar: Tensor, seed: Tensor, offset: Tensor, grad_z: Tensor, grad_kl: Tensor
) -> tuple[Tensor, Tensor]:
    """One launch. Returns grad_mu and grad_logvar, contiguous, like `mu` and `logvar`."""
    mu_BD, logvar_BD, grad_z_BD = rows(mu), rows(logvar), rows(grad_z)
    B, D = mu_BD.shape
    tiles = tiling(B, D)
    grad_mu = torch.empty(mu.shape, dtype=mu.dtype, device=mu.device)
    grad_logvar = torch.empty(logvar.shape, dtype=logvar.dtype, device=mu.device)
    with on_device(mu):
        backward_kernel[(tiles.row_programs, tiles.column_programs)](
            mu_BD,
            logvar_BD,
            seed,
            offset,
            grad_z_BD,
            grad_kl,
            grad_mu,
            grad_logvar,
            B,
            D,
            *mu_BD.stride(),
            *logvar_BD.stride(),
            *grad_z_BD.stride(),
            grad_kl.stride(0),
            BLOCK_R=tiles.block_r,
            BLOCK_C=tiles.block_c,
            **OPTIONS,
        )
    return grad_mu, grad_logvar
