"""On a GPU: between two lines of the log the host waits for nothing.

Needs nothing of conftest.py, so that `bench/gpu.py` can run it where few packages are installed.
"""

import traceback
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from step_cases import digit_like_images, make_accelerator, make_updates
from step_speed import side_stream

from fastvae.config import Config, ModelConfig, ObjectiveConfig, OptimizerConfig
from fastvae.training.course import Course
from fastvae.training.updates import Updates

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

SMALL = ModelConfig(hidden=(64,), latent_dim=7)
PLAIN = Config(model=SMALL, batch_size=24)
CONFIGS = {
    "plain": PLAIN,
    "average": replace(PLAIN, optimizer=OptimizerConfig(ema_decay=0.99)),
    "clipped": replace(PLAIN, optimizer=OptimizerConfig(clip_norm=1.0)),
    "cosine": replace(PLAIN, optimizer=OptimizerConfig(schedule="cosine", lr_warmup_steps=5)),
    "importance-weighted": replace(
        PLAIN, objective=ObjectiveConfig(objective="importance-weighted", num_samples=3)
    ),
    "optimal variance": replace(
        PLAIN, model=replace(SMALL, likelihood="gaussian", variance="optimal")
    ),
}


@pytest.fixture(autouse=True)
def _own_stream() -> Iterator[None]:
    with side_stream(torch.device("cuda")):
        yield


def warm(config: Config, *, compiled: bool, replayed: bool) -> Updates:
    """After so many steps that whatever compiles, captures or measures has done so."""
    images = digit_like_images(300, torch.device("cuda"))
    accelerator = make_accelerator(config, images.device)
    updates = make_updates(config, images, accelerator, compiled=compiled, replayed=replayed)
    updates.advance(100)
    return updates


def assert_no_wait(updates: Updates) -> None:
    """100 steps, across ends of epochs; a failure names the line that waits."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        updates.advance(100)
    except RuntimeError as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if "/fastvae" in f.filename] or frames
        pytest.fail(f"{ours[-1].filename}:{ours[-1].lineno} waits: {ours[-1].line} ({error})")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("replayed", [True, False], ids=["replayed", "launched"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_host_never_waits(name: str, replayed: bool) -> None:
    updates = warm(CONFIGS[name], compiled=False, replayed=replayed)
    if replayed:
        assert updates.replay is not None and updates.replay.graphs and not updates.replay.problem
    assert_no_wait(updates)


@pytest.mark.parametrize("replayed", [True, False], ids=["replayed", "launched"])
def test_nor_when_compiled(replayed: bool) -> None:
    assert_no_wait(warm(PLAIN, compiled=True, replayed=replayed))


def test_nor_for_the_numbers_of_a_line() -> None:
    updates = warm(PLAIN, compiled=False, replayed=True)
    course: Any = SimpleNamespace(updates=updates, accelerator=updates.accelerator)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        readings = []
        for _ in range(3):
            updates.advance(10)
            readings.append(Course._reading(course))
            updates.sums.zero_()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(reading.get()[0] > 0 for reading in readings)


def test_a_wait_is_seen_and_named() -> None:
    updates = warm(PLAIN, compiled=False, replayed=False)
    update = updates._update

    def waits() -> None:
        update()
        updates.sums.sum().item()

    updates._update = waits  # type: ignore[method-assign]
    with pytest.raises(pytest.fail.Exception, match="waits"):
        assert_no_wait(updates)
