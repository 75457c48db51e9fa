"""What the latents carry: from the posteriors of all held-out images, mu and logvar `[N, D]`.

All sums are in float64.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from fastvae_kernels import normal
from torch import Tensor

from fastvae.errors import UserError
from fastvae.estimators.importance import chunk_size

_LOG_2PI = math.log(2 * math.pi)


class ElboSurgery(NamedTuple):
    """kl = mutual_information + marginal_kl, exactly; nats, means over images.

    Attributes:
        kl: E_i[log q(z_i | x_i) − log p(z_i)], the KL term of the ELBO from one draw per image.
        mutual_information: I_q(x; z), how much of the index of an image its latent tells.
        marginal_kl: KL(q(z) ‖ p(z)), how far the aggregate posterior is from the prior.
        ceiling: log N, which `mutual_information` cannot exceed. Where it comes near, the true
            one may be larger, and `marginal_kl` smaller.
    """

    kl: float
    mutual_information: float
    marginal_kl: float
    ceiling: float


def kl_per_latent(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(q(z_d | x) ‖ N(0, 1)) of each latent, mean over images: float64 `[D]`, nats."""
    _check(mu, logvar)
    mu, logvar = mu.double(), logvar.double()
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).mean(0)


def active_units(mu: Tensor, threshold: float = 0.01) -> Tensor:
    """Which latents move with the data: var over images of mu > threshold, bool `[D]`.

    Burda et al. 2016 (arXiv:1509.00519), section 5.2; `.sum()` is the number of active units.
    """
    _check(mu, mu)
    if len(mu) < 2:
        raise UserError("the variance over images needs at least two images, got 1")
    return mu.double().var(0) > threshold


@torch.no_grad()
def elbo_surgery(
    mu: Tensor,
    logvar: Tensor,
    log_prior: Callable[[Tensor], Tensor] | None = None,
    *,
    seed: int,
    memory_bytes: int = 2**28,
) -> ElboSurgery:
    """The KL term, split into mutual information and the KL of the aggregate posterior.

    Hoffman & Johnson 2016, "ELBO surgery", with q(z) = (1/N) Σ_j q(z | x_j) over the given images
    and z_i ~ q(z | x_i), one draw for each image. Takes N² D operations.

    Args:
        mu, logvar: `[N, D]`, the diagonal Gaussian posteriors.
        log_prior: z `[n, D]` in the dtype of `mu` → log p(z) `[n]`, nats; any prior. None is the
            standard normal.
        seed: of the draws; that of image i is a function of (seed, i).
        memory_bytes: bounds the rows of the N×N matrix held at once.

    Raises:
        UserError: for shapes that do not fit, or a bound that no row fits in.
    """
    _check(mu, logvar)
    images, latents = mu.shape
    prior = log_prior or _standard_normal
    noise = normal((images, latents), seed, device=mu.device).double()
    mean, logvar = mu.double(), logvar.double()
    z = mean + (0.5 * logvar).exp() * noise
    log_q_own = -0.5 * (noise.square() + logvar + _LOG_2PI).sum(1)
    peak = -0.5 * (logvar + _LOG_2PI).sum(1)

    # log q(z | x_j) = [z², z, 1] · [−½ / σ_j², μ_j / σ_j², c_j]: all pairs in one product. Its
    # terms cancel to a relative 1e-16 of μ² / σ², so it is centred, and never above its peak.
    centre = mean.mean(0)
    mean = mean - centre
    precision = (-logvar).exp()
    powers = torch.cat([(z - centre).square(), z - centre], 1)
    coefficients = torch.cat([-0.5 * precision, mean * precision], 1)
    constant = peak - 0.5 * (mean.square() * precision).sum(1)

    # The matrix, and the two copies that logsumexp makes of it.
    rows = chunk_size(memory_bytes, 1, 3 * images, bytes_per_number=8)
    sums = torch.zeros(2, dtype=torch.float64, device=mu.device)
    for start in range(0, images, rows):
        block = slice(start, start + rows)
        log_q = torch.addmm(constant, powers[block], coefficients.T)  # [n, N]
        torch.minimum(log_q, peak, out=log_q)
        log_q.diagonal(start).copy_(log_q_own[block])
        log_q_marginal = log_q.logsumexp(1) - math.log(images)
        log_p = prior(z[block].to(mu.dtype)).double()
        if log_p.shape != log_q_marginal.shape:
            raise UserError(
                f"log_prior of z {tuple(z[block].shape)} must be {tuple(log_q_marginal.shape)}, "
                f"got {tuple(log_p.shape)}"
            )
        sums[0] += (log_q_own[block] - log_q_marginal).sum()
        sums[1] += (log_q_marginal - log_p).sum()
    information, marginal = (sums / images).tolist()
    return ElboSurgery(information + marginal, information, marginal, math.log(images))


def _standard_normal(z: Tensor) -> Tensor:
    return -0.5 * (z.square() + _LOG_2PI).sum(1)


def _check(mu: Tensor, logvar: Tensor) -> None:
    if mu.dim() != 2 or mu.shape != logvar.shape or len(mu) == 0:
        raise UserError(
            f"mu and logvar must both be [N, D] with N ≥ 1, "
            f"got {tuple(mu.shape)} and {tuple(logvar.shape)}"
        )
