"""−log N(x; mean, exp(logvar)), written plainly."""

import math

import torch
from torch import Tensor

from fastvae_kernels.reference._common import rows, unit_interval, widen


def gaussian_nll(mean: Tensor, target: Tensor, logvar: Tensor) -> Tensor:
    """½ Σ [(x − mean)² / σ² + log σ² + log 2π] over everything but the batch: `[B]` in nats.

    `mean`: `[B, …]` floating; `target`: the same shape, uint8 (read as / 255), bool or floating;
    `logvar` = log σ²: 0-d (one variance for all) or of `mean`'s shape.
    """
    mean_BD = rows(widen(mean))
    t_BD = rows(unit_interval(target, mean_BD.dtype))
    logvar = logvar.to(mean_BD.dtype)
    logvar_BD = logvar if logvar.dim() == 0 else rows(logvar)
    scaled_BD = (t_BD - mean_BD).square() * torch.exp(-logvar_BD)
    return 0.5 * (scaled_BD + (logvar_BD + math.log(2 * math.pi))).sum(1)
