"""Batches on the device, by position in the run."""

import warnings

import torch
from torch import Tensor

from fastvae.batch import Batch
from fastvae.data import EpochOrder, ImageSet
from fastvae.data.stored import StoredImages
from fastvae.errors import FastvaeWarning
from fastvae.hardware import fits_on
from fastvae.training.stream import Stream


class Feed:
    """Hands out the rows at given positions.

    Where the images fit they live on the device, with the order of the epochs at hand: a batch is
    places that the device computes, and whoever reads the images gathers them. Otherwise they stay
    in the host's memory, or, if they do not fit there either, encoded where they lie; a batch is
    copied through a pinned buffer.
    """

    def __init__(
        self,
        images: ImageSet,
        seed: int,
        device: torch.device,
        samples_ahead: int,
        workers: int | None = None,
        memory_format: torch.memory_format = torch.preserve_format,
    ) -> None:
        """`samples_ahead`: the most positions that one `prepare` covers. `workers`: processes that
        decode images which lie encoded; None: as many as there are cores, at most 8.
        `memory_format`: in which order images lie on the device."""
        self.device, self.memory_format = device, memory_format
        stored = images.images if isinstance(images.images, StoredImages) else None
        self.on_device = fits_on(device, images)
        self.set = images.to(device, memory_format) if self.on_device else images
        self.size = len(images)
        self.order = EpochOrder(self.size, seed)
        self.stream: Stream | None = None
        if stored is not None:
            self.stream = Stream(stored, self.order, workers, pinned=device.type == "cuda")
        self.bad_samples = 0
        """Images that could not be read, here, since the last line: others took their places."""
        # Epoch e lies in row e modulo their number, so that position p lies at p modulo all.
        epochs = 2 + samples_ahead // self.size if self.on_device else 0
        self.epochs = torch.empty(epochs, self.size, dtype=torch.int64, device=device)
        self.ahead = torch.arange(samples_ahead if self.on_device else 0, device=device)
        self.held: list[int | None] = [None] * epochs

    def prepare(self, first: int, last: int) -> None:
        """Have the order ready for positions `first` … `last − 1`. The host does not wait."""
        for epoch in range(first // self.size, (last - 1) // self.size + 1):
            row = epoch % len(self.held)
            if self.held[row] != epoch:
                self.epochs[row].copy_(self._pinned(self.order.epoch(epoch)), non_blocking=True)
                self.held[row] = epoch

    def batch(self, position: Tensor, count: int) -> Batch:
        """`count` rows, their labels and their places in the set, on the device; not gathered yet.

        `position`: 0-d int64 on the device, that of the first; `prepare` has covered them all.
        """
        assert count <= len(self.ahead), (count, len(self.ahead))
        places = (position + self.ahead[:count]) % self.epochs.numel()
        index = self.epochs.view(-1).index_select(0, places)
        labels = self.set.labels
        return Batch(
            self.set.tensor,
            None if labels is None else labels.index_select(0, index),
            index,
            chosen=index,
        )

    def copied_batch(self, position: int, count: int) -> Batch:
        """The same from where the images lie, by a position that the host knows."""
        index = self.order.indices(position, count)
        return self._copied(self.set.select(index).loaded(), index)

    def streamed_batch(self, position: int, count: int) -> Batch:
        """The same, in the order that `stream.begin` announced: decoded ahead."""
        if self.stream is None:
            return self.copied_batch(position, count)
        found = self.stream.next(position)
        self.bad_samples += len(found.problems)
        for problem in found.problems:
            warnings.warn(
                f"{problem}; another of its batch takes its place", FastvaeWarning, stacklevel=2
            )
        index = self.order.indices(position, count)
        return self._copied(self.set.select(index).with_pixels(found), index[found.taken])

    def _copied(self, rows: ImageSet, index: Tensor) -> Batch:
        images, labels, indices = (
            None if x is None else self._pinned(x).to(self.device, non_blocking=True)
            for x in (rows.tensor, rows.labels, index)
        )
        assert images is not None
        return Batch(images.to(memory_format=self.memory_format), labels, indices)

    def _pinned(self, x: Tensor) -> Tensor:
        pin = self.device.type == "cuda" and not (x.is_cuda or x.is_pinned())
        return x.pin_memory() if pin else x
