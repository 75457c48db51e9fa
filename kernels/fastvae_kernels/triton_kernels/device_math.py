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
def row_normals(
    seed, position_R, sample, first_column, D, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Standard normals of rows `position_R` (int64), BLOCK_C columns from `first_column` on, for
    one sample (0, 1, …).

    `first_column` and BLOCK_C are multiples of four. Returns float32 `[BLOCK_R, BLOCK_C]`.
    """
    groups = tl.cdiv(D, 4)
    group_G = first_column // 4 + tl.arange(0, BLOCK_C // 4)
    call_RG = position_R[:, None] * groups + group_G[None, :]
    low_RG = call_RG.to(tl.uint32)
    high_RG = (call_RG >> 32).to(tl.uint32)
    zero_RG = low_RG * 0
    a, b, c, d = tl.philox(seed, low_RG, high_RG, zero_RG + sample, zero_RG)
    n0, n1 = box_muller(a, b)
    n2, n3 = box_muller(c, d)
    # join stacks on a new last axis: [R, G, 2, 2] → columns 4g, 4g+1, 4g+2, 4g+3.
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (BLOCK_R, BLOCK_C))


@triton.jit
def gaussian_kl(mu, logvar):
    """KL(N(mu, exp(logvar)) ‖ N(0, 1)) of each element, in nats; 0 where both are 0.

    From another Gaussian: that of (μ − μₚ)/σₚ and log σ²/σₚ²."""
    return 0.5 * (mu * mu + tl.exp(logvar) - 1.0 - logvar)


@triton.jit
def log1p_of_fraction(e):
    """log(1 + e) for e in [0, 1], as e − e²·(a polynomial of degree 8 around ½).

    With all rounding within 6.6e-8 of the truth, which is as near as the logarithm of a rounded
    1 + e can come, and within 9.6e-8 of its size, where that loses a small e altogether; and in
    half the instructions of Triton's logarithm, which expects any float.
    """
    t = e - 0.5
    p = 0.010177705436944962 + t * (-0.006930693518370390 + t * 0.003318469738587737)
    p = 0.028904998674988747 + t * (-0.016656985506415367 + t * p)
    p = 0.09323185682296753 + t * (-0.05108905956149101 + t * p)
    p = 0.3781395554542542 + t * (-0.17922489345073700 + t * p)
    return e - (e * e) * p


@triton.jit
def softplus_and_sigmoid(x):
    """log(1 + exp(x)) and its derivative, without overflow."""
    e = tl.exp(-tl.abs(x))
    softplus = tl.maximum(x, 0.0) + log1p_of_fraction(e)
    sigmoid = tl.where(x >= 0, 1.0, e) / (1.0 + e)
    return softplus, sigmoid


@triton.jit
def standardized(error, logvar):
    """error / σ and 1 / σ. Divided before it is squared, since 1/σ² overflows long before; and
    where there is no error, σ = 1 does as well as a σ whose inverse overflows."""
    inverse_sigma = tl.exp(-0.5 * tl.where(error == 0.0, 0.0, logvar))
    return error * inverse_sigma, inverse_sigma


@triton.jit
def standardized_by(error, inverse_sigma):
    """error / σ and error / σ² from one 1 / σ for all; none where there is no error, whatever σ."""
    standard = tl.where(error == 0.0, 0.0, error * inverse_sigma)
    return standard, tl.where(error == 0.0, 0.0, standard * inverse_sigma)


@triton.jit
def tanh(x):
    """tanh and its derivative, without overflow."""
    e = tl.exp(-2.0 * tl.abs(x))
    inverse = 1.0 / (1.0 + e)
    magnitude = (1.0 - e) * inverse
    return tl.where(x < 0, -magnitude, magnitude), 4.0 * e * inverse * inverse


@triton.jit
def add_to_log_sum(maximum, total, x):
    """log Σ exp, online: the sum so far is total · exp(maximum); x joins it."""
    e = tl.exp(-tl.abs(x - maximum))
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
    inverse_scale = tl.exp(-log_scale)
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
    decay = tl.exp(-y)
    is_open = is_first | is_last
    is_narrow = y <= 0.5
    complement = tl.where(is_narrow, 1.0, 1.0 - decay * decay)
    inside = tl.where(is_narrow, 2.0 * HALF_BIN * decay * sinhc, complement)
    inside = tl.where(is_open, 1.0, inside)

    e_a, e_b = tl.exp(-tl.abs(a)), tl.exp(-tl.abs(b))
    inverse = 1.0 / ((1.0 + e_a) * (1.0 + e_b))
    linear = -tl.maximum(-a, 0.0) - tl.maximum(b, 0.0)
    linear += tl.where(is_narrow & (is_open == 0), -log_scale, 0.0)

    above = tl.where(a >= 0, e_a, 1.0) * (1.0 + e_b) * inverse  # σ(−a)
    below = tl.where(b >= 0, 1.0, e_b) * (1.0 + e_a) * inverse  # σ(b)
    # 2y / (exp(2y) − 1)
    narrowing = tl.where(is_narrow, decay / sinhc, 2.0 * y * decay * decay / complement)
    grad_log_scale = b * below - a * above - tl.where(is_open, 0.0, narrowing)
    grad_log_scale = tl.where(is_free, grad_log_scale, 0.0)
    return linear, inside * inverse, (below - above) * inverse_scale, grad_log_scale


@triton.jit
def is_new(grad_nll_R, row_weight):
    """Whether the gradient that meets a row differs in any bit from the one it was promised."""
    promised = tl.cast(row_weight, tl.float32).to(tl.int32, bitcast=True)
    return grad_nll_R.to(tl.int32, bitcast=True) != promised
