"""How threads that wait should wait: images a second of `fastvae train` on a CPU, alone and beside
programs that keep all cores busy.

    python bench/threads.py [--data-dir DIR] [--only NAME …] [--rounds N] [--loops N] [--quick]

Each setting trains in processes of its own, which take turns in every round. Medians, and the ratio
to the setting that fastvae makes (`fastvae/threads.py`) within each round. Writes
threads-cpu-NAME-DATE.json and .md into --output (bench/results).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from record import write_results
from settings import ROOT

OURS = "fastvae's own"
SETTINGS: dict[str, dict[str, str]] = {
    OURS: {},
    "GNU OpenMP's own": {"GOMP_SPINCOUNT": "300000"},
    "no turn": {"GOMP_SPINCOUNT": "0"},
    "2,000 turns": {"GOMP_SPINCOUNT": "2000"},
    "20,000 turns": {"GOMP_SPINCOUNT": "20000"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
SAID = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")


@dataclass(frozen=True)
class Case:
    """What is trained, and for how many steps."""

    preset: str
    compiled: bool
    steps: int

    def __str__(self) -> str:
        return f"{self.preset}-{'compiled' if self.compiled else 'eager'}"


CASES = {
    str(case): case
    for case in (
        Case("mnist-mlp", False, 1500),
        Case("mnist-mlp", True, 1500),
        Case("vae", False, 3000),
        Case("vae", True, 3000),
        Case("mnist-conv", False, 120),
        Case("mnist-conv", True, 120),
    )
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for case in (CASES[name] for name in arguments.cases):
            for loops in (0, arguments.loops):
                rates = _measure(case, loops, arguments, Path(folder))
                rows.append({"case": str(case), "loops": loops, "images_per_second": rates})
                print("\n".join(_lines(rows[-1])), flush=True)
    head = (
        f"# How waiting threads wait\n\n{arguments.rounds} rounds, {os.cpu_count()} cores, "
        f"{'quick, nothing in it means anything, ' if arguments.quick else ''}images a second "
        "(medians) and the ratio to fastvae's own setting within a round, with its quartiles."
    )
    table = ["| case | beside | setting | images/s | of fastvae's own |", "| --- " * 5 + "|"]
    table += [line for row in rows for line in _lines(row)]
    path = write_results(
        arguments.output, "threads", torch.device("cpu"), head, "\n".join(table) + "\n", rows=rows
    )
    print(f"written: {path}.json and .md")
    return 0


def _measure(
    case: Case, loops: int, arguments: argparse.Namespace, folder: Path
) -> dict[str, list[float]]:
    """Images a second of each setting, round by round."""
    rates: dict[str, list[float]] = {name: [] for name in SETTINGS}
    steps = 20 if arguments.quick else max(20, case.steps // (4 if loops else 1))
    _train(case, 20, SETTINGS[OURS], arguments.data_dir, folder)  # what is compiled has been
    for _ in range(arguments.rounds):
        for name, setting in SETTINGS.items():
            with _busy(loops):
                rates[name].append(_train(case, steps, setting, arguments.data_dir, folder))
    return rates


def _train(
    case: Case, steps: int, setting: dict[str, str], data_dir: Path | None, folder: Path
) -> float:
    """Images a second, as a run in a process of its own has them in its results."""
    run = Path(tempfile.mkdtemp(dir=folder)) / "run"
    command = [sys.executable, "-m", "fastvae.cli", "train", "--preset", case.preset]
    command += ["--compile", "on" if case.compiled else "off", "--max-steps", str(steps)]
    command += ["--eval-every", "1e9", "--checkpoint-every", "1e9", "--heldout-limit", "100"]
    command += ["--output", str(run)]
    command += ["--data", "digits"] if data_dir is None else ["--data-dir", str(data_dir)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = {k: v for k, v in os.environ.items() if k not in SAID}
    environment |= {
        "PYTHONPATH": path,
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "CUDA_VISIBLE_DEVICES": "",
        **setting,
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{case}: {done.stderr[-1000:]}")
    return json.loads((run / "results.json").read_text())["images_per_second"]


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
    beside = f"{row['loops']} busy loops" if row["loops"] else "alone"
    found = row["images_per_second"]
    lines = []
    for name, rates in found.items():
        ratios = [rate / own for rate, own in zip(rates, found[OURS], strict=True)]
        spread = f"{min(ratios):.2f}–{max(ratios):.2f}"
        if len(ratios) > 1:
            low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
            spread = f"{low:.2f}–{high:.2f}"
        lines.append(
            f"| {row['case']} | {beside} | {name} | {statistics.median(rates):,.0f} | "
            f"{statistics.median(ratios):.2f} [{spread}] |"
        )
    return lines


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--data-dir", type=Path, help="where MNIST lies (default: the embedded digits)")
    add("--only", nargs="+", choices=CASES, default=[], metavar="NAME", help=f"of {list(CASES)}")
    add("--rounds", type=int, default=5, help="interleaved rounds (default: 5)")
    add("--loops", type=int, default=4, help="programs beside which it trains too (default: 4)")
    add("--quick", action="store_true", help="20 steps each, to see that everything runs")
    add("--output", type=Path, default=ROOT / "bench/results", help="folder of the results")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1 or arguments.loops < 1:
        parser.error("--rounds and --loops are at least 1")
    arguments.cases = arguments.only or list(CASES)
    return arguments


if __name__ == "__main__":
    sys.exit(main())
