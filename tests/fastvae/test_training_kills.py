"""Real processes, killed by SIGKILL wherever it finds them, resumed: the same run to the bit."""

import random
import shlex
import subprocess
import time
from pathlib import Path

import pytest
from running import (
    TINY,
    assert_same_run,
    command_line,
    ended,
    kill,
    lines_written,
    metrics,
    ranks,
    started,
)

# 300 steps of a millisecond or two with a checkpoint every fourth, so that most of the time one is
# being written, with lines between the checkpoints and checkpoints between the lines.
FLAGS = [
    *TINY,
    *shlex.split(
        "--max-steps 300 --epochs 100 --log-every 7 --eval-every 2 --checkpoint-every 0.16 "
        "--ema-decay 0.95"
    ),
]
STEPS = 300
CASES = {
    "one process": (1, ""),
    "accumulated": (1, "--gradient-accumulation-steps 2 --clip-norm 5"),
    "compiled": (1, "--compile on"),
    "two processes": (2, ""),
    "two processes, accumulated": (2, "--gradient-accumulation-steps 2"),
}


def start(case: str, folder: Path, *flags: str) -> subprocess.Popen[bytes]:
    count, more = CASES[case]
    begin = [*command_line(), "train"] if count == 1 else ranks(count)
    resumed = "--resume" in flags
    command = [*begin, *flags] if resumed else [*begin, *FLAGS, *more.split(), *flags]
    return started(command, folder, ACCELERATE_USE_CPU="true")


def killed(process: subprocess.Popen[bytes], run: Path, moment: random.Random) -> bool:
    """Kill it and all its processes some time after it wrote its next lines; False where it came to
    its end before."""
    lines = lines_written(run) + moment.randrange(1, 8)
    end = time.monotonic() + 120
    while lines_written(run) < lines and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.001)
    time.sleep(moment.random() * 0.03)
    alive = process.poll() is None
    kill(process)
    return alive


def killed_and_resumed(case: str, kills: int, folder: Path) -> int:
    """How often a run was killed before it ended; it must be the one that was not."""
    process = ended(start(case, folder, "--output", "straight"))
    assert process.returncode == 0, process.stderr
    done = 0
    moment = random.Random(f"{case} {kills}")
    process = start(case, folder, "--output", "run")
    for _ in range(kills):
        if not killed(process, folder / "run", moment):
            break
        done += 1
        process = start(case, folder, "--resume", "run")
    found = ended(process)
    assert found.returncode == 0, found.stderr
    assert_same_run(folder / "run", folder / "straight")
    steps = [line["step"] for line in metrics(folder / "run")]
    assert steps == sorted(set(steps)) and steps[-1] == STEPS
    return done


def test_killed(tmp_path: Path) -> None:
    assert killed_and_resumed("one process", 1, tmp_path) == 1


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_killed_again_and_again(case: str, tmp_path: Path) -> None:
    """Five cases of five kills."""
    assert killed_and_resumed(case, 5, tmp_path) == 5
