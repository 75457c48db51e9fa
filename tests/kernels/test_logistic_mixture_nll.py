"""Mixtures of discretised logistics: the plain formula in float64 and 160 digits, normalisation,
samples that meet the probabilities, and the kernels in the interpreter and in the compiler."""

import importlib
import itertools
import re
from functools import partial

import mpmath
import numpy as np
import pytest
import scipy.stats
import torch
from fastvae_kernels import (
    functional,
    logistic_mixture_channels,
    logistic_mixture_mean,
    logistic_mixture_nll,
    logistic_mixture_sample,
)
from kernel_cases import DTYPES, HAS_TRITON, Draw, cap, error, far_apart, leaf, needs_no_interpreter
from kernel_oracle import Truth
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import logsigmoid as log_sigmoid

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# B, H, W, M, C, L: one pixel, odd sizes, many rows in a tile, rows shared by several programs.
CASES = [
    (1, 1, 1, 1, 1, 2),
    (2, 3, 5, 4, 1, 256),
    (3, 5, 7, 3, 2, 7),
    (2, 3, 5, 2, 3, 256),
    (70, 1, 3, 2, 1, 16),
    (2, 17, 31, 2, 3, 4),
]
COLOUR = (2, 3, 5, 2, 3, 256)

# The same values in other places of memory: each makes `[5, n, 3, 7]` from `make(shape)`.
LAYOUTS = {
    "contiguous": lambda make, n: make((5, n, 3, 7)),
    "channels_last": lambda make, n: make((5, n, 3, 7)).to(memory_format=torch.channels_last),
    "permuted": lambda make, n: make((7, n, 5, 3)).permute(2, 1, 3, 0),
    "packed": lambda make, n: make((5, 2 * n, 3, 7)).chunk(2, 1)[1],
    "cropped": lambda make, n: make((5, n, 4, 9))[:, :, 1:, 2:],
    "expanded_batch": lambda make, n: make((1, n, 3, 7)).expand(5, n, 3, 7),
    "expanded_pixels": lambda make, n: make((5, n, 1, 1)).expand(5, n, 3, 7),
    "unaligned": lambda make, n: make((5 * n * 21 + 1,))[1:].view(5, n, 3, 7),
}


def groups(channels):
    """What each group of M parameter channels holds, by name, in the order documented."""
    names = ["logits"]
    for c in range(channels):
        names += [f"mean_{c}", f"log_scale_{c}"]
    return names + [f"coupling_{c}{j}" for c in range(1, channels) for j in range(c)]


def split(parameters, mixtures, channels):
    """`[B, P, …]` → by name, `[B, M, …]`."""
    return dict(zip(groups(channels), parameters.split(mixtures, dim=1), strict=True))


def plain(parameters, level, mixtures, levels):
    """The formula of the paper in float64, each sigmoid taken on the side where it is small.

    Returns nll for each pixel, and the errors that float32 may make, as sums of magnitudes.
    """
    channels = level.shape[1]
    p = split(parameters.double(), mixtures, channels)
    x = 2 * level.double() / (levels - 1) - 1
    half = 1 / (levels - 1)
    log_p, condition, scales = p["logits"], 1 + p["logits"].abs(), {}
    for c in range(channels):
        mean, size = p[f"mean_{c}"], 1 + p[f"mean_{c}"].abs()
        for j in range(c):
            mean = mean + torch.tanh(p[f"coupling_{c}{j}"]) * x[:, j : j + 1]
            size = size + 1
        log_scale = torch.clamp(p[f"log_scale_{c}"], min=-7)
        scale = log_scale.exp()
        a, b = (x[:, c : c + 1] + half - mean) / scale, (x[:, c : c + 1] - half - mean) / scale
        first, last = level[:, c : c + 1] == 0, level[:, c : c + 1] == levels - 1
        # log(e^u − e^v) from the logarithms of both sigmoids, on the side where they are small.
        high = log_sigmoid(torch.where(a + b > 0, -b, a))
        low = log_sigmoid(torch.where(a + b > 0, -a, b))
        inner = high + torch.log(-torch.expm1(low - high))
        log_p = log_p + torch.where(
            first, log_sigmoid(a), torch.where(last, log_sigmoid(-b), inner)
        )

        above = torch.where(last, 0, torch.sigmoid(-a))
        below = torch.where(first, 0, torch.sigmoid(b))
        uncertain = size / scale
        exponent = 1 + log_scale.abs()
        moved = above * (uncertain + a.abs() * exponent) + below * (uncertain + b.abs() * exponent)
        condition = condition + exponent + moved
        scales[f"mean_{c}"] = (above + below) * (1 + uncertain) / scale
        scales[f"log_scale_{c}"] = (1 + moved) * (1 + uncertain)
        for j in range(c):
            scales[f"coupling_{c}{j}"] = scales[f"mean_{c}"]
    prior, joint = torch.logsumexp(p["logits"], 1), torch.logsumexp(log_p, 1)
    posterior = torch.softmax(log_p, 1)
    common = (posterior * condition).sum(1) + prior.abs() + joint.abs()
    scales = {k: posterior * s * (condition + common.unsqueeze(1)) for k, s in scales.items()}
    of_prior = torch.softmax(p["logits"], 1) * (1 + p["logits"].abs() + prior.abs().unsqueeze(1))
    scales["logits"] = of_prior + posterior * (condition + common.unsqueeze(1))
    return prior - joint, common, scales


def oracle(parameters, level, grad_nll, mixtures, levels):
    """nll and every gradient by name, through float64 autograd of the plain formula."""
    parameters = leaf(parameters.double())
    nll, common, scales = plain(parameters, level, mixtures, levels)
    truth = Truth()
    truth["nll"], truth.scales["nll"] = nll.flatten(1).sum(1), common.flatten(1).sum(1)
    (grad,) = torch.autograd.grad(truth["nll"], parameters, grad_nll.double())
    g = grad_nll.double().abs().view(-1, 1, 1, 1)
    for name, value in split(grad, mixtures, level.shape[1]).items():
        truth[name], truth.scales[name] = value, g * scales[name].detach()
    truth["nll"] = truth["nll"].detach()
    return truth


def draw_parameters(draw, case):
    """Means over the whole range, scales of a few bins."""
    B, H, W, M, C, L = case
    parameters = draw((B, logistic_mixture_channels(M, C), H, W))
    for name, part in split(parameters, M, C).items():
        if name.startswith("log_scale"):
            part.sub_(float(np.log(L)) - 1)
    return parameters


def draw_levels(draw, shape, levels):
    level = torch.randint(0, levels, shape, generator=draw.generator, dtype=torch.uint8)
    flat = level.view(-1)
    if flat.numel() > 1:
        flat[0], flat[-1] = 0, levels - 1
    return level.to(draw.device)


def check(impl, device, parameters, target, grad_nll, mixtures, levels, level=None):
    """`level`: what `target` stands for, where it is not made of levels."""
    parameters = leaf(parameters)
    nll = logistic_mixture_nll(parameters, target, mixtures=mixtures, levels=levels, impl=impl)
    assert (nll.shape, nll.dtype, nll.device) == (
        parameters.shape[:1],
        torch.float32,
        parameters.device,
    )
    (grad,) = torch.autograd.grad(nll, parameters, grad_nll)
    assert (grad.shape, grad.dtype) == (parameters.shape, parameters.dtype)
    level = target if level is None else level
    truth = oracle(parameters.cpu(), level.cpu(), grad_nll.cpu(), mixtures, levels)
    got = {"nll": nll, **split(grad, mixtures, level.shape[1])}
    assert set(got) == set(truth)
    for name, value in got.items():
        wrong = error(value, truth[name], truth.scales[name], value.dtype)
        limit = cap(value.dtype, impl, device)
        assert wrong <= limit, f"{name}: error {wrong:.3g} of its scale, allowed {limit:.3g}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_shapes(impl, device, case, dtype):
    B, H, W, M, C, L = case
    draw = Draw(device, DTYPES[dtype])
    parameters, level = draw_parameters(draw, case), draw_levels(draw, (B, C, H, W), L)
    check(impl, device, parameters, level, draw((B,)).float(), M, L)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(impl, device, layout, dtype):
    draw = Draw(device, DTYPES[dtype])
    channels, M, L = 3, 2, 32
    parameters = LAYOUTS[layout](draw, logistic_mixture_channels(M, channels))
    level = LAYOUTS[layout](partial(draw_levels, draw, levels=L), channels)
    plain_level = draw_levels(draw, (5, channels, 3, 7), L)
    grad_nll = draw((5,)).float()
    check(impl, device, parameters, level, grad_nll, M, L)
    if dtype == "float32":
        check(impl, device, parameters, plain_level, grad_nll, M, L)
        check(impl, device, draw(tuple(parameters.shape)), level, grad_nll, M, L)


def test_layouts_of_the_incoming_gradient(impl, device):
    draw = Draw(device)
    parameters, level = draw((5, 10, 3, 7)), draw_levels(draw, (5, 1, 3, 7), 16)
    for grad_nll in (draw((1,)).expand(5), draw((10,))[::2], draw((6,))[1:]):
        check(impl, device, parameters[:, :6], level, grad_nll, 2, 16)


@pytest.mark.parametrize("levels", [2, 5, 32, 256])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_floating_targets_are_read_as_the_nearest_level(impl, device, dtype, levels):
    """Also those of 256 levels in bfloat16, which has fewer digits than that."""
    draw = Draw(device)
    level = torch.arange(256, dtype=torch.uint8, device=device).clamp(max=levels - 1)
    level = level.view(2, 1, 8, 16)
    target = (level.double() / (levels - 1)).to(getattr(torch, dtype))
    parameters = draw_parameters(draw, (2, 8, 16, 2, 1, levels))
    check(impl, device, parameters, target, draw((2,)), 2, levels, level)


def test_bits_and_values_beyond_the_ends(impl, device):
    draw = Draw(device)
    bits = draw.target((2, 1, 3, 5), torch.bool)
    check(impl, device, draw((2, 6, 3, 5)), bits, draw((2,)), 2, 2, bits.to(torch.uint8))
    parameters = draw((2, 6, 3, 5))
    nll = partial(logistic_mixture_nll, parameters, mixtures=2, levels=8, impl=impl)
    seven = torch.full((2, 1, 3, 5), 7, dtype=torch.uint8, device=device)
    assert torch.equal(nll(seven + 200), nll(seven))
    assert torch.equal(nll(torch.full_like(parameters[:, :1], 1.7)), nll(seven))
    assert torch.equal(nll(torch.full_like(parameters[:, :1], -0.3)), nll(0 * seven))


@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 0, 3), (0, 0, 0)])
def test_empty(impl, device, shape):
    B, H, W = shape
    parameters = torch.zeros(B, 6, H, W, device=device, requires_grad=True)
    target = torch.zeros(B, 1, H, W, device=device)
    nll = logistic_mixture_nll(parameters, target, mixtures=2, impl=impl)
    assert torch.equal(nll, torch.zeros(B, device=device))
    (grad,) = torch.autograd.grad(nll.sum(), parameters)
    assert grad.shape == parameters.shape


def test_elements_further_apart_than_an_int32_can_count(impl, device):
    """Parameter channels (logit, mean, log-scale) and colours."""
    values, level = (far_apart(impl, device, t) for t in (torch.float16, torch.uint8))
    draw = Draw(device)
    parameters = values.view(1, 3, 1, 1)
    check(impl, device, parameters, draw_levels(draw, (1, 1, 1, 1), 8), draw((1,)), 1, 8)
    check(impl, device, draw((1, 10, 1, 1)), level.view(1, 3, 1, 1), draw((1,)), 1, 8)


def test_repeats_bit_for_bit(impl, device):
    B, H, W, M, C, L = case = (2, 17, 31, 2, 3, 4)
    draw = Draw(device)
    parameters, level = leaf(draw_parameters(draw, case)), draw_levels(draw, (B, C, H, W), L)

    def run():
        nll = logistic_mixture_nll(parameters, level, mixtures=M, levels=L, impl=impl)
        return nll, *torch.autograd.grad(nll.sum(), parameters)

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


# ------------------------------------------------------------------------------ normalisation


def every_colour(channels, levels):
    """`[C, levels^C]` uint8."""
    colours = list(itertools.product(range(levels), repeat=channels))
    return torch.tensor(colours, dtype=torch.uint8).t().contiguous()


@pytest.mark.parametrize("log_scale", [-1e4, -30, -7, -5, -2, 0, 4, 20, 88, 1e4])
@pytest.mark.parametrize(("channels", "levels"), [(1, 256), (1, 2), (2, 9), (3, 4)])
def test_the_levels_have_probability_one_together(impl, device, channels, levels, log_scale):
    """For ordinary parameters and for means far outside, with every colour as one row."""
    colours = every_colour(channels, levels).to(device)
    draw = Draw(device)
    M, n = 3, colours.shape[1]
    for factor in (0.7, 3.0, 1e4):
        parameters = draw((1, logistic_mixture_channels(M, channels), 1, 1)) * factor
        for name, part in split(parameters, M, channels).items():
            if name.startswith("log_scale"):
                part.copy_(draw(tuple(part.shape)) + log_scale)
            if name == "logits":  # of logits near 1e4 float32 keeps no more than 1e-3
                part.clamp_(-20, 20)
        many = parameters.expand(n, -1, -1, -1)
        target = colours.t().reshape(n, channels, 1, 1)
        nll = logistic_mixture_nll(many, target, mixtures=M, levels=levels, impl=impl)
        total = torch.exp(-nll.double()).sum().item()
        assert total == pytest.approx(1, abs=3e-6 if device == "cpu" else 2e-5)
        if impl == "torch":
            nll = logistic_mixture_nll(many.double(), target, mixtures=M, levels=levels, impl=impl)
            assert torch.exp(-nll).sum().item() == pytest.approx(1, abs=1e-12)


# ----------------------------------------------------------------------------------- extremes


def exact(parameters, level, levels):
    """−log p of one grey pixel in 160 digits. `parameters`: M logits, means, log-scales."""
    M = len(parameters) // 3
    logits, means, log_scales = parameters[:M], parameters[M : 2 * M], parameters[2 * M :]
    x, half = mpmath.mpf(2 * level) / (levels - 1) - 1, mpmath.mpf(1) / (levels - 1)
    total = 0
    for logit, mean, log_scale in zip(logits, means, log_scales, strict=True):
        scale = mpmath.exp(max(log_scale, -7))

        def cdf(y, mean=mean, scale=scale):
            return 1 / (1 + mpmath.exp(-(y - mean) / scale))

        low = 0 if level == 0 else cdf(x - half)
        high = 1 if level == levels - 1 else cdf(x + half)
        total += mpmath.exp(logit) * (high - low)
    return mpmath.log(sum(mpmath.exp(logit) for logit in logits)) - mpmath.log(total)


EXTREMES = [
    # logits; means; log-scales
    (0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    (0.3, -0.2, 1.3, -2.1, -6.5, -3.0),  # far from most levels
    (5.0, -90.0, 0.5, 0.1, -6.9, 3.0),
    (0.0, 80.0, 30.0, -20.0, -3.0, -1.0),
    (0.0, 1.0, 0.01, -0.02, 15.0, 40.0),  # flat: bins of 1e-7 to 1e-17
    (0.0, -1.0, 3.0, 0.0, 100.0, 95.0),  # bins below the smallest float32
    (0.0, 0.0, 0.0, 1.0, -40.0, -8.0),  # below the floor
]


def operator(parameters, target, mixtures, levels):
    """Forward and backward as operators: the kernels, or on a CPU the references of both."""
    return torch.ops.fastvae.logistic_mixture_nll(parameters, target, mixtures, levels)[0]


@pytest.mark.parametrize("parameters", EXTREMES, ids=str)
def test_against_160_digits(impl, device, parameters):
    """Values and gradients, where neither float64 nor a plain difference of sigmoids would do."""
    levels = 256
    tested = [0, 1, 77, 128, 254, 255]
    functions = [partial(logistic_mixture_nll, impl=impl), operator]
    with mpmath.workdps(160):
        numbers = [mpmath.mpf(float(np.float32(v))) for v in parameters]
        want = [exact(numbers, k, levels) for k in tested]
        slopes = []
        for k in tested:
            for i in range(len(numbers)):
                at = numbers[i]

                def f(v, i=i, k=k):
                    return exact([*numbers[:i], v, *numbers[i + 1 :]], k, levels)

                step = mpmath.mpf(10) ** -60
                slopes.append((f(at + step) - f(at - step)) / (2 * step))
    want = torch.tensor([float(v) for v in want], dtype=torch.float64)
    slopes = torch.tensor([float(v) for v in slopes], dtype=torch.float64).view(len(tested), -1)
    target = torch.tensor(tested, dtype=torch.uint8, device=device).view(-1, 1, 1, 1)
    for function in functions:
        rows = (
            torch.tensor(parameters, device=device).view(1, -1, 1, 1).repeat(len(tested), 1, 1, 1)
        )
        rows = leaf(rows)
        nll = function(rows, target, mixtures=2, levels=levels)
        (grad,) = torch.autograd.grad(nll.sum(), rows)
        # In units of a scale a mean is known to so much, and its gradient too.
        per_scale = torch.tensor(parameters[4:], dtype=torch.float64).clamp(min=-7).neg().exp()
        reach = 2e-7 * (per_scale * (1 + torch.tensor(parameters[2:4]).abs())).max().item()
        wrong = (nll.detach().cpu().double() - want).abs()
        assert (wrong / (3e-6 * (1 + want.abs()) + reach)).max() < 1
        allowed = torch.ones(6, dtype=torch.float64)
        allowed[2:4] = per_scale.clamp(min=1e-30)  # not below what float32 can hold
        # A component's posterior is known to the digits of its logarithm.
        wrong = (grad.cpu().double().view_as(slopes) - slopes).abs()
        assert (wrong / (2e-4 * slopes.abs() + 1e-6 * allowed)).max() < 1


@pytest.mark.parametrize("mean", [0.0, 1e3, -1e10, 1e30, -1e33])
@pytest.mark.parametrize("log_scale", [-1e30, -100, -7, 0, 50, 90, 1e3, 1e30])
def test_everything_is_finite(impl, device, mean, log_scale):
    parameters = Draw(device)((2, logistic_mixture_channels(2, 3), 3, 5))
    p = split(parameters, 2, 3)
    for c in range(3):
        p[f"mean_{c}"].add_(mean)
        p[f"log_scale_{c}"].copy_(torch.full_like(p[f"log_scale_{c}"], log_scale))
    p["coupling_21"].mul_(1e30)
    level = draw_levels(Draw(device), (2, 3, 3, 5), 256)
    for function in (partial(logistic_mixture_nll, impl=impl), operator):
        parameters = leaf(parameters)
        nll = function(parameters, level, mixtures=2, levels=256)
        (grad,) = torch.autograd.grad(nll.sum(), parameters)
        assert nll.isfinite().all() and grad.isfinite().all()


def test_a_component_can_be_switched_off(impl, device):
    """A logit of −∞ leaves the other components as they are without it."""
    draw = Draw(device)
    level = draw_levels(draw, (2, 1, 3, 5), 16)
    two = draw((2, 6, 3, 5))
    off = two.new_full((2, 1, 3, 5), -torch.inf)
    blank = torch.zeros_like(off)
    parts = [off, two[:, :2], blank, two[:, 2:4], blank, two[:, 4:]]
    three = leaf(torch.cat(parts, dim=1))
    nll = logistic_mixture_nll(three, level, mixtures=3, levels=16, impl=impl)
    want = logistic_mixture_nll(two, level, mixtures=2, levels=16, impl=impl)
    torch.testing.assert_close(nll, want, rtol=1e-6, atol=1e-6)
    (grad,) = torch.autograd.grad(nll.sum(), three)
    assert grad.isfinite().all() and not grad[:, [0, 3, 6]].any()


def test_what_is_not_a_number_stays_none(impl, device):
    """In a parameter of any group, and in the target: NaN of that row, and of no other."""
    draw = Draw(device)
    parameters, target = draw((2, 10, 1, 2)), draw.uniform((2, 3, 1, 2))
    nll = partial(logistic_mixture_nll, mixtures=1, impl=impl)
    for channel in range(10):
        spoilt = parameters.clone()
        spoilt[1, channel, 0, 1] = torch.nan
        assert nll(spoilt, target).isnan().tolist() == [False, True]
    for channel in range(3):
        spoilt = target.clone()
        spoilt[0, channel, 0, 0] = torch.nan
        assert nll(parameters, spoilt).isnan().tolist() == [True, False]


def test_scales_have_a_floor(impl, device):
    """Below −7 nothing changes and the log-scale has no gradient; at −7 it has one."""
    draw = Draw(device)
    parameters = draw((3, 3, 3, 5)) * 0.1
    level = draw_levels(draw, (3, 1, 3, 5), 256)
    parameters[:, 2] = torch.tensor([-7.0, -7.5, -1000.0], device=device).view(3, 1, 1)
    parameters[1:], level[1:] = (
        torch.where(
            torch.tensor([True, True, False], device=device).view(3, 1, 1),
            parameters[0],
            parameters,
        )[1:],
        level[0],
    )
    parameters = leaf(parameters)
    nll = logistic_mixture_nll(parameters, level, mixtures=1, impl=impl)
    (grad,) = torch.autograd.grad(nll.sum(), parameters)
    assert nll[0] == nll[1] == nll[2]
    assert grad[0, 2].abs().min() > 0 and not grad[1:, 2].any()
    assert torch.equal(grad[1, 1], grad[0, 1]) and torch.equal(grad[2, 1], grad[0, 1])


@pytest.mark.parametrize("levels", [2, 4])
def test_the_gradient_where_a_mean_lies_on_the_edge_of_a_bin(impl, device, levels):
    """A network that begins with zeros puts it there, and must not stand still."""
    level = draw_levels(Draw(device), (2, 3, 1, 3), levels)
    zeros = torch.zeros(2, 20, 1, 3, device=device)
    zeros[:, 10:12] = 0.5  # couplings have a gradient only where components differ
    check(impl, device, zeros, level, torch.ones(2, device=device), 2, levels)
    check(impl, device, 0 * zeros, level, torch.ones(2, device=device), 2, levels)


# ---------------------------------------------------------------------------------- references


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("function", [logistic_mixture_nll, operator])
def test_gradcheck(function, channels):
    draw = Draw("cpu", torch.float64)
    parameters = leaf(draw((2, logistic_mixture_channels(2, channels), 1, 3)))
    level = draw_levels(draw, (2, channels, 1, 3), 6)
    function = partial(function, mixtures=2, levels=6)
    assert torch.autograd.gradcheck(lambda p: function(p, level), parameters)
    assert function(parameters, level).dtype == torch.float64


def test_float64_runs_in_float64():
    B, H, W, M, C, L = COLOUR
    draw = Draw("cpu", torch.float64)
    parameters, level = draw_parameters(draw, COLOUR), draw_levels(draw, (B, C, H, W), L)
    want = oracle(parameters, level, torch.ones(B), M, L)["nll"]
    got = logistic_mixture_nll(parameters, level, mixtures=M, levels=L)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-11)


def test_the_operator_agrees_with_autograd_through_the_reference(device):
    B, H, W, M, C, L = COLOUR
    draw = Draw(device)
    values, level = draw_parameters(draw, COLOUR), draw_levels(draw, (B, C, H, W), L)
    results = []
    for function in (operator, partial(logistic_mixture_nll, impl="torch")):
        parameters = leaf(values)
        nll = function(parameters, level, mixtures=M, levels=L)
        results.append((nll, *torch.autograd.grad(nll.square().sum(), parameters)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


def test_the_log_sums_have_no_gradient(device):
    parameters = leaf(Draw(device)((2, 3, 1, 3)))
    level = torch.zeros(2, 1, 1, 3, dtype=torch.uint8, device=device)
    _, log_sums = torch.ops.fastvae.logistic_mixture_nll(parameters, level, 1, 256)
    assert log_sums.shape == (2, 2, 3) and not log_sums.requires_grad


# ------------------------------------------------------------------------- under torch.compile


@pytest.fixture
def _forget_compiled_code():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def public(parameters, target, mixtures, levels):
    return logistic_mixture_nll(parameters, target, mixtures=mixtures, levels=levels)


def results(function, device, batch=3, channels=2, dtype=torch.float32):
    draw = Draw(device, dtype)
    parameters = leaf(draw_parameters(draw, (batch, 5, 7, 2, channels, 256)))
    level = draw_levels(draw, (batch, channels, 5, 7), 256)
    nll = function(parameters, level, 2, 256)
    weights = torch.linspace(-1, 1, batch, device=device)
    return nll, *torch.autograd.grad(nll, parameters, weights)


@needs_no_interpreter
@pytest.mark.usefixtures("_forget_compiled_code")
@pytest.mark.parametrize("function", [pytest.param(public, marks=pytest.mark.slow), operator])
def test_compiled_equals_eager(device, function):
    got = results(torch.compile(function, fullgraph=True), device)
    for g, w in zip(got, results(function, device), strict=True):
        assert g.dtype == w.dtype
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5 * w.abs().max().item())


@needs_no_interpreter
@pytest.mark.usefixtures("_forget_compiled_code")
@pytest.mark.parametrize("function", [pytest.param(public, marks=pytest.mark.slow), operator])
def test_a_dynamic_graph_serves_all_batch_sizes(device, function):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
    counts = []
    for batch in (10, 9, 17):
        got, want = results(compiled, device, batch, 1), results(function, device, batch, 1)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)
        counts.append(counter.frame_count)
    assert counts == [counts[0]] * 3


@pytest.mark.parametrize("function", [public, operator])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(device, function, dtype):
    with torch.autocast(device, torch.bfloat16):
        got = results(function, device, dtype=dtype)
    assert (got[0].dtype, got[1].dtype) == (torch.float32, dtype)
    for g, w in zip(got, results(function, device, dtype=dtype), strict=True):
        assert torch.equal(g, w)


@needs_no_interpreter
@pytest.mark.parametrize("function", [public, operator])
def test_no_value_is_read_by_the_host(function):
    with FakeTensorMode():
        parameters = torch.randn(3, 20, 5, 7, requires_grad=True)
        level = torch.zeros(3, 3, 5, 7, dtype=torch.uint8)
        nll = function(parameters, level, 2, 256)
        (grad,) = torch.autograd.grad(nll.sum(), parameters)
        assert grad.shape == parameters.shape
        parameters, level = parameters.detach().to("cuda", torch.bfloat16), level.to("cuda")
        nll = public(parameters, level, 2, 256)
        assert (nll.device.type, nll.dtype, nll.shape) == ("cuda", torch.float32, (3,))
        drawn = logistic_mixture_sample(parameters, 2, 3, 256, 0)
        assert (drawn.device.type, drawn.shape) == ("cuda", (3, 3, 5, 7))


def opcheck_cases(device):
    """Arguments of the operator and of its gradient: plain, strided, low precision, empty."""
    draw = Draw(device)
    byte = draw_levels(draw, (2, 3, 4, 5), 256)
    colour = draw((2, 20, 4, 5))
    grey = draw((4, 3, 5, 2)).permute(3, 1, 0, 2)
    sums = draw((2, 2, 20))
    return {
        "logistic_mixture_nll": [
            (leaf(colour), byte, 2, 256),
            (leaf(colour.bfloat16()), byte.float() / 255, 2, 8),
            (leaf(grey), byte[:, 1:2], 1, 256),
            (leaf(colour[:0]), byte[:0], 2, 256),
        ],
        "logistic_mixture_nll_backward": [
            (colour, byte, sums, torch.ones(1, device=device).expand(2), 2, 256),
            (colour.bfloat16(), byte, sums, draw((2,)), 2, 256),
            (grey, byte[:, 1:2], sums, draw((2,)), 1, 256),
        ],
    }


@needs_no_interpreter
@pytest.mark.parametrize(
    ("name", "index"), [(n, i) for n, c in opcheck_cases("cpu").items() for i in range(len(c))]
)
def test_opcheck(device, name, index):
    arguments = opcheck_cases(device)[name][index]
    torch.library.opcheck(getattr(torch.ops.fastvae, name).default, arguments)


# ---------------------------------------------------------------------------- means and samples


@pytest.mark.parametrize(("mixtures", "channels", "levels"), [(2, 1, 5), (3, 2, 6), (3, 3, 4)])
@pytest.mark.parametrize("log_scale", [-9.0, -2.0, 0.0])
def test_samples_have_the_probabilities(mixtures, channels, levels, log_scale):
    """Pearson's χ² of all colours, cells with an expectation below 5 taken together."""
    draw = Draw("cpu", seed=channels)
    one = draw((1, logistic_mixture_channels(mixtures, channels), 1, 1))
    for name, part in split(one, mixtures, channels).items():
        if name.startswith("log_scale"):
            part.mul_(0.3).add_(log_scale)
    colours = every_colour(channels, levels)
    n = colours.shape[1]
    nll = logistic_mixture_nll(
        one.double().expand(n, -1, -1, -1),
        colours.t().reshape(n, channels, 1, 1),
        mixtures=mixtures,
        levels=levels,
    )
    many = one.expand(16, -1, 128, 128)
    sample = logistic_mixture_sample(many, mixtures, channels, levels, seed=7)
    level = sample * (levels - 1)
    assert torch.equal(level, level.round()) and level.min() >= 0 and level.max() <= levels - 1
    place = levels ** torch.arange(channels - 1, -1, -1).view(1, -1, 1, 1)
    code = (level.round().long() * place).sum(1).flatten()
    count = torch.bincount(code, minlength=n).double().numpy()
    expected = torch.exp(-nll).numpy() * code.numel()
    rare = expected < 5
    count, expected = (
        np.append(v[~rare], v[rare].sum()) if rare.any() else v for v in (count, expected)
    )
    if expected[-1] < 5:
        assert count[-1] < 25
        count, expected = count[:-1], expected[:-1]
    statistic = ((count - expected) ** 2 / expected).sum()
    assert scipy.stats.chi2.sf(statistic, max(1, len(count) - 1)) > 1e-3


def test_samples_of_extreme_parameters():
    for log_scale, mean in ((1e4, 0.0), (-1e4, 0.3), (0.0, 1e30), (90.0, -1e30)):
        parameters = torch.zeros(2, 20, 8, 8)
        parameters[:, 2:14] = (
            torch.tensor([mean, log_scale]).repeat_interleave(2).repeat(3).view(1, 12, 1, 1)
        )
        sample = logistic_mixture_sample(parameters, 2, 3, 256, 0)
        assert ((sample >= 0) & (sample <= 1)).all()
        if log_scale == 1e4:
            assert ((sample == 0) | (sample == 1)).all() and 0.4 < sample.mean() < 0.6


def test_a_sampled_row_depends_on_its_place_alone():
    parameters = Draw("cpu")((1, 10, 4, 6)).expand(5, -1, -1, -1)
    whole = logistic_mixture_sample(parameters, 1, 3, 256, 3)
    assert torch.equal(logistic_mixture_sample(parameters[:2], 1, 3, 256, 3, offset=2), whole[2:4])
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(logistic_mixture_sample(parameters, 1, 3, 256, 4), whole)


def test_mean_of_narrow_components_is_that_of_samples():
    parameters = Draw("cpu")((1, logistic_mixture_channels(3, 3), 1, 1)) * 0.4
    for name, part in split(parameters, 3, 3).items():
        if name.startswith("log_scale"):
            part.fill_(-5.0)
    mean = logistic_mixture_mean(parameters, 3, 3)
    sample = logistic_mixture_sample(parameters.expand(16, -1, 64, 64), 3, 3, 256, 0)
    torch.testing.assert_close(mean.flatten(), sample.mean((0, 2, 3)), rtol=0, atol=4e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_clips_each_component_channel_by_channel(dtype):
    parameters = torch.zeros(1, 20, 1, 1, dtype=DTYPES[dtype])
    p = split(parameters, 2, 3)
    p["mean_0"][:, 0], p["mean_0"][:, 1] = 3.0, -0.5  # 1 and −½
    p["mean_1"][:, 1], p["coupling_10"][:, 0] = 0.25, 50.0  # 0 + 1·1, and ¼
    p["mean_2"][:, 0], p["coupling_21"][:, 0] = 0.5, -50.0  # ½ − 1·1, and 0
    mean = logistic_mixture_mean(parameters, 2, 3)
    want = (torch.tensor([(1 - 0.5) / 2, (1 + 0.25) / 2, -0.25]) + 1) / 2
    torch.testing.assert_close(mean.flatten(), want)
    assert (mean.dtype, mean.shape) == (torch.float32, (1, 3, 1, 1))


# ------------------------------------------------------------------------------------- errors

P, X = torch.zeros(2, 6, 3, 5), torch.zeros(2, 1, 3, 5)


@pytest.mark.parametrize(
    ("arguments", "keywords", "exception", "message"),
    [
        ((None, X), {}, TypeError, "parameters must be a tensor, got NoneType"),
        ((P.int(), X), {}, TypeError, r"parameters must be float32, .* or float64, got torch\.int"),
        ((P, [0.0]), {}, TypeError, "target must be a tensor, got list"),
        ((P, X.long()), {}, TypeError, r"target must be uint8, bool or floating, got torch\.int64"),
        ((P, X[0]), {}, ValueError, r"target must be \[B, channels, H, W\], got shape \(1, 3, 5\)"),
        ((P[0], X), {}, ValueError, r"parameters must be \[B, channels, H, W\], got shape \(6, "),
        (
            (P, X[:1]),
            {},
            ValueError,
            r"target has shape \(1, 1, 3, 5\), parameters \(2, 6, 3, 5\); batch, height and width",
        ),
        ((P, X[..., :1]), {}, ValueError, "batch, height and width must be the same"),
        ((P, X.to("meta")), {}, ValueError, "target is on meta, parameters on cpu"),
        ((P, X.clone().requires_grad_()), {}, ValueError, r"pass target\.detach\(\)"),
        (
            (P, X),
            {"mixtures": 3},
            ValueError,
            "parameters has 6 channels; 3 components and 1 colour channels need 9",
        ),
        ((P, X.expand(2, 4, 3, 5)), {}, ValueError, "channels must be 1 to 3, got 4"),
        ((P, X), {"mixtures": 0}, ValueError, "mixtures must be 1 or more, got 0"),
        ((P, X), {"mixtures": 2.0}, TypeError, "mixtures must be an int, got float"),
        ((P, X), {"levels": 1}, ValueError, "levels must be 2 to 256, got 1"),
        ((P, X), {"levels": 257}, ValueError, "levels must be 2 to 256, got 257"),
        ((P, X), {"impl": "cuda"}, ValueError, 'impl is "auto", "triton" or "torch", got'),
    ],
)
def test_errors(arguments, keywords, exception, message):
    with pytest.raises(exception, match=message):
        logistic_mixture_nll(*arguments, **{"mixtures": 2, **keywords})


def test_errors_of_mean_and_sample():
    with pytest.raises(ValueError, match="parameters has 6 channels; 2 components and 3 colour"):
        logistic_mixture_mean(P, 2, 3)
    with pytest.raises(ValueError, match=r"parameters must be \[B, channels, H, W\], got shape"):
        logistic_mixture_sample(P[0], 2, 1, 256, 0)
    with pytest.raises(ValueError, match="levels must be 2 to 256, got 1000"):
        logistic_mixture_sample(P, 2, 1, 1000, 0)
    with pytest.raises(TypeError, match="seed must be an int or an int64 tensor, got float"):
        logistic_mixture_sample(P, 2, 1, 256, 0.5)


def test_triton_has_conditions(monkeypatch):
    monkeypatch.setattr(functional, "_HAS_TRITON", True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        TypeError, match=r"takes float32, bfloat16 or float16, got .*float64.*; use"
    ):
        logistic_mixture_nll(P.double(), X, mixtures=2, impl="triton")
    with pytest.raises(
        ValueError, match='impl="triton" needs tensors on a GPU, got cpu; use impl='
    ):
        logistic_mixture_nll(P, X, mixtures=2, impl="triton")


# ------------------------------------------------------------------ the kernels, compiled

# Registers of a thread: with 128 at most, four programs of 128 threads share a multiprocessor.
REGISTERS = {"forward_kernel": 96, "backward_kernel": 128}


@needs_no_interpreter
@pytest.mark.skipif(not HAS_TRITON, reason="the package triton is not installed")
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize(
    ("dtype", "chooses"), [("fp32", False), ("bf16", False), ("fp16", False), ("bf16", True)]
)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", REGISTERS)
def test_ahead_of_time(name, channels, dtype, chooses, architecture, tmp_path):
    """Compiles, spills nothing, and leaves room for other programs on its multiprocessor; also
    where indices choose the targets."""
    tools = importlib.import_module("test_ahead_of_time")
    kernels = importlib.import_module("fastvae_kernels.triton_kernels.logistic_mixture_nll")
    block_r, block_c = kernels.tile(64, 32 * 32)
    constants = {"CHANNELS": channels, "LEVELS": 256, "TARGET_SCALE": 1.0}
    constants |= {} if chooses else {"indices_B": None}
    constants |= {"BLOCK_R": block_r, "BLOCK_C": block_c}
    pointers = dict.fromkeys(("nll_BS", "log_sums_B2N", "grad_nll_B"), "*fp32")
    pointers |= {"target_TCN": "*u8", "indices_B": "*i64"}
    pointers |= dict.fromkeys(("parameters_BPN", "grad_parameters_BPN"), f"*{dtype}")
    signature, constexprs, attributes = {}, {}, {}
    function = getattr(kernels, name)
    for i, parameter in enumerate(function.params):
        argument = parameter.name
        if argument in constants:
            signature[argument], constexprs[i,] = "constexpr", constants[argument]
        elif argument.endswith("_stride_n"):
            signature[argument], constexprs[i,] = "constexpr", 1
        elif argument in ("B", "T", "M"):
            signature[argument] = "i32"
        else:
            assert argument in pointers or argument == "N" or "_stride_" in argument
            signature[argument] = pointers.get(argument, "i32")
            attributes[i,] = [["tt.divisibility", 16]]
    compiled = tools.triton.compile(
        tools.ASTSource(function, signature, constexprs, attributes),
        target=tools.GPUTarget("cuda", architecture, 32),
        options=dict(kernels.OPTIONS),
    )
    tools.check_no_spills(compiled.asm["ptx"], architecture, tmp_path)
    report = tools.resources(compiled.asm["ptx"], architecture, tmp_path)
    assert int(re.search(r"Used (\d+) registers", report)[1]) <= REGISTERS[name]
