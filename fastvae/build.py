"""From a run's configuration to its model and objective."""

from typing import Any

from fastvae.config import ModelConfig, ObjectiveConfig
from fastvae.parts import BetaELBO, DiagonalGaussian
from fastvae.parts.networks import ImageShape
from fastvae.vae import VAE, build_vae


def build_model(config: ModelConfig, image_shape: ImageShape) -> VAE:
    """The model, with fresh weights from torch's global generator."""
    networks = {"image_shape": image_shape, "activation": config.activation}
    widths = {"widths": config.widths} if config.network == "conv" else {}
    back_widths = {"widths": config.widths[::-1]} if config.network == "conv" else {}
    likelihoods: dict[str, dict[str, Any]] = {
        "bernoulli": {"binarize": config.binarization},
        "gaussian": {} if config.variance == "learned" else {"variance": config.variance},
    }
    spec = {
        "image_shape": image_shape,
        "latent_dim": config.latent_dim,
        "posterior": {"name": "diagonal-gaussian"},
        "prior": {"name": "standard-normal", "latent_dim": config.latent_dim},
        "encoder": {
            "name": config.network,
            "outputs": DiagonalGaussian.statistics_per_latent * config.latent_dim,
            "hidden": config.hidden,
            **widths,
            **networks,
        },
        "decoder": {
            "name": config.network,
            "latent_dim": config.latent_dim,
            "hidden": config.hidden[::-1],
            **back_widths,
            **networks,
        },
        "likelihood": {"name": config.likelihood, **likelihoods[config.likelihood]},
    }
    return build_vae(spec)


def build_objective(config: ObjectiveConfig, samples_per_epoch: int) -> BetaELBO:
    """The objective, with its warm-up counted in samples."""
    return BetaELBO(config.beta, round(config.kl_warmup_epochs * samples_per_epoch))
