"""Images in memory, as every source gives them and everything after reads them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvae.errors import UserError


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images and, where the source has them, their class labels.

    N images, C channels, H height, W width. Raises UserError where a tensor is not as described.
    """

    images: Tensor
    """uint8 `[N, C, H, W]` in 0..255, or float32 `[N, C, H, W]` in [0, 1]."""
    labels: Tensor | None
    """int64 `[N]`, none negative; None where the source has no labels."""
    name: str
    """What the images are, for people: `mnist train`."""

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        given = f"{images.dtype} {list(images.shape)}".removeprefix("torch.")
        if images.ndim != 4 or images.dtype not in (torch.uint8, torch.float32):
            raise UserError(
                f"{self.name}: images must be uint8 or float32 [N, C, H, W], got {given}"
            )
        if images.numel() == 0:
            raise UserError(f"{self.name}: there is no image in it, got {given}")
        if images.dtype == torch.float32:
            low, high = (value.item() for value in torch.aminmax(images))
            # Written this way round, the comparison refuses NaN as well.
            if not (low >= 0.0 and high <= 1.0):
                raise UserError(
                    f"{self.name}: float32 images must lie in [0, 1], "
                    f"got values from {low:.9g} to {high:.9g}"
                )
        if labels is None:
            return
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise UserError(
                f"{self.name}: labels must be int64 [{len(images)}], one to an image, "
                f"got {str(labels.dtype).removeprefix('torch.')} {list(labels.shape)}"
            )
        if labels.min() < 0:
            raise UserError(
                f"{self.name}: labels must not be negative, the lowest is {labels.min().item()}"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    @property
    def nbytes(self) -> int:
        """Bytes of memory the images and labels take."""
        return self.images.nbytes + (0 if self.labels is None else self.labels.nbytes)

    def select(self, indices: Tensor | Sequence[int] | slice) -> "ImageSet":
        """The images at these positions, in this order. A slice shares memory, the rest copy."""
        if not isinstance(indices, slice):
            indices = torch.as_tensor(indices, device=self.images.device)
        labels = None if self.labels is None else self.labels[indices]
        return ImageSet(self.images[indices], labels, self.name)

    def to(self, device: torch.device | str) -> "ImageSet":
        """The same images on `device`."""
        labels = None if self.labels is None else self.labels.to(device)
        return ImageSet(self.images.to(device), labels, self.name)
