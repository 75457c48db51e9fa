"""The inverse autoregressive flow: a density that is that of its draws."""

import ast
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import grey_images, make_vae
from torch import Tensor, distributions

import fastvae
from fastvae import (
    ELBO,
    VAE,
    Batch,
    DiagonalGaussian,
    ImportanceWeighted,
    InverseAutoregressive,
    StandardNormal,
)
from fastvae.errors import UserError
from fastvae.training.step import TrainingStep

IMPORTS = (ast.Import, ast.ImportFrom)


def bent(
    latent_dim: int, layers: int = 2, hidden: tuple[int, ...] = (12, 12), by: float = 0.5
) -> Any:
    """A flow whose weights are moved away from the identity."""
    torch.manual_seed(2)
    flow = InverseAutoregressive(latent_dim, layers, hidden)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    return flow


def draw(flow: Any, statistics: Tensor, samples: int = 1, seed: int = 7, offset: int = 0) -> Any:
    prior = StandardNormal(statistics.shape[1] // 3)
    return flow.draw(statistics, prior, samples, seed, offset, "auto")


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("latent_dim", [1, 3, 4, 5])
def test_change_of_variables(latent_dim: int, layers: int) -> None:
    """Σ log|det| against the log-determinant of autograd's Jacobian, in float64."""
    flow = bent(latent_dim, layers).double()
    z = torch.randn(2, 3, latent_dim, dtype=torch.float64)
    context = torch.randn(3, latent_dim, dtype=torch.float64)
    _, log_det = flow.transform(z, context)
    assert log_det.shape == (2, 3)
    for s in range(2):
        for b in range(3):

            def of_one(one: Tensor, b: int = b) -> Tensor:
                return flow.transform(one.view(1, 1, -1), context[b : b + 1])[0].flatten()

            jacobian = torch.autograd.functional.jacobian(of_one, z[s, b])
            sign, expected = torch.linalg.slogdet(jacobian)
            assert sign == 1
            assert abs(expected) > 1e-3
            torch.testing.assert_close(log_det[s, b], expected, rtol=1e-9, atol=1e-9)
            # Each layer is triangular; two in opposite orders tie every latent to every other.
            assert (jacobian.abs() > 1e-12).all() == (layers > 1 or latent_dim == 1)


def test_the_context_matters_and_rows_stand_alone() -> None:
    flow, statistics = bent(3), torch.randn(4, 9)
    z, kl, q = draw(flow, statistics, 2, offset=10)
    part = draw(flow, statistics[1:3], 2, offset=11)
    torch.testing.assert_close(part.z, z[:, 1:3])
    torch.testing.assert_close(part.kl, kl[1:3])
    torch.testing.assert_close(part.q.log_prob(part.z), q.log_prob(z)[:, 1:3])
    other = statistics + torch.tensor([0.0] * 6 + [1.0] * 3)
    assert (draw(flow, other, 2, offset=10).z - z).abs().min() > 1e-4
    assert torch.equal(draw(flow, statistics, 1, offset=10).z[0], z[0])


def test_it_starts_as_the_diagonal_gaussian() -> None:
    flow, statistics = InverseAutoregressive(3), torch.randn(4, 9)
    z, kl, q = draw(flow, statistics, 3)
    plain = DiagonalGaussian().draw(statistics[:, :6], StandardNormal(3), 3, 7, 0, "auto")
    assert torch.equal(z, plain.z)
    torch.testing.assert_close(q.log_prob(z), plain.q.log_prob(z))
    expected = (plain.q.log_prob(z) - StandardNormal(3).log_prob(z)).mean(0)
    torch.testing.assert_close(kl, expected)
    mu, logvar = flow.moments(statistics)
    torch.testing.assert_close(mu, statistics[:, :3])
    torch.testing.assert_close(logvar, statistics[:, 3:6], rtol=1e-4, atol=1e-4)


def test_divergence_against_an_integral() -> None:
    """Two latents: the flow is inverted on a grid, its density from the inverse's Jacobian."""
    flow = bent(2, hidden=(8,), by=0.25).double()
    statistics = torch.tensor([[0.3, -0.2, -0.5, 0.2, 0.7, -1.0]], dtype=torch.float64)
    mu, logvar, context = statistics.chunk(3, 1)
    side = torch.linspace(-9, 9, 601, dtype=torch.float64)
    z = torch.cartesian_prod(side, side)
    area = (side[1] - side[0]).item() ** 2
    start, log_det = z, torch.zeros(len(z), dtype=torch.float64)
    with torch.no_grad():
        for layer in reversed(flow.layers):
            inverse = layer(context.expand(len(z), 2)).inv
            before, of_layer = inverse.call_and_ladj(start)
            start, log_det = before, log_det + of_layer
    log_q = distributions.Normal(mu, (0.5 * logvar).exp()).log_prob(start).sum(1) + log_det
    log_p = distributions.Normal(0.0, 1.0).log_prob(z).sum(1)
    assert abs(log_q.exp().sum() * area - 1) < 1e-4
    exact = (log_q.exp() * (log_q - log_p)).sum() * area
    unbent = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum()
    assert abs(exact - unbent) > 0.1
    moments = [(log_q.exp() @ z**k) * area for k in (1, 2)]

    rows = 40000
    estimates = draw(flow.float(), statistics.float().expand(rows, -1)).kl.double()
    error = estimates.std() / math.sqrt(rows)
    assert error < 0.05
    assert abs(estimates.mean() - exact) < 5 * error
    # The moments of 64 draws are rough, but of the right size.
    found = flow.moments(statistics.float())
    variance = moments[1] - moments[0].square()
    assert ((found.mu[0] - moments[0]).abs() < 0.5 * variance.sqrt()).all()
    assert ((found.logvar[0] - variance.log()).abs() < 0.7).all()


def test_moments_against_many_draws() -> None:
    """A gently bent flow, whose moments 64 well chosen draws tell closely."""
    flow, statistics = bent(3, hidden=(8,), by=0.1), torch.randn(2, 9)
    mu, logvar = flow.moments(statistics)
    z = draw(flow, statistics, 20000).z
    std = z.std(0)
    assert not torch.allclose(mu, statistics[:, :3], atol=0.01)
    assert ((mu - z.mean(0)).abs() < 0.05 * std).all()
    assert (((0.5 * logvar).exp() / std - 1).abs() < 0.1).all()
    torch.testing.assert_close(flow.moments(statistics[1:]).mu[0], mu[1])


def test_it_learns_a_posterior_whose_latents_are_tied() -> None:
    """A Gaussian with correlation 0.9, which no diagonal Gaussian meets closer than 0.83 nats."""
    torch.manual_seed(0)
    covariance = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    target = distributions.MultivariateNormal(torch.tensor([1.0, -1.0]), covariance)
    flow = InverseAutoregressive(2, hidden=(16,))
    statistics = torch.zeros(1, 6, requires_grad=True)
    optimizer = torch.optim.Adam([*flow.parameters(), statistics], lr=0.02)
    for step in range(300):
        divergence = flow.draw(statistics, target, 128, step, 0, "auto").kl.mean()
        optimizer.zero_grad()
        divergence.backward()
        optimizer.step()
    left = flow.draw(statistics, target, 4000, 999, 0, "auto").kl.item()
    assert -0.5 * math.log(1 - 0.9**2) > 0.8
    assert -0.02 < left < 0.1


def test_the_density_is_known_at_its_own_draws_only() -> None:
    z, _, q = draw(bent(3), torch.randn(4, 9))
    assert q.log_prob(z).shape == (1, 4)
    with pytest.raises(UserError, match="own draws only"):
        q.log_prob(z.clone())
    with pytest.raises(UserError, match="--gradient doubly-reparameterized"):
        q.detached()


@pytest.mark.parametrize(
    ("objective", "latent_dim"), [(ELBO(num_samples=2), 1), (ImportanceWeighted(3), 4)], ids=repr
)
def test_a_training_step_is_one_graph(objective: Any, latent_dim: int) -> None:
    """For the compiler's front end, which is where a graph would break."""
    flow = bent(latent_dim, hidden=(8,))
    step = TrainingStep(make_vae(latent_dim=latent_dim, posterior=flow), objective, 0)
    batch, position = Batch(grey_images(6, (1, 8, 8))), torch.tensor(3)

    def loss_and_gradients(compute: Any) -> list[Tensor]:
        step.zero_grad()
        loss, _ = compute(batch, position)
        loss.backward()
        gradients = [p.grad.clone() for p in step.parameters() if p.grad is not None]
        assert len(gradients) == len(list(step.parameters()))
        return [loss, *gradients]

    one = torch.compile(step, fullgraph=True, dynamic=False, backend="aot_eager")
    for a, b in zip(loss_and_gradients(step), loss_and_gradients(one), strict=True):
        assert (a - b).norm() < 1e-5 * a.norm() + 1e-7


def test_the_density_is_exact_under_autocast() -> None:
    flow, statistics = bent(3), torch.randn(4, 9)
    expected = draw(flow, statistics, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = draw(flow, statistics, 2)
    assert torch.equal(found.z, expected.z)
    assert torch.equal(found.q.log_prob(found.z), expected.q.log_prob(expected.z))
    half = draw(flow, statistics.bfloat16())
    assert half.z.dtype == half.kl.dtype == torch.float32


def test_saved_and_loaded(tmp_path: Path) -> None:
    vae = make_vae(latent_dim=3, posterior=bent(3, 3, (8,)))
    vae.save_pretrained(tmp_path)
    loaded, x = VAE.from_pretrained(tmp_path), grey_images(3, (1, 8, 8))
    assert loaded.spec()["posterior"] == {
        "name": "inverse-autoregressive",
        "latent_dim": 3,
        "layers": 3,
        "hidden": (8,),
    }
    assert torch.equal(loaded.elbo(x, seed=1), vae.elbo(x, seed=1))
    assert torch.equal(loaded.encode(x).mu, vae.encode(x).mu)


def test_without_zuko(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("zuko", "zuko.flows"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"pip install 'fastvae\[flows\]'"):
        InverseAutoregressive(3)


def test_zuko_is_imported_only_when_it_is_used() -> None:
    for path in Path(fastvae.__file__).parent.rglob("*.py"):
        at_once = [n for n in ast.parse(path.read_text()).body if isinstance(n, IMPORTS)]
        assert not [node for node in at_once if "zuko" in ast.unparse(node)], path


def test_no_layers() -> None:
    with pytest.raises(UserError, match="at least 1 layer, got 0"):
        InverseAutoregressive(3, 0)
