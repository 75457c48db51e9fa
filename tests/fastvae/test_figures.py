"""The pictures of a run show what they should."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastvae import figures
from fastvae.errors import UserError
from fastvae.evaluation import quantity_names


def read(path: Path) -> torch.Tensor:
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.mode in ("RGB", "RGBA")
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 50, 70), (1, 1, 1), (3, 8, 5)], ids=str)
def test_a_grid_shows_every_pixel(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    levels = torch.randint(0, 256, (5, *shape), generator=torch.Generator().manual_seed(0))
    figures.save_grid(levels / 255, tmp_path / "grid.png", columns=3)
    scale = max(1, -(-48 // shape[2]))
    height, width = shape[1] * scale + 2, shape[2] * scale + 2
    shown = read(tmp_path / "grid.png")
    assert shown.shape == (3, 2 * height + 2, 3 * width + 2)
    for i in range(5):
        top, left = 2 + i // 3 * height, 2 + i % 3 * width
        tile = shown[:, top : top + height - 2 : scale, left : left + width - 2 : scale]
        assert torch.equal(tile, levels[i].expand(3, -1, -1).to(torch.uint8))


def test_values_outside_are_clipped(tmp_path: Path) -> None:
    figures.save_grid(torch.tensor([-3.0, 7.0]).view(2, 1, 1, 1), tmp_path / "a.png", columns=2)
    shown = read(tmp_path / "a.png")
    assert shown[0, 5, 5] == 0
    assert shown[0, 5, 60] == 255


def test_an_unwritable_picture(tmp_path: Path) -> None:
    for name in ("grid", "grid.xyz", "missing/grid.png"):
        with pytest.raises(UserError, match="cannot write"):
            figures.save_grid(torch.zeros(1, 1, 2, 2), tmp_path / name, columns=1)


def lines(names: dict[str, str], count: int = 40) -> list[dict[str, Any]]:
    found = []
    for i in range(count):
        values = {names["elbo"]: -100 / (i + 1) - 5, names["nll"]: 90 / (i + 1), "kl": 0.1 * i}
        line = {"epoch": i / 4, **values}
        if i % 8 == 0:
            line |= {f"heldout_{key}": value for key, value in values.items()}
        found.append(line)
    return found


@pytest.mark.parametrize("is_density", [True, False])
def test_curves_are_called_what_they_are(
    tmp_path: Path, is_density: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib import pyplot as plt

    shown = []
    monkeypatch.setattr(plt, "close", shown.append)
    names = quantity_names(is_density)
    figures.save_curves(lines(names), names, tmp_path / "curves.png")
    (figure,) = shown
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[2] == "KL(q ‖ p)"
    if is_density:
        assert titles[:2] == ["ELBO", "−log p(x given z)"]
    else:
        assert titles[:2] == ["−(cross-entropy + KL)", "cross-entropy"]
    for axis in figure.axes:
        assert [len(line.get_xdata()) for line in axis.lines] == [40, 5]
        assert axis.get_xlabel() == "epoch"
        assert axis.get_ylabel() == "nats per image"
    drawn = figure.axes[0].lines[0]
    assert drawn.get_ydata()[3] == -30.0
    assert drawn.get_xdata()[3] == 0.75
    assert read(tmp_path / "curves.png").float().std() > 5


def test_curves_of_little(tmp_path: Path) -> None:
    names = quantity_names(True)
    figures.save_curves(lines(names, 1), names, tmp_path / "one.png")
    broken = [{**line, "elbo": float("nan"), "kl": float("inf")} for line in lines(names)]
    figures.save_curves(broken, names, tmp_path / "broken.png")
