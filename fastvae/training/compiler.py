"""Whether and how to compile the training step."""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fastvae.compiler import compiler_problem
from fastvae.config import Config
from fastvae.errors import UserError

# Shorter runs end sooner without the seconds that compilation takes.
WORTHWHILE_STEPS = 3000


def should_compile(config: Config, total_steps: int, device: torch.device) -> tuple[bool, str]:
    """Decide, and say why in one line where "auto" decides against it (else an empty line)."""
    if config.compile == "off":
        return False, ""
    if config.model.refine_steps and config.model.inference == "encoder":
        return False, "not compiled: --refine-steps differentiates inside the forward pass"
    if config.compile == "auto" and total_steps < WORTHWHILE_STEPS:
        return (
            False,
            f"not compiled: {total_steps} steps end sooner without (or --compile on)",
        )
    if problem := compiler_problem(device):
        if config.compile == "on":
            raise UserError(f"--compile on: torch.compile does not work here: {problem}")
        return False, f"not compiled: torch.compile does not work here: {problem}"
    return True, ""


Gradients = Callable[[Tensor], tuple[tuple[Tensor | None, ...], Tensor]]


def gradients_in_one_graph(
    module: nn.Module, parameters: list[nn.Parameter], accelerator: Accelerator
) -> Gradients | None:
    """A compiled function: a position → the gradients of `parameters`, and the sums to log.

    Forward and backward in one graph share what they compute and keep less between them. None
    where PyTorch (before 2.12 or so) cannot trace the backward pass with the forward.
    """
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        return None
    torch._dynamo.config.trace_autograd_ops = True

    def gradients(position: Tensor) -> tuple[tuple[Tensor | None, ...], Tensor]:
        with accelerator.autocast():
            loss, sums = module(position)
        return torch.autograd.grad(loss, parameters, allow_unused=True), sums

    return torch.compile(gradients, fullgraph=True, dynamic=False)
