"""What a device has room for, and how images should lie there."""

import torch
from fastvae_kernels.layout import is_channels_last

from fastvae.data import ImageSet

# Share of a GPU's free memory that a set of images may take; the rest is the model's.
DEVICE_SHARE = 0.5


def fits_on(device: torch.device, images: ImageSet) -> bool:
    """Whether images that are in memory may live on the device as well."""
    if not isinstance(images.images, torch.Tensor):
        return False
    return device.type != "cuda" or images.nbytes < DEVICE_SHARE * _free(device)


def image_format(model: torch.nn.Module) -> torch.memory_format:
    """In which order of memory images that are copied to a GPU should lie there: that of the
    weights of `model`'s convolutions. A CPU reads them where they were loaded."""
    if any(weights.is_cuda and is_channels_last(weights) for weights in model.parameters()):
        return torch.channels_last
    return torch.preserve_format


def _free(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0]
