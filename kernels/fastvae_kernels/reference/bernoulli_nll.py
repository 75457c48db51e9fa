"""−log Bernoulli(x; sigmoid(logits)), written plainly; and the operator's gradient."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from fastvae_kernels.reference._common import chosen, rows, unit_interval, widen

# log(1 + e) = 2 atanh(s) for s = e / (2 + e) ≤ 1/3, and atanh(s) / s as a polynomial in s²: a
# least-maximum fit on [0, 1/9], wrong by 4e-9 at most.
_ATANH = (1.0, 0.3333315734, 0.2001245507, 0.1398030237, 0.1408916300)


def bernoulli_nll(logits: Tensor, target: Tensor, indices: Tensor | None = None) -> Tensor:
    """Σ softplus(l) − l·x over everything but the batch: `[B]` in nats.

    `logits`: `[B, …]` floating; `target`: the same shape, uint8 (read as / 255), bool or floating;
    with `indices` `[B]` a data set `[N, …]`, of which row b meets number indices[b].
    """
    x_BD = rows(widen(logits))
    t_BD = rows(unit_interval(chosen(target, indices), x_BD.dtype))
    if torch.compiler.is_compiling() and x_BD.dtype == torch.float32:
        return _Fusible.apply(x_BD, t_BD)
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


class _Fusible(torch.autograd.Function):
    """The same for a compiler that fuses what is written out: the C library's log1p, which it would
    call, takes several times as long as all the rest."""

    @staticmethod
    def forward(ctx: Any, x_BD: Tensor, t_BD: Tensor) -> Tensor:
        ctx.save_for_backward(x_BD, t_BD)
        e = torch.exp(-x_BD.abs())
        s = e / (2.0 + e)
        q = s * s
        a, b, c, d, f = _ATANH
        log1p = 2.0 * s * (a + q * (b + q * (c + q * (d + q * f))))
        return (x_BD.clamp(min=0.0) + log1p - x_BD * t_BD).sum(1)

    @staticmethod
    def backward(ctx: Any, grad_nll: Tensor) -> tuple[Tensor, None]:
        x_BD, t_BD = ctx.saved_tensors
        e = torch.exp(-x_BD.abs())
        inverse = 1.0 / (1.0 + e)
        sigmoid = torch.where(x_BD >= 0, inverse, e * inverse)
        return grad_nll.unsqueeze(1) * (sigmoid - t_BD), None
