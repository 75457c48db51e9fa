"""What the benchmark of the operators says of targets, and that it meets a foretold gradient."""

import math

import pytest
import torch
from op_cases import OPS, Case, check_agreement
from op_speed import DIRECTIONS, TARGETS, core_cases, missed, more_cases
from settings import Settings


@pytest.mark.parametrize(
    ("name", "direction", "share", "eager", "compiled", "want"),
    [
        ("reparameterize_kl", "forward", 0.85, 4.0, 1.5, []),
        ("reparameterize_kl", "forward", 0.84, 4.0, 1.5, ["85% of copy"]),
        ("reparameterize_kl_packed", "backward", None, 3.99, 1.5, ["4× eager"]),
        ("reparameterize_kl_packed", "backward", 0.9, 9.0, 1.49, ["1.5× compiled"]),
        (
            "reparameterize_kl",
            "forward",
            0.1,
            1.0,
            math.nan,
            ["85% of copy", "1.5× compiled", "4× eager"],
        ),
        ("reparameterize_kl, given prior", "forward", 0.1, 0.1, 0.1, []),
        ("bernoulli_nll, row_weight", "forward+backward", 0.1, 0.1, 1.2, []),
        ("gaussian_nll, one variance", "forward+backward", 0.1, 0.1, 1.19, ["1.2× compiled"]),
        ("gaussian_nll, one variance", "forward", 0.1, 0.1, 0.1, []),
        ("uniform", "forward", 0.1, 0.1, 0.1, []),
    ],
)
def test_missed_targets(name, direction, share, eager, compiled, want):
    """A ratio that is no number reaches nothing."""
    assert sorted(missed(name, direction, share, eager, compiled)) == sorted(want)


def test_targets_name_operators_that_are_timed():
    names = {op.name for op in OPS}
    for key in TARGETS:
        assert any(key in name for name in names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fewest_bytes(dtype):
    """Written ahead, a gradient costs its own bytes and no second look at the inputs."""
    size, by_name = dtype.itemsize, {op.name: op for op in OPS}
    plain, ahead = (
        Case(by_name[name], 100, 784, dtype).bytes(DIRECTIONS[2])
        for name in ("bernoulli_nll, uint8 target", "bernoulli_nll, row_weight")
    )
    assert plain == 100 * (784 * (3 * size + 2) + 8)
    assert ahead == 100 * (784 * (2 * size + 1) + 8)
    separate, packed = (
        Case(by_name[name], 100, 64, dtype).bytes(DIRECTIONS[2])
        for name in ("reparameterize_kl", "reparameterize_kl_packed")
    )
    assert separate == packed == 100 * (64 * 8 * size + 8)


def test_what_is_timed_first():
    """Each operator that training calls most, in both dtypes, at a large and a common size; the
    large ones first. What remains is timed afterwards, and nothing twice."""
    core, more = core_cases(Settings()), more_cases(Settings())
    names = {case.op.name.partition(",")[0] for case in core}
    assert names == {
        *("reparameterize_kl", "bernoulli_nll", "gaussian_nll", "logistic_mixture_nll"),
    }
    assert len(core) == 24 and {case.dtype for case in core} == {torch.float32, torch.bfloat16}
    large, common = ([case.input_bytes for case in half] for half in (core[:12], core[12:]))
    assert all(a > 15 * b for a, b in zip(large, common, strict=True))
    every = [str(case) for case in (*core, *more)]
    assert len(every) == len(set(every)) and {case.op.name for case in more} == {
        op.name for op in OPS
    }


def test_bytes_of_a_mixture_of_logistics():
    """Fifty parameters of a pixel, three bytes of its colours, and two sums that are kept."""
    (op,) = (op for op in OPS if op.name.startswith("logistic_mixture_nll"))
    case = Case(op, 3, 16, torch.bfloat16)
    assert case.bytes("forward") == 3 * (16 * (50 * 2 + 3 + 8) + 4)
    assert case.bytes("backward") == 3 * (16 * (2 * 50 * 2 + 3 + 8) + 4)
    inputs = op.make(3, 16, torch.float32, torch.device("cpu"))
    assert inputs[0].shape == (3, 50, 4, 4) and inputs[1].shape == (3, 3, 4, 4)
    check_agreement(case, {"pytorch": op.pytorch, "fastvae": op.fastvae}, inputs)
