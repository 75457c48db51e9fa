"""q(z | x): how the encoder's output becomes a distribution over latents."""

from typing import NamedTuple, Protocol

from fastvae_kernels import Impl
from torch import Tensor, nn

from fastvae.parts.priors import Prior
from fastvae.parts.spec import part


class LatentGaussian(NamedTuple):
    """A diagonal Gaussian over latents: `mu`, `logvar` (log σ²), each `[B, latent_dim]`."""

    mu: Tensor
    logvar: Tensor

    @property
    def std(self) -> Tensor:
        """σ, `[B, latent_dim]`."""
        return (0.5 * self.logvar).exp()


class Posterior(Protocol):
    """What a posterior answers."""

    statistics_per_latent: int
    """How many numbers the encoder gives for each latent."""

    def distribution(self, statistics: Tensor) -> LatentGaussian:
        """q(z | x) from the encoder's output `[B, statistics_per_latent · latent_dim]`."""

    def sample_kl(
        self,
        statistics: Tensor,
        prior: Prior,
        seed: int | Tensor,
        offset: int | Tensor,
        impl: Impl,
    ) -> tuple[Tensor, Tensor]:
        """Draw z `[B, latent_dim]` and measure KL(q ‖ p) `[B]` in nats."""


@part("posterior", "diagonal-gaussian")
class DiagonalGaussian(nn.Module):
    """N(mu, exp(logvar)): the first half of the statistics is mu, the second logvar."""

    statistics_per_latent = 2

    def __init__(self) -> None:
        super().__init__()

    def distribution(self, statistics: Tensor) -> LatentGaussian:
        """Two views of the statistics; nothing is copied."""
        mu, logvar = statistics.chunk(2, dim=1)
        return LatentGaussian(mu, logvar)

    def sample_kl(
        self,
        statistics: Tensor,
        prior: Prior,
        seed: int | Tensor,
        offset: int | Tensor,
        impl: Impl,
    ) -> tuple[Tensor, Tensor]:
        """z ~ q(z | x) and KL(q ‖ p), in one launch where the prior allows."""
        mu, logvar = self.distribution(statistics)
        return prior.reparameterize_kl(mu, logvar, seed, offset, impl)
