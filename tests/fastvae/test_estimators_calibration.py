"""Scores of predictive mixtures, beside torch.distributions and formulas written out."""

import math

import pytest
import torch
from fastvae_kernels import normal, uniform
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, Normal

from fastvae.errors import UserError
from fastvae.estimators import classification_scores, regression_scores


def predictions(samples: int = 3, images: int = 501, classes: int = 5) -> tuple[Tensor, Tensor]:
    logits = 3 * normal((samples, images, classes), 0)
    return logits.log_softmax(-1), (uniform((images,), 1) * classes).long()


def calibration_error(confidence: Tensor, right: Tensor, bins: int) -> float:
    """Guo et al. 2017, equation 3, bin by bin."""
    error = 0.0
    for k in range(bins):
        inside = (confidence >= k / bins) & (confidence < (k + 1) / bins)
        if inside.any():
            gap = right[inside].double().mean() - confidence[inside].mean()
            error += inside.double().mean().item() * abs(gap.item())
    return error


@pytest.mark.parametrize("bins", [15, 4])
def test_classes_beside_the_formulas(bins: int) -> None:
    log_probs, labels = predictions()
    predictive = log_probs.double().exp().mean(0)
    confidence, choice = predictive.max(1)
    right = choice == labels
    found = classification_scores(log_probs, labels, bins)
    assert found.accuracy == pytest.approx(right.double().mean().item())
    log_likelihood = predictive.log()[torch.arange(501), labels].mean().item()
    assert found.log_likelihood == pytest.approx(log_likelihood, rel=1e-6)
    assert found.calibration_error == pytest.approx(
        calibration_error(confidence, right, bins), abs=1e-5
    )
    assert found.calibration_error > 0.2  # random labels, and sure of itself


def test_a_calibrated_prediction() -> None:
    """Labels drawn from the prediction itself: no error but of sampling."""
    log_probs, _ = predictions(1, 20_001)
    cumulative = log_probs[0].exp().cumsum(1)
    labels = (uniform((20_001, 1), 2) > cumulative).sum(1).clamp(max=4)
    found = classification_scores(log_probs, labels)
    assert found.calibration_error < 0.02
    assert found.accuracy == pytest.approx(log_probs.exp().amax(2).mean().item(), abs=0.01)


def test_certainty_is_no_logit() -> None:
    """Confidences that round to 1: half of them wrong is an error of one half."""
    logits = torch.full((2, 40, 3), -200.0)
    logits[:, :, 1] = 200.0
    found = classification_scores(logits.log_softmax(-1), torch.tensor([1, 2] * 20))
    assert found.calibration_error == pytest.approx(0.5, abs=1e-6)
    assert found.accuracy == 0.5
    assert found.log_likelihood == pytest.approx(-200)
    nearly = torch.tensor([[[0.0, -18.0]]]).log_softmax(-1).double() + 1e-7
    assert classification_scores(nearly, torch.tensor([0])).calibration_error < 1e-6


def test_an_average_of_probabilities_and_not_of_their_logarithms() -> None:
    log_probs = torch.tensor([[[0.9, 0.1]], [[0.2, 0.8]]]).log()
    found = classification_scores(log_probs, torch.tensor([0]))
    assert found.log_likelihood == pytest.approx(math.log(0.55))
    assert found.accuracy == 1.0
    assert found.calibration_error == pytest.approx(0.45)


def test_classes_refuse() -> None:
    log_probs, labels = predictions()
    with pytest.raises(UserError, match="log_softmax"):
        classification_scores(log_probs + 1, labels)
    with pytest.raises(UserError, match="from 0 to 4"):
        classification_scores(log_probs, labels + 1)
    with pytest.raises(UserError, match=r"\[S, N, K\]"):
        classification_scores(log_probs[0], labels)
    with pytest.raises(UserError, match=r"labels \[N\]"):
        classification_scores(log_probs, labels[1:])


def test_real_targets_beside_a_mixture() -> None:
    mean, logvar = 2 * normal((4, 33), 3), normal((4, 33), 4)
    target = 3 * normal((33,), 5)
    m, s, y = mean.double(), (0.5 * logvar.double()).exp(), target.double()
    mixture = MixtureSameFamily(Categorical(torch.ones(33, 4)), Normal(m.T, s.T))
    found = regression_scores(mean, logvar, target)
    assert found.log_likelihood == pytest.approx(mixture.log_prob(y).mean().item(), rel=1e-6)
    assert found.rmse == pytest.approx((mixture.mean - y).square().mean().sqrt().item(), rel=1e-6)
    quantile = mixture.cdf(y)
    gaps = []
    for percent in range(5, 100, 5):
        low, high = 0.5 - percent / 200, 0.5 + percent / 200
        covered = ((quantile >= low) & (quantile <= high)).double().mean().item()
        gaps.append(abs(covered - percent / 100))
    assert found.coverage_error == pytest.approx(sum(gaps) / 19, abs=1e-6)


@pytest.mark.parametrize(("claimed", "expected"), [(1.0, 0.0), (2.0, None), (0.5, None)])
def test_coverage_knows_too_wide_and_too_narrow(claimed: float, expected: float | None) -> None:
    """Targets N(0, 1), predicted as N(0, claimed²): the gap has a closed form."""
    target = normal((40_001,), 6)
    logvar = torch.tensor(2 * math.log(claimed))
    found = regression_scores(torch.zeros(1, 40_001), logvar, target)
    levels = torch.arange(1, 20, dtype=torch.float64) / 20
    half_width = claimed * Normal(0.0, 1.0).icdf((1 + levels) / 2)
    gap = (2 * Normal(0.0, 1.0).cdf(half_width) - 1 - levels).abs().mean().item()
    assert expected is None or gap == pytest.approx(expected, abs=1e-6)
    assert found.coverage_error == pytest.approx(gap, abs=0.005)
    assert found.rmse == pytest.approx(1, abs=0.02)


def test_real_targets_refuse() -> None:
    with pytest.raises(UserError, match=r"targets \[N\]"):
        regression_scores(torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(3))
    with pytest.raises(UserError, match=r"\[S, N\]"):
        regression_scores(torch.zeros(4), torch.zeros(4), torch.zeros(4))
