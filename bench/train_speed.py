"""Whole runs, as `fastvae train` takes them: images a second by the run's own log and by a clock
outside, and what logging, evaluation and checkpoints cost.

The same run five times, each time with one thing more: of few steps, which shows what beginning
and ending take; of many steps; with lines of the log; with evaluations; with checkpoints. The
difference in seconds is what that thing costs. It calls `fastvae.training.train`, which is what
the command does, and needs neither tyro nor datasets. Nothing is compiled, as `--compile auto`
decides for runs of this length; on a GPU steps are replayed.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from settings import Found, Settings, each
from step_cases import digit_like_images

from fastvae.config import Config
from fastvae.data import DataConfig
from fastvae.presets import preset
from fastvae.training import train

PRESET = "mnist-mlp"
NEVER = 10**9
STEPS, STEPS_ON_A_CPU, QUICK_STEPS = 20_000, 600, 60
FEW = 0.1
"""Share of the steps in the shortest run."""


@dataclass(frozen=True)
class Kind:
    """One of the runs: what it is called, and which of the preset's intervals it keeps."""

    name: str
    keeps: tuple[str, ...] = ()
    share: float = 1.0

    def __str__(self) -> str:
        return self.name


KINDS = (
    Kind("few steps", share=FEW),
    Kind("steps alone"),
    Kind("and its log", ("log_every",)),
    Kind("and evaluations", ("log_every", "eval_every")),
    Kind("and checkpoints", ("log_every", "eval_every", "checkpoint_every")),
)


def run(settings: Settings) -> Iterator[Found]:
    """A row for each kind of run."""
    if settings.device.type == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    steps = STEPS if settings.device.type == "cuda" else STEPS_ON_A_CPU
    steps = QUICK_STEPS if settings.quick else steps
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = _config(settings, folder)
        data = "MNIST" if settings.mnist_dir else "made-up digits"
        yield "facts", {"preset": PRESET, "data": data, "batch": config.batch_size}
        train(replace(config, max_steps=max(8, steps // 50), output=folder / "first"), name="first")
        yield from each(KINDS, lambda kind: [_row(kind, config, steps, folder, settings)], settings)


def _config(settings: Settings, folder: Path) -> Config:
    """The preset on MNIST, or on made-up digits; nothing logged, evaluated or kept before the
    end."""
    if settings.mnist_dir:
        data = DataConfig(data="mnist", data_dir=Path(settings.mnist_dir))
    else:
        count = 2_000 if settings.quick else 70_000
        images = digit_like_images(count, torch.device("cpu")).numpy()
        np.save(folder / "digits.npy", images)
        data = DataConfig(data=str(folder / "digits.npy"), holdout=1 / 7)
    return replace(
        preset(PRESET),
        data=data,
        epochs=1e6,
        compile="off",
        log_every=NEVER,
        eval_every=float(NEVER),
        checkpoint_every=float(NEVER),
    )


def _row(
    kind: Kind, config: Config, steps: int, folder: Path, settings: Settings
) -> dict[str, Any]:
    kept = {name: getattr(preset(PRESET), name) for name in kind.keeps}
    if settings.quick and "log_every" in kept:
        kept["log_every"] = 10
    count, output = max(1, int(kind.share * steps)), folder / "run"
    began = time.monotonic()
    train(replace(config, **kept, max_steps=count, output=output), name="run")
    seconds = time.monotonic() - began
    results = json.loads((output / "results.json").read_text())
    lines = len((output / "metrics.jsonl").read_text().splitlines())
    shutil.rmtree(output)
    return {
        "kind": kind.name,
        "steps": count,
        "seconds": seconds,
        "lines": lines,
        "logged_images_per_second": results["images_per_second"],
    }
