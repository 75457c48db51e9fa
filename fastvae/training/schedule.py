"""The learning rate as a function of the step."""

import math

from fastvae.config import OptimizerConfig

STAGE_ENDS = (1, 4, 13, 40, 121, 364, 1093)  # epochs: sums of 1, 3, 9, …


def learning_rate(
    config: OptimizerConfig, step: int, total_steps: int, steps_per_epoch: float
) -> float:
    """The learning rate of step `step` (from 0) of `total_steps`.

    A linear warm-up to the peak, then constant, a half cosine that would reach 0 at `total_steps`
    (Loshchilov & Hutter 2017), a factor at every `lr_step_epochs`, or the stages of Burda et al.
    2016, section 5: 10^(−i/7) of the peak for 3^i epochs, i = 0 … 7, the last without an end.
    """
    if step < config.lr_warmup_steps:
        return config.learning_rate * (step + 1) / config.lr_warmup_steps
    if config.schedule == "cosine":
        progress = (step - config.lr_warmup_steps) / max(1, total_steps - config.lr_warmup_steps)
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    if config.schedule == "step":
        reductions = math.floor(step / steps_per_epoch / config.lr_step_epochs)
        return config.learning_rate * config.lr_step_factor**reductions
    if config.schedule == "stages":
        stage = sum(step / steps_per_epoch >= end for end in STAGE_ENDS)
        return config.learning_rate * 10 ** (-stage / len(STAGE_ENDS))
    return config.learning_rate
