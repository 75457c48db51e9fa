"""The prior, and the posterior's parts that need no model around them."""

import torch
from torch import distributions

from fastvae import DiagonalGaussian, StandardNormal


def test_log_prob_is_that_of_a_standard_normal() -> None:
    z = torch.linspace(-4, 4, 30).view(6, 5)
    expected = distributions.Normal(0.0, 1.0).log_prob(z.double()).sum(1)
    torch.testing.assert_close(StandardNormal(5).log_prob(z).double(), expected, rtol=1e-6, atol=0)


def test_draws_are_standard_normal_and_rows_stand_alone() -> None:
    prior = StandardNormal(6)
    z = prior.sample(20000, 3, torch.device("cpu"))
    assert z.shape == (20000, 6)
    assert z.dtype == torch.float32
    assert (z.mean(0).abs() < 5 / 20000**0.5).all()
    assert (torch.cov(z.T) - torch.eye(6)).abs().max() < 5 * (2 / 20000) ** 0.5
    assert torch.equal(prior.sample(3, 3, torch.device("cpu")), z[:3])


def test_statistics_are_the_mean_and_then_the_log_variance() -> None:
    statistics = torch.arange(12.0).view(2, 6)
    q = DiagonalGaussian().distribution(statistics)
    assert q.mu.tolist() == [[0, 1, 2], [6, 7, 8]]
    assert q.logvar.tolist() == [[3, 4, 5], [9, 10, 11]]
