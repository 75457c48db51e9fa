"""The training steps of a preset, as a run takes them, on random or given images."""

from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from fastvae.build import build_model, build_objective
from fastvae.data import ImageSet
from fastvae.presets import preset
from fastvae.training.feed import Feed
from fastvae.training.step import TrainingStep
from fastvae.training.updates import Updates

CPU = torch.device("cpu")
IMAGES = 2000
SHAPES = {"digits": (1, 8, 8), "cifar10": (3, 32, 32), "diabetes": (1, 1, 10)}


def updates_of(
    name: str, compiled: bool, batch_size: int | None = None, data: ImageSet | None = None
) -> Updates:
    """The preset's steps, in float32; `batch_size` unless it is the preset's, `data` unless they
    are random and in memory."""
    AcceleratorState._reset_state(reset_partial_state=True)
    config = preset(name)
    config = replace(config, batch_size=batch_size or config.batch_size)
    data = data or random_data(config.data.data)
    model = build_model(config.model, data, config.batch_size)
    model.to(memory_format=torch.channels_last)
    objective = build_objective(config.objective, IMAGES)
    return Updates(
        model,
        TrainingStep(model, objective, 0),
        Feed(data, 0, CPU, samples_ahead=config.batch_size),
        torch.optim.Adam(model.parameters(), lr=1e-4, fused=True),
        None,
        Accelerator(cpu=True),
        replace(config, compile="off"),
        total_steps=10**6,
        done=0,
        compiled=compiled,
    )


def random_data(name: str) -> ImageSet:
    """Pixels of the shape that a data set has, and its kind of labels."""
    generator = torch.Generator().manual_seed(0)
    shape = SHAPES.get(name, (1, 28, 28))
    images = torch.randint(256, (IMAGES, *shape), dtype=torch.uint8, generator=generator)
    real = name == "diabetes"
    labels = torch.rand(IMAGES, generator=generator) if real else torch.arange(IMAGES) % 10
    return ImageSet(images, labels, "random")
