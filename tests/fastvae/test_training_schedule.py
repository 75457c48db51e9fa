"""The learning rate at known steps."""

import math

import pytest
import torch

from fastvae.config import OptimizerConfig
from fastvae.training.schedule import learning_rate


def rates(steps: list[int], total: int = 100, per_epoch: float = 10.0, **settings: object) -> list:
    config = OptimizerConfig(learning_rate=0.1, **settings)  # type: ignore[arg-type]
    return [float(learning_rate(config, torch.tensor(step), total, per_epoch)) for step in steps]


def test_constant() -> None:
    assert rates([0, 1, 50, 99]) == [0.1] * 4


def test_warm_up_is_linear_and_ends_at_the_peak() -> None:
    for schedule in ("constant", "cosine", "step"):
        found = rates([0, 1, 3, 4], schedule=schedule, lr_warmup_steps=4)
        assert found[:3] == pytest.approx([0.025, 0.05, 0.1])
        assert found[3] == pytest.approx(0.1)


def test_cosine_reaches_zero_at_the_end() -> None:
    found = rates([0, 25, 50, 75, 99, 100, 150], schedule="cosine")
    half = math.sqrt(0.5)
    expected = [
        0.1,
        0.05 * (1 + half),
        0.05,
        0.05 * (1 - half),
        0.05 * (1 - math.cos(math.pi / 100)),
    ]
    assert found[:5] == pytest.approx(expected)
    assert found[5] == found[6] == pytest.approx(0.0, abs=1e-12)
    # After a warm-up the half cosine takes the steps that are left.
    assert rates([20, 60, 100], schedule="cosine", lr_warmup_steps=20) == pytest.approx(
        [0.1, 0.05, 0.0]
    )


def test_steps_down() -> None:
    settings = {"schedule": "step", "lr_step_epochs": 2.0, "lr_step_factor": 0.5}
    found = rates([0, 19, 20, 39, 40, 99], **settings)
    assert found == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.025, 0.1 / 16])
    assert rates([24, 25], per_epoch=12.5, **settings) == pytest.approx([0.1, 0.05])


def test_stages_of_burda_et_al() -> None:
    """Stage i = 0 … 7 lasts 3^i epochs at 10^(−i/7) of the peak: 3,280 epochs in all."""
    per_epoch, first = 2.5, 0
    for i in range(8):
        steps = math.ceil(per_epoch * (3**i))
        inside = [math.ceil(per_epoch * first), math.ceil(per_epoch * first) + steps // 2]
        found = rates(inside, per_epoch=per_epoch, schedule="stages")
        assert found == pytest.approx([0.1 * 10 ** (-i / 7)] * 2)
        first += 3**i
    assert first == 3280
    at_changes = [1, 4, 13, 40, 121, 364, 1093]
    for i, epoch in enumerate(at_changes):
        found = rates([10 * epoch - 1, 10 * epoch], schedule="stages")
        assert found == pytest.approx([0.1 * 10 ** (-i / 7), 0.1 * 10 ** (-(i + 1) / 7)])
    assert rates([10**6], schedule="stages") == pytest.approx([0.01])


def test_warm_up_longer_than_the_run() -> None:
    assert rates([0, 9], total=10, schedule="cosine", lr_warmup_steps=50) == pytest.approx(
        [0.002, 0.02]
    )
