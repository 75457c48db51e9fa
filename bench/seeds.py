"""Time to quality: seeds of `fastvae/speedrun.py`, as many as there is time for."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from bare import MISSING
from settings import Found, Settings

SEEDS = 2
POLL = 0.2


def run(settings: Settings) -> Iterator[Found]:
    """What the command finds, told after each seed. Where none ends in time, that is left out."""
    missing = [*MISSING, *(["matplotlib"] if find_spec("matplotlib") is None else [])]
    if missing or not (settings.mnist_dir or settings.quick):
        yield "left_out", f"{', '.join(missing)} not installed" if missing else "no --mnist-dir"
        return
    seeds = 1 if settings.quick else SEEDS
    given = (
        ["--quick", "--data", "digits"] if settings.quick else ["--data-dir", settings.mnist_dir]
    )
    # What is still written when the time is up needs no folder.
    on_cpu = {"ACCELERATE_USE_CPU": "true"} if settings.on == "cpu" else {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder, done = Path(name), 0
        command = [
            sys.executable,
            "-m",
            "fastvae.speedrun",
            "--seeds",
            str(seeds),
            *map(str, given),
        ]
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(
                [*command, "--runs", str(folder / "runs"), "--output", str(folder)],
                env={**os.environ, **on_cpu},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        while True:
            running = process.poll() is None  # before looking: what it wrote last is seen too
            for path in folder.glob("speedrun-*.json"):
                found = _whole(path)
                if len(found.get("seeds", {})) > done:
                    done = len(found["seeds"])
                    yield "facts", found
            if not running or settings.seconds_left < 0:
                break
            time.sleep(POLL)
        said = (folder / "log").read_text(errors="replace").strip()[-1000:]
        if not running and process.returncode:
            yield "failure", f"the command ended with status {process.returncode}: {said}"
        elif done < seeds:
            yield "left_out", f"{seeds - done} of {seeds} seeds: no time left ({said or 'silent'})"


def _whole(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except ValueError:  # half written
        return {}
