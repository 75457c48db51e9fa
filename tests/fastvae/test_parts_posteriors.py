"""Posteriors: statistics become a distribution, its draws and its divergence from the prior."""

import math
from typing import Any

import pytest
import torch
from fastvae_kernels import normal
from torch import Tensor, distributions

from fastvae import Deterministic, DiagonalGaussian, LatentGaussian, StandardNormal
from fastvae.errors import UserError


def draw(
    posterior: Any, statistics: Tensor, samples: int = 1, seed: int = 7, offset: int = 0
) -> Any:
    prior = StandardNormal(statistics.shape[1] // posterior.statistics_per_latent)
    return posterior.draw(statistics, prior, samples, seed, offset, "auto")


def test_statistics_are_the_mean_and_then_the_log_variance() -> None:
    q = DiagonalGaussian().moments(torch.arange(12.0).view(2, 6))
    assert q.mu.tolist() == [[0, 1, 2], [6, 7, 8]]
    assert q.logvar.tolist() == [[3, 4, 5], [9, 10, 11]]


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("scale", ["logvar", "softplus"])
def test_draws_and_divergence(scale: Any, samples: int) -> None:
    torch.manual_seed(0)
    statistics = torch.randn(5, 6)
    z, kl, q = draw(DiagonalGaussian(scale), statistics, samples, offset=30)
    mu, second = statistics.double().chunk(2, 1)
    std = (0.5 * second).exp() if scale == "logvar" else torch.log1p(second.exp())
    exact = distributions.Normal(mu, std)
    standard = distributions.Normal(torch.zeros_like(mu), torch.ones_like(mu))
    expected = distributions.kl_divergence(exact, standard).sum(1)
    torch.testing.assert_close(kl.double(), expected, rtol=1e-5, atol=1e-6)
    assert z.shape == (samples, 5, 3)
    torch.testing.assert_close(
        z[0].double(), mu + std * normal((5, 3), 7, offset=30), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        q.log_prob(z).double(), exact.log_prob(z.double()).sum(-1), rtol=1e-5, atol=1e-5
    )
    assert torch.equal(z[0], draw(DiagonalGaussian(scale), statistics, offset=30).z[0])
    standard_z = (z.double() - mu) / std
    distances = (standard_z.unsqueeze(1) - standard_z).abs().mean((2, 3))
    assert (distances + 9 * torch.eye(samples)).min() > 0.3


def test_draws_are_of_the_right_spread() -> None:
    statistics = torch.tensor([[0.5, -1.0, math.log(0.25), 0.0]])
    z = draw(DiagonalGaussian(), statistics, 40000).z[:, 0]
    std = torch.tensor([0.5, 1.0])
    assert ((z.mean(0) - statistics[0, :2]).abs() < 5 * std / 200).all()
    assert ((z.var(0) / std.square() - 1).abs() < 5 * math.sqrt(2 / 40000)).all()


def test_softplus_scale_everywhere() -> None:
    """log σ² = 2 log softplus(s), also where softplus(s) underflows, with its gradient
    2 sigmoid(s) / softplus(s)."""
    s = torch.tensor([-1e30, -1e4, -104.0, -50.0, -15.1, -15.0, -14.9, -3.0, 0.0, 5.0, 80.0, 1e30])
    s.requires_grad_()
    logvar = DiagonalGaussian("softplus").moments(torch.stack([s * 0, s], 1)).logvar[:, 0]
    exact = s.detach().double()
    softplus = torch.logaddexp(exact, torch.zeros(()).double())
    # Far below 0, log softplus(s) = s − e^s / 2 + … = s in float64.
    expected = 2 * torch.where(exact < -40, exact, softplus.log())
    torch.testing.assert_close(logvar.double(), expected, rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(logvar.sum(), s)
    slope = torch.where(exact < -40, 1.0, torch.sigmoid(exact) / softplus)
    torch.testing.assert_close(gradient.double(), 2 * slope, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_softplus_scale_in_half_precision(dtype: torch.dtype) -> None:
    s = torch.linspace(-60000, 60000, 501).to(dtype).requires_grad_()
    q = DiagonalGaussian("softplus").moments(torch.stack([s * 0, s], 1))
    assert q.logvar.dtype == dtype
    (gradient,) = torch.autograd.grad(q.logvar.float().clamp(-1e4, 1e4).sum(), s)
    assert not q.logvar.isnan().any()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("scale", ["logvar", "softplus"])
def test_gradients_of_draws_and_divergence(scale: Any) -> None:
    """Against autograd through the formulas in float64."""
    torch.manual_seed(1)
    statistics = torch.randn(4, 6)
    found, exact = statistics.clone().requires_grad_(), statistics.double().requires_grad_()
    z, kl, _ = draw(DiagonalGaussian(scale), found, 3)
    weight = torch.randn(3, 4, 3)
    ((z * weight).sum() + kl.sum()).backward()
    mu, second = exact.chunk(2, 1)
    std = (0.5 * second).exp() if scale == "logvar" else torch.log1p(second.exp())
    noise = ((z.double() - mu) / std).detach()
    kl_exact = 0.5 * (mu.square() + std.square() - 1) - std.log()
    (((mu + std * noise) * weight).sum() + kl_exact.sum()).backward()
    assert found.grad is not None and exact.grad is not None
    torch.testing.assert_close(found.grad.double(), exact.grad, rtol=1e-4, atol=1e-4)


def test_a_point() -> None:
    posterior = Deterministic()
    statistics = torch.randn(4, 3, requires_grad=True)
    z, kl, q = draw(posterior, statistics)
    assert torch.equal(z, statistics.unsqueeze(0))
    assert kl.tolist() == [0] * 4
    (gradient,) = torch.autograd.grad(z.sum(), statistics)
    assert torch.equal(gradient, torch.ones(4, 3))
    mu, logvar = posterior.moments(statistics)
    assert torch.equal(mu, statistics)
    assert torch.equal(LatentGaussian(mu, logvar).std, torch.zeros(4, 3))
    assert not q.detached().mu.requires_grad
    with pytest.raises(UserError, match="--posterior diagonal-gaussian or inverse-autoregressive"):
        q.log_prob(z)
    with pytest.raises(UserError, match="asked for 2: use --num-samples 1"):
        draw(posterior, statistics, 2)


def test_a_detached_gaussian_passes_gradients_through_z_alone() -> None:
    mu, logvar, z = torch.randn(3, 4, 2).requires_grad_().unbind()
    q = LatentGaussian(mu, logvar)
    assert torch.equal(q.detached().log_prob(z), q.log_prob(z))
    found = torch.autograd.grad(q.detached().log_prob(z).sum(), (mu, logvar, z), allow_unused=True)
    assert found[0] is None and found[1] is None and found[2] is not None


def test_unknown_scale() -> None:
    with pytest.raises(UserError, match="logvar or softplus, got 'std'"):
        DiagonalGaussian("std")  # type: ignore[arg-type]


def test_what_each_is() -> None:
    found = [(p.is_distribution, p.is_gaussian) for p in (DiagonalGaussian(), Deterministic())]
    assert found == [(True, True), (False, False)]
