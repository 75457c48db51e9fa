"""Models and images small enough for any test."""

from typing import Any

import torch
from torch import Tensor

from fastvae import VAE, Bernoulli, ConvDecoder, ConvEncoder, MLPDecoder, MLPEncoder
from fastvae.data import ImageSet
from fastvae.parts.likelihoods import Likelihood
from fastvae.parts.networks import ImageShape


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
