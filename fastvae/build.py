"""From a run's configuration to its model and objective."""

from typing import Any

from torch import Tensor

from fastvae.bayes import BayesianNetwork, build_network
from fastvae.config import ModelConfig, ObjectiveConfig
from fastvae.data import ImageSet
from fastvae.errors import UserError
from fastvae.models import Model
from fastvae.parts.objectives import Objective
from fastvae.parts.spec import build_part
from fastvae.refinement import Refinement
from fastvae.vae import VAE, build_vae

TABLE_STEPS = 500
IMAGES_OF_AVERAGE = 10_000
BYTES_OF_AVERAGE = 1 << 28


def build_model(config: ModelConfig, train_set: ImageSet, batch_size: int) -> Model:
    """The model, with fresh weights from torch's global generator.

    `batch_size` is that of an optimizer step, over all processes. Raises UserError where the
    training set has not the labels that the model needs.
    """
    if config.target == "labels":
        return _build_network(config, train_set, batch_size)
    return _build_vae(config, train_set)


def _build_network(config: ModelConfig, train_set: ImageSet, batch_size: int) -> BayesianNetwork:
    """Of the training set are used: the images' shape and number, and which labels there are."""
    return build_network(
        {
            "image_shape": train_set.image_shape,
            "dataset_size": len(train_set),
            "rows_per_draw": batch_size,
            "hidden": config.hidden,
            "activation": config.activation,
            "weight_std": config.weight_std,
            "likelihood": _label_likelihood_spec(train_set),
        }
    )


def _label_likelihood_spec(train_set: ImageSet) -> dict[str, Any]:
    if train_set.labels is None:
        raise UserError(f"--target labels predicts labels, and {train_set.name} has none")
    if train_set.num_classes is not None:
        return {"name": "categorical", "num_classes": train_set.num_classes}
    targets = train_set.labels.double()
    mean, std = targets.mean().item(), targets.std(correction=0).item()
    return {"name": "gaussian", "target_mean": mean, "target_std": std}


def _build_vae(config: ModelConfig, train_set: ImageSet) -> VAE:
    """Of the training set are used: the images' shape, their number (for a table), the number of
    classes (for a conditional model), the average image (where the decoder of a discrete
    likelihood starts, so that its units need not first learn what all images share; a Gaussian
    decoder that did so learned worse), and a few images (where a VampPrior starts).
    """
    vae = build_vae(model_spec(config, train_set))
    if of_average := getattr(vae.likelihood, "of_average", None):
        most = max(1, BYTES_OF_AVERAGE // (train_set.nbytes // len(train_set)))
        some = _some(train_set, min(IMAGES_OF_AVERAGE, most))
        vae.decoder.start_at(of_average(some))  # type: ignore[operator]
    if initialize := getattr(vae.prior, "initialize_from", None):
        initialize(_some(train_set, config.prior_components))
    return vae


def _some(train_set: ImageSet, count: int) -> Tensor:
    """At least so many images (or all), evenly spread over the set, as stored."""
    return train_set.select(slice(None, None, max(1, len(train_set) // count))).loaded().tensor


def model_spec(config: ModelConfig, train_set: ImageSet) -> dict[str, Any]:
    """What `build_vae` makes the model from; JSON but for its tuples."""
    image_shape, latent_dim = train_set.image_shape, config.latent_dim
    num_classes = 0
    if config.conditional:
        if train_set.num_classes is None:
            raise UserError(
                f"--conditional needs images with class labels, and {train_set.name} has none"
            )
        num_classes = train_set.num_classes

    posteriors: dict[str, dict[str, Any]] = {
        "diagonal-gaussian": {"scale": config.posterior_scale},
        "deterministic": {},
        "inverse-autoregressive": {"latent_dim": latent_dim, "layers": config.flow_layers},
    }
    priors: dict[str, dict[str, Any]] = {
        "standard-normal": {"latent_dim": latent_dim},
        "class-normal": {"latent_dim": latent_dim, "num_classes": num_classes},
        "mixture": {"latent_dim": latent_dim, "components": config.prior_components},
        "vamp": {"image_shape": image_shape, "components": config.prior_components},
        "none": {},
    }
    posterior = {"name": config.posterior, **posteriors[config.posterior]}
    likelihood = _likelihood_spec(config)
    per_latent = build_part("posterior", posterior).statistics_per_latent
    channels = build_part("likelihood", likelihood).parameter_channels(image_shape[0])  # type: ignore[operator]
    shared: dict[str, Any] = {"image_shape": image_shape, "activation": config.activation}
    if num_classes:
        shared["condition_dim"] = num_classes
    if config.network == "conv":
        shared["pooling"] = config.pooling
    encoder: dict[str, Any] = {"name": config.network, "hidden": config.hidden, **shared}
    decoder: dict[str, Any] = {"name": config.network, "hidden": config.hidden[::-1], **shared}
    if config.network == "conv":
        encoder["widths"], decoder["widths"] = config.widths, config.widths[::-1]
    outputs = per_latent * latent_dim  # type: ignore[operator]
    if config.inference == "table":
        encoder = {"name": "table", "rows": len(train_set), "outputs": outputs}
    else:
        encoder["outputs"] = outputs
    refinement = None
    if config.inference == "table" or config.refine_steps:
        refinement = Refinement(config.refine_steps or TABLE_STEPS, config.refine_rate)._asdict()
    return {
        "image_shape": image_shape,
        "latent_dim": latent_dim,
        "num_classes": num_classes,
        "refinement": refinement,
        "posterior": posterior,
        "prior": {"name": config.prior, **priors[config.prior]},
        "encoder": encoder,
        "decoder": {"latent_dim": latent_dim, "channels": channels, **decoder},
        "likelihood": likelihood,
    }


def _likelihood_spec(config: ModelConfig) -> dict[str, Any]:
    if config.likelihood == "gaussian":
        by_variance: dict[Any, dict[str, Any]] = {
            "learned": {"name": "gaussian", "variance": "learned"},
            "optimal": {"name": "gaussian-optimal"},
            "predicted": {"name": "gaussian-per-pixel", "min_std": config.min_std},
        }
        fixed = {"name": "gaussian", "variance": config.variance}
        return by_variance.get(config.variance, fixed)
    arguments: dict[str, dict[str, Any]] = {
        "bernoulli": {"binarize": config.binarization},
        "categorical": {"levels": config.levels},
        "logistic-mixture": {"mixtures": config.mixtures},
    }
    return {"name": config.likelihood, **arguments[config.likelihood]}


def build_objective(config: ObjectiveConfig, samples_per_epoch: int) -> Objective:
    """The objective, with its epochs counted in samples."""

    def samples(epochs: float) -> int:
        return round(epochs * samples_per_epoch)

    arguments: dict[str, dict[str, Any]] = {
        "elbo": {
            "beta": config.beta,
            "warmup_samples": samples(config.kl_warmup_epochs),
            "cycle_samples": samples(config.kl_cycle_epochs),
            "free_bits": config.free_bits,
            "capacity": config.capacity,
            "capacity_samples": samples(config.capacity_epochs),
            "num_samples": config.num_samples,
        },
        "importance-weighted": {
            "num_samples": config.num_samples,
            "groups": config.groups,
            "elbo_share": config.elbo_share,
            "doubly_reparameterized": config.gradient == "doubly-reparameterized",
            "decoder_all": config.decoder_draws == "all",
        },
        "total-correlation": {
            "dataset_size": samples_per_epoch,
            "mutual_information": config.mutual_information_weight,
            "total_correlation": config.total_correlation_weight,
            "dimension_wise": config.dimension_weight,
        },
        "mmd": {
            "mmd_weight": config.mmd_weight,
            "beta": config.beta,
            "num_samples": config.num_samples,
        },
    }
    return build_part("objective", {"name": config.objective, **arguments[config.objective]})  # type: ignore[return-value]
