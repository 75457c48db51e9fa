"""z = μ + σ ε and KL(N(μ, σ²) ‖ prior), written plainly; and the operator's gradients.

Shape suffixes: S samples, B batch, D columns (everything but the batch).
"""

import torch
from torch import Tensor

from fastvae_kernels.philox import row_normals
from fastvae_kernels.reference._common import rows, widen


def reparameterize_kl(
    mu: Tensor,
    logvar: Tensor,
    seed: Tensor,
    offset: Tensor,
    num_samples: int | None = None,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Kingma & Welling 2014, section 2.4 and appendix B.

    `mu`, `logvar`: `[B, …]`; `seed`, `offset`: int64, one element, on the same device;
    `prior_mu`, `prior_logvar`: like `mu`, or neither for N(0, I).
    Returns z (shape and dtype of `mu`; `[S, B, …]` for S = `num_samples`) and kl `[B]` in nats
    (float32; float64 for float64).
    """
    mu_BD, logvar_BD = rows(widen(mu)), rows(widen(logvar))
    B, D = mu_BD.shape
    epsilon = row_normals(B, D, seed, offset, num_samples).to(mu_BD.dtype)  # [B, D] or [S, B, D]
    z = mu_BD + torch.exp(0.5 * logvar_BD) * epsilon
    standard_BD, delta_BD, _ = _relative_to_prior(mu_BD, logvar_BD, prior_mu, prior_logvar)
    kl_B = 0.5 * (standard_BD.square() + torch.exp(delta_BD) - 1.0 - delta_BD).sum(1)
    return z.to(mu.dtype).view(*z.shape[:-2], *mu.shape), kl_B


def reparameterize_kl_backward(
    mu: Tensor,
    logvar: Tensor,
    seed: Tensor,
    offset: Tensor,
    grad_z: Tensor,
    grad_kl: Tensor,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The gradients of Σ grad_z·z + Σ grad_kl·kl, with the same noise, for `mu` and `logvar` and,
    where there is a prior, for `prior_mu` and `prior_logvar`. `grad_z` is like z."""
    mu_BD, logvar_BD = rows(widen(mu)), rows(widen(logvar))
    B, D = mu_BD.shape
    S = grad_z.shape[0] if grad_z.dim() > mu.dim() else 1
    grad_z_SBD = widen(grad_z).reshape(S, B, D)
    epsilon_SBD = row_normals(B, D, seed, offset, S).to(mu_BD.dtype)
    standard_BD, delta_BD, inverse_sigma = _relative_to_prior(
        mu_BD, logvar_BD, prior_mu, prior_logvar
    )
    # What has no weight has no gradient, also where σ overflows: 0 · ∞ must not become NaN.
    noise_BD = (grad_z_SBD * epsilon_SBD).sum(0)
    from_z_BD = torch.where(noise_BD == 0, 0.0, noise_BD * torch.exp(0.5 * logvar_BD))
    grad_kl_B1 = grad_kl.unsqueeze(1)
    idle_B1 = grad_kl_B1 == 0
    from_error_BD = torch.where(idle_B1, 0.0, grad_kl_B1 * (standard_BD * inverse_sigma))
    from_ratio_BD = torch.where(idle_B1, 0.0, grad_kl_B1 * (torch.exp(delta_BD) - 1.0))
    grads = [grad_z_SBD.sum(0) + from_error_BD, 0.5 * (from_z_BD + from_ratio_BD)]
    inputs = [mu, logvar]
    if prior_mu is not None and prior_logvar is not None:
        from_square_BD = torch.where(idle_B1, 0.0, grad_kl_B1 * standard_BD.square())
        grads += [-from_error_BD, -0.5 * (from_ratio_BD + from_square_BD)]
        inputs += [prior_mu, prior_logvar]
    return tuple(g.to(x.dtype).view(x.shape) for g, x in zip(grads, inputs, strict=True))


def _relative_to_prior(
    mu_BD: Tensor, logvar_BD: Tensor, prior_mu: Tensor | None, prior_logvar: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | float]:
    """(μ − μₚ)/σₚ and log σ²/σₚ², for which the divergence is that from N(0, I); and 1/σₚ.

    Divided before it is squared: 1/σₚ² overflows below log σₚ² = −88, 1/σₚ only below −177. Where
    there is no error σₚ = 1 does as well, and 0 · ∞ does not become NaN.
    """
    if prior_mu is None or prior_logvar is None:
        return mu_BD, logvar_BD, 1.0
    prior_logvar_BD = rows(widen(prior_logvar))
    error_BD = mu_BD - rows(widen(prior_mu))
    inverse_sigma_BD = torch.exp(-0.5 * torch.where(error_BD == 0, 0.0, prior_logvar_BD))
    return error_BD * inverse_sigma_BD, logvar_BD - prior_logvar_BD, inverse_sigma_BD
