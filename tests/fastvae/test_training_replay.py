"""Steps that cannot be replayed are taken all the same, and the run says why."""

from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from conftest import Trained
from running import metrics, results, train

from fastvae.training import replay as replay_module
from fastvae.training.replay import PLAIN_STEPS, Replay
from fastvae.training.updates import Updates

PROBLEM = "operation not permitted when stream is capturing"


@pytest.fixture
def failing_captures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many calls each capture was asked for."""
    asked: list[int] = []

    def captured(function: Any, times: int = 1) -> tuple[None, str]:
        asked.append(times)
        return None, PROBLEM

    monkeypatch.setattr(replay_module, "captured", captured)
    return asked


def test_a_failed_capture_is_not_tried_again(failing_captures: list[int]) -> None:
    taken: list[int] = []
    replay = Replay(lambda: taken.append(1), Accelerator(cpu=True), steps_per_launch=4)
    for _ in range(10):
        replay(replay.size(100))
    assert len(taken) == 10 == replay.done
    assert failing_captures == [1]
    assert replay.facts() == {"steps_per_launch": 1, "problem": PROBLEM}


def test_the_run_says_why(
    failing_captures: list[int],
    trained: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line on the screen, and in results.json; the numbers are those of any run."""
    make = Updates.__init__

    def with_replay(self: Updates, *arguments: Any, **named: Any) -> None:
        make(self, *arguments, **named)
        self.replay = Replay(self._update, self.accelerator, None)

    monkeypatch.setattr(Updates, "__init__", with_replay)
    run = train(output=tmp_path / "run")
    told = [line for line in capsys.readouterr().err.splitlines() if "CUDA graph" in line]
    assert len(told) == 1 and PROBLEM in told[0]
    assert results(run)["replay"] == {"steps_per_launch": 1, "problem": PROBLEM}
    assert metrics(run) == metrics(trained.run)
    assert failing_captures == [1]
    assert metrics(run)[-1]["step"] > PLAIN_STEPS
