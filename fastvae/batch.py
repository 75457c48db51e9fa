"""What a model is given of each datum."""

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """B rows of a data set."""

    x: Tensor
    """`[B, C, H, W]` uint8, or floating in [0, 1], as stored."""
    labels: Tensor | None = None
    """int64 `[B]` classes or float32 `[B]` real targets, where the data have them."""
    indices: Tensor | None = None
    """int64 `[B]`: each row's place in the training set; None for all other data."""
