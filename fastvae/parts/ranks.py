"""What parts need to know of the other processes of a run."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of a detached tensor over all processes; `x` itself where there is but one."""
    if _is_alone():
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def joined_over_ranks(x: Tensor) -> Tensor:
    """The rows `[B, …]` of all processes, as many of each, in their order: `[W·B, …]`; `x` itself
    where there is but one.

    Differentiable: a row's gradient is the sum over processes of what each makes of it. Where the
    losses of the processes are averaged and each is a mean over its own rows, that is the gradient
    of the whole batch.
    """
    return x if _is_alone() else _Joined.apply(x)


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(_world())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(_world())[dist.get_rank()]


def _world() -> int:
    return dist.get_world_size()


def _is_alone() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or _world() == 1
