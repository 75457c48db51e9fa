"""The order in which a tensor's elements lie in memory."""

import torch
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Whether `x` is `[B, C, H, W]` and lies in memory as `[B, H, W, C]`, not as `[B, C, H, W]`."""
    return (
        x.dim() == 4
        and not x.is_contiguous()
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def memory_format(x: Tensor) -> torch.memory_format:
    """What a result that is like `x` lies as."""
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def in_memory_order(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Views of all: `[B, H, W, C]` where `x` is channels_last, else as they are.

    What is summed over a row may be read in any order. In this one nothing is copied, and gradients
    come out as `x` lies.
    """
    if not is_channels_last(x):
        return x, *others
    return tuple(t.permute(0, 2, 3, 1) if t.dim() == 4 else t for t in (x, *others))
