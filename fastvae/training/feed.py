"""Batches on the device, by position in the run."""

import torch
from torch import Tensor

from fastvae.data import EpochOrder, ImageSet

# Share of a GPU's free memory that the images may take; the rest is the model's.
DEVICE_SHARE = 0.5


class Feed:
    """Hands out the images at given positions.

    Where the images fit they live on the device and a batch is one gather; otherwise they stay in
    the host's memory and a batch is copied through a pinned buffer.
    """

    def __init__(self, images: ImageSet, seed: int, device: torch.device) -> None:
        self.device = device
        self.on_device = device.type != "cuda" or images.nbytes < DEVICE_SHARE * _free(device)
        self.images = images.images.to(device) if self.on_device else images.images
        self.order = EpochOrder(len(images), seed, self.images.device)

    def batch(self, position: int, count: int) -> Tensor:
        """Images `[count, C, H, W]` as stored, on the device."""
        batch = self.images.index_select(0, self.order.indices(position, count))
        if self.on_device:
            return batch
        return batch.pin_memory().to(self.device, non_blocking=True)


def _free(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0]
