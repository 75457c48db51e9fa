"""What the benchmark of the operators says of targets, and that it meets a foretold gradient."""

import math

import pytest
import torch
from op_cases import OPS, Case
from op_speed import DIRECTIONS, TARGETS, missed


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
