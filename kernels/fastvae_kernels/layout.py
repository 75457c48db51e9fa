"""The order in which a tensor's elements lie in memory."""

import torch
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Whether `x` is `[B, C, H, W]` and lies in memory as `[B, H, W, C]`, not as `[B, C, H, W]`."""
    # vmap can be asked for the plain order alone.
    return x.dim() == 4 and not x.is_contiguous() and x.permute(0, 2, 3, 1).is_contiguous()


def empty_rows(batch: int, like: Tensor) -> Tensor:
    """Memory for float32 `[batch, …]`, rows as `like` has them: channels_last or contiguous."""
    return torch.empty(
        (batch, *like.shape[1:]),
        dtype=torch.float32,
        device=like.device,
        memory_format=torch.channels_last if is_channels_last(like) else torch.contiguous_format,
    )


def laid_out(x: Tensor, like: Tensor) -> Tensor:
    """`x`, channels_last where `like` is and else contiguous."""
    if is_channels_last(like):
        return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    return x.contiguous()


def in_memory_order(
    x: Tensor, *others: Tensor, chosen_from: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Views of all: `[B, H, W, C]` where `x` is channels_last, else as they are.

    What is summed over a row may be read in any order. In this one nothing is copied, and gradients
    come out as `x` lies. `chosen_from`: one of the others, a data set that is read through indices;
    in another order than its own it could not be.
    """
    if not is_channels_last(x) or (chosen_from is not None and not is_channels_last(chosen_from)):
        return x, *others
    return tuple(t.permute(0, 2, 3, 1) if t.dim() == 4 else t for t in (x, *others))
