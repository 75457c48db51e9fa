"""Whether a predictor knows how sure it may be: scores of predictions averaged over its weights.

A Bayesian predictor answers with S predictions, one for each draw of its weights, and means their
average, a mixture. S = 1 is an ordinary predictor.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastvae.errors import UserError


class ClassificationScores(NamedTuple):
    """Means over images.

    Attributes:
        accuracy: the share of images whose most probable class is theirs.
        log_likelihood: log p(label | x) under the average prediction, nats.
        calibration_error: expected calibration error of the most probable class: the mean gap
            between confidence and accuracy over 15 equal bins of confidence (Guo et al. 2017,
            arXiv:1706.04599).
    """

    accuracy: float
    log_likelihood: float
    calibration_error: float


class RegressionScores(NamedTuple):
    """Means over images.

    Attributes:
        rmse: of the mean of the mixture, in units of the target.
        log_likelihood: log density of the target under the mixture, nats.
        coverage_error: the mean gap between the share of targets that should lie in the mixture's
            central intervals (5 %, 10 %, …, 95 %) and the share that does (Kuleshov et al. 2018,
            arXiv:1807.00263).
    """

    rmse: float
    log_likelihood: float
    coverage_error: float


@torch.no_grad()
def classification_scores(
    log_probs: Tensor, labels: Tensor, bins: int = 15
) -> ClassificationScores:
    """Scores of p(k | x) = (1/S) Σ_s p_s(k | x).

    Args:
        log_probs: `[S, N, K]` log-probabilities of the classes, nats.
        labels: `[N]` integers from 0 to K − 1.
        bins: of the calibration error.

    Raises:
        UserError: for shapes that do not fit, labels out of range, or numbers that are no
            log-probabilities.
    """
    from torchmetrics.functional.classification import multiclass_calibration_error

    if log_probs.dim() != 3 or labels.shape != log_probs.shape[1:2] or log_probs.numel() == 0:
        raise UserError(
            f"class log-probabilities must be [S, N, K] and labels [N], "
            f"got {tuple(log_probs.shape)} and {tuple(labels.shape)}"
        )
    classes = log_probs.shape[2]
    labels = labels.to(log_probs.device).long()
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(f"labels must lie from 0 to {classes - 1}, as there are {classes} classes")
    predictive = _log_mean_exp(log_probs.double())
    if not (predictive.logsumexp(1).abs() < 0.01).all():
        raise UserError("class probabilities must sum to one: pass log_softmax of the logits")
    right = predictive.argmax(1) == labels
    # Below 1, or torchmetrics gives a confidence of exactly 1 a bin of its own, and takes one that
    # rounding has put above 1 for a logit.
    confident = predictive.exp().float().clamp(max=1 - 2**-24)
    error = multiclass_calibration_error(confident, labels, classes, n_bins=bins, norm="l1")
    return ClassificationScores(
        accuracy=right.double().mean().item(),
        log_likelihood=predictive.gather(1, labels[:, None]).mean().item(),
        calibration_error=error.item(),
    )


@torch.no_grad()
def regression_scores(mean: Tensor, logvar: Tensor, target: Tensor) -> RegressionScores:
    """Scores of p(y | x) = (1/S) Σ_s N(y; mean_s, exp(logvar_s)).

    Args:
        mean, logvar: `[S, N]`; logvar may be anything that broadcasts to it, such as 0-d.
        target: `[N]`.

    Raises:
        UserError: for shapes that do not fit.
    """
    if mean.dim() != 2 or mean.numel() == 0 or target.shape != mean.shape[1:]:
        raise UserError(
            f"predicted means must be [S, N] and targets [N], "
            f"got {tuple(mean.shape)} and {tuple(target.shape)}"
        )
    mean, y = mean.double(), target.to(mean.device).double()
    logvar = logvar.double().expand_as(mean)
    standardised = (y - mean) * (-0.5 * logvar).exp()
    log_density = -0.5 * (standardised.square() + logvar + math.log(2 * math.pi))
    # y lies in the central interval of mass c if its quantile F(y) is within c / 2 of the median.
    quantile = torch.special.ndtr(standardised).mean(0)
    levels = torch.arange(1, 20, dtype=torch.float64, device=y.device) / 20
    covered = ((2 * quantile - 1).abs() <= levels[:, None]).double().mean(1)
    return RegressionScores(
        rmse=(y - mean.mean(0)).square().mean().sqrt().item(),
        log_likelihood=_log_mean_exp(log_density).mean().item(),
        coverage_error=(covered - levels).abs().mean().item(),
    )


def _log_mean_exp(values: Tensor) -> Tensor:
    """Over the first dimension."""
    return values.logsumexp(0) - math.log(len(values))
