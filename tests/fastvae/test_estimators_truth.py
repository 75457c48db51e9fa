"""Estimators of log p(x) on a linear-Gaussian model, whose log p(x) is known exactly.

x = W z + b + σ e with z, e standard normal: p(x) = N(b, W Wᵀ + σ² I), and p(z | x) is Gaussian.
"""

import math
from typing import NamedTuple

import pytest
import torch
from fastvae_kernels import normal
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from fastvae.estimators import (
    AnnealedEstimate,
    Estimate,
    annealed_log_marginal,
    importance_log_marginal,
    prior_average_log_marginal,
)


class LinearGaussian(NamedTuple):
    weight: Tensor  # [P, D]
    bias: Tensor  # [P]
    variance: float
    x: Tensor  # [B, P]

    def log_likelihood(self, z: Tensor) -> Tensor:
        """z [..., B, D] -> [..., B]."""
        error = self.x.to(z.dtype) - z @ self.weight.T.to(z.dtype) - self.bias.to(z.dtype)
        log_normalizer = math.log(2 * math.pi * self.variance)
        return -0.5 * (error.square() / self.variance + log_normalizer).sum(-1)

    @staticmethod
    def log_prior(z: Tensor) -> Tensor:
        return -0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)

    def log_marginal(self) -> Tensor:
        covariance = (
            self.weight @ self.weight.T + self.variance * torch.eye(len(self.bias)).double()
        )
        return MultivariateNormal(self.bias, covariance).log_prob(self.x)

    def posterior(self, widen: float = 1.0, shift: float = 0.0) -> MultivariateNormal:
        """p(z | x), or that moved by `shift` and `widen` times as wide."""
        precision = self.weight.T @ self.weight / self.variance
        covariance = torch.linalg.inv(precision + torch.eye(self.weight.shape[1]).double())
        mean = (self.x - self.bias) @ self.weight @ covariance / self.variance
        return MultivariateNormal(mean + shift, widen**2 * covariance)

    def row(self, rows: slice) -> "LinearGaussian":
        return self._replace(x=self.x[rows])


def linear_gaussian(images: int, latents: int, pixels: int, variance: float) -> LinearGaussian:
    weight = normal((pixels, latents), 1).double() / math.sqrt(latents)
    bias = normal((pixels,), 2).double()
    z, noise = normal((images, latents), 3).double(), normal((images, pixels), 4).double()
    x = z @ weight.T + bias + math.sqrt(variance) * noise
    return LinearGaussian(weight, bias, variance, x)


def log_weights(model: LinearGaussian, q: MultivariateNormal, samples: int) -> Tensor:
    """log p(x | z) + log p(z) − log q(z | x), z ~ q: [S, B]."""
    noise = normal((samples, *q.loc.shape), 5).double()
    z = q.loc + (q.scale_tril @ noise.unsqueeze(-1)).squeeze(-1)
    return model.log_likelihood(z) + model.log_prior(z) - q.log_prob(z)


def importance(log_w: Tensor, chunk: int = 999) -> Estimate:
    return importance_log_marginal(
        lambda start, count: log_w[start : start + count], len(log_w), chunk
    )


def initial_z(chains: int, images: int, latents: int, offset: int = 0) -> Tensor:
    return normal((images, chains, latents), 6, offset=offset).transpose(0, 1).double()


@pytest.mark.parametrize(("latents", "pixels"), [(2, 11), (5, 20)])
def test_the_exact_posterior_leaves_no_variance(latents: int, pixels: int) -> None:
    """Then the ELBO, which is one sample of it, is log p(x) too."""
    model = linear_gaussian(7, latents, pixels, 0.05)
    log_w = log_weights(model, model.posterior(), 33)
    torch.testing.assert_close(log_w, model.log_marginal().expand_as(log_w), atol=1e-10, rtol=1e-10)
    for samples in (1, 33):
        found = importance(log_w[:samples])
        torch.testing.assert_close(found.log_marginal, model.log_marginal(), atol=1e-10, rtol=1e-10)
        assert found.effective_sample_size.tolist() == pytest.approx([samples] * 7)
    assert found.standard_error.max() < 1e-6


def test_importance_samples_of_a_wrong_posterior() -> None:
    model = linear_gaussian(7, 3, 15, 0.1)
    q, truth = model.posterior(widen=1.3, shift=0.05), model.log_marginal()
    log_w = log_weights(model, q, 20_000)
    found = importance(log_w)
    error = (found.log_marginal - truth).abs()
    assert error.max() < 0.05
    assert (error < 4 * found.standard_error).all()
    # The ELBO, their mean, stays below by KL(q ‖ p(z | x)).
    gap = kl_divergence(q, model.posterior())
    assert gap.min() > 0.2
    torch.testing.assert_close(truth - log_w.mean(0), gap, atol=0.05, rtol=0)


def test_the_prior_average() -> None:
    model = linear_gaussian(7, 2, 10, 1.0)
    found = prior_average_log_marginal(
        lambda z: model.log_likelihood(z.unsqueeze(1)),  # the same draws for all images
        lambda start, count: normal((count, 2), 7, offset=start).double(),
        samples=200_000,
        chunk=30_001,
    )
    assert (found.log_marginal - model.log_marginal()).abs().max() < 0.05
    assert found.standard_error.max() < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("latents", "pixels", "variance"), [(2, 10, 0.3), (5, 20, 1.0)])
def test_annealing(latents: int, pixels: int, variance: float, dtype: torch.dtype) -> None:
    model = linear_gaussian(7, latents, pixels, variance)
    found = annealed_log_marginal(
        model.log_likelihood,
        model.log_prior,
        initial_z(1604, 7, latents).to(dtype),
        steps=300,
        seed=8,
    )
    error = (found.log_marginal - model.log_marginal()).abs()
    assert error.max() < 0.05
    assert (error < 4 * found.standard_error).all()
    assert (found.acceptance - 0.65).abs().max() < 0.1
    assert found.step_sizes.shape == (299, 7)


def test_annealing_is_unbiased() -> None:
    """mean exp(log_marginal) is p(x), though the step sizes adapt: 400 runs for one image."""
    model = linear_gaussian(1, 3, 12, 0.3)
    many = model._replace(x=model.x.expand(400, -1))
    found = annealed_log_marginal(
        many.log_likelihood,
        many.log_prior,
        initial_z(16, 400, 3).float(),
        steps=100,
        step_size=0.5,
        seed=9,
    )
    ratio = (found.log_marginal - model.log_marginal()).exp()
    error = ratio.std() / math.sqrt(400)
    assert error < 0.03
    assert (ratio.mean() - 1).abs() < 3 * error


def test_more_steps_come_nearer() -> None:
    model = linear_gaussian(11, 4, 16, 0.02)
    gaps = [
        (
            model.log_marginal()
            - annealed_log_marginal(
                model.log_likelihood, model.log_prior, initial_z(9, 11, 4), steps=steps, seed=10
            ).log_marginal
        ).mean()
        for steps in (1, 20, 300)
    ]
    assert gaps[0] > 3 * gaps[1] > 9 * gaps[2]
    assert gaps[2] > -0.2


def test_batches_change_nothing() -> None:
    model = linear_gaussian(7, 3, 12, 0.1)

    def estimate(first: int, last: int) -> AnnealedEstimate:
        part = model.row(slice(first, last))
        return annealed_log_marginal(
            part.log_likelihood,
            part.log_prior,
            initial_z(6, last - first, 3, offset=100 + first),
            steps=40,
            pilots=2,
            seed=11,
            offset=100 + first,
        )

    whole, parts = estimate(0, 7), [estimate(0, 3), estimate(3, 7)]
    for field in ("log_marginal", "standard_error", "acceptance"):
        joined = torch.cat([getattr(part, field) for part in parts])
        torch.testing.assert_close(getattr(whole, field), joined, rtol=1e-6, atol=1e-6)
