"""−log Bernoulli(x; sigmoid(logits)), written plainly; and the operator's gradient."""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from fastvae_kernels.reference._common import chosen, rows, unit_interval, widen


def bernoulli_nll(logits: Tensor, target: Tensor, indices: Tensor | None = None) -> Tensor:
    """Σ softplus(l) − l·x over everything but the batch: `[B]` in nats.

    `logits`: `[B, …]` floating; `target`: the same shape, uint8 (read as / 255), bool or floating;
    with `indices` `[B]` a data set `[N, …]`, of which row b meets number indices[b].
    """
    x_BD = rows(widen(logits))
    t_BD = rows(unit_interval(chosen(target, indices), x_BD.dtype))
    # Beyond 40, softplus(x) is x to double precision; the default of 20 is not.
    return (softplus(x_BD, threshold=40.0) - x_BD * t_BD).sum(1)


def bernoulli_nll_backward(
    logits: Tensor, target: Tensor, grad_nll: Tensor, indices: Tensor | None = None
) -> Tensor:
    """The gradient of Σ grad_nll·nll for `logits`: grad_nll · (sigmoid(logits) − target)."""
    x_BD = rows(widen(logits))
    t_BD = rows(unit_interval(chosen(target, indices), x_BD.dtype))
    grad_logits_BD = grad_nll.unsqueeze(1) * (torch.sigmoid(x_BD) - t_BD)
    return grad_logits_BD.to(logits.dtype).view(logits.shape)
