"""Models and images small enough for any test."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastvae import VAE, Bernoulli, ConvDecoder, ConvEncoder, Gaussian, MLPDecoder, MLPEncoder
from fastvae.data import ImageSet
from fastvae.parts import (
    ClassNormal,
    DiagonalGaussian,
    GaussianMixture,
    InverseAutoregressive,
    StandardNormal,
    Table,
    VampPrior,
)
from fastvae.parts.likelihoods import Likelihood
from fastvae.parts.networks import ImageShape
from fastvae.refinement import Refinement


def make_vae(
    network: str = "mlp",
    image_shape: ImageShape = (1, 8, 8),
    likelihood: Likelihood | None = None,
    latent_dim: int = 5,
    **parts: Any,
) -> VAE:
    """`parts` are further arguments of VAE; the encoder fits the posterior and the classes."""
    torch.manual_seed(0)
    encoders = {"mlp": MLPEncoder, "conv": ConvEncoder}
    decoders = {"mlp": MLPDecoder, "conv": ConvDecoder}
    likelihood = Bernoulli() if likelihood is None else likelihood
    posterior = parts.get("posterior")
    per_latent = 2 if posterior is None else posterior.statistics_per_latent
    shared = {"hidden": (32,), "condition_dim": parts.get("num_classes", 0)}
    channels = likelihood.parameter_channels(image_shape[0])
    return VAE(
        encoders[network](image_shape, per_latent * latent_dim, **shared),
        decoders[network](image_shape, latent_dim, channels=channels, **shared),
        likelihood,
        image_shape=image_shape,
        latent_dim=latent_dim,
        **parts,
    )


def grey_images(count: int, image_shape: ImageShape) -> Tensor:
    """uint8 noise, the same each time."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, *image_shape), dtype=torch.uint8, generator=generator)


def grey_set(count: int, image_shape: ImageShape, classes: int = 0) -> ImageSet:
    """The same with labels 0, 1, …, classes − 1, 0, 1, … where there are classes."""
    labels = torch.arange(count) % classes if classes else None
    return ImageSet(grey_images(count, image_shape), labels, "noise")


def rough(vae: VAE) -> VAE:
    """With weights so large that every term matters."""
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.mul_(3.0)
    return vae


class LinearModel(NamedTuple):
    """A VAE whose likelihoods have a closed form, and that form."""

    vae: VAE
    log_marginal: Callable[[ImageSet], Tensor]
    """log p(x), or log p(x | y), of each image: float64 `[N]`, nats."""
    log_likelihood_under_prior: Callable[[ImageSet], Tensor]
    """E[log p(x | z)] over z of the standard normal, float64 `[N]`."""


def linear_vae(
    image_shape: ImageShape = (1, 3, 4),
    norms: tuple[float, ...] = (0.9, 0.5),
    variance: float = 0.05,
    *,
    num_classes: int = 0,
    posterior: str = "diagonal-gaussian",
    prior: str = "standard-normal",
    table: bool = False,
    refinement: Refinement | None = None,
    perturbed: float = 0.0,
) -> LinearModel:
    """x = W z + V y + b + ε with orthogonal columns in W, so that p(z | x) is a diagonal Gaussian
    where p(z) is standard normal; and an encoder that answers just that, `perturbed` if not 0.

    Priors: standard-normal, class-normal (of other means and one scale), mixture or vamp.
    """
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(3)
    pixels, latent_dim = math.prod(image_shape), len(norms)
    columns = torch.randn(pixels, latent_dim, generator=generator, dtype=torch.float64)
    w = torch.linalg.qr(columns).Q * torch.tensor(norms, dtype=torch.float64)
    v = 0.3 * torch.randn(pixels, num_classes, generator=generator, dtype=torch.float64)
    b = 0.5 + 0.1 * torch.randn(pixels, generator=generator, dtype=torch.float64)

    # p(z | y) = N(m_y, scale² I).
    scale = 0.7 if prior == "class-normal" else 1.0
    m = torch.zeros(num_classes, latent_dim, dtype=torch.float64)
    if prior == "class-normal":
        m = torch.randn(num_classes, latent_dim, generator=generator, dtype=torch.float64)
    precision = 1 / scale**2 + w.square().sum(0) / variance
    from_x = w.T / variance / precision[:, None]
    from_y = m.T / scale**2 / precision[:, None] - from_x @ v
    constant = -from_x @ b

    flow = posterior == "inverse-autoregressive"
    q = InverseAutoregressive(latent_dim, hidden=(8,)) if flow else DiagonalGaussian()
    outputs = q.statistics_per_latent * latent_dim
    encoder: nn.Module = Table(7, outputs)
    condition = {"condition_dim": num_classes, "hidden": ()}
    if not table:
        encoder = MLPEncoder(image_shape, outputs, **condition)
    parts: dict[str, nn.Module] = {
        "standard-normal": StandardNormal(latent_dim),
        "class-normal": ClassNormal(latent_dim, max(num_classes, 1)),
        "mixture": GaussianMixture(latent_dim, 3),
        "vamp": VampPrior(image_shape, 4),
    }
    vae = VAE(
        encoder,
        MLPDecoder(image_shape, latent_dim, **condition),
        Gaussian(variance),
        image_shape=image_shape,
        latent_dim=latent_dim,
        posterior=q,
        prior=parts[prior],
        num_classes=num_classes,
        refinement=refinement,
    )
    with torch.no_grad():
        vae.decoder.head.weight.copy_(torch.cat([w, v], 1))
        vae.decoder.head.bias.copy_(b)
        if not table:
            vae.encoder.head.weight.zero_()
            vae.encoder.head.weight[:latent_dim] = torch.cat([from_x, from_y], 1)
            vae.encoder.head.bias.zero_()
            vae.encoder.head.bias[:latent_dim] = constant
            vae.encoder.head.bias[latent_dim : 2 * latent_dim] = -precision.log()
            for parameter in [*vae.encoder.parameters(), *vae.posterior.parameters()]:
                parameter += perturbed * torch.randn(parameter.shape, generator=generator)
        if prior == "class-normal":
            vae.prior.mu.copy_(m)
            vae.prior.logvar.fill_(2 * math.log(scale))
        if prior == "mixture":
            vae.prior.logits.copy_(torch.tensor([0.5, -0.3, 0.0]))
            vae.prior.logvar.copy_(torch.randn(3, latent_dim, generator=generator) * 0.5)

    def offsets(data: ImageSet) -> Tensor:
        """x − V y − b, `[N, pixels]`."""
        x = data.images.flatten(1).double()
        x = x / 255 if data.images.dtype == torch.uint8 else x
        y = torch.zeros(len(x), 0, dtype=torch.float64)
        if num_classes:
            assert data.labels is not None
            y = nn.functional.one_hot(data.labels, num_classes).double()
        return x - b - y @ v.T

    @torch.no_grad()
    def log_marginal(data: ImageSet) -> Tensor:
        means = m[data.labels][None] if num_classes else torch.zeros(1, 1, latent_dim).double()
        covariances = torch.eye(latent_dim, dtype=torch.float64)[None] * scale**2
        log_weights = torch.zeros(1, dtype=torch.float64)
        if prior in ("mixture", "vamp"):
            p = vae.prior_of(None)
            means, covariances = p.mu.double()[:, None], p.logvar.double().exp().diag_embed()
            log_weights = p.log_weights.double()
        noise = variance * torch.eye(pixels, dtype=torch.float64)
        of_each = [
            torch.distributions.MultivariateNormal(
                mean @ w.T, w @ covariance @ w.T + noise
            ).log_prob(offsets(data))
            for mean, covariance in zip(means, covariances, strict=True)
        ]
        return (torch.stack(of_each) + log_weights[:, None]).logsumexp(0)

    def log_likelihood_under_prior(data: ImageSet) -> Tensor:
        squares = offsets(data).square().sum(1) + w.square().sum()
        return -0.5 * (squares / variance + pixels * math.log(2 * math.pi * variance))

    return LinearModel(vae.eval(), log_marginal, log_likelihood_under_prior)
