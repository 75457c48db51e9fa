"""Published image data sets in the files they are published as: MNIST, Fashion-MNIST, CIFAR-10."""

from dataclasses import replace
from pathlib import Path

import torch

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
    # The published files are pickles, the only ones ever opened here: torchvision compares them
    # with their published MD5 first.
    try:
        parts = [CIFAR10(data_dir, train, download=config.download) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        failed = f"read from {original}" if original.is_dir() else f"downloaded into {data_dir}"
        remedy = "Remove that folder and fetch" if original.is_dir() else "Fetch"
        raise UserError(
            f"cifar10 cannot be {failed}: {tables.first_line(error)}. {remedy} it again with "
            "--download"
        ) from error
    images = [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in parts]
    return [
        ImageSet(decode.fit_images(pixels, config), torch.tensor(part.targets), "cifar10")
        for pixels, part in zip(images, parts, strict=True)
    ]


def _not_there(data: str, expected: str) -> UserError:
    return UserError(
        f"{data} is not there: looked for {expected}. Fetch it with --download, or say with "
        "--data-dir where it lies"
    )
