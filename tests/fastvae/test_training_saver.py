"""Checkpoints are written beside training, one at a time, and none fails unheard."""

import errno
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from running import TINY, fastvae, train, weights

from fastvae import checkpoints
from fastvae.cli import main
from fastvae.training.checkpoint import Snapshot
from fastvae.training.updates import Updates

OFTEN = ["--checkpoint-every", "0.2", "--log-every", "1000", "--keep", "100"]


def at_each_step(patch: pytest.MonkeyPatch, note: Callable[[int], object]) -> None:
    update = Updates._update

    def noting(self: Updates) -> None:
        note(int(self.step))
        update(self)

    patch.setattr(Updates, "_update", noting)


def test_training_goes_on_and_one_is_written_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Snapshot.write
    writing, most, meanwhile = [0], [0], [0]

    def slowly(self: Snapshot, run: Path) -> Any:
        assert threading.current_thread() is not threading.main_thread()
        writing[0] += 1
        most[0] = max(most[0], writing[0])
        time.sleep(0.1)
        found = write(self, run)
        writing[0] -= 1
        return found

    def note(step: int) -> None:
        meanwhile[0] += writing[0]

    monkeypatch.setattr(Snapshot, "write", slowly)
    at_each_step(monkeypatch, note)
    run = train(*OFTEN, output=tmp_path / "run")
    assert most == [1]
    assert meanwhile[0] > 30  # of 60 steps
    # 5.05 steps are a fifth of an epoch, and the first step after each multiple is kept.
    expected = [0, *(step for step in range(1, 60) if int(step / 5.053) > int((step - 1) / 5.053))]
    assert [folder_step(x) for x in checkpoints.folders(run)] == [60, *reversed(expected)]


def folder_step(folder: Path) -> int:
    return checkpoints.read_manifest(folder).step


def test_the_next_step_hears_that_one_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """That of step 26; to the next line it would be a thousand steps."""
    write = Snapshot.write
    taken: list[int] = []
    failed = threading.Event()

    def failing(self: Snapshot, run: Path) -> Any:
        if self.step == 0:
            return write(self, run)
        failed.set()
        raise OSError(errno.ENOSPC, "No space left on device")

    def note(step: int) -> None:
        if step == 26:  # time for the thread to fail
            failed.wait(10)
            time.sleep(0.05)
        taken.append(step)

    monkeypatch.setattr(Snapshot, "write", failing)
    at_each_step(monkeypatch, note)
    with pytest.raises(SystemExit) as caught:
        main(["train", *TINY, "--log-every", "1000", "--output", str(tmp_path / "run")])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert "the checkpoint of step 26 could not be written" in said
    assert "No space left on device; the one of step 0 is untouched" in said
    assert len(taken) in (26, 27)  # before the next step, or in it


def test_by_time_in_place_of_epochs(tmp_path: Path) -> None:
    """Rarely: at the start and at the end alone. Often: in between as well, and it trains alike."""
    kept = {}
    for minutes in ("1000", "0.0005"):
        run = train(*OFTEN, "--checkpoint-minutes", minutes, output=tmp_path / minutes)
        kept[minutes] = [folder_step(folder) for folder in checkpoints.folders(run)]
    assert kept["1000"] == [60, 0]
    assert len(kept["0.0005"]) > 2
    last = [weights(tmp_path / minutes) for minutes in kept]
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[0])


def test_by_time_where_keeping_takes_longer_than_that(tmp_path: Path) -> None:
    """A checkpoint after each step, and the run comes to its end."""
    flags = [*TINY, *OFTEN, "--max-steps", "20", "--checkpoint-minutes", "1e-9"]
    process = fastvae("train", *flags, "--output", "run", folder=tmp_path, timeout=120)
    assert process.returncode == 0, process.stderr
    kept = [folder_step(folder) for folder in checkpoints.folders(tmp_path / "run")]
    assert kept == list(range(20, -1, -1))


def test_by_time_a_mistake_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", *TINY, "--checkpoint-minutes", "0", "--output", str(tmp_path / "run")])
    assert ended.value.code == 2
    assert "--checkpoint-minutes must be positive, got 0.0" in capsys.readouterr().err
