"""−log N(x; mean, exp(logvar)), written plainly; and the operator's gradients."""

import math

import torch
from torch import Tensor

from fastvae_kernels.reference._common import chosen, rows, unit_interval, widen


def gaussian_nll(
    mean: Tensor, target: Tensor, logvar: Tensor, indices: Tensor | None = None
) -> Tensor:
    """½ Σ [(x − mean)² / σ² + log σ² + log 2π] over everything but the batch: `[B]` in nats.

    `mean`: `[B, …]` floating; `target`: the same shape, uint8 (read as / 255), bool or floating;
    `logvar` = log σ²: 0-d (one variance for all) or of `mean`'s shape. With `indices` `[B]` the
    target is a data set `[N, …]`, of which row b meets number indices[b].
    """
    mean_BD = rows(widen(mean))
    t_BD = rows(unit_interval(chosen(target, indices), mean_BD.dtype))
    logvar = logvar.to(mean_BD.dtype)
    logvar_BD = logvar if logvar.dim() == 0 else rows(logvar)
    standard_BD = _standardized(t_BD - mean_BD, logvar_BD)[0]
    return 0.5 * (standard_BD.square() + (logvar_BD + math.log(2 * math.pi))).sum(1)


def gaussian_nll_backward(
    mean: Tensor,
    target: Tensor,
    logvar: Tensor,
    grad_nll: Tensor,
    indices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of Σ grad_nll·nll for `mean` and `logvar`."""
    mean_BD = rows(widen(mean))
    t_BD = rows(unit_interval(chosen(target, indices), mean_BD.dtype))
    logvar_BD = logvar.to(mean_BD.dtype)
    logvar_BD = logvar_BD if logvar.dim() == 0 else rows(logvar_BD)
    grad_nll_B1 = grad_nll.unsqueeze(1)
    standard_BD, inverse_sigma_BD = _standardized(mean_BD - t_BD, logvar_BD)
    grad_mean_BD = grad_nll_B1 * (standard_BD * inverse_sigma_BD)
    grad_logvar_BD = 0.5 * grad_nll_B1 * (1.0 - standard_BD.square())
    grad_logvar = grad_logvar_BD.sum() if logvar.dim() == 0 else grad_logvar_BD.view(mean.shape)
    return grad_mean_BD.to(mean.dtype).view(mean.shape), grad_logvar.to(logvar.dtype)


def one_variance_gradient(logvar: Tensor, columns: int, nll: Tensor, grad_nll: Tensor) -> Tensor:
    """The gradient of Σ grad_nll·nll for the one `logvar` of all elements, from nll itself.

    nll_b = ½ [SSE_b/σ² + D (log σ² + log 2π)] holds the sum that the derivative needs, so that it
    costs B numbers and no second pass: ∂nll_b/∂log σ² = ½ (D − SSE_b/σ²).
    """
    half_sse_B = nll - 0.5 * columns * (widen(logvar) + math.log(2 * math.pi))
    return (grad_nll * (0.5 * columns - half_sse_B)).sum().to(logvar.dtype)


def _standardized(error_BD: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """error / σ and 1 / σ. Divided before it is squared: 1/σ² overflows below log σ² = −88, 1/σ
    only below −177."""
    inverse_sigma = torch.exp(-0.5 * logvar)
    return error_BD * inverse_sigma, inverse_sigma
