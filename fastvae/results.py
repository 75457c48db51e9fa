"""What a finished run leaves beside its checkpoint: pictures, curves and results.json."""

import json
from functools import singledispatch
from pathlib import Path
from typing import Any

import torch

from fastvae import figures, runs
from fastvae.bayes import BayesianNetwork
from fastvae.data import ImageSet
from fastvae.evaluation import Evaluation, quantity_names
from fastvae.files import without_nan, write_whole
from fastvae.models import Model
from fastvae.parts.networks import pixels
from fastvae.predictions import assess_predictions
from fastvae.vae import VAE

SHOWN, COLUMNS = 64, 8


@torch.no_grad()
def write_results(
    run: Path,
    model: Model,
    heldout: ImageSet,
    result: Evaluation,
    circumstances: dict[str, Any],
    *,
    seed: int,
) -> dict[str, Any]:
    """Write all of it into the run's folder; return what results.json holds.

    `result` is that of `heldout`, `circumstances` what else is worth knowing: speed, versions.
    """
    model.eval()
    found = describe(model, run, heldout, result, seed)
    results = {"heldout": result.named(), **found, **circumstances}
    text = json.dumps(without_nan(results), indent=2, allow_nan=False)
    write_whole(run / runs.RESULTS, text + "\n")
    return results


@singledispatch
def describe(
    model: Any, run: Path, heldout: ImageSet, result: Evaluation, seed: int
) -> dict[str, Any]:
    """Write the pictures that a kind of model has; return its own entries of results.json."""
    raise TypeError(f"no results are known for {type(model).__name__}")


@describe.register
def _vae(model: VAE, run: Path, heldout: ImageSet, result: Evaluation, seed: int) -> dict[str, Any]:
    if model.prior.is_distribution and model.num_classes:
        classes = torch.arange(model.num_classes).repeat_interleave(COLUMNS)
        images = model.sample(len(classes), seed=seed, labels=classes)
        figures.save_class_grid(images.unflatten(0, (-1, COLUMNS)), run / runs.SAMPLES)
    elif model.prior.is_distribution:
        figures.save_grid(model.sample(SHOWN, seed=seed), run / runs.SAMPLES, columns=COLUMNS)
    shown = heldout.select(slice(SHOWN)).to(next(model.parameters()).device)
    reconstructed = model.reconstruct(shown.tensor, shown.labels)
    figures.save_pairs(pixels(shown.tensor), reconstructed, run / runs.RECONSTRUCTIONS)
    names = quantity_names(result.is_density, result.is_bound)
    figures.save_curves(runs.read_metrics(run), names, run / runs.CURVES)
    entries = {"units": "nats per image, means over held-out images; bits_per_dim in bits"}
    if not result.is_density:
        entries["note"] = (
            "binarize none: a cross-entropy of grey pixels, which bounds no likelihood"
        )
    elif not result.is_bound:
        entries["note"] = "a deterministic posterior: its nll bounds no likelihood of the images"
    return entries


@describe.register
def _network(
    model: BayesianNetwork, run: Path, heldout: ImageSet, result: Evaluation, seed: int
) -> dict[str, Any]:
    predictions = assess_predictions(model, heldout, seed=seed, folder=run)
    names = quantity_names(result.is_density, result.is_bound)
    figures.save_curves(runs.read_metrics(run), names, run / runs.CURVES, "y given x, w")
    return {
        "predictions": predictions,
        "units": "nats per row, means over held-out rows; rmse in the targets' unit",
        "note": "heldout: E[log p(y given x, w)] by one draw of the weights, and their KL over the "
        "number of training rows; predictions: p(y given x), averaged over draws of the weights",
    }
