"""Stopped and resumed is straight through: to the bit, wherever and however the run was stopped."""

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Trained
from running import (
    assert_same_run,
    assert_same_tensors,
    kept,
    metrics,
    resume,
    train,
    training_state,
)

from fastvae import checkpoints
from fastvae.cli import main
from fastvae.training.log import RunLog


class Killed(BaseException):
    """No handler in the library expects it."""


def killed(*flags: object, output: Path, after_line: int, resumed: bool = False) -> Path:
    """A run that ends without warning once it has logged the given step."""
    write = RunLog.write

    def write_and_die(self: RunLog, step: int, values: dict[str, Any]) -> None:
        write(self, step, values)
        if step >= after_line:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLog, "write", write_and_die)
        with pytest.raises(Killed):
            resume(output, *flags) if resumed else train(*flags, output=output)
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()
    return output


def step_of(run: Path) -> int:
    return checkpoints.newest(run)[0].step


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
        killed(output=run, after_line=line, resumed=True)
        assert step_of(run) > before
    resume(run)
    assert_same_run(run, straight)


def test_stopped_before_the_first_checkpoint_of_an_epoch(tmp_path: Path) -> None:
    """There is one at the start, from which the run begins again."""
    straight = train(output=tmp_path / "straight")
    run = killed(output=tmp_path / "killed", after_line=10)
    assert step_of(run) == 0
    resume(run)
    assert_same_run(run, straight)


def test_only_the_results_are_missing(tmp_path: Path) -> None:
    """It ended between the last checkpoint and the results."""
    run = train(output=tmp_path / "run")
    straight = shutil.copytree(run, tmp_path / "straight")
    for name in ("results.json", "samples.png", "reconstructions.png"):
        (run / name).unlink()
    resume(run)
    assert_same_run(run, straight)


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


def test_the_newest_that_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A damaged checkpoint is named and passed over, and the end of the run is the same."""
    straight = train("--checkpoint-every", 0.3, output=tmp_path / "straight")
    run = killed("--checkpoint-every", 0.3, output=tmp_path / "killed", after_line=50)
    damaged = kept(run)
    content = bytearray((damaged / "training.safetensors").read_bytes())
    content[-1] ^= 1
    (damaged / "training.safetensors").write_bytes(content)
    before = kept(run)
    assert before != damaged
    capsys.readouterr()
    resume(run)
    said = capsys.readouterr().err
    assert f"warning: {damaged}/training.safetensors is damaged" in said
    assert f"continuing from {before} instead" in said
    assert_same_run(run, straight)


def test_so_many_checkpoints_stay(tmp_path: Path) -> None:
    run = train("--checkpoint-every", 0.2, "--keep", 3, output=tmp_path / "run")
    found = [checkpoints.read_manifest(folder) for folder in checkpoints.folders(run)]
    best = checkpoints.best_of(run)
    assert best is not None and best.heldout is not None
    assert len(found) == 3 + (best.step not in [c.step for c in found[:3]])
    assert best.heldout == max(
        line["heldout_elbo"]
        for line in metrics(run)
        if line["step"] in [c.step for c in found] and "heldout_elbo" in line
    )


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
@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "missing"])
def test_no_checkpoint_is_whole(
    copied: Path, name: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A clear error, and no fresh start."""
    for folder in checkpoints.folders(copied):
        file = folder / name
        content = file.read_bytes()
        contents = {"cut": content[: len(content) // 2], "empty": b"", "noise": b"\xff\x80\x04."}
        file.unlink() if damage == "missing" else file.write_bytes(contents[damage])
    message = refused(copied, ["--max-steps", "90"], capsys)
    assert "no checkpoint that is whole" in message
    for folder in checkpoints.folders(copied):
        assert str(folder / name) in message


def test_no_checkpoint_at_all(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(copied / "checkpoints")
    assert "has no checkpoint" in refused(copied, ["--max-steps", "90"], capsys)


def rewritten(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Its state.json changed, and the manifest too, so that it counts as whole."""
    state = json.loads((folder / "state.json").read_text())
    change(state)
    content = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "manifest.json"}
    content["state.json"] = json.dumps(state).encode()

    def fill(fresh: Path) -> None:
        for name, value in content.items():
            (fresh / name).write_bytes(value)

    step = checkpoints.read_manifest(folder).step
    checkpoints.commit(folder.parents[1], step, fill)


@pytest.mark.parametrize("key", ["step", "pending", "faults", "said", "train_data"])
def test_counters_that_make_no_sense(
    copied: Path, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for value in (None, "x", -1, [1]):
        rewritten(kept(copied), lambda state, v=value: state.update({key: v}))
        message = refused(copied, ["--max-steps", "90"], capsys)
        assert "state.json" in message or "other images" in message
    rewritten(kept(copied), lambda state: state.pop(key))
    message = refused(copied, ["--max-steps", "90"], capsys)
    assert "state.json" in message or "other images" in message


def test_a_checkpoint_of_another_model(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The settings were edited by hand."""
    config = json.loads((copied / "config.json").read_text())
    config["model"]["latent_dim"] = 7
    (copied / "config.json").write_text(json.dumps(config))
    assert "of another model" in refused(copied, ["--max-steps", "90"], capsys)


def test_a_checkpoint_of_other_images(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewritten(kept(copied), lambda state: state.update(train_data="1×1×8×8 uint8 0123456789abcdef"))
    message = refused(copied, ["--max-steps", "90"], capsys)
    assert "was trained on other images" in message and "0123456789abcdef" in message


def test_a_checkpoint_of_a_newer_format(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = kept(copied) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    message = refused(copied, ["--max-steps", "90"], capsys)
    assert "format 99" in message and "reads up to 1" in message
