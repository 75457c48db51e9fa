"""Image files and folders of them: which are meant, which split and which class each belongs to."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from fastvae.data import decode
from fastvae.data.config import DataConfig
from fastvae.data.image_set import ImageSet
from fastvae.data.tables import HELD_OUT
from fastvae.errors import UserError


def read_images(paths: Sequence[Path | str], config: DataConfig) -> ImageSet:
    """Read image files, and folders of them, in the order given; a folder's files are sorted.

    Returns uint8 `[N, C, H, W]` without labels. Raises UserError for a missing path, an empty
    folder, a damaged image, and for images of different sizes without `config.image_size`.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            files += require_images(path, files_below(path))
        elif path.exists():
            files.append(path)
        else:
            raise UserError(f"there is no image file or folder {path}")
    if not files:
        raise UserError("no image was given: name image files or folders of them")
    images = decode.find_encoded(len(files), files.__getitem__, lambda i: str(files[i]), config)
    name = str(paths[0]) if len(paths) == 1 else f"{len(files)} images"
    return ImageSet(images, None, name).loaded()


def read_image_folder(
    folder: Path, files: list[Path], config: DataConfig, *, whole: bool
) -> list[ImageSet]:
    """Find the images among `files`, which lie below `folder`, to be decoded when they are needed.

    With `train` and `test`, `validation` or `val` in the folder, these are the split. Labels are
    the sorted names of the class folders of the training images, from 0, where each of them lies
    in one such folder (below its split, if there are splits) and there are two or more. A class
    that only held-out images have comes after them; held-out images of which none lies in a
    training class have no labels.

    Returns all images if `whole` or without a split, else the training and the held-out images,
    with the labels that each has. Raises UserError for a folder or split without images, a
    damaged image, and for images of different sizes without `config.image_size`.
    """
    splits = [name for name in ("train", *HELD_OUT) if (folder / name).is_dir()]
    if len(splits) < 2 or splits[0] != "train":
        splits = []
    files = require_images(folder, files)
    in_split = {name: [f for f in files if folder / name in f.parents] for name in splits}
    groups = [files]
    if splits and not whole:
        groups = [require_images(folder / name, in_split[name]) for name in splits[:2]]
    ordered = [file for group in groups for file in group]
    images = decode.find_encoded(
        len(ordered), ordered.__getitem__, lambda i: str(ordered[i]), config
    )

    def class_folder(file: Path) -> tuple[str, ...]:
        names = file.relative_to(folder).parent.parts
        return names[1:] if names and names[0] in splits else names

    known = {class_folder(file) for file in in_split.get("train", files)}
    classes = _number_classes(known, {class_folder(file) for file in files})
    parts = []
    for pixels, group in zip(images.split([len(group) for group in groups]), groups, strict=True):
        found = [class_folder(file) for file in group]
        labels = None
        if not known.isdisjoint(found) and all(names in classes for names in found):
            labels = torch.tensor([classes[names] for names in found])
        parts.append(ImageSet(pixels, labels, str(folder)))
    return parts


def _number_classes(
    known: set[tuple[str, ...]], every: set[tuple[str, ...]]
) -> dict[tuple[str, ...], int]:
    """A label for each class folder, those of the training images first; {} if they are none."""
    if len(known) < 2 or any(len(names) != 1 for names in known):
        return {}
    others = {names for names in every - known if len(names) == 1}
    return {names: label for label, names in enumerate([*sorted(known), *sorted(others)])}


def files_below(folder: Path) -> list[Path]:
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


def is_image(file: Path) -> bool:
    return file.suffix.lower() in decode.ENDINGS


def require_images(folder: Path, files: list[Path]) -> list[Path]:
    images = [file for file in files if is_image(file)]
    if not images:
        raise nothing_in(folder, decode.ENDINGS)
    return images


def nothing_in(folder: Path, endings: Sequence[str]) -> UserError:
    return UserError(
        f"the folder {folder} holds no images, in its sub-folders neither. Accepted are files "
        f"that end in {' '.join(endings)}"
    )
