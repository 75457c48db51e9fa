"""An exponential moving average of the weights."""

import copy

import torch

from fastvae.models import Model


class EMA:
    """Keeps `model`, a copy of the trained one whose weights follow it slowly."""

    def __init__(self, model: Model, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def update(self, model: Model, step: int) -> None:
        """average ← decay · average + (1 − decay) · weights, after step `step` (from 0).

        Early on the decay is (1 + step) / (10 + step), so that a short run's average is not still
        its first weights.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        for average, weight in zip(self.model.parameters(), model.parameters(), strict=True):
            average.lerp_(weight, 1.0 - decay)
        for kept, value in zip(self.model.buffers(), model.buffers(), strict=True):
            kept.copy_(value)
