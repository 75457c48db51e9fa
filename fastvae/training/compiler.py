"""Whether and how to compile the training step."""

import copy
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastvae.batch import Batch
from fastvae.compiler import Compiled
from fastvae.config import Config
from fastvae.training.step import FedStep, Sums, TrainingStep

# Compilation takes 10 to 40 seconds and then saves a quarter to a half of a run.
WORTHWHILE_SECONDS = 60.0
# What a step takes that is not compiled, roughly: so much for calling its operations, and so many
# operations a second. A constant, not a measurement, so that the same run is always run alike.
_SECONDS_OF_CALLS = 2e-3
_FLOPS_PER_SECOND = {"cpu": 1e11, "cuda": 3e13}
# On a GPU a step of `mnist-mlp` is about so many launches, eager (bench/launches.py). One costs the
# host 6 µs where Python makes it, and the device 1.5 to 2 µs where a CUDA graph is replayed.
_LAUNCHES = 73
_SECONDS_OF_LAUNCH, _SECONDS_OF_NODE = 6e-6, 1.75e-6


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
        seconds = steps * _seconds_of_step(config, flops, device)
        if seconds < WORTHWHILE_SECONDS:
            return False, f"not compiled: {steps} steps end sooner without (or --compile on)"
    return True, ""


def _seconds_of_step(config: Config, flops: float, device: torch.device) -> float:
    if device.type == "cpu":
        return _SECONDS_OF_CALLS + flops / _FLOPS_PER_SECOND["cpu"]
    # What `Updates` replays, but for images that do not fit on the device.
    replayed = config.gradient_accumulation_steps == 1 and config.mixed_precision != "fp16"
    calls = _LAUNCHES * (_SECONDS_OF_NODE if replayed else _SECONDS_OF_LAUNCH)
    return calls + flops / _FLOPS_PER_SECOND["cuda"]


@torch.no_grad()
def training_flops(step: TrainingStep, batch: Batch) -> float:
    """Floating-point operations of the matrix products and convolutions of one training step on
    such a batch: those of a forward pass, which is tried on a copy, and twice as many backward."""
    trial = copy.deepcopy(step)
    position = torch.zeros((), dtype=torch.int64, device=batch.x.device)
    with FlopCounterMode(display=False) as counter:
        trial(batch, position)
    return 3.0 * counter.get_total_flops()


def gradients_in_one_graph(
    module: FedStep,
    parameters: list[nn.Parameter],
    rows: int,
    accelerator: Accelerator,
    *,
    required: bool,
) -> Compiled:
    """A compiled function: the position of a batch of `rows` (0-d int64) → the gradients of
    `parameters`, the sums to log, and what `not_finite` says of them, or on a GPU what
    `loss_not_finite` says.

    Forward and backward in one graph share what they compute and keep less between them.
    """
    torch._dynamo.config.trace_autograd_ops = True
    device_type = accelerator.device.type
    # Accelerate's own context manager cannot be traced by PyTorch 2.11.
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)

    # Each row's part in the mean. Inductor would write it anew for each operator that takes it.
    shares = torch.full((rows,), 1.0 / rows, device=accelerator.device)

    def gradients(position: Tensor) -> tuple[tuple[Tensor | None, ...], Sums, Tensor]:
        with torch.autocast(device_type, dtype=low or torch.bfloat16, enabled=low is not None):
            losses, sums = module.each(position, rows)
        found = torch.autograd.grad(losses, parameters, shares, allow_unused=True)
        # Inductor would look at each parameter's gradient by a kernel of its own.
        bad = loss_not_finite(sums[0]) if losses.is_cuda else not_finite(sums[0], found)
        return tuple(map(_laid_out_as, found, parameters)), sums, bad

    return Compiled(gradients, required=required)


def loss_not_finite(loss: Tensor) -> Tensor:
    """1 where it is NaN or infinite, else 0: 0-d float32."""
    return (loss - loss).ne(0.0).float()


def not_finite(loss: Tensor, gradients: Sequence[Tensor | None]) -> Tensor:
    """1 where one of them is NaN or infinite, else 0: 0-d float32, as fused optimizers want it.

    Gradients are read once more for it. A sum is the fastest way to read on a CPU; it is not finite
    either where it leaves float32. On a GPU see `add_gradients`.
    """
    if loss.is_cuda:
        bad = loss_not_finite(loss)
        add_gradients(bad, gradients, torch.ones_like(bad))
        return bad
    there = [gradient.detach() for gradient in gradients if gradient is not None]
    total = torch.stack([gradient.sum() for gradient in there]).sum()
    return (loss + total).isfinite().logical_not().float()


def add_gradients(bad: Tensor, gradients: Sequence[Tensor | None], one: Tensor) -> None:
    """Set `bad` (0-d float32) to 1 where a gradient has an entry that is NaN or infinite.

    PyTorch's kernel for scaled losses looks at many tensors in one launch; `one` is its scale.
    """
    of_type: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        if gradient is not None:
            of_type.setdefault(gradient.dtype, []).append(gradient.detach())
    for same in of_type.values():
        torch._amp_foreach_non_finite_check_and_unscale_(same, bad, one)


def _laid_out_as(gradient: Tensor | None, parameter: Tensor) -> Tensor | None:
    """In the memory format of the parameter, in which a fused optimizer reads them together."""
    if gradient is None or gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)
