"""The page of the whole family: its table, its arithmetic, and the command that makes it."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import family
import family_page
import family_runs
import family_systems
import numpy as np
import pyarrow
import pytest
import tyro
from PIL import Image
from pyarrow import parquet
from running import REPOSITORY, run_process
from scipy import stats
from tyro.conf import OmitArgPrefixes

from fastvae.cli import TrainArguments
from fastvae.config import differences
from fastvae.presets import PRESETS, preset

SCRIPT = REPOSITORY / "bench/family.py"
BASES = {"digits-mlp", "digits-conv", "mnist-mlp", "mnist-conv"}
BASES |= {"fashion-mnist-conv", "cifar10-conv", "bnn-digits"}
BASES |= {"vae-paper", "iwae-paper", "mnist-speedrun"}  # of a page of their own, or days long
NAMES = [system.preset for system in family_systems.SYSTEMS]


def command(*flags: str, folder: Path, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    return run_process([sys.executable, str(SCRIPT), *flags], folder, timeout)


# ------------------------------------------------------------------------------------- the table


def test_every_preset_of_the_family_has_one_row() -> None:
    assert Counter(NAMES) == Counter(set(PRESETS) - BASES)
    names = [system.name for system in family_systems.SYSTEMS]
    assert len(set(names)) == len(names)


def test_what_is_compared_is_measured_alike() -> None:
    draws = {system.preset: system.draws for system in family_systems.SYSTEMS}
    for pair in family_systems.COMPARISONS:
        one, other = (preset(name) for name in pair)
        assert draws[pair[0]] == draws[pair[1]] > 0
        assert one.data == other.data and one.seed == other.seed
        assert one.model.likelihood == other.model.likelihood == "bernoulli"
        assert one.model.binarization == other.model.binarization == "dynamic"


def test_sections_ask_for_cells_that_there_are(tmp_path: Path) -> None:
    cells = family_page._cells(family_systems.SYSTEMS[0], make_run(tmp_path, [1.0, 2.0]))
    for section in (*family_systems.SECTIONS, family_systems.STATIC):
        assert set(section.columns) <= set(cells)
        assert section.systems


@pytest.mark.parametrize("name", NAMES)
def test_the_settings_shown_lead_from_the_base_to_the_system(name: str) -> None:
    changes = differences(preset(family_systems.BASE), preset(name))
    given = family_runs.flags({key: new for key, (_, new) in changes.items()})
    base = TrainArguments(preset=family_systems.BASE, settings=preset(family_systems.BASE))
    parsed = tyro.cli(OmitArgPrefixes[TrainArguments], args=given, default=base)
    assert parsed.settings == preset(name)


def test_flags() -> None:
    settings = {
        "epochs": 3.0,
        "model.hidden": (9, 8),
        "model.pooling": True,
        "data.download": False,
    }
    given = "--epochs 3 --hidden 9 8 --pooling --no-download"
    assert family_runs.flags(settings) == given.split()


# ---------------------------------------------------------------------------- comparing two runs


def make_run(folder: Path, values: Any, name: str = "vae", keep: bool = False) -> Any:
    """A run whose held-out images have these importance-weighted NLLs."""
    values = np.asarray(values)
    folder.mkdir(parents=True, exist_ok=True)
    if keep:
        (folder / "evaluation").mkdir()
        parquet.write_table(pyarrow.table({"iw_nll": values}), folder / family_runs.SCORES)
    weighted = {"nll": values.mean(), "standard_error": stats.sem(values), "samples": 7}
    evaluation = {"images": len(values), "elbo": -99.0, "kl": 2.0, "importance_weighted": weighted}
    return family_runs.Run(folder, preset(name), {"iw_samples": 7}, 3.0, 4.0, evaluation, {})


def test_a_paired_difference_is_that_of_a_paired_t_test(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    hard = generator.normal(90, 20, size=57)
    values = hard - 0.3 + generator.normal(0, 0.5, size=57)
    a, b = (make_run(tmp_path / n, v, keep=True) for n, v in (("a", values), ("b", hard)))
    found = family_runs.difference(a, b)
    assert found.paired
    test = stats.ttest_rel(values, hard)
    assert found.mean / found.error == pytest.approx(test.statistic, rel=1e-12)
    assert found.mean == pytest.approx((values - hard).mean(), rel=1e-12)


def test_without_values_of_each_image_the_samples_count_as_independent(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    x, y = generator.normal(90, 3, size=40), generator.normal(88, 5, size=40)
    a, b = make_run(tmp_path / "a", x, keep=True), make_run(tmp_path / "b", y)
    found = family_runs.difference(a, b)
    assert not found.paired
    test = stats.ttest_ind(x, y, equal_var=False)
    assert found.mean / found.error == pytest.approx(test.statistic, rel=1e-12)


@pytest.mark.parametrize(
    ("shift", "said"),
    [
        (-1.0, "the first is better by 1.00 ± 0.01"),
        (+1.0, "the first is worse by 1.00 ± 0.01"),
        (0.002, "no difference that counts, 0.00 ± 0.01"),
    ],
)
def test_findings_follow_the_numbers(tmp_path: Path, shift: float, said: str) -> None:
    spread = np.tile([-0.1, 0.1], 50)
    values = np.linspace(60, 140, 100)
    a = make_run(tmp_path / "a", values + spread + shift, keep=True)
    b = make_run(tmp_path / "b", values, keep=True)
    assert said in family_page._finding(a, b)
    assert "(100 images, image by image)" in family_page._finding(a, b)
    conditional = a._replace(config=preset("cvae"))
    assert ("at most 2.30" in family_page._finding(conditional, b)) == (shift < -0.5)


# ---------------------------------------------------------------------------------- what is kept


def test_a_record_is_of_the_same_run_only_if_all_but_places_agree(tmp_path: Path) -> None:
    config = preset("vae")
    family_runs._write_record({"config": config, "train_seconds": 2.0}, tmp_path)
    record = family_runs.read_record(tmp_path)
    assert family_runs.is_same_run(record["config"], config)
    elsewhere = replace(config, data=replace(config.data, data_dir=Path("x"), download=True))
    assert family_runs.is_same_run(record["config"], replace(elsewhere, output=Path("y")))
    assert not family_runs.is_same_run(record["config"], replace(config, epochs=21.0))
    assert family_runs.read_run(tmp_path) is None, "trained, but not evaluated"
    (tmp_path / family_runs.RECORD).write_text('{"config": {"model": {"no_such_setting": 1}}}')
    assert family_runs.read_record(tmp_path) is None
    assert family_runs.read_record(tmp_path / "nowhere") is None


def test_no_probe_of_an_encoder_that_is_told_the_class(tmp_path: Path) -> None:
    for name, said in (("vae", "97.3 %"), ("cvae", "–")):
        run = make_run(tmp_path / name, [1.0, 2.0], name)
        run.evaluation["linear_probe"] = {"score": 0.973}
        assert family_page._cells(family_systems.SYSTEMS[0], run)["probe"] == said


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_a_picture_for_the_table(tmp_path: Path, mode: str) -> None:
    noise = np.random.default_rng(0).integers(256, size=(500, 930, 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(tmp_path / "samples.png")
    family_page.save_picture(tmp_path / "samples.png", tmp_path / "small.png")
    with Image.open(tmp_path / "small.png") as image:
        assert image.size == (240, 129)
    assert (tmp_path / "small.png").stat().st_size < 40_000
    Image.new(mode, (32, 16)).save(tmp_path / "samples.png")
    family_page.save_picture(tmp_path / "samples.png", tmp_path / "small.png")
    with Image.open(tmp_path / "small.png") as image:
        assert image.size == (32, 16), "never enlarged"


def test_a_picture_keeps_the_colours_of_a_few_dots(tmp_path: Path) -> None:
    image = Image.effect_noise((200, 200), 60).convert("RGB")
    dots = {(20, 50): (255, 0, 0), (80, 90): (0, 0, 255), (150, 30): (0, 200, 0)}
    for at, colour in dots.items():
        image.paste(colour, (*at, at[0] + 3, at[1] + 3))
    image.save(tmp_path / "latent_plane.png")
    family_page.save_picture(tmp_path / "latent_plane.png", tmp_path / "small.png")
    with Image.open(tmp_path / "small.png") as file:
        found = file.convert("RGB")
    for at, colour in dots.items():
        assert found.getpixel((at[0] + 1, at[1] + 1)) == pytest.approx(colour, abs=40)


def test_of_reconstructions_a_quarter_is_shown(tmp_path: Path) -> None:
    image = Image.new("L", (400, 200), 0)
    image.paste(255, (0, 0, 200, 100))
    image.save(tmp_path / "reconstructions.png")
    family_page.save_picture(tmp_path / "reconstructions.png", tmp_path / "small.png")
    with Image.open(tmp_path / "small.png") as found:
        assert found.size == (200, 100) and found.convert("L").getextrema() == (255, 255)


# -------------------------------------------------------------------------------- the command


@pytest.mark.slow
def test_two_systems_on_digits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--quick", "--data", "digits", "--only", "vae", "cvae"]
    first = command(*flags, folder=tmp_path)
    assert first.returncode == 0, first.stderr
    runs = tmp_path / "runs/family-quick"
    page = (runs / "family.md").read_text()
    for name in ("vae", "cvae"):
        assert f"{name}: training\n{name}: evaluating" in first.stdout
        found = json.loads((runs / name / "evaluation.json").read_text())
        assert found["importance_weighted"]["samples"] == family_runs.QUICK_DRAWS
        row = row_of(name, page)
        assert f"| {found['importance_weighted']['nll']:.2f} ± " in row
        assert f"| {-found['elbo']:.2f} |" in row
        assert f"(figures/family/{name}.png)" in row
        assert (runs / f"figures/family/{name}.png").is_file()
    assert "no number in it means anything" in page
    assert "Not run yet, or failed: iwae-5, iwae-50, " in page
    assert "- **CVAE, p(z)** and **VAE**: " in page
    assert str(tmp_path) not in page

    # What has been run is not run again.
    monkeypatch.chdir(tmp_path)
    records = [(runs / name / family_runs.RECORD).read_text() for name in ("vae", "cvae")]
    assert family.main(flags) == 0
    assert capsys.readouterr().out == f"runs/family-quick/family.md: 2 of {len(NAMES)} systems\n"
    assert records == [(runs / name / family_runs.RECORD).read_text() for name in ("vae", "cvae")]

    # What cannot be run is said, costs no earlier run, and the rest goes on.
    monkeypatch.setattr(
        family_runs, "_launch", lambda jobs: [sys.executable, "-c", "exit('no images')"]
    )
    assert family.main([*flags, "--fresh"]) == 1
    said = capsys.readouterr()
    assert "vae: training\ncvae: training" in said.out
    assert "vae: failed with status 1: " in said.err and "\nno images\n" in said.err
    assert "failed: vae, cvae" in said.err
    assert row_of("vae", (runs / "family.md").read_text()) == row_of("vae", page)


def row_of(name: str, page: str) -> str:
    (row,) = (line for line in page.splitlines() if f"<br>`{name}` |" in line)
    return row


@pytest.mark.slow
def test_the_whole_family_quickly(tmp_path: Path) -> None:
    found = command("--quick", "--data", "digits", folder=tmp_path, timeout=3600)
    assert found.returncode == 0, found.stderr
    runs = tmp_path / "runs/family-quick"
    page = (runs / "family.md").read_text()
    assert "Not run yet" not in page
    assert "have changed since" not in page
    assert "not both run yet" not in page
    assert page.count("(figures/family/") == len(NAMES) + 1
    for name in (*NAMES, "static"):
        assert (runs / f"figures/family/{name}.png").is_file(), name


def test_other_images_need_quick(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        family._arguments(["--data", "digits"])
    assert "need --quick" in capsys.readouterr().err
