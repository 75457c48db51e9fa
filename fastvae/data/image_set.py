"""Images in memory, as every source gives them and everything after reads them."""

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvae.data.stored import Pixels, StoredImages
from fastvae.errors import FastvaeWarning, UserError

# Of a set beyond it a part tells it from others.
HASHED_BYTES = 1 << 28
# So many images at once are laid into another order of memory.
ROWS_LAID = 1024


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images and, where the source has them, their labels: classes or real targets.

    N images, C channels, H height, W width. Raises UserError where a tensor is not as described.
    """

    images: Tensor | StoredImages
    """uint8 `[N, C, H, W]` in 0..255, or float32 `[N, C, H, W]` in [0, 1]; or uint8 that is still
    encoded (see `loaded`)."""
    labels: Tensor | None
    """int64 `[N]`, none negative: classes. float32 `[N]`, all finite: real targets, in the source's
    unit. None where the source has no labels."""
    name: str
    """What the images are, for people: `mnist train`."""

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        given = f"{images.dtype} {list(images.shape)}".removeprefix("torch.")
        if images.ndim != 4 or images.dtype not in (torch.uint8, torch.float32):
            raise UserError(
                f"{self.name}: images must be uint8 or float32 [N, C, H, W], got {given}"
            )
        if not all(images.shape):
            raise UserError(f"{self.name}: there is no image in it, got {given}")
        if isinstance(images, Tensor) and images.dtype == torch.float32:
            low, high = (value.item() for value in torch.aminmax(images))
            # Written this way round, the comparison refuses NaN as well.
            if not (low >= 0.0 and high <= 1.0):
                raise UserError(
                    f"{self.name}: float32 images must lie in [0, 1], "
                    f"got values from {low:.9g} to {high:.9g}"
                )
        if labels is None:
            return
        if labels.dtype not in (torch.int64, torch.float32) or labels.shape != images.shape[:1]:
            raise UserError(
                f"{self.name}: labels must be int64 (classes) or float32 (real targets) "
                f"[{len(images)}], one to an image, "
                f"got {str(labels.dtype).removeprefix('torch.')} {list(labels.shape)}"
            )
        if labels.is_floating_point():
            bad = labels.isfinite().logical_not().nonzero()
            if len(bad):
                raise UserError(
                    f"{self.name}: real targets must be finite in float32, and {len(bad)} of "
                    f"{len(labels)} are not, the first in row {bad[0].item()}: remove these rows, "
                    "or save the targets in another unit"
                )
        elif labels.min() < 0:
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
    def num_classes(self) -> int | None:
        """The highest class and one more; None without labels and with real targets."""
        if self.labels is None or self.labels.is_floating_point():
            return None
        return int(self.labels.max()) + 1

    @property
    def nbytes(self) -> int:
        """Bytes of memory the images and labels take."""
        return self.images.nbytes + (0 if self.labels is None else self.labels.nbytes)

    @property
    def fingerprint(self) -> str:
        """What tells these images and labels from others: their number, size and a SHA-256, of all
        or, beyond HASHED_BYTES, of images spread evenly among them; of images that lie encoded, of
        their names."""
        count = max(1, min(len(self), HASHED_BYTES * len(self) // self.nbytes))
        taken = self.select(torch.arange(count) * len(self) // count)
        digest = hashlib.sha256()
        if isinstance(taken.images, StoredImages):
            digest.update("\0".join(taken.images.names()).encode())
        else:
            digest.update(taken.images.cpu().numpy().tobytes())
        if taken.labels is not None:
            digest.update(taken.labels.cpu().numpy().tobytes())
        kind = str(self.images.dtype).removeprefix("torch.")
        shape = "×".join(map(str, self.images.shape))
        return f"{shape} {kind} {digest.hexdigest()[:16]}"

    def select(self, indices: Tensor | Sequence[int] | slice) -> "ImageSet":
        """The images at these positions, in this order. A slice shares memory, the rest copy."""
        images = self.images
        if not isinstance(indices, slice):
            where = images.device if isinstance(images, Tensor) else "cpu"
            indices = torch.as_tensor(indices, device=where)
        labels = None if self.labels is None else self.labels[indices]
        taken = images[indices] if isinstance(images, Tensor) else images.view(indices)
        return ImageSet(taken, labels, self.name)

    @property
    def tensor(self) -> Tensor:
        """`images` where they are in memory: a mistake of ours where they are not."""
        assert isinstance(self.images, Tensor)
        return self.images

    def loaded(self) -> "ImageSet":
        """The same, decoded if they were not. Raises UserError for one that cannot be."""
        if isinstance(self.images, Tensor):
            return self
        found = self.images.read()
        for problem in found.problems:
            warnings.warn(f"{problem}; another image takes its place", FastvaeWarning, stacklevel=2)
        return self.with_pixels(found)

    def with_pixels(self, found: Pixels) -> "ImageSet":
        """The same, of which `found` was read."""
        labels = None if self.labels is None else self.labels[found.taken]
        return ImageSet(found.images, labels, self.name)

    def to(
        self,
        device: torch.device | str,
        memory_format: torch.memory_format = torch.preserve_format,
    ) -> "ImageSet":
        """The same images on `device`, decoded, in an order of memory."""
        found = self.loaded()
        labels = None if found.labels is None else found.labels.to(device)
        images = found.tensor
        if memory_format == torch.preserve_format:
            return ImageSet(images.to(device), labels, self.name)
        laid = torch.empty(
            images.shape, dtype=images.dtype, device=device, memory_format=memory_format
        )
        # In parts: a copy into another order is made by way of a copy in the same one.
        for to, part in zip(laid.split(ROWS_LAID), images.split(ROWS_LAID), strict=True):
            to.copy_(part)
        return ImageSet(laid, labels, self.name)


def join(parts: Sequence[ImageSet]) -> ImageSet:
    """The images of all parts, one after the other, under the name of the first.

    They must agree in type and `[C, H, W]`. Labels as `join_labels` has it.
    """
    if len(parts) == 1:
        return parts[0]
    name = parts[0].name
    labels = join_labels([part.labels for part in parts], name)
    return ImageSet(torch.cat([part.tensor for part in parts]), labels, name)


def join_labels(parts: Sequence[Tensor | None], name: str) -> Tensor | None:
    """Labels of all parts, one after the other; None unless every part has them.

    Raises as `require_one_kind`.
    """
    require_one_kind(parts, name)
    present = [part for part in parts if part is not None]
    return torch.cat(present) if len(present) == len(parts) else None


def require_one_kind(parts: Sequence[Tensor | None], name: str) -> None:
    """Raise UserError, which begins with `name`, for classes in one part and targets in another."""
    if len({part.dtype for part in parts if part is not None}) > 1:
        raise UserError(
            f"{name}: labels are whole numbers (classes) in one split and floating point (real "
            "targets) in another. Save them as one type"
        )
