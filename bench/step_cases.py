"""What the training step is measured on, and everybody who takes it: fastvae and its rivals.

fastvae's steps are those of `fastvae.training.updates.Updates`, as a run takes them. A rival has
the same network, parameter by parameter, and starts from the same weights.
"""

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from bare import MISSING
from step_rivals import Step, plain_like, plain_step, pythae_epoch, script_step
from torch import Tensor

from fastvae.build import build_model, build_objective
from fastvae.config import Config
from fastvae.data import ImageSet
from fastvae.hardware import image_format
from fastvae.presets import preset
from fastvae.training.ema import EMA
from fastvae.training.feed import Feed
from fastvae.training.loop import make_optimizer
from fastvae.training.replay import MOST_STEPS_PER_LAUNCH
from fastvae.training.step import TrainingStep
from fastvae.training.updates import Updates

IMAGE_SHAPES = {"cifar10": (3, 32, 32)}
TOTAL_STEPS = 1_000_000
"""Of the run that the measured steps are the beginning of, for its schedule."""


@dataclass(frozen=True)
class StepCase:
    """Which preset is trained, on how many images at a time."""

    preset: str
    batch: int
    precision: Literal["no", "bf16"] = "no"

    def __str__(self) -> str:
        mixed = "" if self.precision == "no" else f"-{self.precision}"
        return f"{self.preset}-{self.batch}{mixed}"

    @property
    def config(self) -> Config:
        base = preset(self.preset)
        return replace(base, batch_size=self.batch, mixed_precision=self.precision)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return IMAGE_SHAPES.get(self.config.data.data, (1, 28, 28))


def digit_like_images(
    count: int, device: torch.device, shape: tuple[int, int, int] = (1, 28, 28)
) -> Tensor:
    """Bytes with the look of digits, the same each time: ten coarse shapes, black around, grey at
    the edges."""
    channels, height, width = shape
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(10, channels, 5, 5, generator=generator)
    inner = (height - 8, width - 8)
    shapes = F.interpolate(coarse, size=inner, mode="bicubic", align_corners=False)
    shapes = F.pad(shapes, (4, 4, 4, 4), value=-9.0)
    kinds = torch.randint(10, (count,), generator=generator).to(device)
    images = shapes.to(device)[kinds] * 4
    noise = torch.randn(
        images.shape, generator=torch.Generator(device).manual_seed(0), device=device
    )
    return (torch.sigmoid(images + noise) * 255).to(torch.uint8)


# ---------------------------------------------------------------------------------- fastvae


def make_accelerator(config: Config, device: torch.device) -> Accelerator:
    """A fresh one: its precision is otherwise that of the first in the process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    precision = "no" if config.mixed_precision == "auto" else config.mixed_precision
    return Accelerator(mixed_precision=precision, cpu=device.type == "cpu")


def make_updates(
    config: Config, images: Tensor, accelerator: Accelerator, *, compiled: bool, replayed: bool
) -> Updates:
    """The steps of a run, made as `fastvae.training.train` makes them, from the same weights every
    time. `replayed`: by a CUDA graph, on a GPU."""
    device = accelerator.device
    train_set = ImageSet(images, None, "random")
    torch.manual_seed(0)
    model = build_model(config.model, train_set, config.batch_size).to(device)
    model.to(memory_format=torch.channels_last)
    feed = Feed(
        train_set,
        config.seed,
        device,
        samples_ahead=MOST_STEPS_PER_LAUNCH * config.batch_size,
        memory_format=image_format(model),
    )
    objective = build_objective(config.objective, len(images))
    updates = Updates(
        model,
        TrainingStep(model, objective, config.seed, config.data.flip).to(device),
        feed,
        make_optimizer(config.optimizer, model),
        EMA(model, config.optimizer.ema_decay) if config.optimizer.ema_decay else None,
        accelerator,
        config,
        total_steps=TOTAL_STEPS,
        done=0,
        compiled=compiled,
    )
    if not replayed:
        updates.replay = None
    return updates


# ------------------------------------------------------------------------------ side by side


@dataclass(frozen=True)
class Candidate:
    """Somebody who trains."""

    advance: Callable[[int], None]
    """Takes so many optimizer steps."""
    mean_loss: Callable[[int], float]
    """The same, and the mean of their losses, nats per image."""
    steps: int
    """That it takes best in one call."""
    replay: Callable[[], dict[str, Any]] | None = None
    """How its steps are replayed: how many at once, or why not."""


WHAT = {
    "fastvae": "compiled, and on a GPU replayed",
    "fastvae-unreplayed": "compiled, each step launched by Python",
    "fastvae-uncompiled": "not compiled, and on a GPU replayed",
    "compiled": "PyTorch compiled, on a GPU with CUDA graphs (`reduce-overhead`)",
    "pytorch": "PyTorch eager",
    "script": "the usual script",
    "pythae": "pythae's own trainer",
}


def why_left_out(name: str, case: StepCase, device: torch.device) -> str:
    """Why a candidate has no part in a case; empty if it has."""
    if name == "fastvae-unreplayed":
        if device.type != "cuda":
            return "nothing is replayed without a GPU"
        if case.batch > 128:
            return "measured at small batches, where launching shows"
    if name == "script" and MISSING:
        return f"{' and '.join(MISSING)} not installed"
    if name == "pythae":
        if case.precision != "no" or case.batch != 128 or case.config.model.network != "mlp":
            return "measured at batch 128 of fully connected networks in float32"
        if find_spec("pythae") is None:
            return "pythae is not installed"
    return ""


def make_candidate(name: str, case: StepCase, images: Tensor) -> Candidate:
    """One of `WHAT`, with the same weights as all."""
    config, device = case.config, images.device
    accelerator = make_accelerator(config, device)
    # As many steps as lie between two lines of a run's log, in which several are launched at once.
    steps = config.log_every if device.type == "cuda" and case.batch <= 1024 else 1
    if name.startswith("fastvae"):
        updates = make_updates(
            config,
            images,
            accelerator,
            compiled=name != "fastvae-uncompiled",
            replayed=name != "fastvae-unreplayed",
        )
        return _of_updates(updates, steps)
    updates = make_updates(config, images, accelerator, compiled=False, replayed=False)
    vae = plain_like(updates.model, config.model, case.image_shape)
    torch.manual_seed(1)
    if name == "pythae":
        return _of_pythae(vae, images, config)
    if name == "script":
        # Its images are made one by one: 50 steps of 1024 would take the time of all others.
        steps = max(1, min(steps, 4000 // case.batch))
        return _of_step(script_step(vae, images, config), steps)
    return _of_step(plain_step(vae, images, config, compiled=name == "compiled"), steps)


def _of_updates(updates: Updates, steps: int) -> Candidate:
    def mean_loss(count: int) -> float:
        updates.sums.zero_()
        updates.advance(count)
        return updates.sums[0].item() / (count * updates.config.batch_size)

    replay = updates.replay
    if replay is None:
        return Candidate(updates.advance, mean_loss, steps)
    return Candidate(
        updates.advance,
        mean_loss,
        steps,
        lambda: {"steps_per_launch": replay.steps_per_launch, "problem": replay.problem},
    )


def _of_step(step: Step, steps: int) -> Candidate:
    def advance(count: int) -> None:
        for _ in range(count):
            step()

    def mean_loss(count: int) -> float:
        return sum(step().item() for _ in range(count)) / count

    return Candidate(advance, mean_loss, steps)


def _of_pythae(vae: torch.nn.Module, images: Tensor, config: Config) -> Candidate:
    """It counts in epochs: one of `steps` steps at a time."""
    steps = 20
    folder = tempfile.TemporaryDirectory()
    epoch = pythae_epoch(vae, images[: steps * config.batch_size], config, folder.name)  # type: ignore[arg-type]

    def mean_loss(count: int) -> float:
        assert folder and count % steps == 0  # the folder lives as long as the candidate
        return sum(epoch() for _ in range(count // steps)) / (count // steps)

    def advance(count: int) -> None:
        mean_loss(count)

    return Candidate(advance, mean_loss, steps)


def check_losses(losses: dict[str, float]) -> None:
    """Over as many steps from the same weights, all have had the same losses but for the noise."""
    assert all(map(math.isfinite, losses.values())), f"losses are not finite: {losses}"
    middle = sorted(losses.values())[len(losses) // 2]
    assert all(abs(x - middle) < 0.05 * abs(middle) for x in losses.values()), (
        f"losses differ: {losses}"
    )
