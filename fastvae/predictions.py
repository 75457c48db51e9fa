"""How good a network's predictions are for rows it has not seen: scores, and a picture of them."""

import math
from functools import singledispatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvae import figures
from fastvae.bayes import BayesianNetwork
from fastvae.data import ImageSet
from fastvae.estimators import classification_scores, regression_scores
from fastvae.parts.label_likelihoods import CategoricalLabels, GaussianTargets
from fastvae.runs import CALIBRATION, PREDICTIONS

DRAWS = 50
BINS = 15


def assess_predictions(
    network: BayesianNetwork,
    heldout: ImageSet,
    *,
    seed: int,
    draws: int = DRAWS,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Scores of p(y | x) averaged over draws of the weights, as JSON values.

    log_likelihood is in nats, the mean over rows of log p(y | x). Of classes there are accuracy and
    expected_calibration_error, of real targets rmse in their unit, coverage_error (both errors as
    in `fastvae.estimators.calibration`) and the share of targets within two standard deviations.
    With a `folder`, the calibration or the predictions are drawn into it.
    """
    device = network.mu.device
    heldout = heldout.to(device)
    network.check_labels(heldout.labels)
    found = _scores(network.likelihood, network, heldout.loaded(), draws, seed, folder)
    return {"weight_draws": draws, **found}


@singledispatch
def _scores(
    likelihood: Any,
    network: BayesianNetwork,
    heldout: ImageSet,
    draws: int,
    seed: int,
    folder: Path | None,
) -> dict[str, Any]:
    raise TypeError(f"no scores are known for {type(likelihood).__name__}")


@_scores.register
def _classes(
    likelihood: CategoricalLabels,
    network: BayesianNetwork,
    heldout: ImageSet,
    draws: int,
    seed: int,
    folder: Path | None,
) -> dict[str, Any]:
    def pool(outputs: Tensor, rows: slice) -> Tensor:
        return likelihood.pool(outputs)

    summed = network.over_draws(heldout.tensor, pool, likelihood.join, num_samples=draws, seed=seed)
    log_probs = summed - math.log(draws)
    assert heldout.labels is not None
    scores = classification_scores(log_probs.unsqueeze(0), heldout.labels, BINS)
    if folder is not None:
        figures.save_calibration(
            *_reliability(log_probs.exp(), heldout.labels), folder / CALIBRATION
        )
    return {
        "log_likelihood": scores.log_likelihood,
        "accuracy": scores.accuracy,
        "expected_calibration_error": scores.calibration_error,
    }


def _reliability(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean confidence, accuracy and number of rows in bins of confidence, each `[BINS]`."""
    confidence, chosen = probabilities.double().max(1)
    bins = (confidence * BINS).long().clamp(max=BINS - 1)

    def summed(values: Tensor) -> Tensor:
        return torch.zeros_like(confidence[:1].expand(BINS)).index_add(0, bins, values)

    counts = summed(torch.ones_like(confidence))
    return summed(confidence) / counts, summed((chosen == labels).double()) / counts, counts


@_scores.register
def _targets(
    likelihood: GaussianTargets,
    network: BayesianNetwork,
    heldout: ImageSet,
    draws: int,
    seed: int,
    folder: Path | None,
) -> dict[str, Any]:
    def pool(outputs: Tensor, rows: slice) -> Tensor:
        return likelihood.in_unit(outputs).T

    def join(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a, b], dim=1)

    means = network.over_draws(heldout.tensor, pool, join, num_samples=draws, seed=seed)
    y = heldout.labels
    assert y is not None
    scores = regression_scores(means.T, likelihood.target_logvar, y)
    mean, std = network.predict(heldout.tensor, num_samples=draws, seed=seed)
    if folder is not None:
        figures.save_predictions(y, mean, std, folder / PREDICTIONS)
    return {
        "log_likelihood": scores.log_likelihood,
        "rmse": scores.rmse,
        "coverage_error": scores.coverage_error,
        "within_two_std": ((y - mean).abs() <= 2 * std).double().mean().item(),
    }
