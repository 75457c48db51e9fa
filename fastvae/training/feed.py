"""Batches on the device, by position in the run."""

import torch
from torch import Tensor

from fastvae.batch import Batch
from fastvae.data import EpochOrder, ImageSet

# Share of a GPU's free memory that the images may take; the rest is the model's.
DEVICE_SHARE = 0.5


class Feed:
    """Hands out the rows at given positions.

    Where the images fit they live on the device, with the order of the epochs at hand: a batch is
    one gather by places that the device computes. Otherwise they stay in the host's memory and a
    batch is copied through a pinned buffer.
    """

    def __init__(
        self, images: ImageSet, seed: int, device: torch.device, samples_ahead: int
    ) -> None:
        """`samples_ahead`: the most positions that one `prepare` covers."""
        self.device = device
        self.on_device = device.type != "cuda" or images.nbytes < DEVICE_SHARE * _free(device)
        self.set = images.to(device) if self.on_device else images
        self.size = len(images)
        self.order = EpochOrder(self.size, seed)
        # Epoch e lies in row e modulo their number.
        epochs = 2 + samples_ahead // self.size
        self.epochs = torch.empty(epochs, self.size, dtype=torch.int64, device=device)
        self.held: list[int | None] = [None] * epochs

    def prepare(self, first: int, last: int) -> None:
        """Have the order ready for positions `first` … `last − 1`. The host does not wait."""
        for epoch in range(first // self.size, (last - 1) // self.size + 1):
            row = epoch % len(self.held)
            if self.held[row] != epoch:
                self.epochs[row].copy_(self._pinned(self.order.epoch(epoch)), non_blocking=True)
                self.held[row] = epoch

    def batch(self, position: Tensor, count: int) -> Batch:
        """`count` rows as stored, their labels and their places in the set, on the device.

        `position`: 0-d int64 on the device, that of the first; `prepare` has covered them all.
        """
        positions = position + torch.arange(count, device=self.device)
        epoch = torch.div(positions, self.size, rounding_mode="floor") % len(self.held)
        index = self.epochs[epoch, positions % self.size]
        labels = self.set.labels
        return Batch(
            self.set.images.index_select(0, index),
            None if labels is None else labels.index_select(0, index),
            index,
        )

    def copied_batch(self, position: int, count: int) -> Batch:
        """The same from the host's memory, where the images did not fit."""
        index = self.order.indices(position, count)
        images, labels = self.set.images, self.set.labels
        rows = (
            images.index_select(0, index),
            None if labels is None else labels.index_select(0, index),
            index,
        )
        copied = (
            None if x is None else self._pinned(x).to(self.device, non_blocking=True) for x in rows
        )
        return Batch(*copied)  # type: ignore[arg-type]

    def _pinned(self, x: Tensor) -> Tensor:
        return x.pin_memory() if self.device.type == "cuda" else x


def _free(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0]
