"""Stopped and resumed is straight through: to the bit, wherever and however the run was stopped."""

import json
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Trained
from running import (
    TINY,
    assert_same_tensors,
    command_line,
    environment,
    metrics,
    results,
    resume,
    train,
    training_state,
    weights,
)

from fastvae.cli import main
from fastvae.training.log import RunLog


class Killed(BaseException):
    """No handler in the library expects it."""


def killed(*flags: object, output: Path, after_line: int) -> Path:
    """A run that ends without warning once it has logged the given step."""
    write = RunLog.write

    def write_and_die(self: RunLog, step: int, values: dict[str, Any]) -> None:
        write(self, step, values)
        if step >= after_line:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLog, "write", write_and_die)
        with pytest.raises(Killed):
            train(*flags, output=output)
    return output


def step_of(run: Path) -> int:
    return json.loads((run / "checkpoint/state.json").read_text())["step"]


def assert_same_run(a: Path, b: Path) -> None:
    assert metrics(a) == metrics(b)
    assert_same_tensors(training_state(a), training_state(b))
    assert_same_tensors(weights(a), weights(b))
    assert results(a)["heldout"] == results(b)["heldout"]
    for name in ("samples.png", "reconstructions.png"):
        assert (a / name).read_bytes() == (b / name).read_bytes()


VARIANTS = {
    "plain": "",
    "mid-epoch, between two lines": "--checkpoint-every 0.27 --log-every 9",
    "accumulated, averaged, clipped": (
        "--gradient-accumulation-steps 4 --ema-decay 0.95 --clip-norm 1 --checkpoint-every 0.3"
    ),
    "binary pixels, warm-up of both kinds": (
        "--likelihood bernoulli --kl-warmup-epochs 2 --lr-warmup-steps 40 --optimizer adamw "
        "--weight-decay 0.01 --checkpoint-every 0.4"
    ),
    "static, steps, convolutions": (
        "--likelihood bernoulli --binarize static --network conv --widths 4 8 --schedule step "
        "--lr-step-epochs 0.5 --checkpoint-every 0.5"
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_resumed_is_straight_through(name: str, tmp_path: Path) -> None:
    flags = VARIANTS[name].split()
    straight = train(*flags, output=tmp_path / "straight")
    run = killed(*flags, output=tmp_path / "killed", after_line=40)
    logged = [line["step"] for line in metrics(run)]
    # There are lines after the checkpoint, which are made again and not doubled.
    assert 20 < step_of(run) < logged[-1]
    assert not (run / "results.json").exists()
    resume(run)
    assert step_of(run) == 60
    assert_same_run(run, straight)


def test_stopped_again_and_again(tmp_path: Path) -> None:
    straight = train("--checkpoint-every", 0.2, output=tmp_path / "straight")
    run = killed("--checkpoint-every", 0.2, output=tmp_path / "killed", after_line=20)
    for line in (30, 50):
        before = step_of(run)
        with pytest.MonkeyPatch.context() as patch:
            write = RunLog.write

            def write_and_die(
                self: RunLog, step: int, values: dict, line: int = line, write: Callable = write
            ) -> None:
                write(self, step, values)
                if step == line:
                    raise Killed

            patch.setattr(RunLog, "write", write_and_die)
            with pytest.raises(Killed):
                resume(run)
        assert step_of(run) > before
    resume(run)
    assert_same_run(run, straight)


def test_killed_by_the_system(tmp_path: Path) -> None:
    """A real process and SIGKILL, at whatever place it finds."""
    flags = shlex.split("--batch-size 16 --max-steps 2500 --epochs 100 --checkpoint-every 0.5")
    command = [*command_line(), "train", *TINY, *flags, "--output", "killed"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment(tmp_path), stderr=subprocess.DEVNULL
    ) as process:
        lines = tmp_path / "killed/metrics.jsonl"
        while process.poll() is None and not (
            lines.exists() and lines.read_text().count("\n") > 40
        ):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed/results.json").exists()
    straight = train(*flags, output=tmp_path / "straight")
    resume(tmp_path / "killed")
    assert_same_run(tmp_path / "killed", straight)


def test_going_on_for_longer(tmp_path: Path) -> None:
    """More steps than were asked for first, where the schedule does not look at their number."""
    flags = ["--schedule", "constant", "--log-every", 10]
    straight = train(*flags, output=tmp_path / "straight")
    run = train(*flags, "--max-steps", 40, output=tmp_path / "run")
    resume(run, "--max-steps", 60)
    assert_same_tensors(training_state(run), training_state(straight))
    expected = {line["step"]: line for line in metrics(straight)}
    assert [line["step"] for line in metrics(run)] == list(expected)
    for line in metrics(run):
        for key in expected[line["step"]]:
            assert line[key] == expected[line["step"]][key]
    assert json.loads((run / "config.json").read_text())["max_steps"] == 60


def test_a_crash_between_the_two_renames(tmp_path: Path) -> None:
    """The new checkpoint has not taken its place yet; the one before waits beside it."""
    straight = train(output=tmp_path / "straight")
    run = killed(output=tmp_path / "killed", after_line=40)
    (run / "checkpoint").rename(run / ".checkpoint.old")
    (run / ".checkpoint.new").mkdir()
    (run / ".checkpoint.new/half.safetensors").write_bytes(b"half")
    resume(run)
    assert_same_run(run, straight)
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


# What is refused, and leaves the run as it was


def refused(run: Path, flags: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(SystemExit) as caught:
        main(["train", "--resume", str(run), *flags])
    assert caught.value.code == 2
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    return capsys.readouterr().err


@pytest.fixture
def copied(trained: Trained, tmp_path: Path) -> Path:
    return shutil.copytree(trained.run, tmp_path / "copied")


def test_a_finished_run(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in ([], ["--max-steps", "30"]):
        message = refused(copied, flags, capsys)
        assert f"{copied} is already at step 60" in message
        assert "--max-steps" in message


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--latent-dim", "5"], "model.latent_dim: 4 in the run, 5 now"),
        (["--seed", "9"], "seed: 0 in the run, 9 now"),
        (["--batch-size", "32"], "batch_size: 64 in the run, 32 now"),
        (["--beta", "2"], "objective.beta: 1.0 in the run, 2.0 now"),
        (["--data", "mnist"], "data.data: digits in the run, mnist now"),
    ],
)
def test_other_settings(
    copied: Path, flags: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(copied, [*flags, "--max-steps", "90"], capsys)
    assert part in message
    assert "max_steps" not in message


@pytest.mark.parametrize("name", ["training.safetensors", "model.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "empty", "noise"])
def test_a_damaged_checkpoint(
    copied: Path, name: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = copied / "checkpoint" / name
    content = file.read_bytes()
    contents = {"cut": content[: len(content) // 2], "empty": b"", "noise": b"\xff\x80\x04."}
    file.write_bytes(contents[damage])
    message = refused(copied, ["--max-steps", "90"], capsys)
    assert str(file) in message
    assert "damaged" in message


def test_a_missing_part_of_a_checkpoint(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copied / "checkpoint/training.safetensors").unlink()
    message = refused(copied, ["--max-steps", "90"], capsys)
    assert "training.safetensors" in message
    shutil.rmtree(copied / "checkpoint")
    assert "no checkpoint to resume from" in refused(copied, ["--max-steps", "90"], capsys)


def test_a_checkpoint_of_another_model(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The settings were edited by hand."""
    config = json.loads((copied / "config.json").read_text())
    config["model"]["latent_dim"] = 7
    (copied / "config.json").write_text(json.dumps(config))
    assert "of another model" in refused(copied, ["--max-steps", "90"], capsys)


def test_a_checkpoint_of_another_format(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = copied / "checkpoint/state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 99}))
    message = refused(copied, ["--max-steps", "90"], capsys)
    assert "format 99" in message
