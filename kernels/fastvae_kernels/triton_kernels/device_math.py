"""Device math: functions of values, no pointers.

Shape suffixes: R rows of a tile, C columns, G = C / 4 groups of four columns.
"""

import os

import torch
import triton
import triton.language as tl

from fastvae_kernels.philox import COS, LOG, LOG_SCALE, SIN

# NVIDIA's own instructions, which flush denormal numbers to 0 and so need no scaling around them.
# Triton's interpreter and other GPUs take Triton's functions.
PTX = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1" and torch.version.hip is None)

_LOG, _SIN, _COS = (tl.constexpr(values) for values in (LOG, SIN, COS))
_LOG_SCALE = tl.constexpr(LOG_SCALE)


@triton.jit
def exp(x):
    """e^x, within 2^-22 and the rounding of x · log2 e; 0 below x = −87.4 and e^NaN = NaN."""
    return exp2(x * 1.4426950408889634)


@triton.jit
def exp2(x):
    """2^x, within 2^-22; 0 below 2^-126."""
    if PTX:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def reciprocal(x):
    """1 / x, within 1 ulp; 0 where it would be less than 2^-126."""
    if PTX:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def with_sign(x, bits):
    """x, or −x where the highest bit is set."""
    flipped = x.to(tl.uint32, bitcast=True) ^ (bits & 0x80000000)
    return flipped.to(tl.float32, bitcast=True)


@triton.jit
def philox4x32(seed, c0, c1, c2, c3):
    """Philox4x32-10, as `fastvae_kernels.philox` has it: four uint32 from the counter's four and a
    seed (uint64). A product of 32 by 32 bits is one instruction, which gives both halves."""
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        product_0 = c0.to(tl.uint64) * 0xD2511F53
        product_1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product_1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = product_1.to(tl.uint32)
        c2 = (product_0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = product_0.to(tl.uint32)
        k0 = (k0.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def minus_two_log(u):
    """−2 log u for u in [2^-33, 1], as `fastvae_kernels.philox.minus_two_log`, step by step."""
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F000001) & -0x800000
    f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    p = _LOG[4] + f * (_LOG[5] + f * (_LOG[6] + f * _LOG[7]))
    p = _LOG[0] + f * (_LOG[1] + f * (_LOG[2] + f * (_LOG[3] + f * p)))
    return (exponent.to(tl.float32) * _LOG_SCALE + f * -2.0) + (f * f) * p


@triton.jit
def box_muller(radius_bits, angle_bits):
    """Two normals from two uint32, as `fastvae_kernels.philox._box_muller` does, step by step."""
    u = radius_bits.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    radius = tl.sqrt(minus_two_log(u))
    t = (angle_bits & 0x1FFFFFFF).to(tl.float32) * 1.4629180792671596e-09
    s = t * t
    sin = t + t * s * (_SIN[0] + s * (_SIN[1] + s * _SIN[2]))
    cos = 1.0 + s * (_COS[0] + s * (_COS[1] + s * (_COS[2] + s * _COS[3])))
    swap = (angle_bits & 0x20000000) != 0
    x = with_sign(radius * tl.where(swap, sin, cos), angle_bits << 1)
    y = with_sign(radius * tl.where(swap, cos, sin), angle_bits)
    return x, y


@triton.jit
def row_normals(
    seed,
    position_R,
    sample,
    first_column,
    D,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TOGETHER: tl.constexpr = 4,
):
    """Standard normals of rows `position_R` (int64), BLOCK_C columns from `first_column` on, for
    one sample (0, 1, …).

    `first_column` and BLOCK_C are multiples of four. A thread draws TOGETHER neighbouring columns,
    4 or 8: as many as it reads of what the numbers are used with at once, or they would have to
    pass through shared memory. Returns float32 `[BLOCK_R, BLOCK_C]`.
    """
    # join stacks on a new last axis: [R, G, 2, 2] → columns 4g, 4g+1, 4g+2, 4g+3.
    if TOGETHER == 8 and BLOCK_C >= 8:
        left = first_column // 4 + 2 * tl.arange(0, BLOCK_C // 8)
        a0, a1, a2, a3 = group_normals(seed, position_R, sample, left, D)
        b0, b1, b2, b3 = group_normals(seed, position_R, sample, left + 1, D)
        n0, n1, n2, n3 = tl.join(a0, b0), tl.join(a1, b1), tl.join(a2, b2), tl.join(a3, b3)
    else:
        group = first_column // 4 + tl.arange(0, BLOCK_C // 4)
        n0, n1, n2, n3 = group_normals(seed, position_R, sample, group, D)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (BLOCK_R, BLOCK_C))


@triton.jit
def group_normals(seed, position_R, sample, group_G, D):
    """The normals of groups of four columns: four times float32 `[R, G]`."""
    call_RG = position_R[:, None] * tl.cdiv(D, 4) + group_G[None, :]
    low_RG = call_RG.to(tl.uint32)
    high_RG = (call_RG >> 32).to(tl.uint32)
    zero_RG = low_RG * 0
    a, b, c, d = philox4x32(seed, low_RG, high_RG, zero_RG + sample, zero_RG)
    n0, n1 = box_muller(a, b)
    n2, n3 = box_muller(c, d)
    return n0, n1, n2, n3


@triton.jit
def twice_gaussian_kl(mu, sigma, logvar):
    """2 KL(N(mu, σ²) ‖ N(0, 1)) of each element, in nats; 0 where mu and log σ² are 0.

    From another Gaussian: that of (μ − μₚ)/σₚ, σ/σₚ and log σ²/σₚ²."""
    return mu * mu + (sigma * sigma - 1.0) - logvar


@triton.jit
def log1p_of_fraction(e):
    """log(1 + e) for e in [0, 1], as e − e²·(a polynomial of degree 7).

    With all rounding within 1.1e-7 of the truth and within 1.5e-7 of its size, where the logarithm
    of a rounded 1 + e loses a small e altogether; and in a third of the instructions of Triton's
    logarithm, which expects any float.
    """
    p = 0.030065800376568825 + e * -0.005364826348972505
    p = 0.13753803452594424 + e * (-0.07920454871374781 + e * p)
    p = 0.24857163798230172 + e * (-0.1915365545898617 + e * p)
    p = 0.49999647964136784 + e * (-0.33321322633796885 + e * p)
    return e - (e * e) * p


@triton.jit
def softplus_and_sigmoid(x):
    """log(1 + exp(x)) and its derivative, without overflow."""
    e = exp(-tl.abs(x))
    softplus = tl.maximum(x, 0.0) + log1p_of_fraction(e)
    sigmoid = tl.where(x >= 0, 1.0, e) * reciprocal(1.0 + e)
    return softplus, sigmoid


@triton.jit
def standardized(error, logvar):
    """error / σ and 1 / σ. Divided before it is squared, since 1/σ² overflows long before; and
    where there is no error, σ = 1 does as well as a σ whose inverse overflows."""
    inverse_sigma = exp(-0.5 * tl.where(error == 0.0, 0.0, logvar))
    return error * inverse_sigma, inverse_sigma


@triton.jit
def standardized_by(error, inverse_sigma):
    """error / σ and error / σ² from one 1 / σ for all; none where there is no error, whatever σ."""
    standard = tl.where(error == 0.0, 0.0, error * inverse_sigma)
    return standard, tl.where(error == 0.0, 0.0, standard * inverse_sigma)


@triton.jit
def tanh(x):
    """tanh and its derivative, without overflow."""
    e = exp(-2.0 * tl.abs(x))
    inverse = reciprocal(1.0 + e)
    magnitude = (1.0 - e) * inverse
    return tl.where(x < 0, -magnitude, magnitude), 4.0 * e * inverse * inverse


@triton.jit
def add_to_log_sum(maximum, total, x):
    """log Σ exp, online: the sum so far is total · exp(maximum); x joins it."""
    e = exp(-tl.abs(x - maximum))
    is_larger = x > maximum
    total = tl.where(is_larger, total * e + 1.0, total + e)
    return tl.where(is_larger, x, maximum), total


@triton.jit
def nearest_level(x, LEVELS: tl.constexpr):
    """The whole number nearest to x among 0 … LEVELS−1. A NaN stays one."""
    level = tl.floor(x + 0.5)
    level = tl.where(level < 0, 0.0, level)
    return tl.where(level > LEVELS - 1, LEVELS - 1.0, level)


@triton.jit
def position_of_level(level, LEVELS: tl.constexpr):
    """Levels 0 … LEVELS−1 lie at equal distances from −1 to 1."""
    return (2.0 * level - (LEVELS - 1.0)) * (1.0 / (LEVELS - 1.0))


@triton.jit
def logistic_bin(level, mean, log_scale, LEVELS: tl.constexpr, LOG_SCALE_FLOOR: tl.constexpr):
    """The log-probability of a level's bin under a logistic, as `reference.logistic_mixture_nll`
    has it. Returns `linear` and `factor`, whose linear + log(factor) it is, so that several bins
    can share one logarithm, and its derivatives for mean and log_scale.

    log[σ(a) − σ(b)] = −softplus(−a) − softplus(b) + log(1 − exp(b − a)) for the bin (b, a); the
    first and the last bin are open, which a finite distance far beyond all scales stands for.
    """
    HALF_BIN: tl.constexpr = 1.0 / (LEVELS - 1.0)
    is_free = log_scale >= LOG_SCALE_FLOOR
    log_scale = tl.where(log_scale < LOG_SCALE_FLOOR, LOG_SCALE_FLOOR, log_scale)
    inverse_scale = exp(-log_scale)
    is_first, is_last = level <= 0.0, level >= LEVELS - 1.0
    # 2·level ± … is a whole number: the upper end of a bin is exactly the lower end of the next.
    a = ((2.0 * level + (2.0 - LEVELS)) * HALF_BIN - mean) * inverse_scale
    b = ((2.0 * level - LEVELS) * HALF_BIN - mean) * inverse_scale
    a = tl.where(is_last, 1e30, a)
    b = tl.where(is_first, -1e30, b)

    # 1 − exp(−2y) is 2y exp(−y) sinh(y)/y for a bin that is narrow for the scale, and y's scale is
    # kept apart as a logarithm, since it may be smaller than any float.
    y = HALF_BIN * inverse_scale
    s = y * y
    sinhc = 1.0 + s * (1.0 / 6 + s * (1.0 / 120 + s * (1.0 / 5040)))
    decay = exp(-y)
    is_open = is_first | is_last
    is_narrow = y <= 0.5
    complement = tl.where(is_narrow, 1.0, 1.0 - decay * decay)
    inside = tl.where(is_narrow, 2.0 * HALF_BIN * decay * sinhc, complement)
    inside = tl.where(is_open, 1.0, inside)

    e_a, e_b = exp(-tl.abs(a)), exp(-tl.abs(b))
    inverse = reciprocal((1.0 + e_a) * (1.0 + e_b))
    linear = -tl.maximum(-a, 0.0) - tl.maximum(b, 0.0)
    linear += tl.where(is_narrow & (is_open == 0), -log_scale, 0.0)

    above = tl.where(a >= 0, e_a, 1.0) * (1.0 + e_b) * inverse  # σ(−a)
    below = tl.where(b >= 0, 1.0, e_b) * (1.0 + e_a) * inverse  # σ(b)
    # 2y / (exp(2y) − 1)
    narrowing = tl.where(is_narrow, decay, 2.0 * y * decay * decay)
    narrowing *= reciprocal(tl.where(is_narrow, sinhc, complement))
    grad_log_scale = b * below - a * above - tl.where(is_open, 0.0, narrowing)
    grad_log_scale = tl.where(is_free, grad_log_scale, 0.0)
    return linear, inside * inverse, (below - above) * inverse_scale, grad_log_scale


@triton.jit
def is_new(grad_nll_R, row_weight):
    """Whether the gradient that meets a row differs in any bit from the one it was promised."""
    promised = tl.cast(row_weight, tl.float32).to(tl.int32, bitcast=True)
    return grad_nll_R.to(tl.int32, bitcast=True) != promised
