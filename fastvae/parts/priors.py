"""p(z): where latents come from before an image is seen."""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from fastvae_kernels import Impl, normal, reparameterize_kl, reparameterize_kl_packed
from torch import Tensor, nn

from fastvae.errors import UserError
from fastvae.parts.latents import (
    LOG_2PI,
    GaussianPrior,
    LatentGaussian,
    LatentPrior,
    MixturePrior,
)
from fastvae.parts.networks import ImageShape, pixels
from fastvae.parts.spec import part

Encode = Callable[[Tensor], LatentGaussian]
"""Images `[B, C, H, W]` float32 → q(z | x)."""


class Prior(Protocol):
    """What a prior answers."""

    is_distribution: bool
    """Whether z can be drawn from it."""
    factorises: bool
    """Whether its latents are independent, so that each has a KL of its own."""

    def distribution(self, condition: Tensor | None, encode: Encode) -> LatentPrior:
        """p(z), or p(z | y) for the rows of `condition` (`[B, classes]`, each row sums to 1)."""


@part("prior", "standard-normal")
class StandardNormal(nn.Module):
    """N(0, I), whatever the label."""

    is_distribution = True
    factorises = True

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim

    def distribution(self, condition: Tensor | None, encode: Encode) -> LatentPrior:
        """It is its own distribution."""
        return self

    def sample(
        self, count: int, seed: int | Tensor, device: torch.device, offset: int | Tensor = 0
    ) -> Tensor:
        """z `[count, latent_dim]` float32; row i depends on (seed, offset + i) alone."""
        return normal((count, self.latent_dim), seed, offset=offset, device=device)

    def log_prob(self, z_SBD: Tensor) -> Tensor:
        """log N(z; 0, I) in nats: `[…, B, D]` → float32 `[…, B]`."""
        return -0.5 * (z_SBD.float().square() + LOG_2PI).sum(-1)

    def reparameterize_kl(
        self,
        q: LatentGaussian,
        num_samples: int,
        seed: int | Tensor,
        offset: int | Tensor,
        impl: Impl,
        packed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The fused kernel; the KL is exact."""
        if packed is None:
            return reparameterize_kl(*q, seed, offset=offset, num_samples=num_samples, impl=impl)
        return reparameterize_kl_packed(
            packed, seed, offset=offset, num_samples=num_samples, impl=impl
        )

    def kl_of_each_latent(self, q: LatentGaussian) -> Tensor:
        """The closed form, `[B, D]` nats."""
        mu, logvar = q.mu.float(), q.logvar.float()
        return 0.5 * (mu.square() + logvar.exp() - 1.0 - logvar)


@part("prior", "class-normal")
class ClassNormal(nn.Module):
    """p(z | y): a learned diagonal Gaussian for each class, starting at N(0, I)."""

    is_distribution = True
    factorises = True
    needs_condition = True

    def __init__(self, latent_dim: int, num_classes: int) -> None:
        super().__init__()
        self.mu = nn.Parameter(torch.zeros(num_classes, latent_dim))
        self.logvar = nn.Parameter(torch.zeros(num_classes, latent_dim))

    def distribution(self, condition: Tensor | None, encode: Encode) -> LatentPrior:
        """The Gaussian of each row's class."""
        assert condition is not None  # VAE refuses the combination
        return GaussianPrior(condition @ self.mu, condition @ self.logvar)


@part("prior", "mixture")
class GaussianMixture(nn.Module):
    """A learned mixture of diagonal Gaussians; the KL is estimated from the draws of z."""

    is_distribution = True
    factorises = False

    def __init__(self, latent_dim: int, components: int = 10) -> None:
        super().__init__()
        _check_components(components)
        self.logits = nn.Parameter(torch.zeros(components))
        # Apart from the start: equal components would get equal gradients for ever.
        self.mu = nn.Parameter(torch.randn(components, latent_dim))
        self.logvar = nn.Parameter(torch.zeros(components, latent_dim))

    def distribution(self, condition: Tensor | None, encode: Encode) -> LatentPrior:
        """The mixture, whatever the label."""
        return MixturePrior(torch.log_softmax(self.logits, 0), self.mu, self.logvar)


@part("prior", "vamp")
class VampPrior(nn.Module):
    """The encoder's answers to K learned pseudo-inputs, mixed evenly (Tomczak & Welling 2018).

    The pseudo-inputs are kept in [0, 1] by a sigmoid. `initialize_from` starts them at images.
    """

    is_distribution = True
    factorises = False

    def __init__(self, image_shape: ImageShape, components: int = 100) -> None:
        super().__init__()
        _check_components(components)
        self.pseudo_inputs = nn.Parameter(torch.randn(components, *image_shape) - 2.0)

    @torch.no_grad()
    def initialize_from(self, images: Tensor) -> None:
        """Start at these images `[≥ K, C, H, W]` as stored."""
        count = min(len(images), len(self.pseudo_inputs))
        start = torch.logit(pixels(images[:count]), eps=0.02)
        self.pseudo_inputs[:count] = start.to(self.pseudo_inputs.device)

    def distribution(self, condition: Tensor | None, encode: Encode) -> LatentPrior:
        """The even mixture of q(z | u_k)."""
        q = encode(torch.sigmoid(self.pseudo_inputs))
        even = torch.full((len(q.mu),), -math.log(len(q.mu)), device=q.mu.device)
        return MixturePrior(even, *q)


@part("prior", "none")
class NoPrior(nn.Module):
    """No p(z), for a plain autoencoder: z can be found for an image, but not drawn."""

    is_distribution = False
    factorises = False

    def __init__(self) -> None:
        super().__init__()

    def distribution(self, condition: Tensor | None, encode: Encode) -> LatentPrior:
        """Itself, which refuses everything."""
        return self

    def sample(
        self, count: int, seed: int | Tensor, device: torch.device, offset: int | Tensor = 0
    ) -> Tensor:
        """Raises UserError."""
        raise UserError(
            "this model has no prior to draw z from: fit one to its latents, "
            "fastvae sample RUN --sampler mixture"
        )

    def log_prob(self, z_SBD: Tensor) -> Tensor:
        """Raises UserError."""
        raise UserError("this model has no prior, so no z has a density")

    def reparameterize_kl(
        self,
        q: LatentGaussian,
        num_samples: int,
        seed: int | Tensor,
        offset: int | Tensor,
        impl: Impl,
        packed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Raises UserError."""
        raise UserError("this model has no prior to measure a KL from: give it one")

    def kl_of_each_latent(self, q: LatentGaussian) -> Tensor:
        """Raises UserError."""
        raise UserError("this model has no prior to measure a KL from: give it one")


def _check_components(components: int) -> None:
    if components < 1:
        raise UserError(f"a mixture has at least 1 component, got {components}")
