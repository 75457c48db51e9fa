"""From what `--data` names to images in memory: which source it is, and how it is split."""

import difflib
import re
from dataclasses import replace
from pathlib import Path

import torch

from fastvae.data import arrays, decode, folders, published, scikit, tables
from fastvae.data.config import DataConfig
from fastvae.data.folders import read_images
from fastvae.data.image_set import ImageSet, join, require_one_kind
from fastvae.errors import UserError

BUILT_IN = ("digits", *published.IDX_NAMES, "cifar10", *scikit.TABLE_NAMES)
"""The names `--data` knows. A folder of the same name is meant with `./` before it."""


def load_data(config: DataConfig, seed: int) -> tuple[ImageSet, ImageSet]:
    """Read the training images and the held-out images that `config` names.

    The split is the source's own where it has one, else `split` by `seed`; of either side the first
    `train_limit` and `heldout_limit` are kept. Both sets are uint8 `[N, C, H, W]` (float32 from a
    file of floats or a table of numbers) and agree in C, H and W. Labels `[N]` are int64 classes
    in both sets or float32 real targets in both; None where the source has none, and for the
    held-out images also where it has none for training. A held-out class may be beyond the
    training classes. Encoded images stay encoded where all of them are more than the
    `data_budget`. Raises UserError for whatever the user can mend.
    """
    parts = _read(config, whole=False)
    if len(parts) == 1:
        train, heldout = split(parts[0], config.holdout, seed)
    else:
        train, heldout = parts
        require_one_kind([train.labels, heldout.labels], train.name)
        labels = None if train.labels is None else heldout.labels
        train = replace(train, name=f"{train.name} train")
        heldout = replace(heldout, name=f"{heldout.name} test", labels=labels)
    train = train.select(slice(config.train_limit))
    heldout = heldout.select(slice(config.heldout_limit))
    if train.nbytes + heldout.nbytes > config.budget_bytes:
        return train, heldout
    return train.loaded(), heldout.loaded()


def load_all(data: str, config: DataConfig) -> ImageSet:
    """Read every image of one source unsplit, whatever splits it has one after the other.

    `data` is anything `--data` takes, or one image file; the other fields of `config` hold, but
    for the limits. Labels are None unless all images have them. Returns and raises as `load_data`.
    """
    images = join(_read(replace(config, data=data), whole=True))
    return images if images.nbytes > config.budget_bytes else images.loaded()


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


def _read(config: DataConfig, *, whole: bool) -> list[ImageSet]:
    """Find the source that `config.data` means, and read it.

    Returns training and held-out images where the source has a split, else all images. `whole`
    asks for all of its splits, be it as one part or two.
    """
    data, path = config.data, Path(config.data).expanduser()
    if not data:  # which as a path would be the current folder
        raise UserError(f"--data is empty. Give {', '.join(BUILT_IN)}, a folder or a file")
    if data == "digits":
        return scikit.read_digits(config)
    if data in scikit.TABLE_NAMES:
        return scikit.read_number_table(config)
    if data in published.IDX_NAMES:
        return published.read_idx_files(config)
    if data == "cifar10":
        return published.read_cifar10(config, whole=whole)
    if path.is_dir():
        return _read_folder(path, config, whole=whole)
    if path.is_file():
        return _read_file(path, config)
    return _read_hub(config, whole=whole)


def _read_folder(folder: Path, config: DataConfig, *, whole: bool) -> list[ImageSet]:
    """Image files if the folder has any, else a table."""
    files = folders.files_below(folder)
    if any(folders.is_image(file) for file in files):
        return folders.read_image_folder(folder, files, config, whole=whole)
    if any(file.suffix.lower() in tables.ENDINGS for file in files):
        return tables.read_table_folder(folder, config, whole=whole)
    raise folders.nothing_in(folder, (*decode.ENDINGS, *tables.ENDINGS))


def _read_file(file: Path, config: DataConfig) -> list[ImageSet]:
    if file.suffix.lower() in arrays.ENDINGS:
        return arrays.read_array_file(file, config)
    if folders.is_image(file):
        return [read_images([file], config)]
    if file.suffix.lower() in tables.ENDINGS:
        raise UserError(f"{file} is one file of a table: give its folder, {file.parent}")
    raise UserError(
        f"{file} is no file of images. Accepted are {' '.join(arrays.ENDINGS)}, a folder of "
        "images, and a folder of Parquet or Arrow files"
    )


def _read_hub(config: DataConfig, *, whole: bool) -> list[ImageSet]:
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
