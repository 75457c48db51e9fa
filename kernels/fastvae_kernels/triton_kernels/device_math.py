"""Device math: functions of values, no pointers.

Shape suffixes: R rows of a tile, C columns, G = C / 4 groups of four columns.
"""

import triton
import triton.language as tl


@triton.jit
def box_muller(radius_bits, angle_bits):
    """Two normals from two uint32, as `fastvae_kernels.philox._box_muller` does, step by step."""
    u = radius_bits.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    radius = tl.sqrt(-2.0 * tl.log(u))
    t = (angle_bits & 0x1FFFFFFF).to(tl.float32) * 1.4629180792671596e-09
    s = t * t
    sin = t + t * s * (-1.0 / 6 + s * (1.0 / 120 + s * (-1.0 / 5040 + s * (1.0 / 362880))))
    cos = 1.0 + s * (-1.0 / 2 + s * (1.0 / 24 + s * (-1.0 / 720 + s * (1.0 / 40320))))
    swap = (angle_bits & 0x20000000) != 0
    x = radius * tl.where(swap, sin, cos)
    y = radius * tl.where(swap, cos, sin)
    x = tl.where((angle_bits & 0x40000000) != 0, -x, x)
    y = tl.where((angle_bits & 0x80000000) != 0, -y, y)
    return x, y


@triton.jit
def row_normals(seed, position_R, first_column, D, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Standard normals of rows `position_R` (int64) and BLOCK_C columns from `first_column` on.

    `first_column` and BLOCK_C are multiples of four. Returns float32 `[BLOCK_R, BLOCK_C]`.
    """
    groups = tl.cdiv(D, 4)
    group_G = first_column // 4 + tl.arange(0, BLOCK_C // 4)
    call_RG = position_R[:, None] * groups + group_G[None, :]
    low_RG = call_RG.to(tl.uint32)
    high_RG = (call_RG >> 32).to(tl.uint32)
    zero_RG = low_RG * 0
    a, b, c, d = tl.philox(seed, low_RG, high_RG, zero_RG, zero_RG)
    n0, n1 = box_muller(a, b)
    n2, n3 = box_muller(c, d)
    # join stacks on a new last axis: [R, G, 2, 2] → columns 4g, 4g+1, 4g+2, 4g+3.
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (BLOCK_R, BLOCK_C))


@triton.jit
def gaussian_kl(mu, logvar):
    """KL(N(mu, exp(logvar)) ‖ N(0, 1)) of each element, in nats; 0 where both are 0."""
    return 0.5 * (mu * mu + tl.exp(logvar) - 1.0 - logvar)


@triton.jit
def softplus_and_sigmoid(x):
    """log(1 + exp(x)) and its derivative, without overflow."""
    e = tl.exp(-tl.abs(x))
    softplus = tl.maximum(x, 0.0) + tl.log(1.0 + e)
    sigmoid = tl.where(x >= 0, 1.0, e) / (1.0 + e)
    return softplus, sigmoid


@triton.jit
def standardized(error, logvar):
    """error / σ and 1 / σ. Divided before it is squared, since 1/σ² overflows long before; and
    where there is no error, σ = 1 does as well as a σ whose inverse overflows."""
    inverse_sigma = tl.exp(-0.5 * tl.where(error == 0.0, 0.0, logvar))
    return error * inverse_sigma, inverse_sigma
