"""Published image data sets in the files they are published as: MNIST, Fashion-MNIST, CIFAR-10."""

import pickletools
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastvae.data import decode, tables
from fastvae.data.arrays import read_idx
from fastvae.data.config import DataConfig
from fastvae.data.image_set import ImageSet
from fastvae.errors import UserError

# The folder and the torchvision class of each are called the same, and so are the four files.
_IDX_FOLDERS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}
_IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_CIFAR10_FOLDER = "cifar-10-batches-py"

IDX_NAMES = tuple(_IDX_FOLDERS)
"""What `read_idx_files` reads."""


def read_idx_files(config: DataConfig) -> list[ImageSet]:
    """Read MNIST or its like from four IDX files as they are published, gzipped or not.

    Returns the training and the test images. Raises UserError for files that are not there, or
    damaged.
    """
    data_dir = config.data_dir or Path("data")
    raw = data_dir / _IDX_FOLDERS[config.data] / "raw"
    files = _find_idx_files(raw) or _find_idx_files(data_dir)
    if files is None and config.download:
        _download_idx_files(config.data, raw)
        files = _find_idx_files(raw)
    if files is None:
        missing = next(name for name in _IDX_FILES if _find(raw, name) is None)
        raise _not_there(
            config.data, f"{missing} or {missing}.gz in {raw}, or all four such files in {data_dir}"
        )
    train_images, train_labels, test_images, test_labels = (
        read_idx(file, 3 if "images" in file.name else 1) for file in files
    )
    return [
        ImageSet(decode.fit_images(images[:, None], config), labels.to(torch.int64), config.data)
        for images, labels in ((train_images, train_labels), (test_images, test_labels))
    ]


def _find_idx_files(folder: Path) -> list[Path] | None:
    """All four files in one folder, never a mixture of folders."""
    found = [path for name in _IDX_FILES if (path := _find(folder, name)) is not None]
    return found if len(found) == len(_IDX_FILES) else None


def _find(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _download_idx_files(data: str, raw: Path) -> None:
    with tables.needs("torchvision", "--download"):
        import torchvision
        from torchvision.datasets.utils import download_url

    # torchvision knows where the files are and what their MD5 is. Its data set classes are not
    # called, because they prefer an old processed/training.pt, a pickle, to fetching anything.
    known = getattr(torchvision.datasets, _IDX_FOLDERS[data])
    for name, md5 in known.resources:
        for mirror in known.mirrors:
            try:
                download_url(mirror + name, str(raw), name, md5)
                break
            except (OSError, RuntimeError) as error:
                reason = f"{mirror + name}: {tables.first_line(error)}"
        else:
            raise UserError(
                f"{data} cannot be downloaded into {raw}. {reason}. "
                f"Or fetch {', '.join(name for name, _ in known.resources)} by other means"
            )


def read_cifar10(config: DataConfig, *, whole: bool) -> list[ImageSet]:
    """Read CIFAR-10 as torchvision keeps it, or a folder `cifar10` of Parquet files.

    Returns and raises as `read_idx_files`, and as `read_table_folder` for Parquet.
    """
    data_dir = config.data_dir or Path("data")
    original, parquet = data_dir / _CIFAR10_FOLDER, data_dir / "cifar10"
    if not original.is_dir() and parquet.is_dir():
        found = tables.read_table_folder(parquet, config, whole=whole)
        return [replace(part, name="cifar10") for part in found]
    if not original.is_dir() and not config.download:
        raise _not_there("cifar10", f"the folder {original}, or one of Parquet files {parquet}")

    with tables.needs("torchvision", "cifar10"):
        from torchvision.datasets import CIFAR10
        from torchvision.datasets.utils import check_integrity, download_and_extract_archive
    if not original.is_dir():
        try:
            download_and_extract_archive(
                CIFAR10.url, str(data_dir), filename=CIFAR10.filename, md5=CIFAR10.tgz_md5
            )
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"cifar10 cannot be downloaded into {data_dir}: {tables.first_line(error)}. Fetch "
                f"{CIFAR10.url} by other means and unpack it there"
            ) from error
    sets = []
    for batches in (CIFAR10.train_list, CIFAR10.test_list):
        parts = []
        for name, md5 in batches:
            if not check_integrity(str(original / name), md5):
                raise UserError(
                    f"{original / name} is not there, or not as it was published: its MD5 should "
                    f"be {md5}. Remove {original} and fetch it again with --download"
                )
            parts.append(_read_cifar10_batch((original / name).read_bytes()))
        pixels, labels = (torch.cat(found) for found in zip(*parts, strict=True))
        sets.append(ImageSet(decode.fit_images(pixels, config), labels, "cifar10"))
    return sets


def _read_cifar10_batch(content: bytes) -> tuple[Tensor, Tensor]:
    """uint8 `[N, 3, 32, 32]` and int64 `[N]` from a published file.

    It is a pickle of a dictionary, which is not executed here: among its operations those are
    looked for that push the bytes of `data` and the numbers of `labels`.
    """
    key, labels, pixels = "", [], b""
    for _, value, _ in pickletools.genops(content):
        if value in ("data", "labels", "filenames", "batch_label"):
            key = value
        elif key == "labels" and isinstance(value, int) and value < 10:
            labels.append(value)
        elif key == "data" and isinstance(value, str | bytes | bytearray) and len(value) >= 3072:
            pixels = value.encode("latin-1") if isinstance(value, str) else bytes(value)
    array = np.frombuffer(pixels, np.uint8).reshape(-1, 3, 32, 32)
    return torch.from_numpy(array.copy()), torch.tensor(labels)


def _not_there(data: str, expected: str) -> UserError:
    return UserError(
        f"{data} is not there: looked for {expected}. Fetch it with --download, or say with "
        "--data-dir where it lies"
    )
