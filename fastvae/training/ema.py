"""An exponential moving average of the weights."""

import copy

import torch
from torch import Tensor

from fastvae.models import Model


class EMA:
    """Keeps `model`, a copy of the trained one whose weights follow it slowly."""

    def __init__(self, model: Model, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def update(self, model: Model, step: Tensor, skipped: Tensor) -> None:
        """average ← decay · average + (1 − decay) · weights, after step `step` (0-d, from 0), but
        not if that was `skipped` (0-d bool).

        Early on the decay is (1 + step) / (10 + step), so that a short run's average is not still
        its first weights.
        """
        now = step.double()
        decay = torch.clamp((1.0 + now) / (10.0 + now), max=self.decay)
        share = torch.where(skipped, 0.0, 1.0 - decay).float()
        for average, weight in zip(self.model.parameters(), model.parameters(), strict=True):
            average.lerp_(weight, share)
        for kept, value in zip(self.model.buffers(), model.buffers(), strict=True):
            kept.copy_(value)
