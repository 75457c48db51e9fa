"""Refinement: better statistics for each image, and what is learned from them."""

from typing import Any

import pytest
import torch
from small_models import grey_images, make_vae, rough
from torch import Tensor, distributions, nn

from fastvae import VAE, Batch, Gaussian, ImportanceWeighted, LatentGaussian, Refinement, Table
from fastvae.errors import UserError
from fastvae.noise import REFINE, stream
from fastvae.refinement import refine

SHAPE = (1, 2, 3)


class Linear(nn.Module):
    """x = W z + b, with columns of W at right angles: the exact posterior is diagonal."""

    def __init__(self) -> None:
        super().__init__()
        orthogonal = torch.linalg.qr(torch.randn(6, 2, generator=torch.Generator().manual_seed(1)))
        self.weight = nn.Parameter(orthogonal.Q * torch.tensor([1.0, 0.4]))
        self.bias = nn.Parameter(torch.linspace(0, 1, 6))

    def forward(self, z: Tensor) -> Tensor:
        return (z @ self.weight.T + self.bias).view(-1, *SHAPE)


def linear_model(plan: Refinement | None, table: bool = False) -> VAE:
    torch.manual_seed(0)
    encoder: nn.Module = nn.Sequential(nn.Flatten(), nn.Linear(6, 4))
    if table:
        encoder = Table(9, 4)
    likelihood = Gaussian(0.05)
    return VAE(encoder, Linear(), likelihood, image_shape=SHAPE, latent_dim=2, refinement=plan)


def exact_posterior(vae: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Bishop 2006, equations 2.116 and 2.117: mean `[B, D]` and variances `[D]`."""
    weight, bias = vae.decoder.weight.detach().double(), vae.decoder.bias.detach().double()
    precision = torch.eye(2).double() + weight.T @ weight / 0.05
    covariance = torch.linalg.inv(precision)
    mean = (x.double() / 255 - bias.view(SHAPE)).flatten(1) @ weight @ covariance / 0.05
    return mean, covariance.diagonal()


@pytest.mark.parametrize("table", [False, True])
def test_it_finds_the_exact_posterior(table: bool) -> None:
    vae, x = linear_model(Refinement(600, 0.05), table), grey_images(40, SHAPE)
    mean, variance = exact_posterior(vae, x)

    def divergence(q: LatentGaussian) -> Tensor:
        found = distributions.Normal(q.mu.double(), (0.5 * q.logvar.double()).exp())
        exact = distributions.Normal(mean, variance.sqrt())
        return distributions.kl_divergence(found, exact).sum(1)

    with torch.no_grad():
        start, found = linear_model(Refinement(0)).encode(x), vae.encode(x)
    # What remains is the noise of one draw of z in each step.
    assert divergence(start).mean() > 5
    assert divergence(found).mean() < 0.03
    assert divergence(found).max() < 0.15
    errors = (found.mu - mean) / variance.sqrt()
    assert errors.mean(0).abs().max() < 5 * 0.15 / len(x) ** 0.5
    assert not found.mu.requires_grad


def test_the_bound_becomes_tight() -> None:
    """log p(x) = log N(x; b, W Wᵀ + σ²)."""
    vae, x = linear_model(Refinement(600, 0.05)), grey_images(12, SHAPE)
    weight = vae.decoder.weight.detach().double()
    covariance = weight @ weight.T + 0.05 * torch.eye(6)
    normal = distributions.MultivariateNormal(vae.decoder.bias.detach().double(), covariance)
    exact = normal.log_prob((x.double() / 255).flatten(1)).mean()
    found = vae(x, 5, num_samples=500).elbo.double().mean()
    assert -0.05 < exact - found < 0.05
    plain = linear_model(None)(x, 5, num_samples=500).elbo.mean()
    assert exact - plain > 1


def test_an_answer_does_not_depend_on_its_batch() -> None:
    vae, x = rough(make_vae(refinement=Refinement(10))), grey_images(7, (1, 8, 8))
    whole = vae.infer(Batch(x), 3, 100)
    part = vae.infer(Batch(x[2:5]), 3, 102)
    assert whole.first_gradient is not None and part.first_gradient is not None
    assert (whole.statistics - whole.start).abs().mean() > 0.05
    for a, b in (
        (whole.start, part.start),
        (whole.statistics, part.statistics),
        (whole.first_gradient, part.first_gradient),
    ):
        torch.testing.assert_close(b, a[2:5], rtol=1e-3, atol=1e-4)
    other = vae.infer(Batch(x[2:5]), 3, 103)
    assert not torch.allclose(other.statistics, part.statistics, atol=1e-3)


def gradients(vae: VAE, loss: Tensor) -> dict[str, Tensor | None]:
    names, parameters = zip(*vae.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return dict(zip(names, found, strict=True))


def assert_same(found: Tensor | None, expected: Tensor | None) -> None:
    assert found is not None and expected is not None
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_encoder_learns_where_the_search_began_and_the_decoder_where_it_ended() -> None:
    vae, x = (
        rough(make_vae(refinement=Refinement(3), likelihood=Gaussian())),
        grey_images(5, (1, 8, 8)),
    )
    terms = vae(x, 3, 100, num_samples=2)
    found = gradients(vae, -terms.elbo.sum())

    observed = x.float() / 255
    first = vae.terms(vae.encoder(observed), observed, None, stream(3, REFINE), 100)
    plain = gradients(vae, -first.elbo.sum())
    inferred = vae.infer(Batch(x), 3, 100)
    last = vae.terms(inferred.statistics, observed, None, 3, 100, 2)
    assert torch.equal(terms.kl, last.kl)
    assert torch.equal(terms.nll, last.nll)
    refined = gradients(vae, -last.elbo.sum())
    for name in found:
        if name.startswith("encoder"):
            assert_same(found[name], plain[name])
            assert refined[name] is None
        else:
            assert_same(found[name], refined[name])
    assert not torch.allclose(plain["decoder.head.weight"], refined["decoder.head.weight"])  # type: ignore[arg-type]


def test_the_encoder_learns_alike_under_every_objective() -> None:
    """Its gradient is the ELBO's, whatever weighs the refined draws."""
    vae, x = rough(make_vae(refinement=Refinement(2))), grey_images(3, (1, 8, 8))
    place = torch.zeros(3, dtype=torch.int64)
    terms = vae(x, 3, num_samples=4)
    plain = gradients(vae, -vae(x, 3, num_samples=4).elbo.sum())
    for doubly in (False, True):
        objective = ImportanceWeighted(4, 2, doubly_reparameterized=doubly)
        loss = objective(terms, place, torch.tensor(0)).sum()
        found = torch.autograd.grad(loss, vae.encoder.head.weight, retain_graph=True)[0]
        assert_same(found, plain["encoder.head.weight"])


def test_searching_leaves_no_trace() -> None:
    vae, x = make_vae(refinement=Refinement(3)), grey_images(3, (1, 8, 8))
    with torch.no_grad():
        terms = vae(x, 1)
    assert not terms.nll.requires_grad
    assert all(parameter.grad is None for parameter in vae.parameters())
    assert torch.equal(vae(x, 1).elbo, terms.elbo)


def test_steps_by_hand() -> None:
    """Adam with a falling rate on (s − t)², elementwise; each step has a seed of its own."""
    seeds = []

    def loss(s: Tensor, seed: Any) -> Tensor:
        seeds.append(seed)
        return (s - torch.tensor([1.0, -100.0])).square().sum(1)

    start = torch.zeros(2, 2, requires_grad=True)
    statistics, first = refine(loss, start, Refinement(2, 0.1), 5)
    assert first.tolist() == [[-2.0, 200.0]] * 2
    # The first step is 0.1 against the sign; the second is half as long.
    a = torch.tensor([1.0, -100.0])
    g1, g2 = -2 * a, 2 * (0.1 * a.sign() - a)
    mean, square = (0.09 * g1 + 0.1 * g2) / 0.19, (0.0099 * g1**2 + 0.01 * g2**2) / 0.0199
    expected = 0.1 * a.sign() - 0.05 * mean / square.sqrt()
    torch.testing.assert_close(statistics, expected.expand(2, 2))
    assert len(set(seeds)) == 2
    assert not statistics.requires_grad and not first.requires_grad
    nothing = refine(loss, start, Refinement(0), 5)
    assert torch.equal(nothing.statistics, start.detach())


# A table of statistics


def test_a_table_looks_its_images_up() -> None:
    vae, x = linear_model(Refinement(5), table=True), grey_images(4, SHAPE)
    with torch.no_grad():
        vae.encoder.statistics.weight.normal_()
    places = torch.tensor([7, 0, 7, 3])
    rows = vae.encoder.statistics.weight[places]
    inferred = vae.infer(Batch(x, None, places), 0)
    assert torch.equal(inferred.statistics, rows)
    assert inferred.first_gradient is None
    q = vae.encode(x, indices=places)
    assert torch.equal(torch.cat(q, 1), rows)
    vae(Batch(x, None, places), 0).elbo.sum().backward()
    touched = vae.encoder.statistics.weight.grad.abs().sum(1) > 0
    assert touched.nonzero().flatten().tolist() == [0, 3, 7]


def test_images_that_a_table_has_not_seen_start_at_the_prior() -> None:
    vae, x = linear_model(Refinement(5), table=True), grey_images(4, SHAPE)
    with torch.no_grad():
        vae.encoder.statistics.weight.normal_()
    inferred = vae.infer(Batch(x), 0)
    assert inferred.start.abs().max() == 0
    assert inferred.statistics.abs().max() > 0.1
    vae.refinement = Refinement(0)
    mu, logvar = vae.encode(x)
    assert mu.abs().max() == logvar.abs().max() == 0
    assert vae(x, 0).kl.abs().max() == 0


def test_a_fresh_table_is_at_the_prior() -> None:
    table = Table(3, 4)
    assert table(torch.tensor([2, 0])).tolist() == [[0.0] * 4] * 2


def test_a_table_needs_a_refinement() -> None:
    with pytest.raises(UserError, match="give the model a refinement"):
        linear_model(None, table=True)
