"""The samplers that a run keeps beside its checkpoint, fitted when they are first asked for."""

from pathlib import Path
from typing import Literal

from fastvae import runs
from fastvae.assessment import training_means
from fastvae.data import load_data
from fastvae.errors import UserError
from fastvae.samplers import (
    FlowSampler,
    GaussianMixtureSampler,
    LatentSampler,
    load_sampler,
    save_sampler,
)
from fastvae.saving import WEIGHTS_NAME, model_folder
from fastvae.vae import VAE

# Training images whose latents a sampler is fitted to.
IMAGES = 20_000


def fitted(run: Path, vae: VAE, kind: Literal["mixture", "flow"]) -> LatentSampler:
    """The run's sampler of that kind, fitted now if it was not, or if the model has changed.

    It models the means of q of at most `IMAGES` training images, evenly spaced; one density for
    each class where the model is conditional. Raises UserError where the run's data are gone.
    """
    path = run / f"sampler-{kind}.safetensors"
    weights = model_folder(run) / WEIGHTS_NAME
    # A model that was saved alone has a config.json, too, but no checkpoints/.
    if weights.parent == run or not (run / runs.CONFIG).is_file():
        raise UserError(
            f"--sampler {kind} is fitted to the training images, and {run} is no run's folder that "
            "says which they were"
        )
    if path.exists() and path.stat().st_mtime >= weights.stat().st_mtime:
        return load_sampler(path)
    config = runs.read_config(run)
    train_set, _ = load_data(config.data, config.seed)
    z, labels = training_means(vae, runs.prepare(train_set, config), IMAGES, config.seed)
    classes = labels if vae.num_classes else None
    sampler: LatentSampler
    if kind == "mixture":
        sampler = GaussianMixtureSampler.fit(z, classes, seed=config.seed)
    else:
        sampler = FlowSampler.fit(z, classes, seed=config.seed)
    save_sampler(sampler, path)
    return sampler
