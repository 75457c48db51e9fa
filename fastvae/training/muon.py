"""Muon: steepest descent in the spectral norm for the layers' matrices, Adam for the rest."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

# Jordan et al. 2024: five rounds of this polynomial bring every singular value above about 1e-3
# of the Frobenius norm to between 0.7 and 1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ROUNDS = 5
# The root mean square of an entry of Adam's steps, as found in practice (Liu et al. 2025).
RMS_OF_ADAM = 0.2


def layer_weights(model: nn.Module) -> list[Tensor]:
    """The weights of linear maps and convolutions: what Muon is for."""
    kinds = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
    return [module.weight for module in model.modules() if isinstance(module, kinds)]


def orthogonalized(G: Tensor) -> Tensor:
    """About U Vᵀ for G = U S Vᵀ: `[m, n]` floating → float32 `[m, n]`.

    Newton–Schulz rounds (Jordan et al. 2024, "Muon") on the Gram matrix of the shorter side, which
    is what they need to know of G: min(m, n)³ a round in place of min(m, n)² · max(m, n).
    """
    if G.shape[0] > G.shape[1]:
        return orthogonalized(G.T).T
    X = G.float()
    X = X / (X.norm() + 1e-20)
    gram = X @ X.T
    polynomial = product = _polynomial(gram)
    for _ in range(ROUNDS - 1):
        gram = polynomial @ gram @ polynomial
        polynomial = _polynomial(gram)
        product = polynomial @ product
    return product @ X


def _polynomial(gram: Tensor) -> Tensor:
    """What a round multiplies X by: a I + b X Xᵀ + c (X Xᵀ)²."""
    a, b, c = COEFFICIENTS
    result = torch.addmm(gram, gram, gram, beta=b, alpha=c)
    result.diagonal().add_(a)
    return result


class Muon(torch.optim.Optimizer):
    """Momentum whose direction for each matrix has all singular values about 1.

    Jordan et al. 2024 (kellerjordan.github.io/posts/muon), scaled so that the entries of a step are
    as large as Adam's (Liu et al. 2025, arXiv:2502.16982, eq. 4): one learning rate serves both.
    All other parameters are Adam's (Kingma & Ba 2015), with its betas and epsilon. A convolution's
    weight is a matrix of its first dimension by the others. Weight decay is decoupled.

    Args:
        params: every parameter to train.
        matrices: those of them that are weights of layers (`layer_weights`).
        lr: a number or a 0-d tensor.
        momentum: of the matrices' gradients, Nesterov's.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        matrices: Iterable[Tensor],
        *,
        lr: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "momentum": momentum,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)
        self.matrices = {id(p) for p in matrices}

    found_inf: Tensor | None = None
    """As of PyTorch's fused optimizers: where it is 1, a step leaves everything as it is."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                taken: Tensor | float = 1.0
                gradient = p.grad
                if self.found_inf is not None:
                    taken = 1.0 - self.found_inf
                    gradient = torch.where(self.found_inf.bool(), 0.0, gradient)
                if group["weight_decay"]:
                    p.mul_(1 - taken * group["lr"] * group["weight_decay"])
                direction = self._of_matrix if id(p) in self.matrices else self._of_adam
                p.sub_(direction(p, gradient, taken, group) * (taken * group["lr"]))

    def _of_matrix(
        self, p: Tensor, gradient: Tensor, taken: Tensor | float, group: dict[str, Any]
    ) -> Tensor:
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        kept = state["momentum_buffer"].lerp_(gradient, taken * (1 - group["momentum"]))
        ahead = gradient.lerp(kept, group["momentum"]).flatten(1)
        scale = RMS_OF_ADAM * math.sqrt(max(ahead.shape))
        return (orthogonalized(ahead) * scale).view_as(p)

    def _of_adam(
        self, p: Tensor, gradient: Tensor, taken: Tensor | float, group: dict[str, Any]
    ) -> Tensor:
        state, (beta1, beta2) = self.state[p], group["betas"]
        if not state:
            state["step"] = torch.zeros((), device=p.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        step = state["step"].add_(taken)
        mean = state["exp_avg"].lerp_(gradient, taken * (1 - beta1))
        square = state["exp_avg_sq"].lerp_(gradient.square(), taken * (1 - beta2))
        # Before the first step that is taken there is nothing to correct for, and 0 / 0.
        first = step.clamp(min=1)
        mean, square = mean / (1 - beta1**first), square / (1 - beta2**first)
        return mean / (square.sqrt() + group["eps"])
