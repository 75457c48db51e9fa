"""What latents carry, beside torch.distributions and cases with a known answer."""

import math

import pytest
import torch
from fastvae_kernels import normal
from torch import Tensor
from torch.distributions import (
    Categorical,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    kl_divergence,
)

from fastvae.errors import UserError
from fastvae.estimators import active_units, elbo_surgery, kl_per_latent


def posteriors(images: int = 37, latents: int = 3) -> tuple[Tensor, Tensor]:
    mu = normal((images, latents), 0) * torch.tensor([2.0, 0.5, 0.0])[:latents] + 1
    return mu, normal((images, latents), 1) - 1


def test_kl_per_latent() -> None:
    mu, logvar = posteriors()
    q = Normal(mu.double(), (0.5 * logvar.double()).exp())
    expected = kl_divergence(q, Normal(0.0, 1.0)).mean(0)
    torch.testing.assert_close(kl_per_latent(mu, logvar), expected)
    assert kl_per_latent(torch.zeros(4, 2), torch.zeros(4, 2)).tolist() == [0, 0]


def test_active_units() -> None:
    base = normal((2000,), 2)
    base = (base - base.mean()) / base.std()
    mu = torch.stack([base * 0.099 + 1000, base * 0.101, base, torch.ones(2000)], 1).double()
    assert active_units(mu).tolist() == [False, True, True, False]
    assert active_units(mu, threshold=0.5).sum() == 1


@pytest.mark.parametrize("memory_bytes", [3 * 37 * 8, 5 * 3 * 37 * 8, 2**28])
def test_surgery_beside_a_mixture(memory_bytes: int) -> None:
    """q(z) is a mixture of N Gaussians; rows of any number at once."""
    mu, logvar = posteriors()
    mean, std = mu.double(), (0.5 * logvar.double()).exp()
    z = mean + std * normal((37, 3), 5).double()
    own = Independent(Normal(mean, std), 1)
    marginal = MixtureSameFamily(Categorical(logits=torch.zeros(37).double()), own)
    log_p = MultivariateNormal(torch.zeros(3).double(), torch.eye(3).double()).log_prob(z)

    found = elbo_surgery(mu, logvar, seed=5, memory_bytes=memory_bytes)
    information = (own.log_prob(z) - marginal.log_prob(z)).mean().item()
    assert found.mutual_information == pytest.approx(information, abs=1e-9)
    assert found.marginal_kl == pytest.approx(
        (marginal.log_prob(z) - log_p).mean().item(),
        abs=1e-5,  # z meets the prior in float32
    )
    assert found.kl == pytest.approx(found.mutual_information + found.marginal_kl, abs=1e-12)
    assert found.kl == pytest.approx((own.log_prob(z) - log_p).mean().item(), abs=1e-5)
    assert found.ceiling == math.log(37)


def test_surgery_where_q_is_gaussian() -> None:
    """μ = a u with u ~ N(0, I) makes q(z) = N(0, a² + σ²)."""
    images, scale, std = 4000, torch.tensor([1.0, 0.6]), torch.tensor([0.4, 0.5])
    logvar = (2 * std.log()).expand(images, -1)
    found = elbo_surgery(normal((images, 2), 3) * scale, logvar, seed=4)
    total = (scale.square() + std.square()).sqrt()
    information = (total / std).log().sum().item()
    marginal = kl_divergence(Normal(0.0, total), Normal(0.0, 1.0)).sum().item()
    assert found.mutual_information == pytest.approx(information, abs=0.05)
    assert found.marginal_kl == pytest.approx(marginal, abs=0.05)


def test_a_prior_of_any_kind() -> None:
    mu, logvar = posteriors()
    seen = []

    def log_prior(z: Tensor) -> Tensor:
        assert z.dtype == mu.dtype
        seen.append(len(z))
        return Independent(Normal(1.0, torch.full((3,), 2.0)), 1).log_prob(z)

    found = elbo_surgery(mu, logvar, log_prior, seed=5, memory_bytes=10 * 3 * 37 * 8)
    standard = elbo_surgery(mu, logvar, seed=5)
    assert seen == [10, 10, 10, 7]
    assert found.mutual_information == pytest.approx(standard.mutual_information, abs=1e-12)
    z = mu + (0.5 * logvar).exp() * normal((37, 3), 5)
    difference = (log_prior(z) - Normal(0.0, 1.0).log_prob(z).sum(1)).mean().item()
    assert standard.marginal_kl - found.marginal_kl == pytest.approx(difference, abs=1e-5)


@pytest.mark.parametrize("logvar", [-10.0, -40.0, -80.0])
def test_narrow_posteriors_reach_the_ceiling_and_no_more(logvar: float) -> None:
    """Far from the origin, where a quadratic form in float32 would have lost every digit."""
    mu = normal((50, 3), 6) + 300
    found = elbo_surgery(mu, torch.full_like(mu, logvar), seed=7)
    assert found.mutual_information == pytest.approx(math.log(50), abs=1e-6)
    assert found.mutual_information <= math.log(50) + 1e-9


@pytest.mark.parametrize(("logvar", "tolerance"), [(-16.0, 1e-6), (-70.0, 3.0)])
def test_images_that_are_met_twice(logvar: float, tolerance: float) -> None:
    """Half of the images can be told apart, or as near as float64 comes to saying so."""
    mu = (normal((25, 3), 6) + 300).repeat(2, 1)
    found = elbo_surgery(mu, torch.full_like(mu, logvar), seed=7)
    assert found.mutual_information == pytest.approx(math.log(25), abs=tolerance)


def test_a_collapsed_posterior_carries_nothing() -> None:
    zeros = torch.zeros(40, 3)
    found = elbo_surgery(zeros, zeros, seed=8)
    assert found.mutual_information == pytest.approx(0, abs=1e-12)
    assert found.marginal_kl == pytest.approx(0, abs=1e-6)


def test_refuses() -> None:
    mu, logvar = posteriors()
    with pytest.raises(UserError, match="both be"):
        kl_per_latent(mu, logvar[:, :2])
    with pytest.raises(UserError, match="N ≥ 1"):
        elbo_surgery(mu[:0], logvar[:0], seed=0)
    with pytest.raises(UserError, match="at least two"):
        active_units(mu[:1])
    with pytest.raises(UserError, match="log_prior"):
        elbo_surgery(mu, logvar, lambda z: z, seed=0)
    with pytest.raises(UserError, match="bytes"):
        elbo_surgery(mu, logvar, seed=0, memory_bytes=100)
