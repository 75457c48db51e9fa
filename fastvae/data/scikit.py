"""Data sets that come with scikit-learn: handwritten digits, and tables of numbers."""

from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from fastvae.data import decode
from fastvae.data.config import DataConfig
from fastvae.data.image_set import ImageSet
from fastvae.data.tables import needs
from fastvae.errors import UserError

_TABLES: dict[str, tuple[str, dict[str, Any]]] = {
    "diabetes": ("load_diabetes", {"scaled": False}),
    "breast-cancer": ("load_breast_cancer", {}),
    "wine": ("load_wine", {}),
}

TABLE_NAMES = tuple(_TABLES)
"""What `read_number_table` reads."""


def read_digits(config: DataConfig) -> list[ImageSet]:
    """1,797 grey digits, uint8 `[N, 1, 8, 8]` before `config` resizes them, with classes 0 to 9."""
    grey, classes = _digits()
    images = torch.from_numpy(np.rint(grey * 255 / 16).astype(np.uint8)).view(-1, 1, 8, 8)
    labels = torch.from_numpy(classes).to(torch.int64)
    return [ImageSet(decode.fit_images(images, config), labels, "digits")]


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Grey values 0 to 16, float64 `[N, 64]`, and classes `[N]`.

    scikit-learn's file is read without scikit-learn, whose import would take as long as PyTorch's;
    by scikit-learn where it keeps its file elsewhere.
    """
    package = find_spec("sklearn")
    if package is not None and package.origin is not None:
        file = Path(package.origin).parent / "datasets/data/digits.csv.gz"
        if file.exists():
            table = np.loadtxt(file, delimiter=",")
            return table[:, :-1], table[:, -1]
    digits = _datasets("digits").load_digits()
    return digits.data, digits.target


def read_number_table(config: DataConfig) -> list[ImageSet]:
    """Rows of F features as images of one line: float32 `[N, 1, 1, F]` in [0, 1].

    Each feature is scaled by its lowest and highest value in the whole table. These are constants
    of a table that never changes, hold nothing of the labels, and leave no held-out value outside
    [0, 1]. Labels are int64 classes, or float32 targets in their unit. Raises UserError where
    `config` asks for another size or for colour.
    """
    function, options = _TABLES[config.data]
    table = getattr(_datasets(config.data), function)(**options)
    low, high = table.data.min(axis=0), table.data.max(axis=0)
    rows = ((table.data - low) / (high - low)).astype(np.float32)[:, None, None]
    width = rows.shape[-1]
    if config.image_size not in ((), (1, width)) or config.channels == 3:
        raise UserError(
            f"{config.data} is a table of numbers: each row is a grey image of 1 x {width} (height "
            "x width), one pixel to a feature, and can be neither resized nor coloured. Leave out "
            "--image-size and --channels"
        )
    real = table.target.dtype.kind == "f"
    labels = torch.from_numpy(table.target).to(torch.float32 if real else torch.int64)
    return [ImageSet(torch.from_numpy(rows), labels, config.data)]


def _datasets(source: str) -> ModuleType:
    with needs("scikit-learn", source):
        import sklearn.datasets
    return sklearn.datasets
