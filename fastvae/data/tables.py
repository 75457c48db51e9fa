"""Tables of images, as Hugging Face datasets reads them: Parquet, Arrow, or from the Hub."""

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastvae.data.config import DataConfig
from fastvae.data.decode import find_encoded
from fastvae.data.image_set import ImageSet, join_labels
from fastvae.data.stored import BadSample, Encoded, StoredImages
from fastvae.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

ENDINGS = (".parquet", ".arrow")
HELD_OUT = ("test", "validation", "val")
"""The split held out beside `train`: the first of these that there is."""

_IMAGE_NAMES = ("image", "img", "images")
_LABEL_NAMES = ("label", "labels", "fine_label", "target", "targets")


@contextmanager
def needs(package: str, source: str) -> Iterator[None]:
    """Around an import: say what to install where the package is missing (UserError)."""
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"{source} needs the Python package {package}: pip install {package} ({error})"
        ) from error


def read_table_folder(folder: Path, config: DataConfig, *, whole: bool) -> list[ImageSet]:
    """Read a folder of Parquet or Arrow files, or one that `save_to_disk` wrote.

    Returns and raises as `read_table` does. Parquet is copied once into the cache of datasets.
    """
    with needs("datasets", f"{folder} with its Parquet or Arrow files"):
        import datasets
    saved = (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()
    try:
        loaded = datasets.load_from_disk(folder) if saved else datasets.load_dataset(str(folder))
    except Exception as error:  # datasets lets the errors of many libraries through
        raise UserError(f"{folder} cannot be read by datasets: {first_line(error)}") from error
    return read_table(loaded, str(folder), config, whole=whole)


def read_table(
    loaded: "Dataset | DatasetDict", source: str, config: DataConfig, *, whole: bool
) -> list[ImageSet]:
    """Find the images in what datasets loaded, to be decoded when they are needed.

    Labels come from the first column of numbers called `label`, `labels`, `fine_label`, `target`
    or `targets`, else from the only ClassLabel column. Whole numbers are classes, floating point
    is real targets. The labels of a split are None where one of its rows has none (null, or a
    negative class as is the custom on the Hub).

    Returns the images of all splits if `whole`, as one; otherwise those of `train` and those of the
    first of `test`, `validation`, `val`, or those of the one split. Raises UserError without a
    single column of images, and for a damaged image.
    """
    splits = dict(loaded) if isinstance(loaded, Mapping) else {"all": loaded}
    if not whole:
        splits = _choose_splits(splits, source)
    splits = {name: split for name, split in splits.items() if len(split)}
    if not splits:
        raise UserError(f"{source}: there is no row in it")
    first = next(iter(splits.values()))
    images = _read_images(splits, _image_column(first, source), source, config)
    label_column = _label_column(first)
    labels = [_read_labels(split, label_column) for split in splits.values()]
    if whole:
        return [ImageSet(images, join_labels(labels, source), source)]
    parts = images.split([len(split) for split in splits.values()])
    return [ImageSet(part, y, source) for part, y in zip(parts, labels, strict=True)]


def first_line(error: Exception) -> str:
    """The kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _choose_splits(splits: "dict[str, Dataset]", source: str) -> "dict[str, Dataset]":
    """Training and held-out split, or the one to be split."""
    if len(splits) == 1:
        return splits
    if "train" not in splits:
        raise UserError(
            f"{source} has the splits {', '.join(splits)} and none called train: rename one"
        )
    names = ["train", *(name for name in HELD_OUT if name in splits)][:2]
    return {name: splits[name] for name in names}


def _image_column(split: "Dataset", source: str) -> str:
    from datasets import Image

    columns = [name for name, kind in split.features.items() if isinstance(kind, Image)]
    preferred = [name for name in _IMAGE_NAMES if name in columns] or columns
    if len(columns) == 1 or preferred != columns:
        return preferred[0]
    have = ", ".join(f"{name} ({kind})" for name, kind in split.features.items())
    raise UserError(
        f"{source} has {len(columns) or 'no'} columns of images among its columns {have}. Mark "
        'the one to read: dataset.cast_column("its name", datasets.Image()), and save it again'
    )


def _label_column(split: "Dataset") -> str | None:
    from datasets import ClassLabel, Value

    features = split.features
    for name in _LABEL_NAMES:
        kind = features.get(name)
        if isinstance(kind, ClassLabel | Value) and kind.dtype.startswith(("int", "uint", "float")):
            return name
    classes = [name for name, kind in features.items() if isinstance(kind, ClassLabel)]
    return classes[0] if len(classes) == 1 else None


def _read_images(
    splits: "dict[str, Dataset]", column: str, source: str, config: DataConfig
) -> StoredImages:
    # As Arrow, the encoded images stay in the mapped file until their row is decoded.
    names = list(splits)
    rows = [split.with_format("arrow")[:][column] for split in splits.values()]
    starts = [0, *accumulate(len(part) for part in rows)]

    def locate(index: int) -> tuple[int, int]:
        part = bisect_right(starts, index) - 1
        return part, index - starts[part]

    def where(index: int) -> str:
        part, row = locate(index)
        return f"{source}, split {names[part]}, row {row}, column {column!r}"

    def item(index: int) -> Encoded:
        part, row = locate(index)
        value = rows[part][row].as_py() or {}
        if value.get("bytes") is not None:
            return bytes(value["bytes"])
        if value.get("path"):
            return Path(value["path"])
        raise BadSample(f"{where(index)} holds no image. Remove the row, or mend it")

    return find_encoded(starts[-1], item, where, config)


def _read_labels(split: "Dataset", column: str | None) -> Tensor | None:
    """int64 or float32 [N], or None where a row has none"""
    if column is None or column not in split.features:
        return None
    values = split.with_format("arrow")[:][column]
    if values.null_count:
        return None
    labels = values.to_numpy()
    if labels.dtype.kind == "f":
        return torch.from_numpy(labels.astype(np.float64)).to(torch.float32)
    return None if (labels < 0).any() else torch.from_numpy(labels.astype(np.int64))
