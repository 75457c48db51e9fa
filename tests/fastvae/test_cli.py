"""The command line: what it says, what it refuses, and how it ends."""

import dataclasses
import re
import shlex
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import Trained
from running import ACCELERATE, LAUNCH, TINY, fastvae, kept, metrics, run_process, train, weights

from fastvae.cli import COMMANDS, main
from fastvae.config import Config
from fastvae.presets import PRESETS

EVERYDAY = shlex.split(
    "--preset --data --data-dir --output --epochs --max-steps --batch-size "
    "--learning-rate --latent-dim --likelihood --beta --seed --log-every "
    "--checkpoint-every --resume --config --compile"
)


def ends(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit status and what is printed, in one line and without the frame around it."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    printed = capsys.readouterr()
    text = re.sub(r"[│╭╮╰╯─]", " ", printed.out + printed.err)
    assert isinstance(caught.value.code, int)
    return caught.value.code, " ".join(text.split())


def fields(config: object) -> Iterator[str]:
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from fields(value)
        else:
            yield field.name


# What is there


def test_help_of_train_shows_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    status, text = ends(["train", "--help"], capsys)
    assert status == 0
    words = set(re.findall(r"--[a-z][a-z0-9-]*", text))
    expected = {f"--{name.replace('_', '-')}" for name in fields(Config())}
    assert not (expected | set(EVERYDAY)) - words
    assert all(name in text for name in PRESETS)
    assert text.count("(default: ") >= len(expected)


def test_the_default_values_shown_are_the_presets(capsys: pytest.CaptureFixture[str]) -> None:
    _, text = ends(["train", "--preset", "mnist-mlp", "--help"], capsys)
    assert re.search(r"--latent-dim INT Number of latents\. \(default: 20\)", text)
    _, text = ends(["train", "--preset=cifar10-conv", "--help"], capsys)
    assert re.search(r"--latent-dim INT Number of latents\. \(default: 128\)", text)


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("sample", ["RUN", "-n", "--output", "--seed", "--noise", "--device"]),
        ("reconstruct", ["RUN", "IMAGES", "--output", "--device"]),
        ("encode", ["RUN", "DATA", "--output", "--data-dir", "--device"]),
        ("evaluate", ["RUN", "--data", "--data-dir", "--output", "--device"]),
    ],
)
def test_help_of_the_others(
    command: str, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    status, text = ends([command, "--help"], capsys)
    assert status == 0
    assert all(flag in text for flag in flags)


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, expected in (
        (["--help"], 0),
        (["-h"], 0),
        ([], 2),
        (["trian"], 2),
        (["--preset", "digits-mlp"], 2),
    ):
        status, text = ends(arguments, capsys)
        assert status == expected
        assert all(name in text for name in COMMANDS)
    assert "no command is called 'trian'" in ends(["trian"], capsys)[1]


# What is refused, before any work, in words and with status 2


REFUSALS = {
    "--preset digits-mpl": ["digits-mpl", "did you mean digits-mlp?", "mnist-conv"],
    "--latent-dim 0": ["--latent-dim must be at least 1, got 0"],
    "--latent-dim many": ["--latent-dim", "many"],
    "--beta -1": ["--beta must be 0 or more, got -1"],
    "--batch-size 0": ["--batch-size must be at least 1, got 0"],
    "--likelihood foo": ["--likelihood", "foo", "bernoulli", "gaussian"],
    "--likelihood gaussian --binarize dynamic": ["--binarize", "auto or none", "dynamic"],
    "--epochs inf": ["--epochs must be positive, at most 1e9, got inf"],
    "--kl-warmup-epochs inf": ["--kl-warmup-epochs", "got inf"],
    "--variance 0": ["--variance must be learned, optimal, predicted or a positive number"],
    "--data nosuch": ["no file or folder nosuch", "digits, mnist, fashion-mnist, cifar10"],
    "--data fashion_mnist": ["did you mean fashion-mnist?"],
    "--data mnist --data-dir empty": ["mnist is not there", "--download", "--data-dir"],
    "--config unknown.json": ["unknown.json", "latent", "3"],
    "--config nosuch.json": ["nosuch.json", "no such file"],
    "--config": ["--config"],
    "--resume empty": ["empty is no run's folder", "config.json"],
    "--resume empty --preset digits-mlp": ["--preset and --resume", "give one"],
    "--batch-size 2 --gradient-accumulation-steps 3": ["--batch-size 2", "3 or more"],
    "--mixed-precision fp16": ["fp16 needs a GPU", "bf16"],
    "--lattent-dim 3": ["--lattent-dim", "--latent-dim"],
    "--learning_rats 3": ["Unrecognized"],
}


def folder_with_files(folder: Path) -> None:
    (folder / "empty").mkdir()
    (folder / "unknown.json").write_text('{"latent": 3}')


@pytest.mark.parametrize("flags", REFUSALS)
def test_refusals(
    flags: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder_with_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.rglob("*"))
    status, text = ends(["train", *flags.split(), "--max-steps", "3"], capsys)
    assert status == 2
    assert not [part for part in REFUSALS[flags] if part not in text], text
    assert set(tmp_path.rglob("*")) == before, "something was written"


@pytest.mark.parametrize(
    "chosen",
    [
        ["--lattent-dim 3", "--data nosuch --output here"],
        pytest.param(["--preset digits-mpl", "--latent-dim 0"], marks=pytest.mark.slow),
    ],
    ids=["unknown", "impossible"],
)
def test_the_real_command_refuses_likewise(chosen: list[str], tmp_path: Path) -> None:
    """No traceback, status 2, nothing written."""
    folder_with_files(tmp_path)
    before = set(tmp_path.rglob("*"))
    with ThreadPoolExecutor(2) as pool:
        done = pool.map(lambda flags: fastvae("train", *flags.split(), folder=tmp_path), chosen)
    for flags, process in zip(chosen, done, strict=True):
        assert process.returncode == 2, flags
        assert "Traceback" not in process.stdout + process.stderr
        text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", process.stderr + process.stdout).split())
        for part in REFUSALS[flags.removesuffix(" --output here")]:
            assert part in text
    allowed = {tmp_path / name for name in ("matplotlib", "inductor", "huggingface", "triton")}
    left = {path for path in tmp_path.rglob("*") if not allowed & {path, *path.parents}}
    assert left == before


def test_a_tracker_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fastvae.training.launcher.find_spec", lambda name: None)
    status, text = ends(["train", "--tracker", "wandb", "--output", str(tmp_path / "x")], capsys)
    assert status == 2
    assert "pip install 'fastvae[wandb]'" in text
    assert not (tmp_path / "x").exists()


def test_the_folder_of_another_run(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    before = (trained.run / "config.json").read_text()
    status, text = ends(["train", "--output", str(trained.run)], capsys)
    assert status == 2
    assert f"{trained.run} already holds a run" in text
    assert f"--resume {trained.run}" in text
    assert (trained.run / "config.json").read_text() == before


def test_an_output_that_cannot_be_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file/below"):
        status, text = ends(["train", *TINY, "--output", str(output)], capsys)
        assert status == 2
        assert str(output) in text
    assert (tmp_path / "file").read_text() == "mine"


def test_after_a_refusal_the_corrected_command_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    flags = ["train", "--data", "nosuch", "--max-steps", "2", "--output", str(output)]
    assert ends(flags, capsys)[0] == 2
    train("--max-steps", 2, output=output)
    assert (output / "results.json").is_file()


def test_folders_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(3):
        main(["train", "--max-steps", "1", "--hidden", "4"])
    main(["train", "--config", "runs/digits-mlp-2/config.json"])
    found = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert found == ["digits-mlp", "digits-mlp-2", "digits-mlp-2-2", "digits-mlp-3"]


def test_a_resumed_run_stays_in_its_folder(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["train", "--resume", str(trained.run), "--output", str(tmp_path / "other")]
    status, text = ends(flags, capsys)
    assert status == 2
    assert "--output" in text
    assert "--resume" in text
    assert not (tmp_path / "other").exists()


# The settings of another run


def test_a_saved_configuration_gives_the_same_run(tmp_path: Path) -> None:
    odd = shlex.split(
        "--seed 5 --beta 0.5 --likelihood bernoulli --activation tanh --ema-decay 0.9"
    )
    first = train(*odd, "--learning-rate", 0.003, "--max-steps", 12, output=tmp_path / "first")
    again = tmp_path / "again"
    main(["train", "--config", str(first / "config.json"), "--output", str(again)])
    files = "model.safetensors", "training.safetensors"
    assert all((kept(first) / f).read_bytes() == (kept(again) / f).read_bytes() for f in files)
    assert metrics(first) == metrics(again)
    assert (first / "samples.png").read_bytes() == (again / "samples.png").read_bytes()

    other = tmp_path / "other"
    main(["train", "--config", str(first / "config.json"), "--seed", "6", "--output", str(other)])
    assert not all((weights(first)[k] == v).all() for k, v in weights(other).items())


# Started in other ways


@pytest.mark.parametrize(
    "start",
    [
        pytest.param([*ACCELERATE, "launch", str(LAUNCH / "train.py")], id="launcher"),
        pytest.param(
            [sys.executable, str(LAUNCH / "train.py")], id="script", marks=pytest.mark.slow
        ),
        pytest.param(
            [sys.executable, "-m", "fastvae.cli", "train"], id="module", marks=pytest.mark.slow
        ),
    ],
)
def test_scripts_and_launchers_do_the_same(
    start: list[str], trained: Trained, tmp_path: Path
) -> None:
    process = run_process([*start, *TINY, "--output", "run"], tmp_path, ACCELERATE_USE_CPU="true")
    assert process.returncode == 0, process.stderr
    for file in ("model.safetensors", "training.safetensors"):
        expected = (kept(trained.run) / file).read_bytes()
        assert (kept(tmp_path / "run") / file).read_bytes() == expected
    assert metrics(tmp_path / "run") == metrics(trained.run)


def test_the_default_job(tmp_path: Path) -> None:
    """No flag at all: the embedded digits, learned well enough to look like digits."""
    process = fastvae("train", folder=tmp_path)
    assert process.returncode == 0, process.stderr
    run = tmp_path / "runs/digits-mlp"
    assert f"results: {run.relative_to(tmp_path)}/" in process.stderr
    assert {file.name for file in run.glob("*.png")} == {
        "samples.png",
        "reconstructions.png",
        "curves.png",
    }
    lines = [line for line in metrics(run) if "heldout_elbo" in line]
    # A model that has learned nothing but the mean and the variance of the pixels stays below 0.
    assert lines[-1]["heldout_elbo"] > 25
    assert lines[-1]["heldout_kl"] > 8
