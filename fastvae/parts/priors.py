"""p(z): where latents come from before an image is seen."""

import math
from typing import Protocol

import torch
from fastvae_kernels import Impl, normal, reparameterize_kl
from torch import Tensor, nn

from fastvae.parts.spec import part


class Prior(Protocol):
    """What a prior answers."""

    def sample(self, count: int, seed: int | Tensor, device: torch.device) -> Tensor:
        """Draw z `[count, latent_dim]`, float32."""

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) in nats, `[B]`."""

    def reparameterize_kl(
        self, mu: Tensor, logvar: Tensor, seed: int | Tensor, offset: int | Tensor, impl: Impl
    ) -> tuple[Tensor, Tensor]:
        """Draw z ~ N(mu, exp(logvar)) and measure that Gaussian's KL divergence from p(z)."""


@part("prior", "standard-normal")
class StandardNormal(nn.Module):
    """N(0, I)."""

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim

    def sample(self, count: int, seed: int | Tensor, device: torch.device) -> Tensor:
        """Draw z `[count, latent_dim]`, float32; row i depends on (seed, i) alone."""
        return normal((count, self.latent_dim), seed, device=device)

    def log_prob(self, z: Tensor) -> Tensor:
        """log N(z; 0, I) in nats: `[B, latent_dim]` → `[B]` float32."""
        z = z.float()
        return -0.5 * (z.square() + math.log(2 * math.pi)).sum(1)

    def reparameterize_kl(
        self, mu: Tensor, logvar: Tensor, seed: int | Tensor, offset: int | Tensor, impl: Impl
    ) -> tuple[Tensor, Tensor]:
        """The fused kernel: z like `mu`, and the closed-form KL `[B]` in nats."""
        return reparameterize_kl(mu, logvar, seed, offset=offset, impl=impl)
