"""A run's folder, and what is fixed once for a run."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Trained

from fastvae import runs
from fastvae.config import Config, ModelConfig
from fastvae.data import ImageSet
from fastvae.errors import UserError

GREYS = ImageSet(
    torch.arange(256, dtype=torch.uint8).repeat(400).view(400, 1, 16, 16), None, "greys"
)
STATIC = Config(model=ModelConfig(binarize="static"))


def test_static_binarisation_is_one_draw_for_the_run() -> None:
    drawn = runs.prepare(GREYS, STATIC)
    assert set(drawn.images.unique().tolist()) == {0, 255}
    assert torch.equal(drawn.images, runs.prepare(GREYS, STATIC).images)
    assert drawn.name == GREYS.name
    white = (drawn.images == 255).double().flatten(1).mean(0)
    p = torch.arange(256, dtype=torch.float64) / 255
    deviation = (white - p) / (p * (1 - p) / 400).sqrt().clamp(min=1e-9)
    assert white[0] == 0
    assert white[255] == 1
    assert deviation[1:255].abs().max() < 5
    # Equal images are drawn apart, and so are other runs' and the held-out images.
    for other in (
        drawn.images.roll(1, 0),
        runs.prepare(GREYS, replace(STATIC, seed=1)).images,
        runs.prepare(replace(GREYS, name="held out"), STATIC).images,
    ):
        assert 0.25 < (other != drawn.images).double().mean() < 0.4


def test_floats_are_binarised_alike() -> None:
    floats = ImageSet(GREYS.images.float() / 255, None, "greys")
    drawn = runs.prepare(floats, STATIC).images
    assert drawn.dtype == torch.uint8
    assert (drawn != runs.prepare(GREYS, STATIC).images).double().mean() < 1e-4


@pytest.mark.parametrize("model", [ModelConfig(), ModelConfig(binarize="none")])
def test_nothing_else_is_drawn_beforehand(model: ModelConfig) -> None:
    assert runs.prepare(GREYS, Config(model=model)) is GREYS


def test_runs_that_start_together_get_a_folder_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: runs.new_run_folder(Config(), "name"), range(40)))
    assert len(set(folders)) == 40
    assert {folder.name for folder in folders} == {"name", *(f"name-{n}" for n in range(2, 41))}


def test_an_empty_folder_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("kept")
    assert runs.new_run_folder(Config(output=tmp_path / "mine"), "x") == tmp_path / "mine"
    (tmp_path / "mine/config.json").write_text("{}")
    with pytest.raises(UserError, match="already holds a run"):
        runs.new_run_folder(Config(output=tmp_path / "mine"), "x")


def test_other_images_are_read_as_the_model_needs_them(trained: Trained) -> None:
    config = runs.data_like(trained.run)
    assert (config.image_size, config.channels) == ((8, 8), 1)
    with pytest.raises(UserError, match="is no run's folder"):
        runs.read_config(trained.run / "checkpoints/none")


def test_environment() -> None:
    found = runs.environment(torch.device("cpu"), 3)
    assert found["hardware"]["processes"] == 3
    assert found["hardware"]["name"]
    assert found["versions"]["torch"].startswith(torch.__version__.split("+")[0])
