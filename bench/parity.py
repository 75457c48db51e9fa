"""Whether the kernels compute what they should: speed counts for nothing otherwise."""

import importlib
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
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bare import MISSING
from settings import ROOT, Settings

# Of the training step, on a GPU. They do without conftest.py, which needs the command line's
# packages.
REPLAY = "tests/fastvae/test_replay_cuda.py"
WAITS = "tests/fastvae/test_no_host_waits_cuda.py"
FAULTS = "tests/fastvae/test_faults_cuda.py"


class Red(Exception):
    """Parity is not shown; carries what was found."""

    def __init__(self, message: str, found: dict[str, Any]) -> None:
        super().__init__(message)
        self.found = found


def run(settings: Settings) -> dict[str, Any]:
    """Run the parity tests in processes of their own. Raises Red unless all are green and, on a
    GPU, the Triton kernels were among what was tested.

    `red` says what is wrong with the kernels and with replayed steps, of which no speed is then
    reported; a host that waits, or a fault that is not handled, is a failure too, but makes no
    speed wrong.
    """
    quick = ["-k", "test_shapes or test_layouts"] if settings.quick else []
    found, problem = _pytest([*settings.tests, *_in_parallel(settings), *quick])
    if not problem and settings.device.type == "cuda" and not found["kernels_on_gpu"]:
        problem = "no test ran the Triton kernels on the GPU"
    found["not_importable"] = _not_importable()
    found["replay"], replay_problem = _pytest([REPLAY, "--noconftest"])
    found["waits"], waits_problem = _pytest([WAITS, "--noconftest"])
    found["faults"], faults_problem = _pytest([FAULTS, "--noconftest"])
    found["red"] = {"kernels": problem, "replay": replay_problem}
    problems = [p for p in (problem, replay_problem, waits_problem, faults_problem) if p]
    if problems:
        raise Red("\n\n".join(problems), found)
    return found


def _pytest(arguments: list[str]) -> tuple[dict[str, Any], str]:
    """What the tests found, and the end of what pytest said unless they are green."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", *arguments, "-q", f"--junitxml={report}"]
        command += ["-m", "not slow", "-p", "no:cacheprovider"]
        environment = dict(os.environ)
        paths = [str(ROOT), str(ROOT / "kernels"), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=420
        )
        found = _counted(report)
    found |= {
        "command": shlex.join(["pytest", *command[3:]]).replace(str(report), "REPORT"),
        "seconds": round(time.monotonic() - began, 1),
    }
    if not done.returncode:
        return found, ""
    tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-40:])
    return found, f"{found['command']} ended with status {done.returncode}:\n{tail}"


def _in_parallel(settings: Settings) -> list[str]:
    """Where pytest-xdist is there, several processes: most of the time is Triton's compiler."""
    workers = min(8, (os.cpu_count() or 1) // 2)
    if settings.device.type != "cuda" or workers < 2 or find_spec("xdist") is None:
        return []
    return ["-n", str(workers)]


def _counted(report: Path) -> dict[str, Any]:
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
        "failures": failures,
        "left_out": dict(reasons),
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
