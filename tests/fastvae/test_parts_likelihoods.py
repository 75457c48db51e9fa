"""Likelihoods are normalised, and grey pixels become binary as they promise."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastvae_kernels import binarize
from running import TORCHRUN, run_process
from scipy import stats
from torch import Tensor, distributions

from fastvae import (
    Bernoulli,
    Categorical,
    Gaussian,
    GaussianOptimal,
    GaussianPerPixel,
    LogisticMixture,
)
from fastvae.errors import UserError
from fastvae.parts.likelihoods import Likelihood, quantize

EVERY: list[Any] = [
    Bernoulli(),
    Gaussian(0.2),
    GaussianPerPixel(),
    GaussianOptimal(),
    Categorical(5),
    LogisticMixture(2),
]


def some_parameters(likelihood: Likelihood, rows: int, channels: int, scale: float = 1.0) -> Tensor:
    """One row of random parameters, the same for all, for images of 2×3 pixels."""
    generator = torch.Generator().manual_seed(3)
    shape = (1, likelihood.parameter_channels(channels), 2, 3)
    return (scale * torch.randn(shape, generator=generator)).expand(rows, *shape[1:])


# Normalised


def test_bernoulli_mass_of_all_binary_images_is_one() -> None:
    images = torch.tensor(list(itertools.product([0, 255], repeat=6)), dtype=torch.uint8)
    images = images.view(64, 1, 2, 3)
    for scale in (0.1, 1.0, 5.0):
        logits = some_parameters(Bernoulli(), 64, 1, scale)
        mass = torch.exp(-Bernoulli("static").nll(logits, images).double())
        assert abs(mass.sum().item() - 1) < 1e-5


@pytest.mark.parametrize("levels", [2, 3, 5])
def test_categorical_mass_of_all_images_is_one(levels: int) -> None:
    """Of 2 channels and 2 pixels."""
    images = torch.tensor(list(itertools.product(range(levels), repeat=4)))
    x = images.view(-1, 2, 1, 2).float() / (levels - 1)
    torch.manual_seed(0)
    for scale in (0.1, 1.0, 5.0):
        logits = (scale * torch.randn(1, 2 * levels, 1, 2)).expand(len(x), -1, -1, -1)
        mass = torch.exp(-Categorical(levels).nll(logits, x).double())
        assert abs(mass.sum().item() - 1) < 1e-5


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_logistic_mixture_mass_of_all_pixels_is_one(channels: int, dtype: torch.dtype) -> None:
    """Of one pixel with each of its 256 levels, or 65,536 colours."""
    levels = torch.arange(256, dtype=torch.uint8)
    pixels = torch.cartesian_prod(*[levels] * channels).view(-1, channels, 1, 1)
    x = pixels if dtype == torch.uint8 else pixels.to(dtype) / 255
    likelihood = LogisticMixture(3)
    torch.manual_seed(channels)
    for scale in (0.1, 1.0, 3.0):
        parameters = scale * torch.randn(1, likelihood.parameter_channels(channels), 1, 1)
        nll = likelihood.nll(parameters.expand(len(x), -1, -1, -1), x)
        assert abs(torch.exp(-nll.double()).sum().item() - 1) < 1e-5


def plane(reach: float, cells: int) -> tuple[Tensor, float]:
    """Images of two pixels, one for each cell of a square about (0.3, 0.9), and its area."""
    side = torch.linspace(-reach, reach, cells, dtype=torch.float64)
    points = torch.cartesian_prod(side + 0.3, side + 0.9).view(-1, 1, 1, 2)
    return points, (side[1] - side[0]).item() ** 2


@pytest.mark.parametrize("variance", [0.01, 0.1, 2.0])
def test_gaussian_density_integrates_to_one(variance: float) -> None:
    points, area = plane(8 * math.sqrt(variance), 400)
    mean = torch.tensor([0.3, 0.9], dtype=torch.float64).view(1, 1, 1, 2).expand_as(points)
    density = torch.exp(-Gaussian(variance).double().nll(mean, points))
    assert abs(density.sum().item() * area - 1) < 1e-6


def test_gaussian_density_with_a_variance_for_each_pixel_integrates_to_one() -> None:
    points, area = plane(3.0, 600)
    second = torch.tensor([-9.0, -1.5], dtype=torch.float64)
    parameters = torch.cat([torch.tensor([0.3, 0.9], dtype=torch.float64), second]).view(1, 2, 1, 2)
    density = torch.exp(
        -GaussianPerPixel(0.1).nll(parameters.expand(len(points), -1, -1, -1), points)
    )
    assert abs(density.sum().item() * area - 1) < 1e-6


def test_gaussian_density_with_the_running_variance_integrates_to_one() -> None:
    likelihood = GaussianOptimal().double().eval()
    points, area = plane(8 * math.sqrt(0.1), 400)
    mean = torch.tensor([0.3, 0.9], dtype=torch.float64).view(1, 1, 1, 2).expand_as(points)
    density = torch.exp(-likelihood.nll(mean, points))
    assert abs(density.sum().item() * area - 1) < 1e-6


# Against independent densities, in float64


def in_float64(likelihood: Any, parameters: Tensor, x: Tensor) -> Tensor:
    """−log p(x) by torch.distributions or scipy, `[B]`."""
    parameters, x = parameters.double(), x.double()
    if isinstance(likelihood, Bernoulli):
        log_p = distributions.Bernoulli(logits=parameters).log_prob(x)
    elif isinstance(likelihood, Gaussian):
        log_p = distributions.Normal(parameters, math.sqrt(0.2)).log_prob(x)
    elif isinstance(likelihood, GaussianPerPixel):
        mean, second = parameters.chunk(2, 1)
        floor = 2 * math.log(0.05)
        variance = math.exp(floor) * (1 + torch.exp(second - floor))
        log_p = distributions.Normal(mean, variance.sqrt()).log_prob(x)
    elif isinstance(likelihood, GaussianOptimal):
        std = (parameters - x).square().mean().sqrt()
        log_p = distributions.Normal(parameters, std).log_prob(x)
    elif isinstance(likelihood, Categorical):
        logits = parameters.view(len(x), likelihood.levels, *x.shape[1:]).movedim(1, -1)
        levels = (x * (likelihood.levels - 1)).round()
        log_p = distributions.Categorical(logits=logits).log_prob(levels)
    else:
        log_p = logistic_mixture_log_p(parameters, (x * 255).round(), likelihood.mixtures)
    return -log_p.flatten(1).sum(1)


def logistic_mixture_log_p(parameters: Tensor, level: Tensor, mixtures: int) -> Tensor:
    """PixelCNN++, equation 2 and section 2.2, by differences of scipy's logistic CDF."""
    p = parameters.unflatten(1, (-1, mixtures)).numpy()  # [B, G, M, H, W]
    channels = level.shape[1]
    x = (level / 127.5 - 1).numpy()
    of_component = np.ones_like(p[:, 0])
    pairs = iter(range(1 + 2 * channels, p.shape[1]))
    for c in range(channels):
        mean, scale = p[:, 1 + 2 * c], np.exp(p[:, 2 + 2 * c])
        for j in range(c):
            mean = mean + np.tanh(p[:, next(pairs)]) * x[:, j, None]
        here = x[:, c, None]
        above = np.where(here >= 1, 1.0, stats.logistic.cdf((here + 1 / 255 - mean) / scale))
        below = np.where(here <= -1, 0.0, stats.logistic.cdf((here - 1 / 255 - mean) / scale))
        of_component *= above - below
    weights = np.exp(p[:, 0]) / np.exp(p[:, 0]).sum(1, keepdims=True)
    return torch.from_numpy(np.log((weights * of_component).sum(1)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("likelihood", EVERY, ids=lambda x: type(x).__name__)
def test_nll_in_float64(likelihood: Any, channels: int) -> None:
    torch.manual_seed(0)
    likelihood.train()
    x = torch.randint(0, 256, (4, channels, 5, 3), dtype=torch.uint8)
    observed = likelihood.observe(x, 3, 7)
    assert observed.dtype == torch.float32
    assert observed.shape == x.shape
    parameters = torch.randn(4, likelihood.parameter_channels(channels), 5, 3)
    nll = likelihood.nll(parameters, observed)
    assert nll.shape == (4,)
    torch.testing.assert_close(
        nll.double(), in_float64(likelihood, parameters, observed), rtol=2e-5, atol=1e-4
    )


def test_channels_of_the_decoder() -> None:
    found = [[likelihood.parameter_channels(c) for c in (1, 3)] for likelihood in EVERY]
    assert found == [[1, 3], [1, 3], [2, 6], [1, 3], [5, 15], [6, 20]]
    with pytest.raises(UserError, match="1 to 3 channels, got 4"):
        LogisticMixture().parameter_channels(4)


def test_bits_count_the_stored_values() -> None:
    assert [x.bits_offset for x in EVERY] == [0, 8, 8, 8, 0, 0]
    assert [x.couples_rows for x in EVERY] == [False, False, False, True, False, False]


# Means and draws


def test_means_and_draws() -> None:
    logits = torch.tensor([-40.0, -1.0, 0.0, 2.0, 40.0]).view(1, 1, 1, 5).expand(20000, 1, 1, 5)
    likelihood = Bernoulli()
    draws = likelihood.sample(logits, 3)
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(likelihood.mean(logits), torch.sigmoid(logits))
    error = (draws.mean(0) - torch.sigmoid(logits[0])).abs().flatten()
    assert error.max() < 5 * 0.5 / math.sqrt(20000)
    assert max(error[0], error[4]) < 1e-6


@pytest.mark.parametrize("kind", ["fixed", "optimal", "per pixel"])
def test_means_and_draws_of_gaussians(kind: str) -> None:
    rows = 40000
    mean, std = torch.tensor([0.7, -0.2]), torch.tensor([0.5, 0.5])
    parameters = mean.view(1, 1, 1, 2)
    likelihood: Any = Gaussian(0.25)
    if kind == "optimal":
        likelihood = GaussianOptimal()
        likelihood.logvar.fill_(math.log(0.25))
    if kind == "per pixel":
        likelihood = GaussianPerPixel(0.01)
        std = torch.tensor([0.5, 0.05])
        second = (std.square() - 0.01**2).log().view(1, 1, 1, 2)
        parameters = torch.cat([parameters, second], 1)
    parameters = parameters.expand(rows, -1, -1, -1)
    assert torch.equal(likelihood.mean(parameters), parameters[:, :1])
    draws = likelihood.sample(parameters, 3).view(rows, 2)
    assert ((draws.mean(0) - mean).abs() < 5 * std / math.sqrt(rows)).all()
    assert ((draws.var(0) / std.square() - 1).abs() < 5 * math.sqrt(2 / rows)).all()
    assert torch.equal(draws[:10], likelihood.sample(parameters[:10], 3).view(10, 2))


@pytest.mark.parametrize("likelihood", [Categorical(4), LogisticMixture(2)], ids=repr)
def test_draws_are_as_frequent_as_they_are_probable(likelihood: Any) -> None:
    """Every level of every one of 2 × 6 values, and the mean of them all."""
    rows = 20000
    levels = getattr(likelihood, "levels", 256)
    parameters = some_parameters(likelihood, 1, 2, 0.8)
    x = likelihood.sample(parameters.expand(rows, -1, -1, -1), 5)
    drawn = x * (levels - 1)
    torch.testing.assert_close(drawn, drawn.round(), rtol=0, atol=1e-4)
    values = drawn.round().long().flatten(1)
    found = torch.stack([(values == k).double().mean(0) for k in range(levels)], 1)
    probability = level_probabilities(likelihood, parameters, levels)
    expected = probability * rows
    chi_square = ((found - probability).square() * rows / probability)[expected > 5].sum().item()
    cells = int((expected > 5).sum())
    assert cells > 3 * len(values[0])
    assert chi_square < cells + 5 * math.sqrt(2 * cells)
    exact = (probability * torch.arange(levels) / (levels - 1)).sum(1)
    error = (x.double().mean(0).flatten() - exact).abs()
    assert error.max() < 5 * 0.5 / math.sqrt(rows)


def level_probabilities(likelihood: Any, parameters: Tensor, levels: int) -> Tensor:
    """`[values, levels]` of images of 2 channels: of the second, over all levels of the first."""
    logits = parameters.double()
    if isinstance(likelihood, Categorical):
        return logits.view(levels, -1).softmax(0).T
    colours = torch.cartesian_prod(torch.arange(256), torch.arange(256)).double().view(-1, 2, 1, 1)
    shape = (len(colours), -1, 2, 3)
    log_p = logistic_mixture_log_p(
        logits.expand(shape), colours.expand(shape), likelihood.mixtures
    ).view(256, 256, 6)
    return torch.cat([log_p.exp().sum(1).T, log_p.exp().sum(0).T])


def test_mean_of_a_categorical() -> None:
    logits = torch.log(torch.tensor([0.5, 0.25, 0.25])).view(1, 3, 1, 1)
    assert Categorical(3).mean(logits).item() == pytest.approx(0.375)


def test_mean_of_a_logistic_mixture() -> None:
    """Narrow components far from the ends: the weighted mean, exactly."""
    logits, means = torch.tensor([0.0, math.log(3.0)]), torch.tensor([-0.5, 0.3])
    parameters = torch.cat([logits, means, torch.full((2,), -6.0)]).view(1, 6, 1, 1)
    expected = 0.5 * (0.25 * -0.5 + 0.75 * 0.3) + 0.5
    assert LogisticMixture(2).mean(parameters).item() == pytest.approx(expected, abs=1e-6)
    draws = LogisticMixture(2).sample(parameters.expand(20000, -1, -1, -1), 0)
    assert draws.mean().item() == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("likelihood", EVERY, ids=lambda x: type(x).__name__)
def test_draws_repeat_with_their_seed(likelihood: Any) -> None:
    parameters = some_parameters(likelihood, 50, 3)
    draws = likelihood.sample(parameters, 8)
    assert draws.shape == likelihood.mean(parameters).shape == (50, 3, 2, 3)
    assert draws.dtype == likelihood.mean(parameters).dtype == torch.float32
    assert torch.equal(draws, likelihood.sample(parameters, torch.tensor(8)))
    assert not torch.equal(draws, likelihood.sample(parameters, 9))
    assert not torch.equal(draws[0], draws[1])


# Binary pixels


def ramp(dtype: torch.dtype) -> Tensor:
    """One image with every grey value once."""
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    return levels if dtype == torch.uint8 else levels.to(dtype) / 255


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_dynamic_draws_are_white_as_often_as_the_pixel_says(dtype: torch.dtype) -> None:
    draws = 40000
    x = ramp(dtype)
    white = binarize(x.expand(draws, 1, 16, 16), 12).mean(0).flatten().double()
    p = torch.arange(256, dtype=torch.float64) / 255
    deviation = (white - p) / (p * (1 - p) / draws).sqrt().clamp(min=1e-9)
    assert white[0] == 0
    assert white[255] == 1
    assert deviation[1:255].abs().max() < 5  # 254 draws from N(0, 1)
    assert 0.8 < deviation[1:255].square().mean() < 1.25


def test_black_is_never_and_white_always_white() -> None:
    for x in (torch.zeros(3000, 1, 8, 8, dtype=torch.uint8), torch.zeros(3000, 1, 8, 8)):
        assert binarize(x, 1).sum() == 0
    for x in (torch.full((3000, 1, 8, 8), 255, dtype=torch.uint8), torch.ones(3000, 1, 8, 8)):
        assert binarize(x, 1).min() == 1


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


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("likelihood", [*EVERY, Bernoulli("static")], ids=lambda x: repr(x))
def test_rows_of_a_data_set_are_observed_as_their_copies(likelihood: Any, dtype: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(0, 256, (9, 1, 5, 3), generator=generator).to(torch.uint8)
    data = data if dtype == torch.uint8 else data.float() / 255
    indices = torch.tensor([8, 0, 3, 3])
    got = likelihood.observe(data, 5, 100, indices)
    assert torch.equal(got, likelihood.observe(data[indices], 5, 100))
    assert got.shape == (4, 1, 5, 3)
    if isinstance(likelihood, Bernoulli) and likelihood.binarize == "dynamic":
        assert torch.equal(got, binarize(data, 5, offset=100, indices=indices))


@pytest.mark.parametrize("kind", ["static", "none"])
def test_other_kinds_draw_nothing(kind: Any) -> None:
    x = ramp(torch.uint8)
    assert torch.equal(Bernoulli(kind).observe(x, 1, 2), x.float() / 255)
    assert torch.equal(Bernoulli(kind).observe(x, 1, 2), Bernoulli(kind).observe(x, 3, 4))


def test_only_a_cross_entropy_is_no_density() -> None:
    flags = [Bernoulli("dynamic"), Bernoulli("static"), Bernoulli("none"), *EVERY[1:]]
    assert [likelihood.is_density for likelihood in flags] == [True, True, False, *[True] * 5]


# Levels


def test_256_levels_are_the_pixels() -> None:
    x = ramp(torch.uint8)
    assert torch.equal(quantize(x, 256), x.float() / 255)
    assert torch.equal(quantize(x.float() / 255, 256), x.float() / 255)
    likelihood = LogisticMixture()
    assert torch.equal(likelihood.observe(x, 0, 0), x.float() / 255)


@pytest.mark.parametrize("levels", [2, 3, 8, 100])
def test_levels_are_equal_steps(levels: int) -> None:
    found = quantize(ramp(torch.uint8), levels).flatten()
    counts = torch.bincount((found * (levels - 1)).round().long())
    assert len(counts) == levels
    assert counts.sum() == 256
    assert counts.max() - counts.min() <= 1
    assert torch.equal(found, found.sort().values)
    assert (found[0], found[-1]) == (0.0, 1.0)
    if levels == 8:
        assert torch.equal(quantize(ramp(torch.float32), levels).flatten(), found)


# The variances of the Gaussians


def test_gaussian_variance_is_learned_or_fixed() -> None:
    assert [name for name, _ in Gaussian().named_parameters()] == ["logvar"]
    fixed = Gaussian(0.3)
    assert not list(fixed.parameters())
    assert fixed.logvar.item() == pytest.approx(math.log(0.3))
    assert "logvar" in fixed.state_dict()


def test_a_predicted_deviation_stays_above_its_floor() -> None:
    likelihood = GaussianPerPixel(0.05)
    second = torch.tensor([-1e30, -1e4, -50.0, -6.0, 0.0, 5.0, 50.0], requires_grad=True)
    parameters = torch.cat([torch.zeros(7), second]).view(1, 2, 1, 7)
    x = torch.zeros(1, 1, 1, 7)
    exact = second.detach().double()
    logvar = torch.logaddexp(exact, torch.tensor(2 * math.log(0.05), dtype=torch.float64))
    assert logvar.exp().sqrt().min() >= 0.05
    nll = likelihood.nll(parameters, x)
    expected = 0.5 * (logvar + math.log(2 * math.pi)).sum()
    torch.testing.assert_close(nll.double(), expected[None], rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(nll.sum(), second)
    torch.testing.assert_close(
        gradient.double(), 0.5 * torch.exp(exact - logvar), rtol=1e-5, atol=1e-9
    )
    draws = likelihood.sample(parameters.detach().expand(2000, -1, -1, -1), 0)
    assert draws.std(0).flatten()[0].item() == pytest.approx(0.05, rel=0.1)


def optimal_case(rows: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randint(0, 256, (rows, 3, 4, 5), dtype=torch.uint8, generator=generator)
    return torch.rand(rows, 3, 4, 5, generator=generator), x


def test_nll_at_the_optimal_variance() -> None:
    """½ D (log 2π σ² + 1) with σ² the mean squared error (Rybkin et al. 2021, equation 5)."""
    mean, x = optimal_case()
    error = (mean.double() - x.double() / 255).square().mean()
    nll = GaussianOptimal().nll(mean, x)
    expected = 30 * (torch.log(2 * math.pi * error) + 1)
    torch.testing.assert_close(nll.double().mean(), expected, rtol=1e-6, atol=0)
    assert nll.std() > 0.1


def test_gradient_at_the_optimal_variance() -> None:
    """That of ½ D log mse: σ² itself may move, since nll does not change with it."""
    mean, x = optimal_case()
    found, exact = mean.clone().requires_grad_(), mean.double().requires_grad_()
    GaussianOptimal().nll(found, x).mean().backward()
    (30 * (exact - x.double() / 255).square().mean().log()).backward()
    assert exact.grad is not None and found.grad is not None
    torch.testing.assert_close(found.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


def test_running_variance() -> None:
    likelihood = GaussianOptimal()
    x = torch.zeros(2, 1, 3, 3)
    logvars = [math.log((0.1 + 0.01 * step) ** 2) for step in range(130)]
    expected = 0.0
    for step, logvar in enumerate(logvars, start=1):
        likelihood.nll(torch.full_like(x, math.exp(logvar / 2)), x)
        expected += (logvar - expected) * max(1 / step, 0.01)
        assert likelihood.logvar.item() == pytest.approx(expected, rel=1e-4)
        if step == 50:
            assert expected == pytest.approx(sum(logvars[:50]) / 50)
    assert likelihood.steps == 130
    assert set(likelihood.state_dict()) == {"logvar", "steps"}


def test_evaluation_uses_the_running_variance_and_leaves_it() -> None:
    likelihood = GaussianOptimal()
    mean, x = optimal_case()
    likelihood.nll(mean, x)
    kept = likelihood.logvar.clone()
    likelihood.eval()
    nll = likelihood.nll(mean + 1.0, x)
    assert torch.equal(likelihood.logvar, kept)
    assert likelihood.steps == 1
    std = (mean.double() - x.double() / 255).square().mean().sqrt()
    density = distributions.Normal(mean.double() + 1.0, std)
    expected = -density.log_prob(x.double() / 255).flatten(1).sum(1)
    torch.testing.assert_close(nll.double(), expected, rtol=1e-5, atol=0)


def test_images_that_are_met_exactly() -> None:
    likelihood = GaussianOptimal()
    nll = likelihood.nll(torch.ones(2, 1, 2, 2), torch.full((2, 1, 2, 2), 255, dtype=torch.uint8))
    assert likelihood.logvar.exp().sqrt().item() == pytest.approx(0.5 / 255, rel=1e-5)
    assert nll.isfinite().all()


# Each process takes its half of `optimal_case`; eager, then as one graph.
OPTIMAL = """
import json, os, torch
import torch.distributed as dist
from fastvae import GaussianOptimal

dist.init_process_group("gloo")
rank = dist.get_rank()
case = torch.load("case.pt", weights_only=True)
mean, x = (half[3 * rank : 3 * rank + 3] for half in (case["mean"], case["x"]))
found = []
for compiled in (False, True):
    likelihood = GaussianOptimal()
    nll = torch.compile(likelihood.nll, fullgraph=True, backend="aot_eager", disable=not compiled)
    leaf = mean.clone().requires_grad_()
    values = nll(leaf, x)
    values.sum().backward()
    found.append([values.tolist(), leaf.grad.flatten().tolist(), likelihood.logvar.item()])
with open(f"found-{rank}.json", "w") as file:
    json.dump(found, file)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_share_the_optimal_variance(tmp_path: Path) -> None:
    mean, x = optimal_case()
    torch.save({"mean": mean, "x": x}, tmp_path / "case.pt")
    (tmp_path / "optimal.py").write_text(OPTIMAL)
    command = [*TORCHRUN, "--standalone", "--nproc_per_node", "2", "optimal.py"]
    process = run_process(command, tmp_path)
    assert process.returncode == 0, process.stderr
    likelihood, leaf = GaussianOptimal(), mean.clone().requires_grad_()
    nll = likelihood.nll(leaf, x)
    nll.sum().backward()
    assert leaf.grad is not None
    ranks = [json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in (0, 1)]
    for first, second in zip(*ranks, strict=True):
        assert first[0] + second[0] == pytest.approx(nll.tolist(), rel=1e-6)
        assert first[1] + second[1] == pytest.approx(leaf.grad.flatten().tolist(), rel=1e-5)
        assert first[2] == second[2] == pytest.approx(likelihood.logvar.item(), rel=1e-6)


# What is refused


@pytest.mark.parametrize("variance", [0.0, -1.0, math.nan, math.inf])
def test_impossible_variance(variance: float) -> None:
    with pytest.raises(UserError, match=f"got {variance}"):
        Gaussian(variance)
    with pytest.raises(UserError, match=f"min_std is positive, got {variance}"):
        GaussianPerPixel(variance)


def test_unknown_binarisation() -> None:
    with pytest.raises(UserError, match="dynamic, static or none, got 'often'"):
        Bernoulli("often")  # type: ignore[arg-type]


def test_impossible_numbers_of_levels_and_components() -> None:
    for levels in (1, 257):
        with pytest.raises(UserError, match=f"2..256, got {levels}"):
            Categorical(levels)
    with pytest.raises(UserError, match="at least 1 component, got 0"):
        LogisticMixture(0)


@pytest.mark.parametrize(
    "likelihood",
    [Bernoulli(), Categorical(5)],
    ids=lambda part: type(part).__name__,
)
def test_parameters_of_the_average_image(likelihood: Any) -> None:
    """E[x] under them is the mean of the images, and nothing near is likelier."""
    images = torch.randint(40, 200, (60, 2, 3, 4), generator=torch.Generator().manual_seed(0))
    images = images.to(torch.uint8)
    start = likelihood.of_average(images)
    assert start.shape == (likelihood.parameter_channels(2), 3, 4)
    observed = likelihood.observe(images, 0, 0)
    mean = observed.mean(0) if isinstance(likelihood, Categorical) else images.float().mean(0) / 255
    torch.testing.assert_close(likelihood.mean(start[None])[0], mean, atol=0.03, rtol=0)

    def nll(parameters: torch.Tensor) -> float:
        return likelihood.eval().nll(parameters.expand(60, -1, -1, -1), observed).sum().item()

    step = 0.3 * torch.randn(start.shape, generator=torch.Generator().manual_seed(1))
    assert nll(start) < min(nll(start + step), nll(start - step))


def test_a_mixture_starts_spread_over_each_colour() -> None:
    """Means at the quantiles, so that a pixel's expected value is about the colour's mean; and
    likelier than components that begin alike."""
    rng = torch.Generator().manual_seed(0)
    red, green, blue = (
        torch.randint(low, high, (40, 1, 6, 5), generator=rng)
        for low, high in ((0, 30), (100, 256), (90, 91))
    )
    images = torch.cat([red, green, blue], dim=1).to(torch.uint8)
    likelihood = LogisticMixture(5)
    start = likelihood.of_average(images)
    assert start.shape == (likelihood.parameter_channels(3), 6, 5)
    mean = likelihood.mean(start[None])[0].mean((1, 2)) * 255
    torch.testing.assert_close(mean, images.float().mean((0, 2, 3)), atol=3.0, rtol=0)
    torch.testing.assert_close(start[5:10, 0, 0], torch.tensor([2.0, 8, 14, 20, 26]) / 127.5 - 1,
                               atol=1.1 / 127.5, rtol=0)  # fmt: skip

    x = likelihood.observe(images, 0, 0)
    alike = start.clone()
    for group in (1, 3, 5):
        alike[5 * group : 5 * group + 5] = alike[5 * group : 5 * group + 5].mean(0)
    nll = [likelihood.nll(p.expand(40, -1, -1, -1), x).sum() for p in (start, alike)]
    assert nll[0] < nll[1]
