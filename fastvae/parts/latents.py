"""Distributions over latents, as posteriors and priors hand them on.

Shape suffixes: S samples, B rows, D latents, K components.
"""

import math
from typing import NamedTuple, Protocol

import torch
from fastvae_kernels import Impl, normal, reparameterize_kl, uniform
from torch import Tensor

from fastvae.errors import UserError

LOG_2PI = math.log(2 * math.pi)


class LatentDensity(Protocol):
    """q(z | x) of a batch: what is known of it besides its draws."""

    def log_prob(self, z_SBD: Tensor) -> Tensor:
        """log q(z | x) in nats: `[…, B, D]` → float32 `[…, B]`."""

    def detached(self) -> "LatentDensity":
        """The same density, through whose own parameters no gradient flows."""


class LatentGaussian(NamedTuple):
    """A diagonal Gaussian over latents: `mu`, `logvar` (log σ²), each `[B, latent_dim]`."""

    mu: Tensor
    logvar: Tensor

    @property
    def std(self) -> Tensor:
        """σ, `[B, latent_dim]`."""
        return (0.5 * self.logvar).exp()

    def log_prob(self, z_SBD: Tensor) -> Tensor:
        """log N(z; mu, exp(logvar)) in nats: `[…, B, D]` → float32 `[…, B]`."""
        logvar = self.logvar.float()
        standard = (z_SBD.float() - self.mu.float()) * torch.exp(-0.5 * logvar)
        return -0.5 * (standard.square() + logvar + LOG_2PI).sum(-1)

    def detached(self) -> "LatentGaussian":
        """The same Gaussian, through whose parameters no gradient flows."""
        return LatentGaussian(self.mu.detach(), self.logvar.detach())


class LatentPoint(NamedTuple):
    """All mass at one z: the encoder's answer of a plain autoencoder."""

    mu: Tensor

    def log_prob(self, z_SBD: Tensor) -> Tensor:
        """There is none. Raises UserError."""
        raise UserError(
            "a deterministic posterior has no density: objectives and estimates that weigh draws "
            "by log q(z | x) need --posterior diagonal-gaussian or inverse-autoregressive"
        )

    def detached(self) -> "LatentPoint":
        """The same point without its gradient."""
        return LatentPoint(self.mu.detach())


class LatentPrior(Protocol):
    """p(z), or p(z | y) of a batch."""

    def log_prob(self, z_SBD: Tensor) -> Tensor:
        """log p(z) in nats: `[…, B, D]` → float32 `[…, B]`."""

    def sample(
        self, count: int, seed: int | Tensor, device: torch.device, offset: int | Tensor = 0
    ) -> Tensor:
        """z `[count, D]` float32; row i depends on (seed, offset + i) alone. Where the prior
        depends on the row, `count` is the number of rows it was made for."""

    def reparameterize_kl(
        self,
        q: LatentGaussian,
        num_samples: int,
        seed: int | Tensor,
        offset: int | Tensor,
        impl: Impl,
        packed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """z ~ q `[S, B, D]` and KL(q ‖ p) `[B]` in nats: exact where there is a closed form, else
        the mean of log q − log p over the S draws, which is unbiased. `packed`: the tensor
        `[B, 2D]` whose halves are q's, where there is one."""

    def kl_of_each_latent(self, q: LatentGaussian) -> Tensor:
        """KL(q ‖ p) of each latent, `[B, D]` nats. Raises UserError where it does not factorise."""


class GaussianPrior(NamedTuple):
    """A diagonal Gaussian for each row: `mu`, `logvar` `[B, D]`."""

    mu: Tensor
    logvar: Tensor

    def log_prob(self, z_SBD: Tensor) -> Tensor:
        """log N(z; mu, exp(logvar)) in nats: `[…, B, D]` → float32 `[…, B]`."""
        return LatentGaussian(self.mu, self.logvar).log_prob(z_SBD)

    def sample(
        self, count: int, seed: int | Tensor, device: torch.device, offset: int | Tensor = 0
    ) -> Tensor:
        """One z for each row, `[B, D]`."""
        if count != len(self.mu):
            raise UserError(f"this prior was made for {len(self.mu)} rows, asked for {count}")
        noise = normal((count, self.mu.shape[1]), seed, offset=offset, device=device)
        return self.mu.float() + (0.5 * self.logvar.float()).exp() * noise

    def reparameterize_kl(
        self,
        q: LatentGaussian,
        num_samples: int,
        seed: int | Tensor,
        offset: int | Tensor,
        impl: Impl,
        packed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The fused kernel with four gradients; the KL is exact."""
        return reparameterize_kl(
            *q,
            seed,
            offset=offset,
            num_samples=num_samples,
            prior_mu=self.mu,
            prior_logvar=self.logvar,
            impl=impl,
        )

    def kl_of_each_latent(self, q: LatentGaussian) -> Tensor:
        """The closed form, `[B, D]` nats."""
        p = LatentGaussian(self.mu.float(), self.logvar.float())
        distance = (q.mu.float() - p.mu) * torch.exp(-0.5 * p.logvar)
        difference = q.logvar.float() - p.logvar
        return 0.5 * (difference.exp() + distance.square() - 1.0 - difference)


class MixturePrior(NamedTuple):
    """Σ_k π_k N(z; mu_k, exp(logvar_k)): `log_weights` `[K]`, `mu`, `logvar` `[K, D]`."""

    log_weights: Tensor
    mu: Tensor
    logvar: Tensor

    def log_prob(self, z_SBD: Tensor) -> Tensor:
        """log Σ_k π_k N(z; mu_k, exp(logvar_k)) in nats: `[…, B, D]` → float32 `[…, B]`."""
        of_each = LatentGaussian(self.mu, self.logvar).log_prob(z_SBD.unsqueeze(-2))
        return torch.logsumexp(of_each + self.log_weights.float(), dim=-1)

    def sample(
        self, count: int, seed: int | Tensor, device: torch.device, offset: int | Tensor = 0
    ) -> Tensor:
        """Choose a component by its weight, then draw from it."""
        # A stream of its own for the choice: the noise must not know of it.
        chooser = uniform((count, 1), seed ^ 0x5DEECE66D, offset=offset, device=device)
        cumulative = self.log_weights.float().exp().cumsum(0)
        chosen = torch.searchsorted(cumulative, chooser.squeeze(1) * cumulative[-1], right=True)
        chosen = chosen.clamp(max=len(cumulative) - 1)
        noise = normal((count, self.mu.shape[1]), seed, offset=offset, device=device)
        return self.mu.float()[chosen] + (0.5 * self.logvar.float()).exp()[chosen] * noise

    def reparameterize_kl(
        self,
        q: LatentGaussian,
        num_samples: int,
        seed: int | Tensor,
        offset: int | Tensor,
        impl: Impl,
        packed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """z from the fused kernel; the KL from the draws themselves."""
        z, _ = reparameterize_kl(*q, seed, offset=offset, num_samples=num_samples, impl=impl)
        return z, (q.log_prob(z) - self.log_prob(z)).mean(0)

    def kl_of_each_latent(self, q: LatentGaussian) -> Tensor:
        """Raises UserError: a mixture ties its latents together."""
        raise UserError(
            "the KL of each latent exists only under a prior that factorises: "
            "--prior standard-normal or class-normal"
        )
