"""Numbers that the host reads later, and time that it does not wait for."""

import time

import pytest
import torch

from fastvae.training.clock import Clock
from fastvae.training.readings import Mark, Reading

CPU = torch.device("cpu")
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]


@pytest.mark.parametrize("device", DEVICES)
def test_a_reading_is_of_its_moment(device: str) -> None:
    values = torch.tensor([1.0, 2.5, -3.0], dtype=torch.float64, device=device)
    first = Reading(values)
    values.mul_(2)
    second = Reading(values)
    values.zero_()
    assert first.get() == [1.0, 2.5, -3.0] == first.get()
    assert second.get() == [2.0, 5.0, -6.0]


@pytest.mark.parametrize("device", DEVICES)
def test_marks_are_in_order(device: str) -> None:
    first = Mark(torch.device(device))
    time.sleep(0.02)
    second = Mark(torch.device(device))
    assert 0.02 <= second.since(first) < 1.0
    assert first.since(first) == 0.0


def test_images_a_second_leave_out_pauses_and_the_first_step() -> None:
    clock = Clock()
    with clock.paused():  # before the first step nothing is timed
        pass
    time.sleep(0.05)
    clock.first_step(CPU)
    assert clock.first_step_seconds is not None and clock.first_step_seconds >= 0.05
    time.sleep(0.02)
    clock.count(100)
    with clock.paused():
        time.sleep(0.3)
    time.sleep(0.02)
    clock.count(50)
    window = clock.window()
    assert window.images == 150
    assert 0.04 <= window.seconds() < 0.3
    time.sleep(0.3)  # the next window's
    assert clock.rate(window) == pytest.approx(150 / window.seconds(), abs=0.1)
    assert clock.overall() == clock.rate(window)
    assert clock.rate(clock.window()) == 0.0


def test_what_fails_in_a_pause_ends_it() -> None:
    clock = Clock()
    clock.first_step(CPU)
    failing: dict[str, int] = {}
    with pytest.raises(KeyError), clock.paused():
        failing["later than" if time.sleep(0.2) is None else ""]
    assert clock.window().seconds() < 0.2
