"""q(z | x): how the encoder's output becomes a distribution over latents."""

import math
from typing import Literal, NamedTuple, Protocol

import torch
from fastvae_kernels import Impl
from torch import Tensor, nn
from torch.nn.functional import softplus

from fastvae.errors import UserError
from fastvae.parts.latents import LatentDensity, LatentGaussian, LatentPoint, LatentPrior
from fastvae.parts.spec import part


class Draw(NamedTuple):
    """What is drawn for a batch: z `[S, B, D]`, KL(q ‖ p) `[B]` nats, and q(z | x) itself."""

    z: Tensor
    kl: Tensor
    q: LatentDensity


class Posterior(Protocol):
    """What a posterior answers. `statistics` is the encoder's output for a batch."""

    statistics_per_latent: int
    """How many numbers the encoder gives for each latent."""
    is_distribution: bool
    """False where q(z | x) is a point and has no density."""
    is_gaussian: bool
    """Whether q(z | x) is the diagonal Gaussian of its moments."""

    def draw(
        self,
        statistics: Tensor,
        p: LatentPrior,
        num_samples: int,
        seed: int | Tensor,
        offset: int | Tensor,
        impl: Impl,
    ) -> Draw:
        """Draw z and measure KL(q ‖ p)."""

    def moments(self, statistics: Tensor) -> LatentGaussian:
        """The mean and log-variance of each latent, `[B, D]` each."""


@part("posterior", "diagonal-gaussian")
class DiagonalGaussian(nn.Module):
    """N(mu, σ²): the first half of the statistics is mu; the second is log σ², or σ before its
    softplus (`scale="softplus"`), which grows linearly where exp would explode."""

    statistics_per_latent = 2
    is_distribution = True
    is_gaussian = True

    def __init__(self, scale: Literal["logvar", "softplus"] = "logvar") -> None:
        super().__init__()
        if scale not in ("logvar", "softplus"):
            raise UserError(f"scale is logvar or softplus, got {scale!r}")
        self.scale = scale

    def moments(self, statistics: Tensor) -> LatentGaussian:
        """q(z | x) itself; with logvar, two views of the statistics."""
        mu, second = statistics.chunk(2, dim=1)
        if self.scale == "logvar":
            return LatentGaussian(mu, second)
        # log σ² = 2 log softplus(s). Far below 0, softplus(s) = exp(s) underflows; log of it is s.
        second, is_far = second.float(), second < -15.0
        near = torch.where(is_far, 0.0, second)
        logvar = 2.0 * torch.where(is_far, second, softplus(near).log())
        return LatentGaussian(mu, logvar.to(mu.dtype))

    def draw(
        self,
        statistics: Tensor,
        p: LatentPrior,
        num_samples: int,
        seed: int | Tensor,
        offset: int | Tensor,
        impl: Impl,
    ) -> Draw:
        """z ~ q(z | x) and KL(q ‖ p), in one launch where the prior is Gaussian."""
        q = self.moments(statistics)
        packed = statistics if self.scale == "logvar" else None
        return Draw(*p.reparameterize_kl(q, num_samples, seed, offset, impl, packed), q)


@part("posterior", "deterministic")
class Deterministic(nn.Module):
    """z = the encoder's answer, without noise and without KL: a plain autoencoder.

    Nothing bounds log p(x) then, and no ELBO is reported.
    """

    statistics_per_latent = 1
    is_distribution = False
    is_gaussian = False

    def __init__(self) -> None:
        super().__init__()

    def moments(self, statistics: Tensor) -> LatentGaussian:
        """The point itself, with variance 0 (log-variance −∞)."""
        return LatentGaussian(statistics, torch.full_like(statistics, -math.inf))

    def draw(
        self,
        statistics: Tensor,
        p: LatentPrior,
        num_samples: int,
        seed: int | Tensor,
        offset: int | Tensor,
        impl: Impl,
    ) -> Draw:
        """The point, `[1, B, D]`, and a KL of 0."""
        if num_samples != 1:
            raise UserError(
                f"a deterministic posterior has one z for each image, asked for {num_samples}: "
                "use --num-samples 1 or --posterior diagonal-gaussian"
            )
        kl = torch.zeros(len(statistics), dtype=torch.float32, device=statistics.device)
        return Draw(statistics.unsqueeze(0), kl, LatentPoint(statistics))
