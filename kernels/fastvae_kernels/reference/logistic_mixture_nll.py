"""Mixtures of discretised logistics, written plainly: −log p(x), its gradient, mean and samples.

Salimans et al. 2017, PixelCNN++ (arXiv:1701.05517), sections 2.1 and 2.2.

Shape suffixes: B batch, G parameter groups, M mixture components, C colour channels, N pixels.
Group 0 holds the logits, groups 1 + 2c and 2 + 2c the means and log-scales of channel c, and the
last C(C−1)/2 the couplings of channel pairs. Levels 0 … L−1 lie at −1 … 1, 2h = 2/(L−1) apart.
"""

import math

import torch
from torch import Tensor

from fastvae_kernels.reference._common import chosen, widen

# As in the authors' code: two of 256 levels lie 8.6 of the smallest scale apart.
LOG_SCALE_FLOOR = -7.0
# Where the bins of the first and the last level end, in scales: finite, so that 0 times it is 0.
FAR = 1e30
# sinh(y)/y = 1 + y²/3! + y⁴/5! + …, below the rounding of float64 for y ≤ ½.
_SINHC = tuple(1.0 / math.factorial(2 * k + 1) for k in range(7))


def logistic_mixture_nll(
    parameters: Tensor,
    target: Tensor,
    mixtures: int,
    levels: int,
    indices: Tensor | None = None,
) -> Tensor:
    """−Σ log Σ_m π_m p_m(pixel): `[B]` in nats.

    `parameters`: `[B, G·M, H, W]` floating; `target`: `[B, C, H, W]`, uint8 or bool (levels) or
    floating in [0, 1] (read as the nearest level); with `indices` `[B]` a data set `[T, C, H, W]`,
    of which row b meets number indices[b].
    """
    target = chosen(target, indices)
    log_prior_BN, log_joint_BN = _log_sums(parameters, target, mixtures, levels)
    return (log_prior_BN - log_joint_BN).sum(1)


def logistic_mixture_log_sums(
    parameters: Tensor,
    target: Tensor,
    mixtures: int,
    levels: int,
    indices: Tensor | None = None,
) -> Tensor:
    """`[B, 2, N]`: log Σ_m exp(logit_m) and log Σ_m exp(logit_m) p_m(pixel)."""
    target = chosen(target, indices)
    return torch.stack(_log_sums(parameters, target, mixtures, levels), dim=1)


def logistic_mixture_nll_backward(
    parameters: Tensor,
    target: Tensor,
    log_sums: Tensor,
    grad_nll: Tensor,
    mixtures: int,
    levels: int,
    indices: Tensor | None = None,
) -> Tensor:
    """The gradient of Σ grad_nll·nll for `parameters`, given the log-sums.

    A logit's is prior − posterior probability of the component; every other is the posterior
    times the gradient of −log p_m.
    """
    p_BGMN = _groups(parameters, mixtures)
    level_BCN = _level(chosen(target, indices), levels, p_BGMN.dtype)
    logistics = _logistics(p_BGMN, level_BCN, levels)
    log_joint_BMN = p_BGMN[:, 0]
    for logistic in logistics:
        log_joint_BMN = log_joint_BMN + _log_mass(*logistic, levels)
    weight_B11 = grad_nll.view(-1, 1, 1)
    prior_BMN = weight_B11 * torch.exp(p_BGMN[:, 0] - log_sums[:, :1])
    posterior_BMN = weight_B11 * torch.exp(log_joint_BMN - log_sums[:, 1:])

    grads = [prior_BMN - posterior_BMN]
    for logistic in logistics:
        grads += [-posterior_BMN * slope_BMN for slope_BMN in _log_mass_backward(*logistic, levels)]
    C = len(logistics)
    for c in range(C):
        for j in range(c):
            slope_BMN = 1.0 - torch.tanh(p_BGMN[:, _pair(c, j, C)]).square()
            x_B1N = _position(level_BCN[:, j : j + 1], levels)
            grads.append(grads[1 + 2 * c] * x_B1N * slope_BMN)
    return torch.stack(grads, dim=1).to(parameters.dtype).view(parameters.shape)


def logistic_mixture_mean(parameters: Tensor, mixtures: int, channels: int) -> Tensor:
    """Σ_m π_m mean_m in [0, 1], `[B, C, H, W]`; a component's means are clipped channel by channel
    as its samples are."""
    p_BGMN = _groups(parameters, mixtures)
    prior_BMN = torch.softmax(p_BGMN[:, 0], dim=1)
    positions: list[Tensor] = []
    for c in range(channels):
        positions.append(_coupled(p_BGMN, positions, c, channels).clamp(-1.0, 1.0))
    x_BCN = torch.stack([(prior_BMN * x_BMN).sum(1) for x_BMN in positions], dim=1)
    mean_BCN = (0.5 * x_BCN + 0.5).clamp(0.0, 1.0)
    return mean_BCN.view(len(parameters), channels, *parameters.shape[2:])


def logistic_mixture_sample(
    parameters: Tensor, uniforms: Tensor, mixtures: int, channels: int, levels: int
) -> Tensor:
    """A level for each value, as level / (L−1): `[B, C, H, W]`, from uniforms `[B, M + C, H, W]`.

    The largest logit plus Gumbel noise chooses the component; then each channel in order is a
    logistic by its inverse CDF, cut to the level whose bin it fell into, on which the means of the
    following channels depend.
    """
    p_BGMN, u_BUN = _groups(parameters, mixtures), uniforms.flatten(2)
    gumbel_BMN = -torch.log(-torch.log(u_BUN[:, :mixtures]))
    chosen_B11N = (p_BGMN[:, 0] + gumbel_BMN).argmax(1, keepdim=True).unsqueeze(1)
    p_BG1N = p_BGMN.gather(2, chosen_B11N.expand(-1, p_BGMN.shape[1], -1, -1))
    sample: list[Tensor] = []
    positions: list[Tensor] = []
    for c in range(channels):
        u_B1N = u_BUN[:, mixtures + c].unsqueeze(1)
        # Above e^80 every sample lies at an end, and infinity times logit(½) would be NaN.
        scale_B1N = torch.exp(p_BG1N[:, 2 + 2 * c].clamp(LOG_SCALE_FLOOR, 80.0))
        mean_B1N = _coupled(p_BG1N, positions, c, channels)
        x_B1N = mean_B1N + scale_B1N * (torch.log(u_B1N) - torch.log1p(-u_B1N))
        level_B1N = _nearest((0.5 * x_B1N + 0.5) * (levels - 1), levels)
        sample.append(level_B1N / (levels - 1))
        positions.append(_position(level_B1N, levels))
    return torch.cat(sample, dim=1).view(len(parameters), channels, *parameters.shape[2:])


def _log_sums(
    parameters: Tensor, target: Tensor, mixtures: int, levels: int
) -> tuple[Tensor, Tensor]:
    p_BGMN = _groups(parameters, mixtures)
    level_BCN = _level(target, levels, p_BGMN.dtype)
    log_joint_BMN = p_BGMN[:, 0]
    for logistic in _logistics(p_BGMN, level_BCN, levels):
        log_joint_BMN = log_joint_BMN + _log_mass(*logistic, levels)
    return torch.logsumexp(p_BGMN[:, 0], dim=1), torch.logsumexp(log_joint_BMN, dim=1)


def _groups(parameters: Tensor, mixtures: int) -> Tensor:
    """`[B, G·M, H, W]` → `[B, G, M, N]`."""
    return widen(parameters).flatten(2).unflatten(1, (-1, mixtures))


def _level(target: Tensor, levels: int, dtype: torch.dtype) -> Tensor:
    """`[B, C, H, W]` → whole numbers 0 … L−1 in a floating `[B, C, N]`."""
    target_BCN = target.to(dtype).flatten(2)
    if target.is_floating_point():
        target_BCN = target_BCN * (levels - 1)
    return _nearest(target_BCN, levels)


def _nearest(level: Tensor, levels: int) -> Tensor:
    return torch.floor(level + 0.5).clamp(0, levels - 1)


def _position(level: Tensor, levels: int) -> Tensor:
    """Where a level lies in [−1, 1]."""
    return (2.0 * level - (levels - 1)) * (1.0 / (levels - 1))


def _pair(c: int, j: int, channels: int) -> int:
    """The group that couples channel c to an earlier channel j: (1,0), (2,0), (2,1), …"""
    return 1 + 2 * channels + c * (c - 1) // 2 + j


def _coupled(p_BGMN: Tensor, positions: list[Tensor], c: int, channels: int) -> Tensor:
    """The means of channel c given where the channels before it lie."""
    mean_BMN = p_BGMN[:, 1 + 2 * c]
    for j in range(c):
        mean_BMN = mean_BMN + torch.tanh(p_BGMN[:, _pair(c, j, channels)]) * positions[j]
    return mean_BMN


def _logistics(
    p_BGMN: Tensor, level_BCN: Tensor, levels: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each channel its levels `[B, 1, N]`, its means given the true values of the channels
    before it, and its log-scales, `[B, M, N]` both."""
    channels = level_BCN.shape[1]
    of_channel = [level_BCN[:, c : c + 1] for c in range(channels)]
    positions = [_position(level_B1N, levels) for level_B1N in of_channel]
    return [
        (of_channel[c], _coupled(p_BGMN, positions, c, channels), p_BGMN[:, 2 + 2 * c])
        for c in range(channels)
    ]


def _floored(log_scale: Tensor) -> Tensor:
    """With a gradient at the floor itself, which `clamp` has in some releases only; a NaN stays."""
    return torch.where(log_scale < LOG_SCALE_FLOOR, LOG_SCALE_FLOOR, log_scale)


def _bin(
    level: Tensor, mean: Tensor, inverse_scale: Tensor, levels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(upper end − mean)/s, (lower end − mean)/s, and whether the bin is one of the open ones.

    2·level ± … is a whole number, so the upper end of a bin is exactly the lower end of the next.
    """
    first, last = level <= 0, level >= levels - 1
    half_bin = 1.0 / (levels - 1)
    upper = ((2.0 * level + (2 - levels)) * half_bin - mean) * inverse_scale
    lower = ((2.0 * level - levels) * half_bin - mean) * inverse_scale
    return torch.where(last, FAR, upper), torch.where(first, -FAR, lower), first | last


def _log_mass(level: Tensor, mean: Tensor, log_scale: Tensor, levels: int) -> Tensor:
    """log[σ(a) − σ(b)] = −softplus(−a) − softplus(b) + log(1 − exp(b − a)), for the bin (b, a).

    The last term depends on the scale alone and is 0 for an open bin. Every softplus is its linear
    part and a factor, and the factors share one logarithm.
    """
    log_scale = _floored(log_scale)
    inverse_scale = torch.exp(-log_scale)
    a, b, is_open = _bin(level, mean, inverse_scale, levels)
    half_bin = 1.0 / (levels - 1)
    y = half_bin * inverse_scale
    is_narrow = y <= 0.5
    decay = torch.exp(-y)
    # 1 − exp(−2y) of a bin that is narrow for the scale is 2y exp(−y) sinh(y)/y, and y's own
    # scale is kept apart as a logarithm: it may be smaller than any float.
    inside = torch.where(is_narrow, 2.0 * half_bin * decay * _sinhc(y), 1.0 - decay * decay)
    inside = torch.where(is_open, 1.0, inside)
    outside = (1.0 + torch.exp(-a.abs())) * (1.0 + torch.exp(-b.abs()))
    # (|a| − a)/2 is max(−a, 0), with the derivative −½ that softplus(−a) needs at 0.
    linear = 0.5 * ((a.abs() - a) + (b.abs() + b))
    log_inverse_scale = torch.where(is_narrow & ~is_open, -log_scale, 0.0)
    return torch.log(inside / outside) + log_inverse_scale - linear


def _log_mass_backward(
    level: Tensor, mean: Tensor, log_scale: Tensor, levels: int
) -> tuple[Tensor, Tensor]:
    """The derivatives of `_log_mass` for mean and log-scale."""
    is_free = log_scale >= LOG_SCALE_FLOOR
    inverse_scale = torch.exp(-_floored(log_scale))
    a, b, is_open = _bin(level, mean, inverse_scale, levels)
    y = inverse_scale * (1.0 / (levels - 1))
    decay = torch.exp(-y)
    # 2y / (exp(2y) − 1)
    narrowing = torch.where(
        y <= 0.5, decay / _sinhc(y), 2.0 * y * decay * decay / (1.0 - decay * decay)
    )
    above, below = torch.sigmoid(-a), torch.sigmoid(b)
    grad_mean = (below - above) * inverse_scale
    grad_log_scale = b * below - a * above - torch.where(is_open, 0.0, narrowing)
    return grad_mean, torch.where(is_free, grad_log_scale, 0.0)


def _sinhc(y: Tensor) -> Tensor:
    """sinh(y)/y for y ≤ ½; finite beyond."""
    s = y * y
    result = torch.full_like(s, _SINHC[-1])
    for coefficient in reversed(_SINHC[:-1]):
        result = result * s + coefficient
    return result
