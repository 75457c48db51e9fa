"""Real files of images, what to expect of them, and what is said where one is refused."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastvae.data import DataConfig, load_all, load_data
from fastvae.errors import UserError

REAL = Path(__file__).parents[2].parent / "shared/data"
RNG = np.random.default_rng(7)


def noise(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def png(pixels: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", **options)
    return file.getvalue()


def write_image(path: Path, pixels: np.ndarray, **options: Any) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pgm" and pixels.dtype == np.uint16:  # Pillow 10.1 only reads them
        height, width = pixels.shape
        path.write_bytes(b"P5 %d %d 65535\n" % (width, height) + pixels.astype(">u2").tobytes())
    else:
        Image.fromarray(pixels).save(path, **options)
    return pixels


def chw(pixels: np.ndarray) -> torch.Tensor:
    return torch.tensor(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def refusal(data: Any, *, whole: bool = False, **fields: Any) -> str:
    config = DataConfig(data=str(data), **fields)
    with pytest.raises(UserError) as caught:
        load_all(str(data), config) if whole else load_data(config, seed=0)
    return str(caught.value)


class Trap:
    """Unpickling one makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)

    def sprung(self) -> bool:
        return self.folder.exists()


def keep_datasets_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have datasets write its caches below `folder`."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(folder))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
