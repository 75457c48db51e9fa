"""What is shown while a run trains, to a terminal and to a file."""

import io
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from conftest import Trained
from running import metrics, train

from fastvae.training import log as log_module
from fastvae.training.course import Course, Line
from fastvae.training.log import RunLog


class Screen(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def log_steps(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, terminal: bool, seconds_a_step: float
) -> str:
    """What a run of 100 steps shows, a line of metrics after each."""
    screen, now = Screen(terminal), [0.0]
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(log_module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    log = RunLog(
        Accelerator(cpu=True), folder, bound="elbo", start_step=0, last_line=0, total_steps=100
    )
    log.say("hello")
    for step in range(1, 101):
        now[0] += seconds_a_step
        values = {"step": step, "loss": 3.14159, "elbo": -2.5, "images_per_second": 123.4}
        if step == 50:
            values["heldout_elbo"] = -2.75
        if terminal and step == 100:
            time.sleep(0.15)  # a bar is drawn ten times a second
        log.write(step, values)
    log.close()
    return screen.getvalue()


def test_to_a_file_a_line_every_few_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = log_steps(tmp_path, monkeypatch, terminal=False, seconds_a_step=1.0)
    assert "\r" not in shown
    lines = shown.splitlines()
    assert lines[0] == "hello"
    steps = [int(line.split()[1].split("/")[0]) for line in lines[1:]]
    assert steps == [1, *range(6, 100, 5), 100]
    assert lines[1] == "step 1/100  loss 3.14  elbo -2.50  images/s 123  01:39 left"
    assert lines[-1] == (
        "step 100/100  loss 3.14  elbo -2.50  held out -2.75  images/s 123  00:00 left"
    )


def test_a_fast_run_says_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = log_steps(tmp_path, monkeypatch, terminal=False, seconds_a_step=0.01)
    assert len(shown.splitlines()) == 3


def test_a_terminal_gets_a_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = log_steps(tmp_path, monkeypatch, terminal=True, seconds_a_step=1.0)
    assert "\r" in shown
    assert "hello" in shown
    assert "100/100" in shown
    assert "elbo=-2.50" in shown


def test_lines_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step}) for step in (5, 10, 15)]
    file.write_text("\n".join([*lines, '{"step": 20, "lo']))  # cut short by a crash
    RunLog(
        Accelerator(cpu=True), tmp_path, bound="elbo", start_step=10, last_line=10, total_steps=20
    ).close()
    assert file.read_text() == '{"step": 5}\n{"step": 10}\n'


def test_lines_that_are_written_later_are_the_same(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: each line while the steps after it are under way."""
    monkeypatch.setattr(Course, "_lines_may_wait", lambda self: True)
    delays = []
    write = Course._write

    def noting(self: Course, line: Line) -> None:
        delays.append(self.updates.done - line.step)
        write(self, line)

    monkeypatch.setattr(Course, "_write", noting)
    run = train(output=tmp_path / "run")
    assert metrics(run) == metrics(trained.run)
    assert max(delays) >= 6  # the steps to the next line, or to an evaluation
    assert delays[-1] == 0


def test_a_run_that_diverges_says_so_later_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Course, "_lines_may_wait", lambda self: True)
    with pytest.raises(SystemExit):
        train("--learning-rate", "1e30", "--max-bad-steps", "7", output=tmp_path / "run")
    told = capsys.readouterr().err
    assert "had a loss or gradient that is not finite" in told
    report = json.loads((tmp_path / "run/bad-steps.json").read_text())
    assert report["steps_in_a_row"] >= 7
