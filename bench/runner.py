"""Sections in processes of their own, which hand over each case as soon as it is measured.

Whatever becomes of a process (a fault of the device, a hang, too little time), what it had handed
over stays, and no other process hears of it.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from sections import Section
from settings import ROOT, Settings

GRACE = 10.0
"""Seconds beyond its deadline after which a section is ended."""
POLL = 0.05
NO_DEVICE = 3
"""Exit status of a process that finds no GPU."""


class NoDevice(Exception):
    """There is no GPU."""


def run_section(
    section: Section, settings: Settings, found: dict[str, Any], changed: Callable[[], None]
) -> None:
    """Run one section to its end, or to `GRACE` seconds after its deadline.

    `found` takes what it says: facts, `rows`, `left_out`, `failures`; and `status`: running, then
    ok or failed, with `error`. `changed` is called after each of them. Where a process dies in a
    case, another goes on behind that case. Raises NoDevice.
    """
    found |= {"status": "running", "rows": [], "left_out": [], "failures": []}
    skipped: list[str] = []
    while True:
        begun = ""
        with _Process(section.run, replace(settings, skipped=tuple(skipped))) as process:
            for kind, value in process.lines(settings.deadline + GRACE):
                begun = value if kind == "begun" else begun
                add(found, kind, value)
                changed()
            status, said = process.status, process.said()
        if status == NO_DEVICE:
            raise NoDevice(said)
        if status == 0:
            break
        where = f"in {begun}" if begun else "before its first case"
        ended = "did not end in time" if status is None else f"ended with status {status}"
        found["failures"].append(f"the process {ended}, {where}: {said}")
        if status is None or not begun or begun in skipped:
            break
        skipped.append(begun)
        changed()
    found["status"] = "failed" if found["failures"] else "ok"
    changed()


def add(found: dict[str, Any], kind: str, value: Any) -> None:
    """One thing that a section says, to what it has said."""
    if kind == "facts":
        found |= value
    elif kind != "begun":
        found[{"row": "rows", "failure": "failures"}.get(kind, kind)].append(value)


class Warmers:
    """Processes that compile what is to be timed later, while nothing is timed."""

    def __init__(self, sections: list[Section], settings: Settings) -> None:
        """As many as there are cores for."""
        share = min(1.0, (os.cpu_count() or 1) / 16)
        self.began = time.monotonic()
        self.processes = [
            _Process(section.warm, replace(settings, part=(part, parts)), compilers=4)
            for section in sections
            if section.warm and (parts := max(1, round(share * section.warmers)))
            for part in range(parts)
        ]

    def wait(self, seconds: float) -> dict[str, Any]:
        """Wait until all have ended, so long at most; end the others. What came of them."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and any(p.running for p in self.processes):
            time.sleep(POLL)
        lines = [line for p in self.processes for line in p.written()]
        compiled = sum(kind == "row" for kind, _ in lines)
        failures = [value for kind, value in lines if kind == "failure"]
        ended = sum(not p.running for p in self.processes)
        self.close()
        return {
            "processes": len(self.processes),
            "ended": ended,
            "cases": compiled,
            "failures": failures,
            "seconds": round(time.monotonic() - self.began, 1),
        }

    def close(self) -> None:
        for process in self.processes:
            process.end()


class _Process:
    """One that runs MODULE:FUNCTION by `serve`, with all that it starts."""

    def __init__(self, run: str, settings: Settings, *, compilers: int | None = None) -> None:
        """`compilers`: how many processes Inductor starts of its own; None: one for each core."""
        environment = dict(os.environ)
        if compilers is not None:
            environment["TORCHINDUCTOR_COMPILE_THREADS"] = str(compilers)
        self.folder = tempfile.TemporaryDirectory()
        self.path, self.log = (Path(self.folder.name) / name for name in ("lines", "log"))
        self.path.touch()
        self.read = 0
        self.status: int | None = None
        """None while it runs, and where it had to be ended."""
        command = [sys.executable, str(ROOT / "bench" / "gpu.py"), "--section", run]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "--settings", settings.to_json(), "--lines", str(self.path)],
                stdin=subprocess.PIPE,  # closed when this process dies, however it does
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=ROOT,
                env=environment,
            )

    def __enter__(self) -> "_Process":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def lines(self, until: float) -> Iterator[tuple[str, Any]]:
        """What it says, until it ends or time.monotonic() is `until`."""
        while True:
            running = self.running  # before reading: what it said last is read too
            yield from self.written()
            if not running:
                self.status = self.process.returncode
                return
            if time.monotonic() > until:
                return
            time.sleep(POLL)

    def written(self) -> Iterator[tuple[str, Any]]:
        """What it has said since the last call."""
        with self.path.open("rb") as file:
            file.seek(self.read)
            whole, newline, _ = file.read().rpartition(b"\n")
        self.read += len(whole) + len(newline)
        for line in whole.splitlines():
            kind, value = json.loads(line)
            yield kind, value

    def said(self) -> str:
        """The end of what it printed."""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return "\n".join(lines[-25:]) or "it said nothing"

    def end(self) -> None:
        """It and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.folder.cleanup()


def serve(run: str, settings: Settings, path: Path) -> int:
    """In the process of a section: write what MODULE:FUNCTION yields to `path`, a line each."""
    threading.Thread(target=_die_with_the_parent, daemon=True).start()
    if settings.on.startswith("cuda"):
        import torch

        if not torch.cuda.is_available():
            print("PyTorch finds no CUDA GPU")
            return NO_DEVICE
        torch.cuda.set_device(settings.device)
    import bare  # noqa: F401  # before fastvae

    module, _, function = run.partition(":")
    with path.open("ab", buffering=0) as file:
        for found in getattr(import_module(module), function)(settings):
            file.write(json.dumps(found).encode() + b"\n")
    return 0


def _die_with_the_parent() -> None:
    """Whose end closes standard input. Nobody is left behind on the device."""
    if os.read(0, 1) == b"":
        os.killpg(0, signal.SIGKILL)
