"""Whether and how to compile the training step."""

import copy
from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastvae.batch import Batch
from fastvae.compiler import compiler_problem
from fastvae.config import Config
from fastvae.errors import UserError
from fastvae.training.step import TrainingStep

# Compilation takes 10 to 40 seconds and then saves a quarter to a half of a run.
WORTHWHILE_SECONDS = 60.0
# What a step takes that is not compiled, roughly: so much for calling its operations, and so many
# operations a second. A constant, not a measurement, so that the same run is always run alike.
_SECONDS_OF_CALLS = {"cpu": 2e-3, "cuda": 3e-4}
_FLOPS_PER_SECOND = {"cpu": 1e11, "cuda": 3e13}


def should_compile(
    config: Config, steps: int, flops: float, device: torch.device
) -> tuple[bool, str]:
    """Decide, and say why in one line where "auto" decides against it (else an empty line).

    `steps`: those that are left; `flops`: floating-point operations of one of them, here.
    """
    if config.compile == "off":
        return False, ""
    if config.model.refine_steps and config.model.inference == "encoder":
        return False, "not compiled: --refine-steps differentiates inside the forward pass"
    if config.compile == "auto":
        kind = "cpu" if device.type == "cpu" else "cuda"
        seconds = steps * (_SECONDS_OF_CALLS[kind] + flops / _FLOPS_PER_SECOND[kind])
        if seconds < WORTHWHILE_SECONDS:
            return False, f"not compiled: {steps} steps end sooner without (or --compile on)"
    if problem := compiler_problem(device):
        if config.compile == "on":
            raise UserError(f"--compile on: torch.compile does not work here: {problem}")
        return False, f"not compiled: torch.compile does not work here: {problem}"
    return True, ""


@torch.no_grad()
def training_flops(step: TrainingStep, batch: Batch) -> float:
    """Floating-point operations of the matrix products and convolutions of one training step on
    such a batch: those of a forward pass, which is tried on a copy, and twice as many backward."""
    trial = copy.deepcopy(step)
    position = torch.zeros((), dtype=torch.int64, device=batch.x.device)
    with FlopCounterMode(display=False) as counter:
        trial(batch, position)
    return 3.0 * counter.get_total_flops()


Gradients = Callable[[Tensor], tuple[tuple[Tensor | None, ...], Tensor, Tensor]]


def gradients_in_one_graph(
    module: nn.Module, parameters: list[nn.Parameter], rows: int, accelerator: Accelerator
) -> Gradients | None:
    """A compiled function: the position of `rows` rows → the gradients of `parameters`, the
    sums to log, and whether something is `not_finite`.

    Forward and backward in one graph share what they compute and keep less between them. None
    where PyTorch (before 2.12 or so) cannot trace the backward pass with the forward.
    """
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        return None
    torch._dynamo.config.trace_autograd_ops = True

    def gradients(position: Tensor) -> tuple[tuple[Tensor | None, ...], Tensor, Tensor]:
        with accelerator.autocast():
            loss, sums = module(position, rows)
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return tuple(map(_laid_out_as, found, parameters)), sums, not_finite(sums[0], found)

    # Compiled code is kept with the function's code, which would be that of every run in this
    # process; and `Updates` does not ask again which of them it is for.
    gradients.__code__ = gradients.__code__.replace()
    return torch.compile(gradients, fullgraph=True, dynamic=False)


def not_finite(loss: Tensor, gradients: Sequence[Tensor | None]) -> Tensor:
    """Whether one of them is NaN or infinite, or all of them together beyond float32: 0-d bool.

    Gradients are read once more for it. A sum is the fastest way to read on a CPU; on a GPU it is
    PyTorch's norm of many tensors, a few kernels for all of them.
    """
    there = [gradient.detach() for gradient in gradients if gradient is not None]
    if loss.is_cuda:
        total = torch.nn.utils.get_total_norm(there)
    else:
        total = torch.stack([gradient.sum() for gradient in there]).sum()
    return (loss + total).isfinite().logical_not()


def _laid_out_as(gradient: Tensor | None, parameter: Tensor) -> Tensor | None:
    """In the memory format of the parameter, in which a fused optimizer reads them together."""
    if gradient is None or gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)
