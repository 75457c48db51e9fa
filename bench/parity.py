"""Whether the kernels compute what they should: speed counts for nothing otherwise.

Each row is one suite of tests, in a pytest of its own, handed over as soon as it ends. A suite
that is green is remembered in the library's cache: by the source of everything that it runs, the
machine and the versions. The same run on the same machine takes it from there.
"""

import hashlib
import importlib
import json
import os
import pkgutil
import re
import shlex
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bare import MISSING
from fastvae_kernels.cpu.build import cache_folder
from machine import describe
from settings import ROOT, Found, Settings

Row = dict[str, Any]

# Every kernel in every dtype, and every kind of stride (none, a row's, a column's, 0, unaligned)
# in float32; rows that several programs share; data sets read through indices; gradients written
# ahead.
_ONCE = (
    "(test_layouts and not test_layouts_of and (contiguous or float32 and"
    " (transposed or packed_second or channels_last or expanded_batch or sliced or unaligned)))"
    " or test_dtypes_with_samples_and_prior"
    " or (test_layouts_of_the_prior and transposed)"
    " or (test_packed_is_the_same_bit_for_bit and rows and None and both)"
    " or (test_layouts_of_the_data_set and sliced)"
    " or (test_shapes and float32 and 20000)"
    " or (test_row_weight and test_shapes and bfloat16 and 507)"
)
_MODULES = sorted((ROOT / "kernels" / "fastvae_kernels" / "triton_kernels").glob("[!_]*.py"))
_OF_KERNELS = tuple(
    f"tests/kernels/test_{name}.py"
    for name in (*(module.stem for module in _MODULES), "indices", "row_weight")
    if (ROOT / "tests" / "kernels" / f"test_{name}.py").exists()
)
# Of the training step. They do without conftest.py, which needs the command line's packages.
_STEPS = "tests/fastvae"


@dataclass(frozen=True)
class Suite:
    """Some tests that run together, and what is known of the rest if they are green."""

    name: str
    tests: tuple[str, ...]
    chosen: str = ""
    """As pytest's -k; all unless given."""
    of_steps: bool = False


SMOKE = (
    Suite("kernels", _OF_KERNELS, _ONCE),
    Suite("replay", (f"{_STEPS}/test_replay_cuda.py",), "200 and (bf16 or importance)", True),
    Suite("compiled", (f"{_STEPS}/test_compiled_cuda.py",), "", True),
)
FULL = (
    Suite("kernels", ("tests/kernels",)),
    Suite("replay", (f"{_STEPS}/test_replay_cuda.py",), "", True),
    Suite("waits", (f"{_STEPS}/test_no_host_waits_cuda.py",), "", True),
    Suite("faults", (f"{_STEPS}/test_faults_cuda.py",), "", True),
)


def smoke(settings: Settings) -> Iterator[Found]:
    """What must be green before anything is timed, in under a minute."""
    yield from run(SMOKE, settings)


def full(settings: Settings) -> Iterator[Found]:
    """Everything. Of what is red here, no speed that was found before counts."""
    yield from run(FULL, settings)
    yield "facts", {"not_importable": _not_importable()}


def run(suites: tuple[Suite, ...], settings: Settings) -> Iterator[Found]:
    """All suites at once; a row for each as it ends. `green`: its tests passed, and on a GPU some
    ran there; `problem` says what is wrong; neither where it did not end in time."""
    machine = describe(settings.device)
    with tempfile.TemporaryDirectory() as folder:
        running = {}
        for suite in suites:
            command = _command(suite, settings)
            kept = _kept(command, machine)
            if kept.exists() and not settings.fresh:
                yield "row", {**json.loads(kept.read_text()), "seen_before": True}
            else:
                running[suite.name] = _Run(suite, command, Path(folder), kept)
        while running:
            late = settings.seconds_left < 0
            for name, each in list(running.items()):
                if each.process.poll() is not None or late:
                    del running[name]
                    yield "row", (row := each.row(settings.device.type))
                    if row["problem"] or not row["green"]:
                        yield "failure", row["problem"] or f"{row['command']}: no time left"
            time.sleep(0.05)


def _command(suite: Suite, settings: Settings) -> list[str]:
    """Pytest's arguments."""
    on_gpu = settings.device.type == "cuda"
    chosen = suite.chosen
    if suite.of_steps:
        command = [*suite.tests, "--noconftest", "-m", "not slow"]
    elif on_gpu:
        chosen = f"triton-cuda and ({chosen})" if chosen else ""
        command = [*suite.tests, "-m", "gpu and not slow"]
        # Where pytest-xdist is there, several processes: most of the time is Triton's compiler.
        workers = min(12, (os.cpu_count() or 1) // 2)
        command += ["-n", str(workers)] if workers > 1 and find_spec("xdist") is not None else []
    else:
        command = [*suite.tests, "-m", "not slow"]
    if settings.quick and not suite.of_steps:
        command, chosen = ["tests/kernels/test_bernoulli_nll.py"], "test_layouts and contiguous"
    return [*command, "-q", "-p", "no:cacheprovider", *(["-k", chosen] if chosen else [])]


class _Run:
    """One pytest that runs."""

    def __init__(self, suite: Suite, command: list[str], folder: Path, kept: Path) -> None:
        self.suite, self.command, self.kept = suite, command, kept
        self.report, self.log = (folder / f"{suite.name}{end}" for end in (".xml", ".log"))
        self.began = time.monotonic()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pytest", *command, f"--junitxml={self.report}"],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def row(self, device: str) -> Row:
        """What came of it, kept if it is green. One that runs still is ended."""
        status = self.process.poll()
        if status is None:
            self.process.kill()
            self.process.wait()
        found = _counted(self.report)
        problem = ""
        if status:
            lines = self.log.read_text(errors="replace").strip().splitlines()
            problem = f"ended with status {status}:\n" + "\n".join(lines[-40:])
        elif status == 0 and device == "cuda":
            ran = found["passed"] if self.suite.of_steps else found["kernels_on_gpu"]
            problem = "" if ran else "no test ran on the GPU"
        command = shlex.join(["pytest", *self.command])
        row = {
            "suite": self.suite.name,
            "command": command,
            "seconds": round(time.monotonic() - self.began, 1),
            "green": status == 0 and not problem,
            "problem": f"{command}: {problem}" if problem else "",
            "seen_before": False,
            **found,
        }
        if row["green"]:
            self.kept.parent.mkdir(parents=True, exist_ok=True)
            self.kept.write_text(json.dumps(row))
        return row


def _kept(command: list[str], machine: dict[str, Any]) -> Path:
    """Where the outcome of these tests, of this code, on this machine is remembered."""
    digest = hashlib.sha256(json.dumps([command, machine]).encode())
    for name in ("fastvae", "kernels", "tests", "bench"):
        for file in sorted((ROOT / name).rglob("*.[pc]*")):
            if file.suffix in (".py", ".c"):
                digest.update(f"\0{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return cache_folder() / "parity" / f"{digest.hexdigest()[:32]}.json"


def _counted(report: Path) -> Row:
    """How many tests passed, failed and were left out, and why."""
    outcomes: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    failures, kernels_on_gpu = [], 0
    cases = ElementTree.parse(report).iter("testcase") if report.exists() else []
    for case in cases:
        name = f"{case.get('classname')}::{case.get('name')}"
        if (skipped := case.find("skipped")) is not None:
            outcomes["skipped"] += 1
            reasons[skipped.get("message", "")] += 1
        elif case.find("failure") is not None or case.find("error") is not None:
            outcomes["failed"] += 1
            failures.append(name)
        else:
            outcomes["passed"] += 1
            kernels_on_gpu += bool(re.search(r"triton-cuda", name))
    return {
        **{key: outcomes[key] for key in ("passed", "failed", "skipped")},
        "kernels_on_gpu": kernels_on_gpu,
        "failed_tests": failures,
        "skipped_because": dict(reasons),
    }


def _not_importable() -> dict[str, str]:
    """Modules of the library that do not import here, and the reason (a package not installed)."""
    missing = dict.fromkeys(MISSING, "not installed; what imports it is given a stand-in")
    for package in ("fastvae_kernels", "fastvae"):
        try:
            path = importlib.import_module(package).__path__
        except ImportError as error:
            missing[package] = str(error)
            continue
        for module in pkgutil.walk_packages(path, f"{package}.", onerror=lambda name: None):
            try:
                importlib.import_module(module.name)
            except ImportError as error:
                missing[module.name] = str(error)
    return missing
