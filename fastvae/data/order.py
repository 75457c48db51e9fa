"""In which order a run meets its data: a pure function of (seed, position).

A position counts the samples that the run has met, over all ranks. Epoch e is the positions from
e·N to (e+1)·N − 1, in the order of a permutation drawn from (seed, e). A batch is a range of
positions and may begin in one epoch and end in the next, so every sample is met exactly once an
epoch and every batch has the same size.
"""

from functools import lru_cache

import torch
from torch import Tensor

from fastvae.noise import derived_seed


class EpochOrder:
    """The endless sequence of sample indices that a run meets, on the CPU."""

    def __init__(self, size: int, seed: int) -> None:
        """`size`: samples in the data set."""
        self.size = size
        self.seed = seed
        # A batch spans at most a few epochs; two permutations serve all but the tiniest data sets.
        self.epoch = lru_cache(maxsize=2)(self._draw)

    def indices(self, position: int, count: int) -> Tensor:
        """Indices of the samples at `position` … `position + count − 1`: int64 `[count]`."""
        pieces = [torch.empty(0, dtype=torch.int64)]
        while count > 0:
            epoch, start = divmod(position, self.size)
            piece = self.epoch(epoch)[start : start + count]
            pieces.append(piece)
            position += len(piece)
            count -= len(piece)
        return pieces[1] if len(pieces) == 2 else torch.cat(pieces)

    def _draw(self, epoch: int) -> Tensor:
        """The permutation of one epoch: int64 `[size]`."""
        generator = torch.Generator().manual_seed(derived_seed("order", self.seed, epoch))
        return torch.randperm(self.size, generator=generator)
