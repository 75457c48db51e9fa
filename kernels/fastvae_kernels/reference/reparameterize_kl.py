"""z = μ + σ ε and KL(N(μ, σ²) ‖ N(0, I)), written plainly."""

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
    epsilon_BD = row_normals(*mu_BD.shape, seed, offset).to(mu_BD.dtype)
    z_BD = mu_BD + torch.exp(0.5 * logvar_BD) * epsilon_BD
    kl_B = 0.5 * (mu_BD.square() + torch.exp(logvar_BD) - 1.0 - logvar_BD).sum(1)
    return z_BD.to(mu.dtype).view(mu.shape), kl_B
