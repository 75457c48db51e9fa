"""−log Bernoulli(x; sigmoid(logits)), written plainly; and the operator's gradient."""

import torch
from torch import Tensor

from fastvae_kernels.reference._common import rows, unit_interval, widen


def bernoulli_nll(logits: Tensor, target: Tensor) -> Tensor:
    """Σ softplus(l) − l·x over everything but the batch: `[B]` in nats.

    `logits`: `[B, …]` floating; `target`: the same shape, uint8 (read as / 255), bool or floating.
    """
    x_BD = rows(widen(logits))
    t_BD = rows(unit_interval(target, x_BD.dtype))
    # softplus(x) = max(x, 0) + log(1 + exp(−|x|)) never overflows; torch.maximum, unlike clamp,
    # has the gradient 1/2 at the tie, so that the derivative at 0 is sigmoid(0). log(1 + e) is
    # three times faster than log1p(e) and differs by less than 2^-24.
    softplus_BD = torch.maximum(x_BD, x_BD.new_zeros(())) + torch.log(1.0 + torch.exp(-x_BD.abs()))
    return (softplus_BD - x_BD * t_BD).sum(1)


def bernoulli_nll_backward(logits: Tensor, target: Tensor, grad_nll: Tensor) -> Tensor:
    """The gradient of Σ grad_nll·nll for `logits`: grad_nll · (sigmoid(logits) − target)."""
    x_BD = rows(widen(logits))
    t_BD = rows(unit_interval(target, x_BD.dtype))
    grad_logits_BD = grad_nll.unsqueeze(1) * (torch.sigmoid(x_BD) - t_BD)
    return grad_logits_BD.to(logits.dtype).view(logits.shape)
