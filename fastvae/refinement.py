"""Statistics of q(z | x) by optimisation, image by image: what an encoder would have to answer."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastvae import noise


class Refinement(NamedTuple):
    """How many steps of Adam each image's statistics take, and how long they are."""

    steps: int
    learning_rate: float = 0.05


class Refined(NamedTuple):
    """The statistics found, and the gradient of the loss where the search began; `[B, outputs]`."""

    statistics: Tensor
    first_gradient: Tensor


def refine(
    loss: Callable[[Tensor, int | Tensor], Tensor],
    start: Tensor,
    plan: Refinement,
    seed: int | Tensor,
) -> Refined:
    """Follow the gradient of each row's loss from `start` `[B, outputs]` for `plan.steps` steps.

    `loss(statistics, seed)` gives `[B]`, each depending on its own row; each step draws its noise
    from a seed of its own, so that no draw is fitted. Adam (Kingma & Ba 2015) is kept elementwise,
    so that a row's answer does not depend on its batch; its step falls linearly to 0.
    No gradient flows from the answer to `start` or to the model.
    """
    seed = noise.stream(seed, noise.REFINE)
    current = start.detach()
    mean, square = torch.zeros_like(current), torch.zeros_like(current)
    first = torch.zeros_like(current)
    with torch.enable_grad():
        for step in range(plan.steps):
            current.requires_grad_(True)
            (gradient,) = torch.autograd.grad(
                loss(current, noise.stream(seed, step)).sum(), current
            )
            if step == 0:
                first = gradient
            mean = 0.9 * mean + 0.1 * gradient
            square = 0.99 * square + 0.01 * gradient.square()
            direction = (mean / (1 - 0.9 ** (step + 1))) / (
                (square / (1 - 0.99 ** (step + 1))).sqrt() + 1e-8
            )
            rate = plan.learning_rate * (1.0 - step / plan.steps)
            current = (current - rate * direction).detach()
    return Refined(current, first)
