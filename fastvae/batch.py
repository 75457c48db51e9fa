"""What a model is given of each datum."""

from typing import NamedTuple

from fastvae_kernels.layout import is_channels_last
from torch import Tensor


class Batch(NamedTuple):
    """B rows of a data set: gathered already, or to be gathered by whoever reads them."""

    images: Tensor
    """`[B, C, H, W]` uint8, or floating in [0, 1], as stored; with `chosen` a whole data set
    `[N, C, H, W]`, where it lies."""
    labels: Tensor | None = None
    """int64 `[B]` classes or float32 `[B]` real targets, where the data have them."""
    indices: Tensor | None = None
    """int64 `[B]`: each row's place in the training set; None for all other data."""
    chosen: Tensor | None = None
    """int64 `[B]`: row b is number chosen[b] of `images`; None where these are the rows."""

    @property
    def x(self) -> Tensor:
        """The rows as stored, `[B, C, H, W]`: a copy at every reading where they are `chosen`."""
        return gathered(self.images, self.chosen)

    @property
    def rows(self) -> int:
        """B."""
        return len(self.images) if self.chosen is None else len(self.chosen)


def gathered(data: Tensor, indices: Tensor | None) -> Tensor:
    """The rows of `data` that indices choose, in its order of memory; all of them without
    indices."""
    if indices is None:
        return data
    if is_channels_last(data):  # index_select alone would answer in the other order
        return data.permute(0, 2, 3, 1).index_select(0, indices).permute(0, 3, 1, 2)
    return data.index_select(0, indices)
