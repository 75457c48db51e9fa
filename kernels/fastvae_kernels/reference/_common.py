"""What the references share: rows, and the precision they compute in."""

import torch
from torch import Tensor


def rows(x: Tensor) -> Tensor:
    """`[B, …]` → `[B, D]` (`[B]` → `[B, 1]`)."""
    return x.flatten(1) if x.dim() > 1 else x.unsqueeze(1)


def widen(x: Tensor) -> Tensor:
    """To float32, the precision of the kernels; float64 stays, for exact checks."""
    return x if x.dtype == torch.float64 else x.float()


def unit_interval(target: Tensor, dtype: torch.dtype) -> Tensor:
    """A target as numbers: uint8 pixels are read as target / 255, all else as it is."""
    if target.dtype == torch.uint8:
        return target.to(dtype) * (1.0 / 255.0)
    return target.to(dtype)


def chosen(target: Tensor, indices: Tensor | None) -> Tensor:
    """The rows of a data set that indices choose; without indices the target is the batch."""
    return target if indices is None else target.index_select(0, indices)
