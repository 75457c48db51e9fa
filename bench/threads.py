"""How threads that wait should wait: steps a second of `fastvae train` on a CPU, alone and beside
programs that keep cores busy.

    python bench/threads.py [--data-dir DIR] [--only NAME …] [--rounds N] [--loops N …] [--quick]

All settings train at once, in processes of their own, and take turns of some seconds: those whose
turn it is not are stopped (SIGSTOP). Means, and the ratio to what fastvae does by itself
(fastvae/threads.py and fastvae/training/threads.py). Writes threads-cpu-NAME-DATE.json and .md into
--output (bench/results).
"""

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from record import write_results
from settings import ROOT

OURS, OURS_BESIDE = "fastvae's own", "fastvae's own, started beside others"
ALL = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
SETTINGS: dict[str, dict[str, str]] = {
    OURS: {},
    OURS_BESIDE: {},
    "GNU OpenMP's own": {"GOMP_SPINCOUNT": "300000", **ALL},
    "60,000 turns": {"GOMP_SPINCOUNT": "60000", **ALL},
    "2,000 turns": {"GOMP_SPINCOUNT": "2000", **ALL},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE", **ALL},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
SAID = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Case:
    """What is trained, and every how many steps it says so: often enough to count them by."""

    preset: str
    compiled: bool
    log_every: int

    def __str__(self) -> str:
        return f"{self.preset}-{'compiled' if self.compiled else 'eager'}"


CASES = {
    str(case): case
    for case in (
        Case("digits-mlp", False, 10),
        Case("digits-mlp", True, 10),
        Case("mnist-mlp", False, 5),
        Case("mnist-mlp", True, 5),
        Case("mnist-conv", False, 1),
        Case("mnist-conv", True, 1),
    )
}


class Training:
    """A run without an end in a process of its own, stopped but for its turns."""

    def __init__(
        self, case: Case, setting: dict[str, str], data_dir: Path | None, folder: Path
    ) -> None:
        self.case, self.run = case, Path(tempfile.mkdtemp(dir=folder)) / "run"
        command = [sys.executable, "-m", "fastvae.cli", "train", "--preset", case.preset]
        command += ["--compile", "on" if case.compiled else "off", "--max-steps", "100000000"]
        command += [
            "--epochs",
            "1e9",
            "--eval-every",
            "1e9",
            "--checkpoint-every",
            "1e9",
            "--heldout-limit",
            "100",
        ]
        command += ["--log-every", str(case.log_every), "--output", str(self.run)]
        if data_dir is not None:
            command += ["--data-dir", str(data_dir)]
        elif not case.preset.startswith("digits"):
            command += ["--data", "digits"]
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
        environment = {k: v for k, v in os.environ.items() if k not in SAID}
        environment |= {
            "PYTHONPATH": path,
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
            "CUDA_VISIBLE_DEVICES": "",
            **setting,
        }
        self.errors = self.run.parent / "stderr"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                command, env=environment, stdout=subprocess.DEVNULL, stderr=errors
            )

    def wait_for_first_steps(self) -> None:
        """Until it trains; then it is stopped."""
        while self.steps() < 3 * self.case.log_every:
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.case}: {self.errors.read_text()[-1000:]}")
            time.sleep(0.1)
        self.process.send_signal(signal.SIGSTOP)

    def steps(self) -> int:
        lines = self.run / "metrics.jsonl"
        return lines.read_bytes().count(b"\n") * self.case.log_every if lines.exists() else 0

    def turn(self, seconds: float) -> float:
        """Steps a second of so many seconds."""
        before, begin = self.steps(), time.monotonic()
        self.process.send_signal(signal.SIGCONT)
        time.sleep(seconds)
        if self.process.poll() is not None:
            raise RuntimeError(f"{self.case} has ended: {self.errors.read_text()[-1000:]}")
        self.process.send_signal(signal.SIGSTOP)
        return (self.steps() - before) / (time.monotonic() - begin)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for case in (CASES[name] for name in arguments.cases):
            for row in _measured(case, arguments, Path(folder)):
                rows.append(row)
                print("\n".join(_lines(row)), flush=True)
    head = (
        f"# How waiting threads wait\n\n{os.cpu_count()} cores, "
        f"{'quick, nothing in it means anything, ' if arguments.quick else ''}{arguments.rounds} "
        f"rounds of turns of {arguments.seconds:g} seconds: steps a second (means) and their ratio "
        "to fastvae's own setting, with its standard error."
    )
    table = ["| case | beside | setting | steps/s | of fastvae's own |", "| --- " * 5 + "|"]
    table += [line for row in rows for line in _lines(row)]
    path = write_results(
        arguments.output, "threads", torch.device("cpu"), head, "\n".join(table) + "\n", rows=rows
    )
    print(f"written: {path}.json and .md")
    return 0


def _measured(case: Case, arguments: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Steps a second of each setting, turn by turn: alone, then beside others."""
    with ExitStack() as stack:
        trainings = {}
        for name, setting in SETTINGS.items():
            with _busy((os.cpu_count() or 1) if name == OURS_BESIDE else 0):
                training = Training(case, setting, arguments.data_dir, folder)
                stack.callback(training.end)
                training.wait_for_first_steps()
            trainings[name] = training
        for loops in (0, *arguments.loops):
            rates: dict[str, list[float]] = {name: [] for name in SETTINGS}
            with _busy(loops):
                for _ in range(arguments.rounds):
                    for name in random.sample(list(SETTINGS), len(SETTINGS)):
                        rates[name].append(trainings[name].turn(arguments.seconds))
            yield {"case": str(case), "loops": loops, "steps_per_second": rates}


@contextmanager
def _busy(loops: int) -> Iterator[None]:
    """So many programs that do nothing but take their share of the cores."""
    programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def _lines(row: dict[str, Any]) -> list[str]:
    beside = f"{row['loops']} busy loop(s)" if row["loops"] else "alone"
    found = row["steps_per_second"]
    ours = statistics.mean(found[OURS])
    lines = []
    for name, rates in found.items():
        mean = statistics.mean(rates)
        spread = statistics.stdev(rates) / len(rates) ** 0.5 if len(rates) > 1 else float("nan")
        lines.append(
            f"| {row['case']} | {beside} | {name} | {mean:.1f} | "
            f"{mean / max(ours, 1e-9):.2f} ± {spread / max(ours, 1e-9):.2f} |"
        )
    return lines


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--data-dir", type=Path, help="where MNIST lies (default: the embedded digits)")
    add("--only", nargs="+", choices=CASES, default=[], metavar="NAME", help=f"of {list(CASES)}")
    add("--rounds", type=int, default=10, help="turns of each setting (default: 10)")
    add("--seconds", type=float, default=2.0, help="of a turn (default: 2)")
    loops = "numbers of programs beside which it trains too (default: 1 4)"
    add("--loops", type=int, nargs="+", default=[1, 4], metavar="N", help=loops)
    add("--quick", action="store_true", help="one short turn each, to see that everything runs")
    add("--output", type=Path, default=ROOT / "bench/results", help="folder of the results")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.rounds, arguments.seconds = 1, 0.2
    if min(arguments.rounds, *arguments.loops) < 1 or arguments.seconds <= 0:
        parser.error("--rounds and --loops are at least 1, --seconds is more than 0")
    arguments.cases = arguments.only or list(CASES)
    return arguments


if __name__ == "__main__":
    sys.exit(main())
