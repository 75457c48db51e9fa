"""Batches on the device, by position in the run."""

import torch
from torch import Tensor

from fastvae.batch import Batch
from fastvae.data import EpochOrder, ImageSet

# Share of a GPU's free memory that the images may take; the rest is the model's.
DEVICE_SHARE = 0.5


class Feed:
    """Hands out the rows at given positions.

    Where the images fit they live on the device and a batch is one gather; otherwise they stay in
    the host's memory and a batch is copied through a pinned buffer.
    """

    def __init__(self, images: ImageSet, seed: int, device: torch.device) -> None:
        self.device = device
        self.on_device = device.type != "cuda" or images.nbytes < DEVICE_SHARE * _free(device)
        self.set = images.to(device) if self.on_device else images
        self.order = EpochOrder(len(images), seed, self.set.images.device)

    def batch(self, position: int, count: int) -> Batch:
        """`count` images as stored, their labels and their places in the set, on the device."""
        index = self.order.indices(position, count)
        labels = self.set.labels
        batch = Batch(
            self.set.images.index_select(0, index),
            None if labels is None else labels.index_select(0, index),
            index,
        )
        if self.on_device:
            return batch
        copied = (None if x is None else self._copied(x) for x in batch)
        return Batch(*copied)  # type: ignore[arg-type]

    def _copied(self, x: Tensor) -> Tensor:
        return x.pin_memory().to(self.device, non_blocking=True)


def _free(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0]
