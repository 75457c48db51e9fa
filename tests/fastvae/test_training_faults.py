"""What goes wrong in the middle of a run: none of it loses the last good checkpoint, none hangs."""

import contextlib
import json
import math
import os
import resource
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from data_files import noise, write_image
from running import (
    TINY,
    assert_same_tensors,
    command_line,
    ended,
    environment,
    kept,
    lines_written,
    metrics,
    ranks,
    resume,
    run_process,
    started,
    train,
    training_state,
    wait_until,
    weights,
)
from torch import Tensor

from fastvae import checkpoints
from fastvae.cli import main
from fastvae.training.step import TrainingStep


def refused(capsys: pytest.CaptureFixture[str], *flags: object) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(["train", *map(str, flags)])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


# A loss or gradient that is not finite


def spoil(patch: pytest.MonkeyPatch, bad: Callable[[Tensor], Tensor], value: float) -> None:
    """Where `bad` of the positions `[B]`, the loss is `value`, and depends on the weights."""
    losses = TrainingStep.losses

    def spoiled(self: TrainingStep, batch: Any, position: Tensor) -> Any:
        found, terms = losses(self, batch, position)
        positions = position + torch.arange(len(found))
        return found * torch.where(bad(positions), value, 1.0), terms

    patch.setattr(TrainingStep, "losses", spoiled)


@pytest.mark.parametrize(
    "value", [math.nan, *(pytest.param(x, marks=pytest.mark.slow) for x in (math.inf, -math.inf))]
)
@pytest.mark.parametrize("compiled", ["off", pytest.param("on", marks=pytest.mark.slow)])
@pytest.mark.parametrize("flags", ["", "--ema-decay 0.9 --clip-norm 1", "--optimizer muon"])
def test_a_bad_step_is_not_taken(
    flags: str, compiled: str, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sample spoils steps 21 to 23: after them all is as before, but for the counters."""
    spoil(monkeypatch, lambda p: (p >= 20 * 64 + 7) & (p <= 22 * 64 + 7) & (p % 64 == 7), value)
    common = [*flags.split(), "--compile", compiled, "--eval-every", 100]
    before = train(*common, "--max-steps", 20, "--schedule", "constant", output=tmp_path / "a")
    flags_after = [*common, "--schedule", "constant", "--max-steps", 23, "--checkpoint-every", 100]
    after = train(*flags_after, output=tmp_path / "b")
    assert_same_tensors(weights(after), weights(before))
    assert_same_tensors(training_state(after), training_state(before))
    state = json.loads((kept(after) / "state.json").read_text())
    assert (state["step"], state["faults"][1]) == (23, 3)
    last = metrics(after)[-1]
    assert (last["step"], last["skipped_steps"], last["loss"]) == (23, 3, None)
    assert "skipped_steps" not in metrics(after)[-2]


def test_the_run_goes_on_after_bad_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean of a line is of the steps that were taken, whose losses follow as they should."""
    straight = train("--log-every", 1, output=tmp_path / "straight")
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, lambda p: p == 59 * 64, math.nan)
        run = train("--log-every", 1, output=tmp_path / "run")
    assert [x["loss"] for x in metrics(run)[:59]] == [x["loss"] for x in metrics(straight)[:59]]
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, lambda p: p == 12 * 64 + 3, math.nan)
        run = train("--log-every", 5, "--checkpoint-every", 100, output=tmp_path / "five")
    assert [x.get("skipped_steps") for x in metrics(run)[:4]] == [None, None, 1, None]
    expected = metrics(straight)
    found = metrics(run)[2]["loss"]
    taken = [expected[i]["loss"] for i in (10, 11)]  # 13 was skipped, 14 and 15 saw other weights
    assert math.isfinite(found) and abs(found - sum(taken) / 2) < 0.2 * found


def test_all_steps_are_bad(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A learning rate beyond all measure. What is left is the checkpoint of the start."""
    run = tmp_path / "run"
    flags = [*TINY, "--learning-rate", "1e25", "--schedule", "constant", "--output", run]
    message = refused(capsys, *flags, "--max-bad-steps", 7, "--log-every", 5)
    assert "steps in a row, from step" in message and "Try a lower --learning-rate" in message
    report = json.loads((run / "bad-steps.json").read_text())
    assert report["steps_in_a_row"] >= 7
    assert len(report["rows"]) == 64 and report["batch_size"] == 64
    statistics = report["statistics_of_the_posterior"][0]
    assert statistics.keys() == {"mu", "logvar"}
    assert statistics["mu"]["not_finite"] > 0 or abs(statistics["mu"]["max"]) > 1e10
    newest, problems = checkpoints.newest(run)
    assert newest.step == 0 and not problems
    assert all(bool(x.isfinite().all()) for x in weights(run).values())


def test_the_report_names_the_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastvae.data import EpochOrder

    spoil(monkeypatch, lambda p: (p >= 30 * 64) & (p % 64 == 9), math.nan)
    run = tmp_path / "run"
    message = refused(capsys, *TINY, "--max-bad-steps", 4, "--output", run)
    index = EpochOrder(1617, seed=0).indices(30 * 64 + 9, 1).item()
    assert f"images {index} of the first of them" in message
    report = json.loads((run / "bad-steps.json").read_text())
    assert report["first_step"] == 31
    assert report["rows"] == [{"index": index, "loss": "nan", "gradient_finite": False}]
    assert checkpoints.newest(run)[0].step == 26  # of the epoch before


SPOILING = """
import os, sys
import torch
from fastvae.cli import main
from fastvae.training.step import TrainingStep

losses = TrainingStep.losses

def spoiled(self, batch, position):
    found, terms = losses(self, batch, position)
    positions = position + torch.arange(len(found))
    return found * torch.where(positions == 20 * 64 + 60, float("nan"), 1.0), terms

TrainingStep.losses = spoiled
main(["train", *sys.argv[1:]])
"""


def test_all_processes_skip_together(tmp_path: Path) -> None:
    """The bad sample is among the rows of the second."""
    (tmp_path / "spoiling.py").write_text(SPOILING)
    flags = [*TINY, "--log-every", "1"]
    process = run_process(
        [*ranks(2, "spoiling.py"), *flags, "--output", "two"], tmp_path, ACCELERATE_USE_CPU="true"
    )
    assert process.returncode == 0, process.stderr
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, lambda p: p == 20 * 64 + 60, math.nan)
        one = train("--log-every", 1, output=tmp_path / "one")
    for a, b in zip(metrics(tmp_path / "two"), metrics(one), strict=True):
        assert a.get("skipped_steps") == b.get("skipped_steps") == (1 if a["step"] == 21 else None)
        if a["step"] != 21:
            assert a["loss"] == pytest.approx(b["loss"], rel=2e-5)
    state = training_state(tmp_path / "two")
    assert {int(x) for name, x in state.items() if name.startswith("optimizer.step/")} == {59}


# The disk


def limited(**limits: int) -> Callable[[], None]:
    """For a child: its limits by the names that `resource` has."""

    def set_limits() -> None:
        for name, value in limits.items():
            resource.setrlimit(getattr(resource, name), (value, value))

    return set_limits


def fastvae_with(
    limits: Callable[[], None], folder: Path, *flags: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command_line(), *flags],
        cwd=folder,
        env=environment(folder),
        preexec_fn=limits,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


LONG = shlex.split("--checkpoint-every 0.4 --max-steps 120 --epochs 100 --schedule constant")


def test_files_that_cannot_grow(tmp_path: Path) -> None:
    """As on a full disk: the checkpoint cannot be written, the one before stays, the run goes on
    once there is room, and is the same."""
    straight = train(*LONG, output=tmp_path / "straight")
    run = train(*LONG, "--max-steps", 30, output=tmp_path / "run")
    before = {p: p.read_bytes() for p in kept(run).iterdir()}
    found = fastvae_with(
        limited(RLIMIT_FSIZE=20_000), tmp_path, "train", "--resume", "run", "--max-steps", "120"
    )
    assert found.returncode == 2, found.stderr
    assert "could not be written to run" in found.stderr and "--resume run" in found.stderr
    assert "Traceback" not in found.stderr
    assert {p: p.read_bytes() for p in kept(run).iterdir()} == before
    resume(run, "--max-steps", 120)
    assert_same_tensors(training_state(run), training_state(straight))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 KiB: three checkpoints and the pictures."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk(small_disk: Path, tmp_path: Path) -> None:
    straight = train(*LONG, output=tmp_path / "straight")
    run = train(*LONG, "--max-steps", 30, "--keep", 1, output=small_disk / "run")
    rest = small_disk / "rest"
    rest.write_bytes(b"")
    with contextlib.suppress(OSError), rest.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    newest = kept(run)
    found = fastvae_with(limited(), small_disk, "train", "--resume", str(run), "--max-steps", "120")
    assert found.returncode == 2
    assert "No space left on device" in found.stderr and "Traceback" not in found.stderr
    assert kept(run) == newest
    rest.unlink()
    resume(run, "--max-steps", 120, "--keep", 1)
    assert_same_tensors(training_state(run), training_state(straight))


@pytest.mark.slow
def test_a_folder_that_cannot_be_written(small_disk: Path, tmp_path: Path) -> None:
    run = train("--max-steps", 30, "--keep", 1, output=small_disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    newest = kept(run)
    found = fastvae_with(limited(), tmp_path, "train", "--resume", str(run), "--max-steps", "60")
    assert found.returncode == 2
    assert "Read-only file system" in found.stderr and "Traceback" not in found.stderr
    found = fastvae_with(limited(), tmp_path, "train", *TINY, "--output", str(small_disk / "new"))
    assert found.returncode == 2
    assert "Read-only file system" in found.stderr and "Traceback" not in found.stderr
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert kept(run) == newest


@pytest.mark.slow
def test_the_run_is_deleted_while_it_trains(tmp_path: Path) -> None:
    flags = ["--max-steps", "100000", "--epochs", "100000", "--checkpoint-every", "2"]
    command = [*command_line(), "train", *TINY, *flags, "--output", "run"]
    process = started(command, tmp_path)
    wait_until(lambda: lines_written(tmp_path / "run") > 3, process)
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    found = ended(process, timeout=60)
    assert found.returncode == 2
    assert "could not be written to run" in found.stderr and "Traceback" not in found.stderr


@pytest.mark.slow
def test_only_the_checkpoints_are_deleted(tmp_path: Path) -> None:
    """The next ones are there again."""
    flags = ["--max-steps", "3000", "--epochs", "1000", "--checkpoint-every", "2"]
    process = started([*command_line(), "train", *TINY, *flags, "--output", "run"], tmp_path)
    wait_until(lambda: lines_written(tmp_path / "run") > 3, process)
    shutil.rmtree(tmp_path / "run/checkpoints", ignore_errors=True)
    found = ended(process)
    assert found.returncode == 0, found.stderr
    assert checkpoints.newest(tmp_path / "run")[0].step == 3000


# Memory


def test_out_of_memory(tmp_path: Path) -> None:
    """Says which batch was tried and what to lower."""
    flags = ["--batch-size", "1500", "--hidden", "60000", "--max-steps", "5"]
    limits = limited(RLIMIT_AS=5 * 2**30)  # of address space, of which PyTorch's code takes 3 to 4
    found = fastvae_with(limits, tmp_path, "train", *TINY, *flags, "--output", "run")
    assert found.returncode == 2, found.stderr
    assert "out of memory with --batch-size 1500 in 1 part(s)" in found.stderr
    assert "--gradient-accumulation-steps 2" in found.stderr
    assert "Traceback" not in found.stderr


# Data that are not kept in memory


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """400 images of 8 x 8 in two class folders."""
    for i in range(400):
        write_image(tmp_path / f"images/{'ab'[i % 2]}/{i:03d}.png", noise(8, 8))
    return tmp_path / "images"


STREAM = shlex.split("--data images --data-budget 0 --data-workers 2 --batch-size 20")


def streaming(folder: Path, *flags: str) -> subprocess.Popen[bytes]:
    common = [*TINY, *STREAM, "--max-steps", "100000", "--epochs", "100000", "--output", "run"]
    return started([*command_line(), "train", *common, "--checkpoint-every", "1", *flags], folder)


@pytest.mark.slow
def test_a_file_is_deleted_while_it_trains(images: Path, tmp_path: Path) -> None:
    process = streaming(tmp_path)
    wait_until(lambda: lines_written(tmp_path / "run") > 10, process)
    for file in images.rglob("*7.png"):
        file.unlink()
    found = ended(process, timeout=60)
    assert found.returncode == 2
    assert "7.png cannot be read as an image" in found.stderr and "Traceback" not in found.stderr
    assert checkpoints.newest(tmp_path / "run")[0].step > 0


@pytest.mark.slow
def test_bad_images_are_skipped(images: Path, tmp_path: Path) -> None:
    process = streaming(tmp_path, "--on-bad-sample", "skip", "--log-every", "5")
    wait_until(lambda: lines_written(tmp_path / "run") > 10, process)
    bad = sorted(images.rglob("*7.png"))
    for file in bad:
        file.write_bytes(file.read_bytes()[:40])
    before = lines_written(tmp_path / "run")
    wait_until(lambda: lines_written(tmp_path / "run") > before + 40, process)
    process.send_signal(signal.SIGTERM)
    found = ended(process, timeout=60)
    assert found.returncode == 0, found.stderr
    counted = [line.get("bad_samples", 0) for line in metrics(tmp_path / "run")]
    assert sum(counted) >= 40 and counted[0] == 0
    assert "7.png cannot be read as an image" in found.stderr
    assert "another of its batch takes its place" in found.stderr


def test_a_worker_dies(images: Path, tmp_path: Path) -> None:
    process = streaming(tmp_path)
    wait_until(lambda: lines_written(tmp_path / "run") > 10, process)
    workers = psutil.Process(process.pid).children()
    assert len(workers) >= 2
    os.kill(workers[0].pid, signal.SIGKILL)
    found = ended(process, timeout=60)
    assert found.returncode == 2
    assert "a process that decodes images has died" in found.stderr
    assert "Traceback" not in found.stderr
    step = checkpoints.newest(tmp_path / "run")[0].step
    assert step > 0
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        resume(Path("run"), "--max-steps", step + 5)
    assert checkpoints.newest(tmp_path / "run")[0].step == step + 5
