"""z = μ + σ ε and KL(N(μ, σ²) ‖ N(0, I)), written plainly; and the operator's gradients."""

import torch
from torch import Tensor

from fastvae_kernels.philox import row_normals
from fastvae_kernels.reference._common import rows, widen


def reparameterize_kl(
    mu: Tensor, logvar: Tensor, seed: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor]:
    """Kingma & Welling 2014, section 2.4 and appendix B.

    `mu`, `logvar`: `[B, …]`; `seed`, `offset`: int64, one element, on the same device.
    Returns z (shape and dtype of `mu`) and kl `[B]` in nats (float32; float64 for float64).
    """
    mu_BD, logvar_BD = rows(widen(mu)), rows(widen(logvar))
    B, D = mu_BD.shape
    epsilon_BD = row_normals(B, D, seed, offset).to(mu_BD.dtype)
    z_BD = mu_BD + torch.exp(0.5 * logvar_BD) * epsilon_BD
    kl_B = 0.5 * (mu_BD.square() + torch.exp(logvar_BD) - 1.0 - logvar_BD).sum(1)
    return z_BD.to(mu.dtype).view(mu.shape), kl_B


def reparameterize_kl_backward(
    mu: Tensor, logvar: Tensor, seed: Tensor, offset: Tensor, grad_z: Tensor, grad_kl: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of Σ grad_z·z + Σ grad_kl·kl for `mu` and `logvar`, with the same noise."""
    mu_BD, logvar_BD, grad_z_BD = rows(widen(mu)), rows(widen(logvar)), rows(widen(grad_z))
    grad_kl_B1 = grad_kl.unsqueeze(1)
    B, D = mu_BD.shape
    epsilon_BD = row_normals(B, D, seed, offset).to(mu_BD.dtype)
    from_z_BD = grad_z_BD * epsilon_BD * torch.exp(0.5 * logvar_BD)
    from_kl_BD = grad_kl_B1 * (torch.exp(logvar_BD) - 1.0)
    # What has no weight has no gradient, also where σ overflows: 0 · ∞ must not become NaN.
    grad_logvar_BD = 0.5 * (
        torch.where(grad_z_BD == 0, 0.0, from_z_BD) + torch.where(grad_kl_B1 == 0, 0.0, from_kl_BD)
    )
    grad_mu_BD = grad_z_BD + grad_kl_B1 * mu_BD
    return grad_mu_BD.to(mu.dtype).view(mu.shape), grad_logvar_BD.to(logvar.dtype).view(mu.shape)
