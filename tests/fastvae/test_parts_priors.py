"""Priors: densities, draws and divergences, against torch.distributions in float64."""

import math
from typing import Any

import pytest
import torch
from small_models import grey_images, make_vae
from torch import Tensor, distributions

from fastvae import (
    Batch,
    ClassNormal,
    Gaussian,
    GaussianMixture,
    GaussianPrior,
    LatentGaussian,
    MixturePrior,
    NoPrior,
    StandardNormal,
    VampPrior,
)
from fastvae.errors import UserError

CPU = torch.device("cpu")


def unused(images: Tensor) -> LatentGaussian:
    raise AssertionError("this prior has nothing to ask the encoder")


def some_mixture(components: int = 4, latent_dim: int = 3) -> MixturePrior:
    torch.manual_seed(4)
    prior = GaussianMixture(latent_dim, components)
    with torch.no_grad():
        prior.logits.normal_()
        prior.logvar.normal_()
    return prior.distribution(None, unused)  # type: ignore[return-value]


def in_float64(p: MixturePrior) -> distributions.MixtureSameFamily:
    weights = distributions.Categorical(logits=p.log_weights.double())
    components = distributions.Normal(p.mu.double(), (0.5 * p.logvar.double()).exp())
    return distributions.MixtureSameFamily(weights, distributions.Independent(components, 1))


# Densities


def test_log_prob_is_that_of_a_standard_normal() -> None:
    z = torch.linspace(-4, 4, 30).view(6, 5)
    expected = distributions.Normal(0.0, 1.0).log_prob(z.double()).sum(1)
    torch.testing.assert_close(StandardNormal(5).log_prob(z).double(), expected, rtol=1e-6, atol=0)


def test_log_prob_of_a_gaussian_for_each_row() -> None:
    mu, logvar, z = torch.randn(3, 4, 5)
    expected = distributions.Normal(mu.double(), (0.5 * logvar.double()).exp())
    p = GaussianPrior(mu, logvar)
    for draws in (z, z.expand(3, 4, 5)):
        torch.testing.assert_close(
            p.log_prob(draws).double(),
            expected.log_prob(draws.double()).sum(-1),
            rtol=1e-5,
            atol=1e-5,
        )


def test_log_prob_of_a_mixture() -> None:
    p = some_mixture()
    z = 3 * torch.randn(2, 7, 3)
    found = p.log_prob(z)
    assert found.shape == (2, 7)
    torch.testing.assert_close(
        found.double(), in_float64(p).log_prob(z.double()), rtol=1e-5, atol=1e-5
    )
    far = torch.full((1, 3), 1e3)
    torch.testing.assert_close(p.log_prob(far).double(), in_float64(p).log_prob(far.double()))


def test_each_class_has_a_gaussian_of_its_own() -> None:
    prior = ClassNormal(2, 3)
    with torch.no_grad():
        prior.mu.copy_(torch.arange(6).view(3, 2))
        prior.logvar.copy_(-torch.arange(6).view(3, 2))
    labels = torch.tensor([2, 0, 1, 2])
    p: Any = prior.distribution(torch.eye(3)[labels], unused)
    assert torch.equal(p.mu, prior.mu[labels])
    assert torch.equal(p.logvar, prior.logvar[labels])
    p.log_prob(torch.zeros(4, 2))[:1].sum().backward()
    assert prior.mu.grad is not None
    assert prior.mu.grad.abs().sum(1).tolist() == [
        0,
        0,
        pytest.approx(prior.mu.grad[2].abs().sum()),
    ]
    fresh: Any = ClassNormal(2, 3).distribution(torch.eye(3), unused)
    z = torch.randn(3, 2)
    torch.testing.assert_close(fresh.log_prob(z), StandardNormal(2).log_prob(z))


# Divergences


def some_posterior(rows: int = 4, latent_dim: int = 3) -> LatentGaussian:
    torch.manual_seed(5)
    return LatentGaussian(torch.randn(rows, latent_dim), torch.randn(rows, latent_dim))


def test_divergence_from_a_gaussian_with_its_four_gradients() -> None:
    q = some_posterior()
    values = [q.mu, q.logvar, *torch.randn(2, 4, 3)]
    found = [x.clone().requires_grad_() for x in values]
    exact = [x.double().requires_grad_() for x in values]
    p = GaussianPrior(*found[2:])
    z, kl = p.reparameterize_kl(LatentGaussian(*found[:2]), 2, 3, 0, "auto")
    assert z.shape == (2, 4, 3)
    expected = distributions.kl_divergence(
        distributions.Normal(exact[0], (0.5 * exact[1]).exp()),
        distributions.Normal(exact[2], (0.5 * exact[3]).exp()),
    )
    of_each = p.kl_of_each_latent(LatentGaussian(*found[:2]))
    torch.testing.assert_close(kl.double(), expected.sum(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(of_each.double(), expected, rtol=1e-5, atol=1e-6)
    weight = torch.rand(4)
    gradients = torch.autograd.grad((weight * kl).sum(), found)
    again = torch.autograd.grad((weight @ of_each).sum(), found)
    truth = torch.autograd.grad((weight.double() @ expected).sum(), exact)
    for a, b, c in zip(gradients, again, truth, strict=True):
        torch.testing.assert_close(a.double(), c, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(b.double(), c, rtol=1e-4, atol=1e-5)


def test_divergence_of_each_latent_from_the_standard_normal() -> None:
    q = some_posterior()
    exact = distributions.Normal(q.mu.double(), (0.5 * q.logvar.double()).exp())
    standard = distributions.Normal(torch.zeros(4, 3).double(), torch.ones(4, 3).double())
    expected = distributions.kl_divergence(exact, standard)
    found = StandardNormal(3).kl_of_each_latent(q).double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_prior_of_another_dtype_is_not_rounded() -> None:
    q = LatentGaussian(torch.zeros(1, 3).bfloat16(), torch.zeros(1, 3).bfloat16())
    p = GaussianPrior(torch.full((1, 3), 1.001), torch.zeros(1, 3))
    _, kl = p.reparameterize_kl(q, 1, 0, 0, "auto")
    assert kl.item() == pytest.approx(3 * 0.5 * 1.001**2, rel=1e-5)


def test_divergence_from_a_mixture_is_right_on_average() -> None:
    """One latent, against an integral."""
    p = some_mixture(latent_dim=1)
    rows = 40000
    q = LatentGaussian(torch.tensor([[0.4]]), torch.tensor([[-0.7]]))
    z = torch.linspace(-15, 15, 20001, dtype=torch.float64)
    log_q = distributions.Normal(0.4, math.exp(-0.35)).log_prob(z)
    log_p = in_float64(p).log_prob(z.unsqueeze(1))
    exact = (log_q.exp() * (log_q - log_p)).sum() * (z[1] - z[0])
    wide = LatentGaussian(*(x.expand(rows, 1) for x in q))
    z_one, kl_one = p.reparameterize_kl(wide, 1, 3, 0, "auto")
    z_five, kl_five = p.reparameterize_kl(wide, 5, 3, 0, "auto")
    for kl in (kl_one, kl_five):
        error = kl.double().std() / math.sqrt(rows)
        assert error < 0.02
        assert abs(kl.double().mean() - exact) < 5 * error
    assert kl_five.std() < 0.6 * kl_one.std()
    assert torch.equal(z_five[:1], z_one)


def test_a_divergence_of_each_latent_needs_a_prior_that_factorises() -> None:
    with pytest.raises(UserError, match="--prior standard-normal or class-normal"):
        some_mixture().kl_of_each_latent(some_posterior())
    priors = [StandardNormal(2), ClassNormal(2, 3), GaussianMixture(2), VampPrior((1, 2, 2))]
    assert [prior.factorises for prior in priors] == [True, True, False, False]


# Draws


def every_prior(rows: int) -> dict[str, Any]:
    torch.manual_seed(6)
    mu, logvar = torch.randn(2, rows, 6)
    return {
        "standard": StandardNormal(6),
        "rows": GaussianPrior(mu, logvar),
        "mixture": some_mixture(5, 6),
    }


def test_draws_are_standard_normal() -> None:
    z = StandardNormal(6).sample(20000, 3, CPU)
    assert z.shape == (20000, 6)
    assert z.dtype == torch.float32
    assert (z.mean(0).abs() < 5 / 20000**0.5).all()
    assert (torch.cov(z.T) - torch.eye(6)).abs().max() < 5 * (2 / 20000) ** 0.5


@pytest.mark.parametrize("name", every_prior(1))
def test_a_draw_depends_on_its_seed_and_place_alone(name: str) -> None:
    p = every_prior(9)[name]
    z = p.sample(9, 3, CPU, offset=20)
    assert torch.equal(z, p.sample(9, torch.tensor(3), CPU, offset=torch.tensor([20])))
    assert not torch.equal(z, p.sample(9, 4, CPU, offset=20))
    part = GaussianPrior(p.mu[4:7], p.logvar[4:7]) if name == "rows" else p
    assert torch.equal(part.sample(3, 3, CPU, offset=24), z[4:7])
    if name != "rows":
        assert torch.equal(p.sample(29, 3, CPU)[20:], z)
    assert (z[0] - z[1]).abs().min() > 0


def test_draws_for_each_row_are_of_its_gaussian() -> None:
    mu, std = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, 2.0]])
    p = GaussianPrior(mu.expand(20000, 2), 2 * std.log().expand(20000, 2))
    z = p.sample(20000, 1, CPU)
    assert ((z.mean(0) - mu).abs() < 5 * std / math.sqrt(20000)).all()
    assert ((z.std(0) / std - 1).abs() < 5 / math.sqrt(2 * 20000)).all()
    with pytest.raises(UserError, match="made for 20000 rows, asked for 3"):
        p.sample(3, 1, CPU)


def test_components_are_drawn_as_often_as_they_weigh() -> None:
    """Far apart, so that each draw tells its component."""
    weights = torch.tensor([0.05, 0.6, 0.0, 0.35])
    mu = torch.arange(4).float().view(4, 1) * 100
    logvar = torch.tensor([[0.0], [2.0], [0.0], [-2.0]])
    p = MixturePrior(weights.log(), mu, logvar)
    z, rows = p.sample(40000, 2, CPU), 40000
    component = (z[:, 0] / 100).round().long()
    shares = torch.bincount(component, minlength=4) / rows
    assert ((shares - weights).abs() <= 5 * (weights * (1 - weights) / rows).sqrt()).all()
    for k in (0, 1, 3):
        own = z[component == k, 0] - 100 * k
        std = math.exp(logvar[k].item() / 2)
        assert abs(own.mean()) < 5 * std / math.sqrt(len(own))
        assert abs(own.std() / std - 1) < 5 / math.sqrt(2 * len(own))
    # What a component draws does not follow from why it was chosen.
    assert z[component == 1, 0].sort().values.diff().max() < 5


# The VampPrior


def vamp_model() -> Any:
    vae = make_vae(image_shape=(1, 3, 4), latent_dim=2, prior=VampPrior((1, 3, 4), 5))
    with torch.no_grad():
        for parameter in vae.encoder.parameters():
            parameter.mul_(3.0)
    return vae


def test_vamp_prior_is_the_mixture_of_the_encoders_answers() -> None:
    vae = vamp_model()
    p: Any = vae.prior_of(None)
    mu, logvar = vae.encode(torch.sigmoid(vae.prior.pseudo_inputs))
    assert torch.equal(p.mu, mu)
    assert torch.equal(p.logvar, logvar)
    assert mu.std(0).min() > 0.01
    z = torch.randn(6, 2)
    of_each = distributions.Normal(mu.double(), (0.5 * logvar.double()).exp())
    exact = of_each.log_prob(z.double().unsqueeze(1)).sum(-1).exp().mean(1).log()
    torch.testing.assert_close(p.log_prob(z).double(), exact, rtol=1e-5, atol=1e-5)


def test_vamp_prior_is_learned_with_the_encoder() -> None:
    vae = vamp_model()
    vae.prior_of(None).log_prob(torch.randn(6, 2)).sum().backward()
    for parameter in (vae.prior.pseudo_inputs, *vae.encoder.parameters()):
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in vae.decoder.parameters())


@pytest.mark.parametrize("count", [3, 5, 9])
def test_vamp_prior_starts_at_images(count: int) -> None:
    vae, images = vamp_model(), grey_images(count, (1, 3, 4))
    before = torch.sigmoid(vae.prior.pseudo_inputs.detach())
    vae.prior.initialize_from(images)
    found = torch.sigmoid(vae.prior.pseudo_inputs.detach())
    used = min(count, 5)
    expected = (images[:used].float() / 255).clamp(0.02, 0.98)
    torch.testing.assert_close(found[:used], expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(found[used:], before[used:])
    assert vae.prior.pseudo_inputs.requires_grad


# In a model


def test_a_prior_for_each_class_in_a_model() -> None:
    vae = make_vae(latent_dim=3, prior=ClassNormal(3, 4), likelihood=Gaussian(), num_classes=4)
    with torch.no_grad():
        vae.prior.mu.normal_()
    x, labels = grey_images(4, (1, 8, 8)), torch.tensor([3, 1, 1, 0])
    mu, logvar = vae.encode(x, labels)
    expected = distributions.kl_divergence(
        distributions.Normal(mu.double(), (0.5 * logvar.double()).exp()),
        distributions.Normal(vae.prior.mu[labels].double(), 1.0),
    ).sum(1)
    found = vae(Batch(x, labels), 0).kl.double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="give the model num_classes"):
        make_vae(latent_dim=3, prior=ClassNormal(3, 4))


def test_no_prior() -> None:
    prior = NoPrior()
    p = prior.distribution(None, unused)
    with pytest.raises(UserError, match="fastvae sample RUN --sampler mixture"):
        p.sample(3, 0, CPU)
    with pytest.raises(UserError, match="no prior, so no z has a density"):
        p.log_prob(torch.zeros(2, 3))
    for use in (
        lambda: p.reparameterize_kl(some_posterior(), 1, 0, 0, "auto"),
        lambda: p.kl_of_each_latent(some_posterior()),
    ):
        with pytest.raises(UserError, match="no prior to measure a KL from"):
            use()
    assert not prior.is_distribution


def test_impossible_numbers_of_components() -> None:
    for make in (lambda: GaussianMixture(2, 0), lambda: VampPrior((1, 2, 2), 0)):
        with pytest.raises(UserError, match="at least 1 component, got 0"):
            make()


def test_equal_components_would_stay_equal() -> None:
    assert GaussianMixture(3, 6).mu.detach().std(0).min() > 0.1
