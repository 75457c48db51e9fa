"""Counter-based random numbers in plain PyTorch: the noise is a function of where it is used.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") turns a 128-bit
counter and a 64-bit key into four 32-bit integers. Here the key is the seed, and the counter is
the place: row r (a global sample position) and columns 4q … 4q+3 of a tensor with D columns take
the four outputs of the call number `r * ceil(D / 4) + q`, which is counter words 0 and 1. Word 2 is
the number of the sample, 0 where a row is drawn once. A row therefore meets the same noise on every
device, in every process, in whatever batch it comes, and however many samples are drawn of it.

Integers are held in int64 and every product fits in 63 bits, so eager PyTorch, Inductor and the
Triton kernels agree on them bit for bit.

The code here is the definition. Eager PyTorch on a CPU would make a hundred passes, and Inductor
one slow one; there C code (cpu/philox.c) draws the same bits, if it can be built.
"""

import ctypes
import functools
import logging
import math

import torch
from torch import Tensor

from fastvae_kernels.cpu import noise

_log = logging.getLogger(__name__)

_MASK = 0xFFFFFFFF
# The multipliers less 2^32: x * (M - 2^32) fits in an int64 for every 32-bit x.
_MULTIPLIER_0 = 0xD2511F53 - 2**32
_MULTIPLIER_1 = 0xCD9E8D57 - 2**32
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85

# −2 log(1 + f) = −2f + f²·(polynomial in f) on [−½, 0], by the smallest largest error: 6e-8 of it.
LOG = (
    0.9999889339542509,
    -0.6673407538735351,
    0.48604524617449674,
    -0.5381794749464244,
    -0.4091462804950039,
    -2.531022811192533,
    -3.4207415560421777,
    -2.9005491030225063,
)
# −2 log 2, for an exponent that stands in its place among the bits of a float32.
LOG_SCALE = -2.0 * math.log(2.0) * 2.0**-23
# sin t = t + t³·(polynomial in t²) and cos t = 1 + t²·(polynomial in t²) on [0, π/4], below the
# rounding of float32: by the smallest largest error, and Taylor's.
SIN = (-0.1666665494370104, 0.008332178146135858, -0.0001951729898102546)
COS = (-1 / 2, 1 / 24, -1 / 720, 1 / 40320)


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 on int64 tensors that hold 32-bit values (broadcast against each other).

    Returns four int64 tensors with values in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product_0 = c0 * _MULTIPLIER_0
        product_1 = c2 * _MULTIPLIER_1
        # floor(x·M / 2^32) = floor(x·(M − 2^32) / 2^32) + x; the low words are equal.
        high_0 = (product_0 >> 32) + c0
        high_1 = (product_1 >> 32) + c2
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, product_1 & _MASK, high_0 ^ c3 ^ k1, product_0 & _MASK
        k0 = (k0 + _WEYL_0) & _MASK
        k1 = (k1 + _WEYL_1) & _MASK
    return c0, c1, c2, c3


def row_bits(
    rows: int, columns: int, seed: Tensor, offset: Tensor, samples: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four outputs for each group of four columns: int64 `[rows, ceil(columns / 4)]` each.

    `seed` and `offset` (the global position of the first row) are int64 tensors of one element;
    the result lies on `offset`'s device. With `samples` it is `[samples, rows, ceil(columns / 4)]`,
    sample 0 being what is drawn without.
    """
    device = offset.device
    groups = (columns + 3) // 4
    row_R1 = (offset.reshape(()) + torch.arange(rows, device=device)).unsqueeze(1)
    call_RG = row_R1 * groups + torch.arange(groups, device=device)
    zero_RG = torch.zeros_like(call_RG)
    sample = zero_RG
    if samples is not None:
        sample = torch.arange(samples, device=device).view(samples, 1, 1)
    seed = seed.reshape(())
    return philox4x32(
        (call_RG & _MASK, (call_RG >> 32) & _MASK, sample, zero_RG),
        (seed & _MASK, (seed >> 32) & _MASK),
    )


def _interleave(parts: tuple[Tensor, ...], columns: int) -> Tensor:
    """`[…, groups]` × 4 → `[…, columns]`, part j in columns 4q + j."""
    return torch.stack(parts, dim=-1).flatten(-2)[..., :columns]


def row_uniforms(rows: int, columns: int, seed: Tensor, offset: Tensor) -> Tensor:
    """Uniform on [0, 1), never 1: float32 `[rows, columns]`, multiples of 2^-24."""
    if noise.is_direct(seed, offset) and (c := _c_code()):
        return noise.row_uniforms(c, rows, columns, seed, offset)
    if _is_traced_for_c(offset):
        return torch.ops.fastvae.uniform.default(rows, columns, seed, offset)
    return _uniforms(rows, columns, seed, offset)


def row_normals(
    rows: int, columns: int, seed: Tensor, offset: Tensor, samples: int | None = None
) -> Tensor:
    """Standard normal, magnitudes up to 6.8: float32 `[rows, columns]`, or with `samples`
    `[samples, rows, columns]`."""
    if noise.is_direct(seed, offset) and (c := _c_code()):
        return noise.row_normals(c, rows, columns, seed, offset, samples)
    if _is_traced_for_c(offset):
        return torch.ops.fastvae.normal.default(rows, columns, seed, offset, samples)
    return _normals(rows, columns, seed, offset, samples)


def _is_traced_for_c(offset: Tensor) -> bool:
    """Whether a compiler should call the operator of ops.py, which C code carries out on a CPU: it
    draws several times as fast as what Inductor makes of 64-bit integers, and three hundred
    operations fewer are to be compiled. An exported program needs nothing of this package."""
    return _is_compiled() and offset.device.type == "cpu" and not noise.WAS_SWITCHED_OFF


def _is_compiled() -> bool:
    """Whether this is traced to be compiled here, not to be exported."""
    # The flag, since in PyTorch 2.11 is_exporting() is True wherever Dynamo traces.
    return torch.compiler.is_compiling() and not torch.compiler._is_exporting_flag


@functools.cache
def _c_code() -> ctypes.CDLL | None:
    """The library that draws, if it was built and gives the bits of the code below."""
    c = noise.library()
    if c is None:
        return None
    # More calls than one block, a row's last call cut short, and a carry into counter word 1.
    seed, offset = (torch.tensor(value, device="cpu") for value in (-(2**40) - 3, 2**31 - 20))
    if torch.equal(
        noise.row_uniforms(c, 37, 7, seed, offset), _uniforms(37, 7, seed, offset)
    ) and torch.equal(
        noise.row_normals(c, 37, 7, seed, offset, 2), _normals(37, 7, seed, offset, 2)
    ):
        return c
    _log.debug("PyTorch draws the noise on the CPU, not C: the compiled code gives other numbers")
    return None


def _uniforms(rows: int, columns: int, seed: Tensor, offset: Tensor) -> Tensor:
    parts = tuple((bits >> 8).float() * 2.0**-24 for bits in row_bits(rows, columns, seed, offset))
    return _interleave(parts, columns)


def _normals(rows: int, columns: int, seed: Tensor, offset: Tensor, samples: int | None) -> Tensor:
    a, b, c, d = row_bits(rows, columns, seed, offset, samples)
    return _interleave((*_box_muller(a, b), *_box_muller(c, d)), columns)


def minus_two_log(u: Tensor) -> Tensor:
    """−2 log u for a float32 u in [2^-33, 1], within 1.3e-7 of its size, which is as near as that
    of a library's logarithm.

    u is 2^e·(1 + f) with f in (−½, 0], so that both logarithms have one sign and nothing cancels.
    No library is called, so that all devices agree; and it needs to know nothing of denormal
    numbers, infinity or NaN.
    """
    bits = u.view(torch.int32)
    exponent = (bits - 0x3F000001) & -0x800000
    f = (bits - exponent).view(torch.float32) - 1.0
    p = LOG[4] + f * (LOG[5] + f * (LOG[6] + f * LOG[7]))
    p = LOG[0] + f * (LOG[1] + f * (LOG[2] + f * (LOG[3] + f * p)))
    return (exponent.float() * LOG_SCALE + f * -2.0) + (f * f) * p


def _root(x: Tensor) -> Tensor:
    """The nearest float32 to √x. Compilers take the processor's own root, which gives it; eager
    PyTorch on a CPU may call a library's, which errs by a unit in the last place."""
    return torch.sqrt(x) if _is_compiled() else torch.sqrt(x.double()).float()


def _box_muller(radius_bits: Tensor, angle_bits: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent normals from two 32-bit integers.

    The top three bits of the angle choose the octant (two signs and a swap), the rest the angle
    inside it, where a short polynomial is exact to float32 rounding. No library's sine or
    logarithm is called, so all devices agree.
    """
    u = radius_bits.float() * 2.0**-32 + 2.0**-33
    radius = _root(minus_two_log(u))
    t = (angle_bits & 0x1FFFFFFF).float() * (math.pi / 4 * 2.0**-29)
    s = t * t
    sin = t + t * s * (SIN[0] + s * (SIN[1] + s * SIN[2]))
    cos = 1.0 + s * (COS[0] + s * (COS[1] + s * (COS[2] + s * COS[3])))
    swap = (angle_bits & 0x20000000) != 0
    x = radius * torch.where(swap, sin, cos)
    y = radius * torch.where(swap, cos, sin)
    x = torch.where((angle_bits & 0x40000000) != 0, -x, x)
    y = torch.where((angle_bits & 0x80000000) != 0, -y, y)
    return x, y
