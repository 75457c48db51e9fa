"""Images that stay where they are, encoded, and are decoded when they are read."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastvae.errors import UserError

ROWS_OF_A_THREAD = 16  # one digit alone costs less than its task

Encoded = Path | bytes
"""One image file, or its content."""


class BadSample(UserError):
    """One image cannot be read; the message names it."""


@dataclass(frozen=True)
class Recipe:
    """How to come by the pixels of an image: uint8 `[C, H, W]`."""

    item: Callable[[int], Encoded]
    """Raises BadSample where there is none."""
    where: Callable[[int], str]
    """What image i is called."""
    decode: Callable[[Encoded, str], Any]
    """To an array of `shape`, given the name for messages. Raises BadSample."""
    shape: tuple[int, int, int]
    skip_bad: bool
    """Let another image take the place of one that cannot be read."""

    def read(self, index: int, into: Any) -> str:
        """Put image `index` into an array; what is wrong with it, "" if nothing, where bad ones are
        skipped. Raises BadSample where not."""
        where = self.where(index)
        try:
            pixels = self.decode(self.item(index), where)
            if pixels.shape != self.shape:
                raise BadSample(
                    f"{where} is {pixels.shape} (channels, height, width) and was "
                    f"{self.shape} when the run began. Leave the data alone while they are read"
                )
        except BadSample as error:
            if not self.skip_bad:
                raise
            return str(error)
        into[...] = pixels
        return ""


class Pixels(NamedTuple):
    """Images as they were read."""

    images: Tensor
    """uint8 `[N, C, H, W]`."""
    taken: Tensor
    """int64 `[N]`: which of the rows asked for each of them is. Where that could not be read it is
    another one's, whose labels go with it."""
    problems: list[str]
    """With those that others stand for."""


class StoredImages:
    """N images `[N, C, H, W]` uint8 as a tensor has them, as far as `ImageSet` looks.

    What can be had of it: its sizes, views of some rows, and the pixels of all, by `read`.
    """

    dtype = torch.uint8
    ndim = 4

    def __init__(self, recipe: Recipe, rows: Tensor) -> None:
        """`rows`: int64 `[N]`, of the images that the recipe knows."""
        self.recipe, self.rows = recipe, rows
        self.shape = (len(rows), *recipe.shape)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def nbytes(self) -> int:
        """Of the decoded images."""
        channels, height, width = self.recipe.shape
        return len(self) * channels * height * width

    def is_floating_point(self) -> bool:
        return False

    def view(self, rows: Tensor | slice) -> "StoredImages":
        """Some of them, in that order; nothing is read."""
        return StoredImages(self.recipe, self.rows[rows])

    def split(self, sizes: Sequence[int]) -> list["StoredImages"]:
        """As of a tensor."""
        return [StoredImages(self.recipe, rows) for rows in self.rows.split(list(sizes))]

    def names(self) -> list[str]:
        return [self.recipe.where(index) for index in self.rows.tolist()]

    def read(self, threads: int | None = None) -> Pixels:
        """Decode all of them. `threads`: None is as many as there are cores.

        Raises BadSample for one that cannot be read, or, where those are skipped, UserError where
        none can be.
        """
        images = _allocate(self.shape)
        pixels = images.numpy()
        indices = self.rows.tolist()
        wrong = [""] * len(self)

        def read(start: int) -> None:
            for row in range(start, min(start + ROWS_OF_A_THREAD, len(self))):
                wrong[row] = self.recipe.read(indices[row], pixels[row])

        starts = range(0, len(self), ROWS_OF_A_THREAD)
        if threads == 1:
            for start in starts:
                read(start)
        else:
            with ThreadPoolExecutor(threads) as pool:
                for _ in pool.map(read, starts):
                    pass
        taken = np.arange(len(self))
        problems = [problem for problem in wrong if problem]
        if problems:
            good = np.flatnonzero([not problem for problem in wrong])
            if not len(good):
                raise UserError(
                    f"not one of {len(self)} images could be read, so that none can stand for "
                    f"another: {problems[0]}"
                )
            # The next good one, after the last the first.
            taken = good[np.searchsorted(good, taken) % len(good)]
            pixels[:] = pixels[taken]
        return Pixels(images, torch.from_numpy(taken), problems)


def _allocate(shape: tuple[int, ...]) -> Tensor:
    try:
        return torch.empty(shape, dtype=torch.uint8)
    except RuntimeError as error:
        count, *image = shape
        gib = count * np.prod(image) / 2**30
        raise UserError(
            f"{count} images of {' x '.join(map(str, image))} need {gib:.1f} GiB of memory, more "
            "than there is: give a lower --data-budget, so that they are decoded as they are "
            "needed, or make them smaller with --image-size"
        ) from error
