"""What a device has room for."""

import torch

from fastvae.data import ImageSet

# Share of a GPU's free memory that a set of images may take; the rest is the model's.
DEVICE_SHARE = 0.5


def fits_on(device: torch.device, images: ImageSet) -> bool:
    """Whether images that are in memory may live on the device as well."""
    if not isinstance(images.images, torch.Tensor):
        return False
    return device.type != "cuda" or images.nbytes < DEVICE_SHARE * _free(device)


def _free(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0]
