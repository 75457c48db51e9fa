"""Streaming averages of weights, beside the same in one piece."""

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from fastvae_kernels import normal

from fastvae.errors import UserError
from fastvae.estimators import (
    chunk_size,
    importance_log_marginal,
    mean_and_standard_error,
    prior_average_log_marginal,
)

SAMPLES = 101


def weights(scale: float = 2.0, shift: float = -700.0) -> torch.Tensor:
    return normal((SAMPLES, 5), 0) * scale + shift


@pytest.mark.parametrize("chunk", [1, 7, 100, 101, 5000])
@pytest.mark.parametrize("shift", [-90_000.0, 0.0, 3000.0])
def test_beside_numpy(chunk: int, shift: float) -> None:
    log_w = weights(shift=shift)
    asked = []

    def log_weights(start: int, count: int) -> torch.Tensor:
        asked.append((start, count))
        return log_w[start : start + count]

    found = importance_log_marginal(log_weights, SAMPLES, chunk)
    truth = log_w.double().numpy()
    w = np.exp(truth - truth.max(0))
    np.testing.assert_allclose(
        found.log_marginal, scipy.special.logsumexp(truth, 0) - math.log(SAMPLES), rtol=1e-13
    )
    error = scipy.stats.sem(w, 0) / w.mean(0)
    np.testing.assert_allclose(found.standard_error, error, rtol=1e-9)
    np.testing.assert_allclose(
        found.effective_sample_size, w.sum(0) ** 2 / (w**2).sum(0), rtol=1e-9
    )
    assert all(field.dtype == torch.float64 for field in found)
    assert sum(count for _, count in asked) == SAMPLES
    assert max(count for _, count in asked) <= chunk


def test_the_standard_error_is_the_spread_of_repeats() -> None:
    repeats = normal((400, 3000), 1)
    found = importance_log_marginal(lambda start, count: repeats, 400, 400)
    assert found.log_marginal.std().item() == pytest.approx(
        found.standard_error.mean().item(), rel=0.1
    )
    assert found.log_marginal.mean().item() == pytest.approx(0.5, abs=0.01)  # E exp(N(0, 1))


def test_one_sample_and_zero_weights() -> None:
    one = importance_log_marginal(lambda start, count: weights()[:1], 1, 9)
    torch.testing.assert_close(one.log_marginal, weights()[0].double())
    assert one.standard_error.isnan().all()
    log_w = torch.tensor([[-torch.inf, -torch.inf], [-torch.inf, 3.0]])
    zero = importance_log_marginal(lambda start, count: log_w[start : start + count], 2, 1)
    assert zero.log_marginal.tolist() == [-math.inf, pytest.approx(3 - math.log(2))]
    assert zero.effective_sample_size[1] == pytest.approx(1)
    assert zero.standard_error[0].isnan()
    assert zero.standard_error[1] == pytest.approx(1)


def test_the_prior_average_takes_shared_or_separate_draws() -> None:
    x = torch.tensor([0.3, -1.0, 2.0])
    z = normal((50, 1), 2)
    shared = prior_average_log_marginal(
        lambda z: -(x - z).square(), lambda start, count: z[start : start + count], 50, 8
    )
    separate = prior_average_log_marginal(
        lambda z: -(x - z).square(),
        lambda start, count: z[start : start + count].expand(-1, 3),
        50,
        50,
    )
    torch.testing.assert_close(shared.log_marginal, separate.log_marginal)
    expected = (-(x - z).square()).double().logsumexp(0) - math.log(50)
    torch.testing.assert_close(shared.log_marginal, expected)


def test_no_graph_is_kept() -> None:
    parameter = torch.ones(5, requires_grad=True)
    found = importance_log_marginal(lambda start, count: weights()[:count] * parameter, 9, 3)
    assert not found.log_marginal.requires_grad


def test_refuses() -> None:
    with pytest.raises(UserError, match="got 0 and 1"):
        importance_log_marginal(lambda start, count: weights(), 0, 1)
    with pytest.raises(UserError, match=r"must be \[4, B\], got \(101, 5\)"):
        importance_log_marginal(lambda start, count: weights(), 8, 4)
    with pytest.raises(UserError, match=r"must be \[4, B\], got \(4,\)"):
        importance_log_marginal(lambda start, count: weights()[:4, 0], 8, 4)


def test_chunk_size() -> None:
    assert chunk_size(1000, images=5, numbers_per_sample=7) == 1000 // (5 * 7 * 4) == 7
    assert chunk_size(280, images=5, numbers_per_sample=7, bytes_per_number=8) == 1
    with pytest.raises(UserError, match="takes 280 bytes, more than the 279 allowed"):
        chunk_size(279, images=5, numbers_per_sample=7, bytes_per_number=8)


def test_mean_and_standard_error() -> None:
    values = normal((77,), 3) + 1e6
    found = mean_and_standard_error(values)
    assert found.mean == pytest.approx(values.double().mean().item(), rel=1e-15)
    assert found.standard_error == pytest.approx(scipy.stats.sem(values.double().numpy()))
    assert math.isnan(mean_and_standard_error(values[:1]).standard_error)
    for wrong in (values[:0], values[None], values[0]):
        with pytest.raises(UserError, match="N ≥ 1"):
            mean_and_standard_error(wrong)
