"""The learning rate as a function of the step."""

import math

import torch
from torch import Tensor

from fastvae.config import OptimizerConfig


def learning_rate(
    config: OptimizerConfig, step: Tensor, total_steps: int, steps_per_epoch: float
) -> Tensor:
    """The learning rate of step `step` (0-d int64, from 0) of `total_steps`: 0-d float64.

    A linear warm-up to the peak, then constant, a half cosine that would reach 0 at `total_steps`
    (Loshchilov & Hutter 2017), or a factor at every `lr_step_epochs`. Computed where `step` lies,
    so that no host needs to know it.
    """
    now = step.double()
    factor = torch.ones_like(now)
    if config.schedule == "cosine":
        progress = (now - config.lr_warmup_steps) / max(1, total_steps - config.lr_warmup_steps)
        factor = 0.5 * (1.0 + torch.cos(math.pi * progress.clamp(max=1.0)))
    elif config.schedule == "step":
        reductions = torch.floor(now / steps_per_epoch / config.lr_step_epochs)
        factor = torch.pow(torch.full_like(now, config.lr_step_factor), reductions)
    if config.lr_warmup_steps:
        warm_up = (now + 1.0) / config.lr_warmup_steps
        factor = torch.where(now < config.lr_warmup_steps, warm_up, factor)
    return config.learning_rate * factor
