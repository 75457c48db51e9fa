"""From what `--data` names to images in memory: which source it is, and how it is split."""

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastvae.data import arrays, decode, tables
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

BUILT_IN = ("digits", *_IDX_FOLDERS, "cifar10")
"""The names `--data` knows. A folder of the same name is meant with `./` before it."""

# All images, in order, and how many from the first are the training split; None where the source
# has no split of its own.
_Source = tuple[ImageSet, int | None]


def load_data(config: DataConfig, seed: int) -> tuple[ImageSet, ImageSet]:
    """Read the training images and the held-out images that `config` names.

    The split is the source's own where it has one, else `split` by `seed`. Both sets are uint8
    `[N, C, H, W]` (float32 from a file of floats) with int64 labels `[N]` or None, and agree in
    C, H and W. Raises UserError for whatever the user can mend.
    """
    images, train_count = _read(config, whole=False)
    if train_count is None:
        return split(images, config.holdout, seed)
    train, test = images.select(slice(train_count)), images.select(slice(train_count, None))
    return replace(train, name=f"{images.name} train"), replace(test, name=f"{images.name} test")


def load_all(data: str, config: DataConfig) -> ImageSet:
    """Read every image of one source unsplit, whatever splits it has one after the other.

    `data` is anything `--data` takes, or one image file; the other fields of `config` hold.
    Returns and raises as `load_data`.
    """
    images, _ = _read(replace(config, data=data), whole=True)
    return images


def read_images(paths: Sequence[Path | str], config: DataConfig) -> ImageSet:
    """Read image files, and folders of them, in the order given; a folder's files are sorted.

    Returns uint8 `[N, C, H, W]` without labels. Raises UserError for a missing path, an empty
    folder, a damaged image, and for images of different sizes without `config.image_size`.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            files += _require_images(path, _files_below(path))
        elif path.exists():
            files.append(path)
        else:
            raise UserError(f"there is no image file or folder {path}")
    if not files:
        raise UserError("no image was given: name image files or folders of them")
    images = decode.read_encoded(len(files), files.__getitem__, lambda i: str(files[i]), config)
    return ImageSet(images, None, str(paths[0]) if len(paths) == 1 else f"{len(files)} images")


def split(images: ImageSet, holdout: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """Hold out a share of the images, at least one, chosen by seed and number of images alone.

    Returns the training and the held-out images, each in their old order. Raises UserError if
    there are not two images at least.
    """
    count = len(images)
    if count < 2:
        raise UserError(
            f"{images.name} holds one image, and training needs two at least: one to learn from "
            "and one held out"
        )
    held_count = min(max(round(count * holdout), 1), count - 1)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    train, held = order[held_count:].sort().values, order[:held_count].sort().values
    return (
        replace(images.select(train), name=f"{images.name} train"),
        replace(images.select(held), name=f"{images.name} held-out"),
    )


def _read(config: DataConfig, *, whole: bool) -> _Source:
    """Find the source that `config.data` means; `whole` asks for all of its splits."""
    data, path = config.data, Path(config.data).expanduser()
    if not data:  # which as a path would be the current folder
        raise UserError(f"--data is empty. Give {', '.join(BUILT_IN)}, a folder or a file")
    if data == "digits":
        return _read_digits(config)
    if data in _IDX_FOLDERS:
        return _read_idx_files(config)
    if data == "cifar10":
        return _read_cifar10(config, whole=whole)
    if path.is_dir():
        return _read_folder(path, config, whole=whole)
    if path.is_file():
        return _read_file(path, config)
    return _read_hub(config, whole=whole)


def _read_digits(config: DataConfig) -> _Source:
    with tables.needs("scikit-learn", "digits"):
        from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(np.rint(digits.images * 255 / 16).astype(np.uint8))[:, None]
    labels = torch.from_numpy(digits.target.astype(np.int64))
    return ImageSet(decode.fit_images(images, config), labels, "digits"), None


def _read_idx_files(config: DataConfig) -> _Source:
    """MNIST and its like, from four IDX files as they are published, gzipped or not."""
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
        arrays.read_idx(file, 3 if "images" in file.name else 1) for file in files
    )
    images = decode.fit_images(torch.cat([train_images, test_images])[:, None], config)
    labels = torch.cat([train_labels, test_labels]).to(torch.int64)
    return ImageSet(images, labels, config.data), len(train_images)


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


def _read_cifar10(config: DataConfig, *, whole: bool) -> _Source:
    data_dir = config.data_dir or Path("data")
    original, parquet = data_dir / _CIFAR10_FOLDER, data_dir / "cifar10"
    if not original.is_dir() and parquet.is_dir():
        images, train_count = tables.read_table_folder(parquet, config, whole=whole)
        return replace(images, name="cifar10"), train_count
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
    pixels = torch.from_numpy(np.concatenate([part.data for part in parts]))
    fitted = decode.fit_images(pixels.permute(0, 3, 1, 2).contiguous(), config)
    labels = torch.tensor([label for part in parts for label in part.targets])
    return ImageSet(fitted, labels, "cifar10"), len(parts[0])


def _not_there(data: str, expected: str) -> UserError:
    return UserError(
        f"{data} is not there: looked for {expected}. Fetch it with --download, or say with "
        "--data-dir where it lies"
    )


def _read_folder(folder: Path, config: DataConfig, *, whole: bool) -> _Source:
    """Image files if the folder has any, else a table."""
    files = _files_below(folder)
    if any(_is_image(file) for file in files):
        return _read_image_folder(folder, files, config, whole=whole)
    if any(file.suffix.lower() in tables.ENDINGS for file in files):
        return tables.read_table_folder(folder, config, whole=whole)
    raise _nothing_in(folder, (*decode.ENDINGS, *tables.ENDINGS))


def _read_image_folder(
    folder: Path, files: list[Path], config: DataConfig, *, whole: bool
) -> _Source:
    """With `train` and `test`, `validation` or `val` in it, these are the split.

    Labels are the sorted names of the class folders, from 0, where each image lies in one such
    folder (below its split, if there are splits) and there are two or more of them.
    """
    parts = [name for name in ("train", *tables.HELD_OUT) if (folder / name).is_dir()]
    if len(parts) < 2 or parts[0] != "train":
        parts = []
    train_count = None
    if parts and not whole:
        train, held = (
            _require_images(folder / part, [f for f in files if folder / part in f.parents])
            for part in parts[:2]
        )
        files, train_count = train + held, len(train)
    files = _require_images(folder, files)
    images = decode.read_encoded(len(files), files.__getitem__, lambda i: str(files[i]), config)
    return ImageSet(images, _class_labels(folder, files, parts), str(folder)), train_count


def _class_labels(folder: Path, files: list[Path], parts: list[str]) -> Tensor | None:
    """int64 [N], or None where the folders are not classes."""
    folders = [file.relative_to(folder).parent.parts for file in files]
    below = [names[1:] if names and names[0] in parts else names for names in folders]
    classes = {names: label for label, names in enumerate(sorted(set(below)))}
    if len(classes) < 2 or any(len(names) != 1 for names in classes):
        return None
    return torch.tensor([classes[names] for names in below])


def _files_below(folder: Path) -> list[Path]:
    """Every file in a folder and its sub-folders, sorted, without hidden ones."""
    found: list[Path] = []
    seen: set[str] = set()
    for parent, names, files in os.walk(folder, followlinks=True):
        # Links to folders are followed, but none twice: they may go in a circle.
        fresh = os.path.realpath(parent) not in seen
        seen.add(os.path.realpath(parent))
        names[:] = sorted(name for name in names if fresh and not name.startswith("."))
        found += [Path(parent, name) for name in files if fresh and not name.startswith(".")]
    return sorted(found, key=lambda file: file.relative_to(folder).parts)


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in decode.ENDINGS


def _require_images(folder: Path, files: list[Path]) -> list[Path]:
    images = [file for file in files if _is_image(file)]
    if not images:
        raise _nothing_in(folder, decode.ENDINGS)
    return images


def _nothing_in(folder: Path, endings: Sequence[str]) -> UserError:
    return UserError(
        f"the folder {folder} holds no images, in its sub-folders neither. Accepted are files "
        f"that end in {' '.join(endings)}"
    )


def _read_file(file: Path, config: DataConfig) -> _Source:
    if file.suffix.lower() in arrays.ENDINGS:
        return arrays.read_array_file(file, config)
    if _is_image(file):
        return read_images([file], config), None
    if file.suffix.lower() in tables.ENDINGS:
        raise UserError(f"{file} is one file of a table: give its folder, {file.parent}")
    raise UserError(
        f"{file} is no file of images. Accepted are {' '.join(arrays.ENDINGS)}, a folder of "
        "images, and a folder of Parquet or Arrow files"
    )


def _read_hub(config: DataConfig, *, whole: bool) -> _Source:
    """The last possibility: a name on the Hub, `owner/name`."""
    data = config.data
    close = difflib.get_close_matches(data.lower(), BUILT_IN, n=1)
    unknown = (
        f"there is no file or folder {data}"
        + (f" (did you mean {close[0]}?)" if close else "")
        + f". The built-in names are {', '.join(BUILT_IN)}"
    )
    # A mistyped path deserves its answer at once, not after minutes of trying to reach the Hub.
    is_path = data.endswith((*arrays.ENDINGS, *decode.ENDINGS, *tables.ENDINGS)) or (
        "/" in data and Path(data).parent.is_dir()
    )
    if is_path or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", data, re.ASCII):
        raise UserError(
            f"{unknown}. A name on the Hugging Face Hub has the form owner/name, and the owner is "
            "no folder here"
        )
    try:
        with tables.needs("datasets", "a name on the Hub"):
            import datasets
        loaded = datasets.load_dataset(data)
    except Exception as error:  # datasets lets the errors of many libraries through
        raise UserError(
            f"{unknown}. As a name on the Hugging Face Hub it could not be loaded: "
            f"{tables.first_line(error)}"
        ) from error
    return tables.read_table(loaded, data, config, whole=whole)
