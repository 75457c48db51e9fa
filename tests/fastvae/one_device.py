"""Scores images on a GPU that is not there and says where an operation is given tensors of it and
of the host at once. Many operations refuse that on a GPU, and no CPU shows it.

    python one_device.py PRESET …
"""

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from launches import move
from preset_steps import random_data
from pretended_gpu import DEVICE, pretended_gpu
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from fastvae.build import build_model
from fastvae.data import ImageSet
from fastvae.estimators.annealed import annealed_log_marginal
from fastvae.estimators.importance import prior_average_log_marginal
from fastvae.estimators.latents import elbo_surgery
from fastvae.presets import preset
from fastvae.scores import score


class Devices(TorchDispatchMode):
    """Collects the operations that meet tensors of two kinds of devices."""

    def __init__(self) -> None:
        super().__init__()
        self.mixed: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if function is torch.ops.aten._local_scalar_dense.default:
            return 1 if not tensors[0].is_floating_point() else 0.5  # some value to go on with
        if len({x.device.type for x in tensors}) > 1:
            frames = traceback.extract_stack()[:-1]
            where = [f for f in frames if "/fastvae/" in f.filename and f.filename != __file__][-1]
            self.mixed.append(f"{function} at {where.filename}:{where.lineno}")
        return function(*args, **kwargs)


def scoring(name: str) -> Callable[[], object]:
    """A pass over images by a preset's model."""
    with _disable_current_modes():
        data = random_data(preset(name).data.data)
        model = build_model(preset(name).model, data, 100)
    move(model)
    images = torch.empty((30, *data.images.shape[1:]), dtype=torch.uint8)
    data = ImageSet(images, torch.zeros(30, dtype=torch.long), "random")
    return lambda: score(model, data, seed=0, samples=101, compile=False)  # type: ignore[arg-type]


def estimating() -> None:
    """The estimators that take functions or tensors."""
    z = torch.empty(30, 8, 4, device=DEVICE)

    def density(z: Tensor) -> Tensor:
        return -z.square().sum(-1)

    def prior(start: int, count: int) -> Tensor:
        return z[start : start + count]

    annealed_log_marginal(density, density, z, steps=3, seed=0)
    prior_average_log_marginal(density, prior, samples=30, chunk=7)
    elbo_surgery(z[0], z[0], seed=0)


def main() -> int:
    """0 where no operation mixes devices."""
    devices = Devices()
    with (
        pretended_gpu(),
        patch("fastvae.data.ImageSet.__post_init__", lambda self: None),  # looks at values
    ):
        for run in [*map(scoring, sys.argv[1:]), estimating]:
            with devices:
                run()
    print(*devices.mixed, sep="\n")
    return int(bool(devices.mixed))


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # what pretends to be a GPU cannot be taken down in order
