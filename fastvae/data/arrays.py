"""Images kept as arrays: IDX (the format of MNIST), .npy, .npz and .safetensors files."""

import gzip
import math
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from fastvae.data.config import DataConfig
from fastvae.data.decode import fit_images
from fastvae.data.image_set import ImageSet
from fastvae.errors import UserError

ENDINGS = (".npy", ".npz", ".safetensors")
# Bytes that gzip makes of one at most, a little more than its 1032.
MOST_UNPACKED = 1100

_PAIRS = (("x_train", "x_test"), ("train_images", "test_images"), ("train", "test"))
_PAIR_LABELS = (
    ("y_train", "y_test"),
    ("train_labels", "test_labels"),
    ("train_targets", "test_targets"),
)
_IMAGES = ("images", "x", "data")
_LABELS = ("labels", "y", "targets", "target")


def read_array_file(path: Path, config: DataConfig) -> list[ImageSet]:
    """Read images, and labels if there are any, from a .npy, .npz or .safetensors file.

    Images are `[N, H, W]`, `[N, H, W, 1|3]` or `[N, 1|3, H, W]`. Three dimensions are always many
    grey images, never one in colour; where four can be read both ways, as in `[N, 3, 8, 3]`, the
    channels are the last. They are uint8, bool (True is white) or floating point in [0, 1], and
    become uint8 or float32 `[N, C, H, W]`. Labels are `[N]` or `[N, 1]`: integers are classes,
    floating point real targets.

    Returns the training and the test images if the file holds a pair such as `x_train` and
    `x_test`, with the labels that each of them has, else all images. Raises UserError for other
    content; nothing is ever unpickled, and nothing rescaled.
    """
    with _named_errors(path), _open_arrays(path) as arrays:
        image_keys, label_keys = _choose_keys(path, arrays)
        where = {key: f"{path}, array {key!r}" if key else str(path) for key in arrays}
        parts = [_to_images(arrays[key], where[key]) for key in image_keys]
        labels = [key if key is None else _to_labels(arrays[key], where[key]) for key in label_keys]
    parts = [fit_images(part, config) for part in parts]
    if len({(part.dtype, part.shape[1:]) for part in parts}) > 1:
        described = " and ".join(
            f"{key} {part.dtype} {list(part.shape)}"
            for key, part in zip(image_keys, parts, strict=True)
        )
        raise UserError(f"{path}: training and test images must be alike, got {described}")
    return [ImageSet(part, y, str(path)) for part, y in zip(parts, labels, strict=True)]


def read_idx(path: Path, ndim: int) -> Tensor:
    """Read an IDX file of bytes, gzipped or not, as a uint8 tensor of `ndim` dimensions.

    Raises UserError if it is something else, or incomplete.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            # Two zero bytes, the type (8: unsigned bytes), the number of dimensions, these.
            header = file.read(4 + 4 * ndim)
            if header[:4] != bytes((0, 0, 8, ndim)) or len(header) < 4 + 4 * ndim:
                raise UserError(
                    f"{path} is not an IDX file of bytes in {ndim} dimensions: it begins with "
                    f"{header[:4].hex(' ') or 'nothing'}. Fetch it again"
                )
            shape = struct.unpack(f">{ndim}I", header[4:])
            count = math.prod(shape)
            # What no file of this size can unpack to is not asked for.
            possible = count <= MOST_UNPACKED * path.stat().st_size
            values = bytearray(file.read(count + 1) if possible else b"")
    except (OSError, EOFError, zlib.error, MemoryError) as error:
        raise UserError(f"{path} cannot be read: {error}. Fetch it again") from error
    if len(values) != count or not count:
        found = f"more than {count}" if len(values) > count else f"{len(values)}"
        raise UserError(
            f"{path} should hold {count} values and holds {found if possible else 'fewer'}. "
            "Fetch it again"
        )
    return torch.frombuffer(values, dtype=torch.uint8).view(shape)


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Turn what the libraries raise on a bad file into a UserError that names it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of NumPy, zipfile, tokenize and others, almost anything
        if "pickle" in str(error):  # both of NumPy's messages say it, and it has no class for them
            raise UserError(
                f"{path} holds pickled Python objects, or is no NumPy file at all. Unpickling runs "
                "whatever code a file names, so it is not done. Save plain numbers: "
                "numpy.save(path, images) with images of type uint8"
            ) from error
        raise UserError(
            f"{path} cannot be read: {str(error) or type(error).__name__}. It may be incomplete: "
            "write or fetch it again"
        ) from error


@contextmanager
def _open_arrays(path: Path) -> Iterator[Mapping[str, Any]]:
    """The arrays in a file by name; the one of a .npy has the name "".

    Those of a .npz are read when they are looked up, the others at once.
    """
    if path.suffix.lower() == ".safetensors":
        yield load_file(path)
        return
    loaded = np.load(path, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        yield {"": loaded}
    else:
        with loaded:
            yield loaded


def _choose_keys(path: Path, arrays: Mapping[str, Any]) -> tuple[list[str], list[str | None]]:
    """The names of the image arrays (one, or training and test) and of the labels of each."""
    keys = list(arrays)
    pair = next(((a, b) for a, b in _PAIRS if a in keys and b in keys), None)
    if pair is not None:
        names = next((names for names in _PAIR_LABELS if names[0] in keys), (None, None))
        return list(pair), [name if name in keys else None for name in names]
    label = next((key for key in _LABELS if key in keys), None)
    others = [key for key in keys if key not in _LABELS]
    images = [key for key in _IMAGES if key in keys] or (others if len(others) == 1 else [])
    if images:
        return images[:1], [label]
    shown = ", ".join(keys[:12]) + (f" and {len(keys) - 12} more" if len(keys) > 12 else "")
    raise UserError(
        f"{path}: which array holds the images? It has {shown or 'no array'}. Name them "
        f"{', '.join(_IMAGES)}, or in pairs {'; '.join(f'{a} and {b}' for a, b in _PAIRS)}"
    )


def _to_images(array: NDArray[Any] | Tensor, where: str) -> Tensor:
    """Any accepted array of images -> uint8 or float32 [N, C, H, W]"""
    images = _to_tensor(array, where)
    shape = list(images.shape)
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and shape[3] in (1, 3):
        images = images.permute(0, 3, 1, 2)
    elif images.ndim != 4 or shape[1] not in (1, 3):
        raise UserError(
            f"{where} has shape {shape}. Images are [N, H, W], [N, H, W, 1 or 3] or "
            "[N, 1 or 3, H, W]: reshape the array and save it again"
        )
    if images.numel() == 0:
        raise UserError(f"{where} has shape {shape}: there is no image in it")
    if images.dtype == torch.bool:
        images = images.to(torch.uint8) * 255
    elif images.dtype != torch.uint8:
        images = _to_floats(images, where)
    return images.contiguous()


def _to_floats(images: Tensor, where: str) -> Tensor:
    """Floating point in [0, 1] -> float32. Of anything else, say what it is and how to mend it."""
    # Converted first, because torch cannot compare all types (uint16, float8).
    values = images.to(torch.float32 if images.is_floating_point() else torch.float64)
    low, high = (value.item() for value in torch.aminmax(values))
    if images.is_floating_point() and low >= 0 and high <= 1:  # false for NaN
        return values
    if not images.is_floating_point() and low >= 0 and high <= 255:
        remedy = "images.astype('uint8') if 255 is white"
    elif low != low:
        remedy = "numpy.nan_to_num(images) if the missing values may be black"
    elif low >= -1 and high <= 1:
        remedy = "(images + 1) / 2 if -1 is black and 1 is white"
    elif low >= 0 and high <= 255:
        remedy = "images / 255 if 255 is white"
    else:
        remedy = "(images - low) / (high - low) with the values of black and white"
    raise UserError(
        f"{where} is {str(images.dtype).removeprefix('torch.')} with values from {low:.9g} to "
        f"{high:.9g}. Images are uint8, bool, or floating point from 0 to 1, and are never "
        f"rescaled unasked. Save them again as {remedy}"
    )


def _to_labels(array: NDArray[Any] | Tensor, where: str) -> Tensor:
    """Integers [N] or [N, 1] -> int64 [N]; floating point -> float32 [N]"""
    labels = _to_tensor(array, where)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.is_complex():
        raise UserError(
            f"{where} is {str(labels.dtype).removeprefix('torch.')} {list(labels.shape)}. Labels "
            "are one number to an image: save them again as an array [N], of integers for classes, "
            "of floating point for real targets"
        )
    return labels.to(torch.float32 if labels.is_floating_point() else torch.int64)


def _to_tensor(array: NDArray[Any] | Tensor, where: str) -> Tensor:
    if isinstance(array, Tensor):
        return array
    if array.dtype.kind not in "biuf":
        raise UserError(
            f"{where} is of type {array.dtype}. Images are uint8, bool, or floating point from "
            "0 to 1, and labels are numbers"
        )
    return torch.from_numpy(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")))
