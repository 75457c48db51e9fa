"""An exponential moving average of the weights."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from fastvae.models import Model


class EMA:
    """Keeps `model`, a copy of the trained one whose weights follow it slowly."""

    def __init__(self, model: Model, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False)

    def share(self, step: Tensor, skipped: Tensor) -> Tensor:
        """What the average takes of the weights after step `step` (0-d, from 0), nothing if that
        was `skipped` (0-d bool): 0-d float32.

        Early on the decay is (1 + step) / (10 + step), so that a short run's average is not still
        its first weights.
        """
        now = step.double()
        decay = torch.clamp((1.0 + now) / (10.0 + now), max=self.decay)
        return torch.where(skipped, 0.0, 1.0 - decay).float()

    @torch.no_grad()
    def update(self, model: Model, share: Tensor) -> None:
        """average ← average + share · (weights − average); buffers are copied."""
        follow(list(self.model.parameters()), list(model.parameters()), share)
        for kept, value in zip(self.model.buffers(), model.buffers(), strict=True):
            kept.copy_(value)


def follow(averages: Sequence[Tensor], values: Sequence[Tensor], share: Tensor | float) -> None:
    """average ← average + share · (value − average) for each, in place. `share`: a number, or a 0-d
    tensor on their device."""
    averages, values = list(averages), list(values)
    if averages[0].is_cuda:  # three launches for all of them
        ways = torch._foreach_sub(values, averages)
        torch._foreach_mul_(ways, share)
        torch._foreach_add_(averages, ways)
    else:
        for average, value in zip(averages, values, strict=True):
            average.lerp_(value, share)
