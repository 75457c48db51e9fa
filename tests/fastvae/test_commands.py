"""What can be done with a trained run, by real commands on real files."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Trained
from PIL import Image
from running import EPOCH, LAUNCH, fastvae, kept, results, train
from safetensors.torch import load_file
from torch import Tensor

from fastvae import VAE
from fastvae.cli import main
from fastvae.data import DataConfig, load_all, load_data

TILE, GAP = 48, 2  # an 8x8 image is enlarged six times


def tile(path: Path, row: int, column: int) -> Tensor:
    """One image of a grid as 8x8 floats."""
    grid = np.asarray(Image.open(path).convert("L")).astype(np.float32) / 255
    top, left = (GAP + (TILE + GAP) * place for place in (row, column))
    large = torch.from_numpy(grid[top : top + TILE, left : left + TILE])
    small = large[::6, ::6]
    assert torch.equal(large, small.repeat_interleave(6, 0).repeat_interleave(6, 1))
    return small


def close(shown: Tensor, expected: Tensor) -> bool:
    """Equal to half a grey level."""
    return bool((shown - expected.clamp(0, 1)).abs().max() < 0.6 / 255)


def refused(arguments: list[object], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        main(list(map(str, arguments)))
    assert caught.value.code == 2
    return capsys.readouterr().err


def write_digit(path: Path, index: int) -> Tensor:
    image = load_all("digits", DataConfig()).images[index, 0]
    Image.fromarray(image.numpy()).save(path)
    return image


# sample


def test_sample(trained: Trained, tmp_path: Path) -> None:
    process = fastvae("sample", trained.run, "-n", 9, "-o", "new/grid.png", folder=tmp_path)
    assert (process.returncode, process.stdout) == (0, "new/grid.png\n"), process.stderr
    assert Image.open(tmp_path / "new/grid.png").size == (3 * 50 + 2, 3 * 50 + 2)
    expected = VAE.from_pretrained(trained.run).sample(9, seed=0)
    for i in range(9):
        assert close(tile(tmp_path / "new/grid.png", i // 3, i % 3), expected[i, 0])


def test_samples_by_seed(trained: Trained, tmp_path: Path) -> None:
    def drawn(name: str, *flags: object) -> bytes:
        main(["sample", str(trained.run), "-o", str(tmp_path / name), *map(str, flags)])
        return (tmp_path / name).read_bytes()

    same = [drawn("a.png", "-n", 4), drawn("b.png", "-n", 4, "--seed", 0)]
    assert same[0] == same[1] != drawn("c.png", "-n", 4, "--seed", 1)
    drawn("many.png", "-n", 64)
    assert torch.equal(tile(tmp_path / "a.png", 0, 1), tile(tmp_path / "many.png", 0, 1))
    assert drawn("d.png", "-n", 4, "--noise") != same[0]


def test_samples_lie_in_the_run_unless_told(tmp_path: Path) -> None:
    run = train("--max-steps", 1, output=tmp_path / "run")
    main(["sample", str(run), "--seed", "3"])
    assert (run / "samples-3.png").is_file()


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["-n", "0"], "at least one image, got 0"),
        (["--device", "foo"], "--device foo cannot be used here"),
        (["--seed", str(10**20)], f"got {10**20}"),
        (["-o", "grid"], "cannot write grid"),
        (["-o", "grid.xyz"], "cannot write grid.xyz"),
        (["-o", "."], "cannot write ."),
        (["-o", "/proc/none/grid.png"], "cannot write /proc/none/grid.png"),
    ],
)
def test_what_cannot_be_sampled(
    trained: Trained,
    flags: list[str],
    part: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert part in refused(["sample", trained.run, *flags], capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(["sample", trained.run, "--device", "cuda"], capsys)
    assert "--device cuda cannot be used here" in message


@pytest.mark.parametrize("command", ["sample", "reconstruct", "encode", "evaluate", "score"])
def test_a_folder_that_is_no_run(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {
        "reconstruct": ["image.png"],
        "encode": ["digits"],
        "score": ["digits", "-o", str(tmp_path / "scores.csv")],
    }
    more = data.get(command, [])
    missing = tmp_path / "missing"
    assert f"no folder {missing}" in refused([command, missing, *more], capsys)
    assert f"{tmp_path} holds no model" in refused([command, tmp_path, *more], capsys)


def test_a_damaged_model(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((kept(trained.run) / name).read_bytes())
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert f"{file} is damaged" in refused(["sample", tmp_path / "run"], capsys)


# reconstruct


def test_reconstruct(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    digits = [write_digit(tmp_path / "pictures" / f"{i}.png", i) for i in range(3)]
    digits.append(write_digit(tmp_path / "single.png", 3))
    process = fastvae(
        "reconstruct", trained.run, "pictures", "single.png", "-o", "pairs.png", folder=tmp_path
    )
    assert (process.returncode, process.stdout) == (0, "pairs.png\n"), process.stderr
    vae = VAE.from_pretrained(trained.run)
    expected = vae.reconstruct(torch.stack(digits)[:, None])
    for i, original in enumerate(digits):
        assert torch.equal(tile(tmp_path / "pairs.png", 0, 2 * i), original.float() / 255)
        assert close(tile(tmp_path / "pairs.png", 0, 2 * i + 1), expected[i, 0])


def test_reconstruct_resizes(trained: Trained, tmp_path: Path) -> None:
    """A large photograph in colour meets a model of small grey images."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg")
    output = tmp_path / "pairs.png"
    main(["reconstruct", str(trained.run), str(tmp_path / "photo.jpg"), "-o", str(output)])
    assert Image.open(output).size == (2 * 50 + 2, 50 + 2)


def test_reconstruct_a_missing_file(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(["reconstruct", trained.run, "nowhere/x.png"], capsys)
    assert "there is no image file or folder nowhere/x.png" in message


# encode


def test_encode(trained: Trained, tmp_path: Path) -> None:
    process = fastvae("encode", trained.run, "digits", "-o", "z.safetensors", folder=tmp_path)
    assert process.returncode == 0, process.stderr
    assert process.stdout == "z.safetensors: mu and logvar of 1797 images, 4 latents each\n"
    found = load_file(tmp_path / "z.safetensors")
    digits = load_all("digits", DataConfig())
    q = VAE.from_pretrained(trained.run).encode(digits.images)
    assert found.keys() == {"mu", "logvar", "label"}
    assert found["mu"].dtype == found["logvar"].dtype == torch.float32
    torch.testing.assert_close(found["mu"], q.mu.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["logvar"], q.logvar.detach(), rtol=1e-4, atol=1e-5)
    assert digits.labels is not None
    assert torch.equal(found["label"], digits.labels)


def test_encode_images_without_labels(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_digit(tmp_path / "one.png", 5)
    output = tmp_path / "below/z.safetensors"
    main(["encode", str(trained.run), str(tmp_path / "one.png"), "-o", str(output)])
    found = load_file(output)
    assert found.keys() == {"mu", "logvar"}
    assert found["mu"].shape == (1, 4)
    assert "no file or folder nosuch" in refused(["encode", trained.run, "nosuch"], capsys)
    message = refused(["encode", trained.run, "digits", "-o", tmp_path], capsys)
    assert f"cannot write {tmp_path}" in message


# evaluate


def test_evaluate_other_images(trained: Trained, tmp_path: Path) -> None:
    """A source of its own is evaluated whole, split or not."""
    train_set, _ = load_data(DataConfig(), seed=0)
    np.save(tmp_path / "mine.npy", train_set.images.numpy())
    output = tmp_path / "evaluation.json"
    main(["evaluate", str(trained.run), "--data", str(tmp_path / "mine.npy"), "-o", str(output)])
    found = json.loads(output.read_text())
    assert found["images"] == EPOCH
    assert found["elbo"] == pytest.approx(results(trained.run)["heldout"]["elbo"], rel=0.1)


# The scripts for accelerate launch


@pytest.mark.parametrize("command", ["sample", "reconstruct", "encode", "evaluate", "score"])
def test_launch_scripts(
    command: str, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_digit(tmp_path / "one.png", 0)
    takes_data = {"reconstruct", "encode", "score"}
    arguments = ["one.png"] if command in takes_data else []
    ending = {"encode": "safetensors", "evaluate": "json", "score": "csv"}.get(command, "png")
    monkeypatch.chdir(tmp_path)
    script = str(LAUNCH / f"{command}.py")
    monkeypatch.setattr("sys.argv", [script, str(trained.run), *arguments, "-o", f"out.{ending}"])
    runpy.run_path(script, run_name="__main__")
    assert (tmp_path / f"out.{ending}").stat().st_size > 0
