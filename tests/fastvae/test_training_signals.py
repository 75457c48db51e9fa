"""SIGTERM and SIGINT: the run stops between two steps, keeps what it has, and says how to go on."""

import json
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from running import (
    ACCELERATE,
    LAUNCH,
    TINY,
    assert_same_run,
    command_line,
    ended,
    lines_written,
    ranks,
    resume,
    started,
    train,
    wait_until,
)

from fastvae import checkpoints

# Long enough to be met in its middle; nothing is kept but at its ends.
FLAGS = shlex.split("--max-steps 4000 --epochs 1000 --log-every 50 --eval-every 50")
FLAGS += ["--checkpoint-every", "1000", "--schedule", "constant"]
SECONDS = 20.0

STARTS = {
    "command": [*command_line(), "train"],
    "accelerate": [*ACCELERATE, "launch", str(LAUNCH / "train.py")],
    "two processes": ranks(2),
}


def start(name: str, folder: Path, *flags: str) -> subprocess.Popen[bytes]:
    command = [*STARTS[name], *TINY, *FLAGS, *flags]
    return started(command, folder, ACCELERATE_USE_CPU="true")


def trainers(launcher: int) -> list[psutil.Process]:
    """The processes that train, which were started by `launcher` or are it."""
    parent = psutil.Process(launcher)
    found = [parent, *parent.children(recursive=True)]
    launching = ("accelerate_cli", "distributed.run")
    lines = {p: " ".join(p.cmdline()) for p in found}
    return [
        p for p in found if "--max-steps" in lines[p] and not any(x in lines[p] for x in launching)
    ]


def stopped(
    process: subprocess.Popen[bytes], run: Path, number: int, to: str
) -> subprocess.CompletedProcess[str]:
    """After some lines, the signal, to the process that was started or to one that trains; all are
    gone within SECONDS."""
    wait_until(lambda: lines_written(run) > 3, process)
    workers = trainers(process.pid)
    assert workers
    target = {"launcher": process.pid, "last": workers[-1].pid}[to]
    began = time.monotonic()
    os.kill(target, number)
    found = ended(process, timeout=60)
    psutil.wait_procs(workers, timeout=SECONDS)
    assert not any(worker.is_running() for worker in workers)
    assert time.monotonic() - began < SECONDS
    return found


@pytest.mark.parametrize(
    ("name", "number", "to"),
    [
        pytest.param("command", signal.SIGTERM, "launcher", marks=pytest.mark.slow),
        pytest.param("command", signal.SIGINT, "launcher", marks=pytest.mark.slow),
        ("accelerate", signal.SIGTERM, "launcher"),
        pytest.param("two processes", signal.SIGTERM, "launcher", marks=pytest.mark.slow),
        pytest.param("two processes", signal.SIGTERM, "last", marks=pytest.mark.slow),
    ],
)
def test_stopped_and_resumed(name: str, number: int, to: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    found = stopped(start(name, tmp_path, "--output", "run"), run, number, to)
    called = signal.Signals(number).name
    assert found.stderr.count(f"stopped by {called} after step") == 1
    assert "continue with --resume run" in found.stderr
    if (name, to) != ("two processes", "launcher"):  # torchrun ends with one of its own
        assert "Traceback" not in found.stderr
    if name == "command":
        assert found.returncode == (0 if number == signal.SIGTERM else 130)
    if to == "last":
        assert found.returncode == 0
    assert not (run / "results.json").exists()
    newest, problems = checkpoints.newest(run)
    assert 0 < newest.step < 4000 and problems == []
    manifest = json.loads((newest.folder / "manifest.json").read_text())
    assert manifest["heldout"] is None  # it was not measured at this step
    if name == "two processes":
        return
    stop = str(newest.step + 60)
    resume(run, "--max-steps", stop)
    straight = train(*FLAGS, "--max-steps", stop, output=tmp_path / "straight")
    assert_same_run(run, straight)


@pytest.mark.slow
def test_sent_twice(tmp_path: Path) -> None:
    """A second SIGINT does not wait for a step to end."""
    process = start("command", tmp_path, "--output", "run")
    wait_until(lambda: lines_written(tmp_path / "run") > 3, process)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
    found = ended(process, timeout=60)
    assert found.returncode == 130
    assert "Traceback" not in found.stderr


@pytest.mark.slow
def test_before_the_first_step(tmp_path: Path) -> None:
    """Where nothing is to be kept, nothing is waited for; the run begins when it is resumed."""
    process = start("command", tmp_path, "--compile", "on", "--output", "run")
    wait_until((tmp_path / "run/config.json").exists, process)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    found = ended(process, timeout=60)
    assert time.monotonic() - began < SECONDS
    assert found.returncode == 0, found.stderr
    assert "continue with --resume run" in found.stderr
    resume(tmp_path / "run", "--max-steps", "60", "--compile", "off")
    straight = train(*FLAGS, "--max-steps", "60", output=tmp_path / "straight")
    assert_same_run(tmp_path / "run", straight)
