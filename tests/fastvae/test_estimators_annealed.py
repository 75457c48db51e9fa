"""The path, the moves and what is asked of the callables; the numbers are in ..._truth.py."""

import math
from itertools import pairwise

import pytest
import torch
from fastvae_kernels import normal
from torch import Tensor

from fastvae.errors import UserError
from fastvae.estimators import annealed_log_marginal, sigmoidal_schedule


def log_prior(z: Tensor) -> Tensor:
    return -0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)


def log_likelihood(z: Tensor) -> Tensor:
    return -2 * (z - 1).square().sum(-1)


def draws(chains: int = 6, rows: int = 3, latents: int = 2) -> Tensor:
    return normal((rows, chains, latents), 0).transpose(0, 1)


@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
def test_schedule(steps: int) -> None:
    t = sigmoidal_schedule(steps)
    assert t[0] == 0.0
    assert t[-1] == 1.0
    assert len(t) == steps + 1
    assert all(a < b for a, b in pairwise(t))
    assert t == pytest.approx([1 - value for value in reversed(t)])  # symmetric
    if steps == 1000:  # σ' (−4) / σ' (0) of the largest step at the ends
        ratio = (t[1] - t[0]) / (t[501] - t[500])
        assert ratio == pytest.approx(4 * math.exp(-4) / (1 + math.exp(-4)) ** 2, rel=0.01)


def test_one_step_is_the_average_over_the_prior_draws() -> None:
    z = draws(9)
    found = annealed_log_marginal(log_likelihood, log_prior, z, steps=1, pilots=0, seed=0)
    expected = log_likelihood(z).double().logsumexp(0) - math.log(9)
    torch.testing.assert_close(found.log_marginal, expected)
    assert found.acceptance.isnan().all()
    assert found.step_sizes.shape == (0, 3)


def test_pilots_steer_and_do_not_count() -> None:
    """The averaged chains see the pilots through the step sizes alone."""
    z, near_zero = draws(8), 1e-6
    moved = z.clone()
    moved[:3] += 5
    arguments = {"steps": 3, "step_size": near_zero, "seed": 1}
    a = annealed_log_marginal(log_likelihood, log_prior, z, pilots=3, **arguments)
    b = annealed_log_marginal(log_likelihood, log_prior, moved, pilots=3, **arguments)
    c = annealed_log_marginal(log_likelihood, log_prior, moved, pilots=0, **arguments)
    torch.testing.assert_close(a.log_marginal, b.log_marginal, rtol=1e-4, atol=1e-4)
    assert (a.log_marginal - c.log_marginal).abs().min() > 0.1
    assert (a.step_sizes[0] < a.step_sizes[1]).all()  # every tiny step is accepted
    assert (c.step_sizes == near_zero).all()


@pytest.mark.parametrize("start", [1e-3, 20.0])
def test_step_sizes_find_their_level_from_any_start(start: float) -> None:
    found = annealed_log_marginal(
        log_likelihood, log_prior, draws(12), steps=300, step_size=start, seed=2
    )
    level = annealed_log_marginal(log_likelihood, log_prior, draws(12), steps=300, seed=3)
    ratio = found.step_sizes[-50:].log().mean(0) - level.step_sizes[-50:].log().mean(0)
    assert ratio.abs().max() < 0.3


def test_trajectories_to_infinity_are_turned_down() -> None:
    found = annealed_log_marginal(
        lambda z: -(z.square().square().sum(-1)),
        log_prior,
        draws(),
        steps=4,
        step_size=1e20,
        pilots=2,
        seed=0,
    )
    assert (found.acceptance == 0).all()
    assert (found.step_sizes[1:] < found.step_sizes[:-1]).all()  # and are no reason for nan
    assert found.log_marginal.isfinite().all()


def test_works_under_no_grad_and_leaves_no_gradients() -> None:
    network = torch.nn.Linear(2, 5)
    with torch.no_grad():
        found = annealed_log_marginal(
            lambda z: -network(z).square().sum(-1), log_prior, draws(), steps=5, seed=0
        )
    assert not found.log_marginal.requires_grad
    assert all(parameter.grad is None for parameter in network.parameters())


def test_the_seed_decides() -> None:
    first, second, other = (
        annealed_log_marginal(log_likelihood, log_prior, draws(), steps=9, seed=seed).log_marginal
        for seed in (4, 4, 5)
    )
    assert torch.equal(first, second)
    assert (first != other).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "at least 1"),
        ({"leapfrog_steps": 0}, "at least 1"),
        ({"step_size": 0.0}, "above 0"),
        ({"pilots": 6}, "0 to 5 can be pilots, got 6"),
        ({"pilots": -1}, "0 to 5"),
        ({"initial_z": torch.zeros(6, 2)}, r"\[S, B, D\]"),
        ({"initial_z": torch.zeros(6, 3, 2, dtype=torch.int64)}, "floating"),
        ({"log_likelihood": lambda z: z.sum(-1, keepdim=True)}, r"\(6, 3\), got \(6, 3, 1\)"),
        ({"log_prior": lambda z: z.sum((1, 2))}, r"log_prior of z \(6, 3, 2\)"),
    ],
)
def test_refuses(change: dict, message: str) -> None:
    arguments = {
        "log_likelihood": log_likelihood,
        "log_prior": log_prior,
        "initial_z": draws(),
        "steps": 3,
        "seed": 0,
    }
    with pytest.raises(UserError, match=message):
        annealed_log_marginal(**(arguments | change))
