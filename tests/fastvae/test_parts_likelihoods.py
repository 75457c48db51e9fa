"""Likelihoods are normalised, and grey pixels become binary as they promise."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvae import Bernoulli, Gaussian
from fastvae.errors import UserError
from fastvae.parts.likelihoods import binarize


def test_bernoulli_mass_of_all_binary_images_is_one() -> None:
    images = torch.tensor(list(itertools.product([0, 255], repeat=6)), dtype=torch.uint8)
    images = images.view(64, 1, 2, 3)
    torch.manual_seed(0)
    for scale in (0.1, 1.0, 5.0):
        logits = (scale * torch.randn(1, 1, 2, 3)).expand(64, 1, 2, 3)
        mass = torch.exp(-Bernoulli("static").nll(logits, images).double())
        assert abs(mass.sum().item() - 1) < 1e-5


@pytest.mark.parametrize("variance", [0.01, 0.1, 2.0])
def test_gaussian_density_integrates_to_one(variance: float) -> None:
    """Over a plane of two pixels."""
    reach, cells = 8 * math.sqrt(variance), 400
    side = torch.linspace(-reach, reach, cells)
    plane = torch.cartesian_prod(side + 0.3, side + 0.9).view(-1, 1, 1, 2)
    mean = torch.tensor([0.3, 0.9]).view(1, 1, 1, 2).expand_as(plane)
    density = torch.exp(-Gaussian(variance).nll(mean, plane).double())
    area = (side[1] - side[0]).item() ** 2
    assert abs(density.sum().item() * area - 1) < 1e-4


def test_means_and_draws() -> None:
    logits = torch.tensor([-40.0, -1.0, 0.0, 2.0, 40.0]).view(1, 1, 1, 5).expand(20000, 1, 1, 5)
    likelihood = Bernoulli()
    draws = likelihood.sample(logits, 3)
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(likelihood.mean(logits), torch.sigmoid(logits))
    error = (draws.mean(0) - torch.sigmoid(logits[0])).abs().flatten()
    assert error.max() < 5 * 0.5 / math.sqrt(20000)
    assert max(error[0], error[4]) < 1e-6

    likelihood_of_values = Gaussian(0.25)
    means = torch.full((20000, 1, 1, 2), 0.7)
    values = likelihood_of_values.sample(means, 3)
    assert abs(values.mean().item() - 0.7) < 5 * 0.5 / math.sqrt(40000)
    assert abs(values.var().item() - 0.25) < 5 * 0.25 * math.sqrt(2 / 40000)
    assert torch.equal(likelihood_of_values.mean(means), means)


def ramp(dtype: torch.dtype) -> Tensor:
    """One image with every grey value once."""
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    return levels if dtype == torch.uint8 else levels.to(dtype) / 255


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_dynamic_draws_are_white_as_often_as_the_pixel_says(dtype: torch.dtype) -> None:
    draws = 40000
    x = ramp(dtype)
    white = binarize(x.expand(draws, 1, 16, 16), 12, 0).mean(0).flatten().double()
    p = torch.arange(256, dtype=torch.float64) / 255
    deviation = (white - p) / (p * (1 - p) / draws).sqrt().clamp(min=1e-9)
    assert white[0] == 0
    assert white[255] == 1
    assert deviation[1:255].abs().max() < 5  # 254 draws from N(0, 1)
    assert 0.8 < deviation[1:255].square().mean() < 1.25


def test_black_is_never_and_white_always_white() -> None:
    for x in (torch.zeros(3000, 1, 8, 8, dtype=torch.uint8), torch.zeros(3000, 1, 8, 8)):
        assert binarize(x, 1, 0).sum() == 0
    for x in (torch.full((3000, 1, 8, 8), 255, dtype=torch.uint8), torch.ones(3000, 1, 8, 8)):
        assert binarize(x, 1, 0).min() == 1


def test_dynamic_draws_are_fresh_at_each_position_and_repeat_at_the_same() -> None:
    x = torch.full((8, 1, 20, 20), 128, dtype=torch.uint8)
    likelihood = Bernoulli()
    draws = likelihood.observe(x, 5, 100)
    assert torch.equal(draws, likelihood.observe(x, 5, 100))
    assert torch.equal(draws[3:], likelihood.observe(x[3:], 5, 103))
    for other in (likelihood.observe(x, 5, 108), likelihood.observe(x, 6, 100)):
        assert 0.4 < (draws != other).float().mean() < 0.6
    # No two images of a batch share their draws either.
    distances = (draws[:, None] != draws[None]).float().mean((2, 3, 4))
    assert (distances + torch.eye(8)).min() > 0.4


@pytest.mark.parametrize("kind", ["static", "none"])
def test_other_kinds_draw_nothing(kind: Any) -> None:
    x = ramp(torch.uint8)
    assert torch.equal(Bernoulli(kind).observe(x, 1, 2), x.float() / 255)
    assert torch.equal(Bernoulli(kind).observe(x, 1, 2), Bernoulli(kind).observe(x, 3, 4))


def test_only_a_cross_entropy_is_no_density() -> None:
    flags = [Bernoulli("dynamic"), Bernoulli("static"), Bernoulli("none"), Gaussian()]
    assert [likelihood.is_density for likelihood in flags] == [True, True, False, True]


def test_gaussian_variance_is_learned_or_fixed() -> None:
    assert [name for name, _ in Gaussian().named_parameters()] == ["logvar"]
    fixed = Gaussian(0.3)
    assert not list(fixed.parameters())
    assert fixed.logvar.item() == pytest.approx(math.log(0.3))
    assert "logvar" in fixed.state_dict()


@pytest.mark.parametrize("variance", [0.0, -1.0, math.nan, math.inf])
def test_impossible_variance(variance: float) -> None:
    with pytest.raises(UserError, match=f"got {variance}"):
        Gaussian(variance)


def test_unknown_binarisation() -> None:
    with pytest.raises(UserError, match="dynamic, static or none, got 'often'"):
        Bernoulli("often")  # type: ignore[arg-type]
