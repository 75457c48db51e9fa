"""The learning rate as a function of the step."""

import math

import torch
from torch import Tensor

from fastvae.config import OptimizerConfig

STAGE_ENDS = (1, 4, 13, 40, 121, 364, 1093)  # epochs: sums of 1, 3, 9, …


def is_constant(config: OptimizerConfig) -> bool:
    """Whether every step has the same learning rate."""
    return config.schedule == "constant" and not config.lr_warmup_steps


def learning_rate(
    config: OptimizerConfig, step: Tensor, total_steps: int, steps_per_epoch: float
) -> Tensor:
    """The learning rate of step `step` (0-d int64, from 0) of `total_steps`: 0-d float64.

    A linear warm-up to the peak, then constant, a half cosine that would reach 0 at `total_steps`
    (Loshchilov & Hutter 2017), a factor at every `lr_step_epochs`, or the stages of Burda et al.
    2016, section 5: 10^(−i/7) of the peak for 3^i epochs, i = 0 … 7, the last without an end.
    Computed where `step` lies, so that no host needs to know it.
    """
    now = step.double()
    factor = torch.ones_like(now)
    if config.schedule == "cosine":
        progress = (now - config.lr_warmup_steps) / max(1, total_steps - config.lr_warmup_steps)
        factor = 0.5 * (1.0 + torch.cos(math.pi * progress.clamp(max=1.0)))
    elif config.schedule == "step":
        reductions = torch.floor(now / steps_per_epoch / config.lr_step_epochs)
        factor = torch.pow(torch.full_like(now, config.lr_step_factor), reductions)
    elif config.schedule == "stages":
        epoch = now / steps_per_epoch
        stage = sum((epoch >= end).double() for end in STAGE_ENDS)
        factor = torch.pow(torch.full_like(now, 10.0), -stage / len(STAGE_ENDS))
    if config.lr_warmup_steps:
        warm_up = (now + 1.0) / config.lr_warmup_steps
        factor = torch.where(now < config.lr_warmup_steps, warm_up, factor)
    return config.learning_rate * factor
