"""The truth in float64, written from the papers and apart from the package under test.

The integers come from numpy, the trigonometry from its cosine and sine, the gradients from pencil
and paper: nothing here shares a line with the kernels or with their PyTorch references.
"""

import math

import numpy as np
import torch
from torch import Tensor

_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox4x32_10(counter, key):
    """Salmon et al. 2011, table 2: four 32-bit words from four counter and two key words."""
    c = [np.asarray(word, dtype=np.uint64) for word in counter]
    k = [np.asarray(word, dtype=np.uint64) for word in key]
    for _ in range(10):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(p1 >> _SHIFT) ^ c[1] ^ k[0], p1 & _MASK, (p0 >> _SHIFT) ^ c[3] ^ k[1], p0 & _MASK]
        k = [(k[0] + np.uint64(0x9E3779B9)) & _MASK, (k[1] + np.uint64(0xBB67AE85)) & _MASK]
    return c


def row_bits(rows: int, columns: int, seed: int, offset: int = 0, sample: int = 0) -> np.ndarray:
    """The 32-bit words behind a tensor `[rows, 4 ceil(columns / 4)]`, one for each column."""
    groups = -(-columns // 4)
    # Python's integers have no width: the counter and the key are cut to 64 bits here.
    call = np.array(
        [[((offset + r) * groups + g) % 2**64 for g in range(groups)] for r in range(rows)],
        dtype=np.uint64,
    ).reshape(rows, groups)
    zero = np.zeros_like(call)
    key = (np.uint64(seed % 2**32), np.uint64(seed % 2**64 >> 32))
    words = philox4x32_10((call & _MASK, call >> _SHIFT, zero + np.uint64(sample), zero), key)
    return np.stack(words, axis=-1).reshape(rows, 4 * groups)


def normals_from_bits(radius_bits: np.ndarray, angle_bits: np.ndarray):
    """Box & Muller 1958: two normals from two words.

    The uniform behind the radius is rounded to float32, as its definition says; all that follows
    is exact to float64. The angle is 29 bits of an eighth of a turn; of the top three bits one
    swaps cosine and sine and two give their signs.
    """
    u = np.float32(radius_bits) * np.float32(2.0**-32) + np.float32(2.0**-33)
    radius = np.sqrt(-2.0 * np.log(u.astype(np.float64)))
    bits = angle_bits.astype(np.uint64)
    theta = (bits & np.uint64(2**29 - 1)).astype(np.float64) * 2.0**-29 * (math.pi / 4)
    swap = (bits >> np.uint64(29)) & np.uint64(1) == 1
    x_sign = np.where((bits >> np.uint64(30)) & np.uint64(1) == 1, -1.0, 1.0)
    y_sign = np.where((bits >> np.uint64(31)) & np.uint64(1) == 1, -1.0, 1.0)
    cos, sin = np.cos(theta), np.sin(theta)
    x = radius * np.where(swap, sin, cos)
    y = radius * np.where(swap, cos, sin)
    return x_sign * x, y_sign * y


def normals(
    shape: tuple[int, ...], seed: int, offset: int = 0, num_samples: int | None = None
) -> Tensor:
    """float64 standard normals on the CPU: `shape` = `[B, …]`, or `[num_samples, B, …]`."""
    if num_samples is None:
        return _normals(shape, seed, offset, 0)
    return torch.stack([_normals(shape, seed, offset, s) for s in range(num_samples)])


def _normals(shape: tuple[int, ...], seed: int, offset: int, sample: int) -> Tensor:
    rows, columns = shape[0], math.prod(shape[1:])
    words = row_bits(rows, columns, seed, offset, sample).reshape(-1, 4)
    x0, y0 = normals_from_bits(words[:, 0], words[:, 1])
    x1, y1 = normals_from_bits(words[:, 2], words[:, 3])
    flat = np.stack([x0, y0, x1, y1], axis=-1).reshape(rows, -1)[:, :columns]
    return torch.from_numpy(np.ascontiguousarray(flat)).reshape(shape)


def _per_row(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], -1).sum(1) if x.numel() else x.new_zeros(x.shape[0])


def _over_rows(row: Tensor, x: Tensor) -> Tensor:
    return row.double().reshape(-1, *[1] * (x.dim() - 1))


class Truth(dict):
    """Quantities by name. `scales` holds for each the sum of the magnitudes of its terms: what a
    relative error is measured against where the terms cancel."""

    def __init__(self) -> None:
        super().__init__()
        self.scales: dict[str, Tensor] = {}

    def put(self, name: str, *terms: Tensor, sum_rows: bool = False) -> None:
        total = sum(terms)
        magnitude = sum(term.abs() for term in terms)
        self[name] = _per_row(total) if sum_rows else total
        self.scales[name] = _per_row(magnitude) if sum_rows else magnitude


def reparameterize_kl(
    mu: Tensor,
    logvar: Tensor,
    epsilon: Tensor,
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    prior: tuple[Tensor, Tensor] | None = None,
) -> Truth:
    """z, kl and the gradients of grad_z·z + grad_kl·kl (None: that output is not used), also for
    `prior` = (μₚ, log σₚ²). `epsilon` and `grad_z` are `[B, …]` or `[S, B, …]`."""
    mu, logvar = mu.double(), logvar.double()
    sigma = (0.5 * logvar).exp()
    one = torch.ones_like(mu)
    g = torch.zeros_like(epsilon) if grad_z is None else grad_z.double()
    k = torch.zeros_like(mu) if grad_kl is None else _over_rows(grad_kl, mu) * one
    prior_mu, prior_logvar = prior or (0 * one, 0 * one)
    prior_mu, prior_logvar = prior_mu.double(), prior_logvar.double()
    ratio, inverse_sigma = (logvar - prior_logvar).exp(), (-0.5 * prior_logvar).exp()
    standard = (mu - prior_mu) * inverse_sigma
    truth = Truth()
    truth.put("z", mu, sigma * epsilon)
    kl = (0.5 * standard**2, 0.5 * ratio, -0.5 * one, -0.5 * logvar, 0.5 * prior_logvar)
    truth.put("kl", *kl, sum_rows=True)
    # 0 · ∞ is 0 here: what has no weight has no gradient.
    gs = g if g.dim() > mu.dim() else g.unsqueeze(0)
    from_z = torch.where(g == 0, 0, 0.5 * g * epsilon * sigma).reshape(gs.shape)
    from_error = torch.where(k == 0, 0, k * standard * inverse_sigma)
    from_ratio = torch.where(k == 0, 0, 0.5 * k * ratio)
    from_square = torch.where(k == 0, 0, 0.5 * k * standard**2)
    truth.put("grad_mu", *gs, from_error)
    truth.put("grad_logvar", *from_z, from_ratio, -0.5 * k)
    truth.put("grad_prior_mu", -from_error)
    truth.put("grad_prior_logvar", -from_ratio, 0.5 * k, -from_square)
    return truth


def pixels(target: Tensor) -> Tensor:
    """A target as float64: bytes are 255ths."""
    return target.double() / 255 if target.dtype == torch.uint8 else target.double()


def bernoulli_nll(logits: Tensor, target: Tensor, grad_nll: Tensor) -> Truth:
    """nll = −Σ [x log p + (1 − x) log(1 − p)], p = sigmoid(logits), and its gradient."""
    x, t = logits.double(), pixels(target)
    # Both branches are computed; an overflow in the one not taken does no harm.
    log_p = torch.where(x > 0, -torch.log1p((-x).exp()), x - torch.log1p(x.exp()))
    log_not_p = torch.where(x > 0, -x - torch.log1p((-x).exp()), -torch.log1p(x.exp()))
    p = torch.where(x > 0, 1 / (1 + (-x).exp()), x.exp() / (1 + x.exp()))
    g = _over_rows(grad_nll, x)
    truth = Truth()
    truth.put("nll", -t * log_p, -(1 - t) * log_not_p, sum_rows=True)
    # softplus(l) − l·x: the sizes that float32 has to handle are |l| and log 2.
    truth.scales["nll"] = _per_row(x.abs() + math.log(2))
    truth.put("grad_logits", g * p, -g * t)
    return truth


def gaussian_nll(mean: Tensor, target: Tensor, logvar: Tensor, grad_nll: Tensor) -> Truth:
    """nll = Σ [½ (x − μ)² / σ² + ½ log 2πσ²] and its gradients; `logvar` 0-d or like `mean`."""
    mean, t = mean.double(), pixels(target)
    one = torch.ones_like(mean)
    full = logvar.double() * one
    error = t - mean
    # (x − μ)/σ first: its square overflows later than 1/σ² does.
    standard = torch.where(error == 0, 0, error * (-0.5 * full).exp())
    g = _over_rows(grad_nll, mean)
    truth = Truth()
    truth.put(
        "nll", 0.5 * standard**2, 0.5 * full, 0.5 * math.log(2 * math.pi) * one, sum_rows=True
    )
    truth.put("grad_mean", -g * standard * (-0.5 * full).exp())
    truth.put("grad_logvar", 0.5 * g * one, -0.5 * g * standard**2)
    # A difference of near numbers is as uncertain as the numbers are.
    uncertain = (t.abs() + mean.abs()) * (-0.5 * full).exp()
    truth.scales["nll"] = truth.scales["nll"] + _per_row(standard.abs() * uncertain)
    truth.scales["grad_mean"] = g.abs() * uncertain * (-0.5 * full).exp()
    truth.scales["grad_logvar"] = g.abs() * (0.5 + standard.abs() * uncertain)
    if logvar.dim() == 0:
        # The sum over rows is taken from nll, so the terms of nll are its sizes.
        truth["grad_logvar"] = truth["grad_logvar"].sum()
        truth.scales["grad_logvar"] = (grad_nll.double().abs() * truth.scales["nll"]).sum()
    return truth
