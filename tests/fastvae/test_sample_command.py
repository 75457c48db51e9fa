"""`fastvae sample`: classes, noise, and samplers that are fitted once and kept in the run."""

import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Trained
from PIL import Image
from running import train

from fastvae import VAE
from fastvae.assessment import training_means
from fastvae.cli import main
from fastvae.data import DataConfig, load_data
from fastvae.noise import PRIOR
from fastvae.samplers import FlowSampler, GaussianMixtureSampler, load_sampler
from fastvae.samplers_of_runs import fitted
from fastvae.saving import model_folder


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of a few steps, not to be changed."""
    kinds = {
        "conditional": "--conditional",
        "class-normal": "--conditional --prior class-normal",
        "plain autoencoder": "--posterior deterministic --prior none",
    }
    folder = tmp_path_factory.mktemp("kept")
    return {
        name: train(*shlex.split(flags), "--max-steps", 25, output=folder / name)
        for name, flags in kinds.items()
    }


@pytest.fixture
def run(trained: Trained, tmp_path: Path) -> Path:
    """A run that may be changed."""
    return copied(trained.run, tmp_path)


def copied(run: Path, folder: Path) -> Path:
    return Path(shutil.copytree(run, folder / "copied"))


@pytest.fixture
def short_flows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Flows of a few steps; how often one was fitted."""
    fits, fit = [], FlowSampler.fit

    def short(*args: Any, **options: Any) -> FlowSampler:
        fits.append(1)
        return fit(*args, **options, steps=30, hidden=(16,), transforms=1)

    monkeypatch.setattr(FlowSampler, "fit", short)
    return fits


def sample(run: Path, *flags: object) -> None:
    main(["sample", str(run), *map(str, flags)])


def refused(arguments: list[object], capsys: pytest.CaptureFixture[str]) -> str:
    """What is said: one line without a traceback."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(list(map(str, arguments)))
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("fastvae "), said
    return said


def tiles(path: Path, columns: int) -> torch.Tensor:
    """The 8×8 images of a plain grid, row by row, as floats."""
    grid = torch.from_numpy(np.asarray(Image.open(path).convert("L")).astype(np.float32)) / 255
    corners = [
        (top, left)
        for top in range(2, len(grid) - 1, 50)
        for left in range(2, 2 + 50 * columns, 50)
    ]
    return torch.stack([grid[top : top + 48 : 6, left : left + 48 : 6] for top, left in corners])


# Samplers


@pytest.mark.parametrize("kind", ["mixture", "flow"])
def test_a_sampler_is_fitted_once_and_kept(
    kind: str, run: Path, short_flows: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    sample(run, "-n", 9, "--sampler", kind, "-o", run / "first.png")
    assert capsys.readouterr().out == f"{run}/first.png\n"
    file = run / f"sampler-{kind}.safetensors"
    content, time = file.read_bytes(), file.stat().st_mtime_ns
    sample(run, "-n", 9, "--sampler", kind)
    sample(run, "-n", 9, "--sampler", kind, "--seed", 1)
    assert (file.read_bytes(), file.stat().st_mtime_ns) == (content, time)
    assert len(short_flows) == (kind == "flow")
    assert (run / f"{kind}-0.png").read_bytes() == (run / "first.png").read_bytes()
    assert (run / f"{kind}-1.png").read_bytes() != (run / "first.png").read_bytes()
    assert not (run / "samples-0.png").exists()


@pytest.mark.parametrize("kind", ["mixture", "flow"])
def test_the_images_are_those_of_the_sampler(kind: str, run: Path, short_flows: list[int]) -> None:
    sample(run, "-n", 9, "--sampler", kind, "--seed", 5)
    sampler, vae = load_sampler(run / f"sampler-{kind}.safetensors"), VAE.from_pretrained(run)
    z = sampler.sample(9, 5 ^ PRIOR, "cpu")
    expected = vae.decode(z).clamp(0, 1)[:, 0]
    assert (tiles(run / f"{kind}-5.png", 3) - expected).abs().max() < 0.6 / 255 + 1e-3
    sample(run, "-n", 9, "--sampler", kind, "--seed", 5, "--noise", "-o", run / "noisy.png")
    noisy = vae.sample_given(z, seed=5, noise=True).clamp(0, 1)[:, 0]
    assert (tiles(run / "noisy.png", 3) - noisy).abs().max() < 0.6 / 255 + 1e-3
    assert (noisy - expected).abs().max() > 0.05


def test_it_is_fitted_to_the_training_images_of_the_run(run: Path) -> None:
    vae = VAE.from_pretrained(run)
    found = fitted(run, vae, "mixture")
    train_set, heldout = load_data(DataConfig(), seed=0)
    z, _ = training_means(vae, train_set, 20_000, 0)
    assert len(z) == 1617
    direct = GaussianMixtureSampler.fit(z, seed=0)
    torch.testing.assert_close(found.log_prob(z[:50]), direct.log_prob(z[:50]))
    # A density of their kind: held-out latents are likelier than draws of the prior.
    unseen = vae.encode(heldout.images).mu.detach()
    prior = torch.randn(len(unseen), 4)
    assert found.log_prob(unseen).mean() > found.log_prob(prior).mean() + 1


def test_a_newer_model_is_fitted_anew(run: Path) -> None:
    vae = VAE.from_pretrained(run)
    first = fitted(run, vae, "mixture")
    file, weights = run / "sampler-mixture.safetensors", model_folder(run) / "model.safetensors"
    with torch.no_grad():
        vae.encoder.head.weight.mul_(2)
    later = file.stat().st_mtime + 10
    os.utime(weights, (later, later))
    second = fitted(run, vae, "mixture")
    assert (second.means - first.means).abs().max() > 0.1  # type: ignore[attr-defined]
    content = file.read_bytes()
    os.utime(file, (later + 1, later + 1))
    fitted(run, vae, "mixture")
    assert file.read_bytes() == content


def test_training_on_makes_the_sampler_old(tmp_path: Path) -> None:
    """The real way to a newer model."""
    run = train("--max-steps", 5, output=tmp_path / "run")
    sample(run, "--sampler", "mixture", "-n", 1)
    content = (run / "sampler-mixture.safetensors").read_bytes()
    old = (run / "sampler-mixture.safetensors").stat().st_mtime - 100
    os.utime(run / "sampler-mixture.safetensors", (old, old))
    main(["train", "--resume", str(run), "--max-steps", "8"])
    sample(run, "--sampler", "mixture", "-n", 1)
    assert (run / "sampler-mixture.safetensors").read_bytes() != content


@pytest.mark.parametrize("kind", ["mixture", "flow"])
def test_a_density_for_each_class(
    kind: str, kept: dict[str, Path], tmp_path: Path, short_flows: list[int]
) -> None:
    run = copied(kept["conditional"], tmp_path)
    sample(run, "--sampler", kind, "--labels", 3, 7, "-n", 8)
    sampler = load_sampler(run / f"sampler-{kind}.safetensors")
    assert sampler.classes == 10
    z = torch.zeros(2, 4)
    of_3, of_7 = sampler.log_prob(z, torch.tensor([3, 7])).tolist()
    assert of_3 != of_7
    sample(run, "--sampler", kind)
    assert (run / f"{kind}-0.png").is_file()


def test_flow_fits_where_no_gradient_is_kept() -> None:
    z = torch.randn(100, 2)
    with torch.no_grad():
        found = FlowSampler.fit(z, steps=5, hidden=(8,), transforms=1)
    again = FlowSampler.fit(z, steps=5, hidden=(8,), transforms=1)
    assert torch.equal(found.log_prob(z), again.log_prob(z))
    assert not found.log_prob(z).requires_grad


@pytest.mark.slow
def test_a_flow_of_full_length(run: Path) -> None:
    sample(run, "--sampler", "flow", "-n", 9)
    vae = VAE.from_pretrained(run)
    sampler = load_sampler(run / "sampler-flow.safetensors")
    _, heldout = load_data(DataConfig(), seed=0)
    z = vae.encode(heldout.images).mu.detach()
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1)
    assert sampler.log_prob(z).mean() > prior.mean()


# Plain autoencoders


def test_a_plain_autoencoder_has_a_mixture_in_place_of_a_prior(
    kept: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(kept["plain autoencoder"], tmp_path)
    message = refused(["sample", run], capsys)
    assert "no prior to draw z from" in message
    assert "--sampler mixture" in message
    sample(run, "--sampler", "mixture", "-n", 4)
    assert Image.open(run / "mixture-0.png").size == (102, 102)


# Classes


def test_every_class_is_a_row(kept: dict[str, Path], tmp_path: Path) -> None:
    def size(*flags: object) -> tuple[int, int]:
        sample(kept["conditional"], *flags, "-o", tmp_path / "grid.png")
        return Image.open(tmp_path / "grid.png").size

    all_width, all_height = size("-n", 40)
    two_width, two_height = size("-n", 40, "--labels", 3, 7)
    assert two_width > all_width  # 20 columns, not 4
    assert all_height > two_height  # 10 rows, not 2


@pytest.mark.parametrize("kind", ["conditional", "class-normal"])
def test_labels_choose_the_images(kind: str, kept: dict[str, Path], tmp_path: Path) -> None:
    def drawn(*flags: object) -> bytes:
        sample(kept[kind], "-n", 4, *flags, "-o", tmp_path / "grid.png")
        return (tmp_path / "grid.png").read_bytes()

    assert drawn("--labels", 3) == drawn("--labels", 3)
    assert drawn("--labels", 3) != drawn("--labels", 4)
    assert drawn("--labels", 3, "--noise") != drawn("--labels", 3)


def test_the_grid_shows_what_the_library_draws(
    kept: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(
        "fastvae.figures.save_class_grid", lambda images, path, names: shown.append((images, names))
    )
    sample(kept["class-normal"], "-n", 7, "--labels", 3, 7, "--seed", 2, "-o", tmp_path / "g.png")
    images, names = shown[0]
    vae = VAE.from_pretrained(kept["class-normal"])
    labels = torch.tensor([3, 3, 3, 7, 7, 7])
    assert names == ["3", "7"]
    assert torch.equal(images.flatten(0, 1), vae.sample(6, seed=2, labels=labels))


# What is refused


@pytest.mark.parametrize(
    ("kind", "flags", "part"),
    [
        ("conditional", "--labels 10", "labels lie in 0..9 for this model, got 10..10"),
        ("conditional", "--labels 3 -1", "labels lie in 0..9 for this model, got -1..3"),
        ("conditional", "-n 0", "at least one image, got 0"),
        ("trained", "--labels 3", "--labels: this model is not conditional"),
        ("trained", "--labels 3 --sampler mixture", "--labels: this model is not conditional"),
        ("trained", f"--seed {2**63}", f"got {2**63}"),
        ("trained", "--sampler mixture -o x/y.png -n 0", "at least one image, got 0"),
    ],
)
def test_what_cannot_be_sampled(
    kind: str,
    flags: str,
    part: str,
    kept: dict[str, Path],
    trained: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    run = trained.run if kind == "trained" else kept[kind]
    assert part in refused(["sample", run, *shlex.split(flags)], capsys)


def test_classes_out_of_range_with_a_sampler(
    kept: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(kept["conditional"], tmp_path)
    message = refused(["sample", run, "--sampler", "mixture", "--labels", 10], capsys)
    assert "labels lie in" in message and "10" in message


def test_an_unknown_sampler(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        sample(trained.run, "--sampler", "kde")
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert "kde" in said and "mixture" in said


def test_a_model_without_its_run(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A saved model draws from its prior; a sampler needs to know the training images."""
    VAE.from_pretrained(trained.run).save_pretrained(tmp_path / "model")
    sample(tmp_path / "model", "-n", 1)
    assert (tmp_path / "model/samples-0.png").is_file()
    message = refused(["sample", tmp_path / "model", "--sampler", "mixture"], capsys)
    assert "is no run's folder that says which they were" in message


def test_data_that_are_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_set, _ = load_data(DataConfig(), seed=0)
    np.save(tmp_path / "mine.npy", train_set.images[:100].numpy())
    run = train("--data", tmp_path / "mine.npy", "--max-steps", 1, output=tmp_path / "run")
    (tmp_path / "mine.npy").unlink()
    message = refused(["sample", run, "--sampler", "mixture"], capsys)
    assert "mine.npy" in message
    assert not (run / "sampler-mixture.safetensors").exists()


def test_a_damaged_sampler(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run / "sampler-mixture.safetensors"
    file.write_bytes(b"nothing")
    message = refused(["sample", run, "--sampler", "mixture"], capsys)
    assert f"cannot read a sampler from {file}" in message


def test_a_model_of_the_hub_makes_no_folder(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which would be mistaken for the model the next time."""
    folder = model_folder(trained.run)

    def download(repo_id: str, filename: str, **options: Any) -> str:
        return str(folder / filename)

    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", download)
    monkeypatch.setattr("fastvae.saving.hf_hub_download", download)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        sample(Path("someone/digits"), "-n", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["samples-0.png"]
