"""Muon: steepest descent in the spectral norm for the layers' matrices, Adam for the rest."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastvae.training.ema import follow

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
    """About U Vᵀ for G = U S Vᵀ: `[m, n]` floating → float32 `[m, n]`."""
    return all_orthogonalized([G])[0]


def all_orthogonalized(matrices: list[Tensor]) -> list[Tensor]:
    """About U Vᵀ for each G = U S Vᵀ: `[m, n]` floating → float32 `[m, n]`.

    Newton–Schulz rounds (Jordan et al. 2024, "Muon") on the Gram matrices of the shorter sides,
    which is all they need to know of G: min(m, n)³ a round in place of min(m, n)² · max(m, n).
    Those of one size go through them together.
    """
    # Each lies: no more rows than columns.
    lying = [(G if G.shape[0] <= G.shape[1] else G.T).float() for G in matrices]
    norms = torch._foreach_norm(lying)
    torch._foreach_add_(norms, 1e-20)
    lying = list(torch._foreach_div(lying, norms))
    of_size: dict[int, list[int]] = {}
    for i, X in enumerate(lying):
        of_size.setdefault(len(X), []).append(i)
    found = list(lying)
    for places in of_size.values():
        grams = torch.stack([lying[i] @ lying[i].T for i in places])
        for i, product in zip(places, _product_of_rounds(grams), strict=True):
            found[i] = product @ lying[i]
    return [X if X.shape == G.shape else X.T for X, G in zip(found, matrices, strict=True)]


def _product_of_rounds(gram: Tensor) -> Tensor:
    """What the rounds together multiply X by, from its Gram matrix X Xᵀ: `[N, m, m]` both.

    A round multiplies by P = a I + Q, where Q = b X Xᵀ + c (X Xᵀ)², and so the Gram matrix by P on
    both sides. The identity is added only where a sum has no other place for it.
    """
    a, b, c = COEFFICIENTS
    Q = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    product = Q.clone()
    product.diagonal(dim1=-2, dim2=-1).add_(a)
    for _ in range(ROUNDS - 1):
        half = torch.baddbmm(gram, Q, gram, beta=a)
        gram = torch.baddbmm(half, half, Q, beta=a)
        Q = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        product = torch.baddbmm(product, Q, product, beta=a)
    return product


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
            there = [p for p in group["params"] if p.grad is not None]
            if not there:
                continue
            gradients = [p.grad for p in there]
            taken: Tensor | float = 1.0
            if self.found_inf is not None:
                taken = 1.0 - self.found_inf
                bad = self.found_inf.bool()
                gradients = [torch.where(bad, 0.0, gradient) for gradient in gradients]
            if group["weight_decay"]:
                torch._foreach_mul_(there, 1 - taken * group["lr"] * group["weight_decay"])
            step_size = taken * group["lr"]
            for directions, are_matrices in ((self._of_matrices, True), (self._of_adam, False)):
                chosen = [
                    i for i, p in enumerate(there) if (id(p) in self.matrices) == are_matrices
                ]
                if chosen:
                    parameters = [there[i] for i in chosen]
                    ways = directions(parameters, [gradients[i] for i in chosen], taken, group)
                    torch._foreach_mul_(ways, step_size)
                    torch._foreach_sub_(parameters, ways)

    def _of_matrices(
        self,
        parameters: list[Tensor],
        gradients: list[Tensor],
        taken: Tensor | float,
        group: dict[str, Any],
    ) -> list[Tensor]:
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        kept = [self.state[p]["momentum_buffer"] for p in parameters]
        follow(kept, gradients, taken * (1 - group["momentum"]))
        ahead = torch._foreach_lerp(gradients, kept, group["momentum"])
        found = all_orthogonalized([x.flatten(1) for x in ahead])
        scales = [RMS_OF_ADAM * math.sqrt(max(x.shape)) for x in found]
        scaled = torch._foreach_mul(found, scales)
        return [x.reshape(p.shape) for x, p in zip(scaled, parameters, strict=True)]

    def _of_adam(
        self,
        parameters: list[Tensor],
        gradients: list[Tensor],
        taken: Tensor | float,
        group: dict[str, Any],
    ) -> list[Tensor]:
        beta1, beta2 = group["betas"]
        for p in parameters:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), device=p.device)
                for name in ("exp_avg", "exp_avg_sq"):
                    self.state[p][name] = torch.zeros_like(p)
        steps, means, squares = (
            [self.state[p][name] for p in parameters] for name in ("step", "exp_avg", "exp_avg_sq")
        )
        # One tensor for all would be read by the host.
        torch._foreach_add_(steps, taken if isinstance(taken, float) else [taken] * len(steps))
        follow(means, gradients, taken * (1 - beta1))
        follow(squares, torch._foreach_mul(gradients, gradients), taken * (1 - beta2))
        # Before the first step that is taken there is nothing to correct for, and 0 / 0.
        firsts = torch._foreach_clamp_min(steps, 1)
        of_means, of_squares = (
            torch._foreach_neg(torch._foreach_sub(torch._foreach_pow(beta, firsts), 1))
            for beta in (beta1, beta2)
        )
        sizes = list(torch._foreach_sqrt(torch._foreach_div(squares, of_squares)))
        torch._foreach_add_(sizes, group["eps"])
        found = list(torch._foreach_div(means, of_means))
        torch._foreach_div_(found, sizes)
        return found
