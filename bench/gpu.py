"""Every measurement on a GPU in one command, in under eight minutes.

    python bench/gpu.py [--mnist-dir DIR] [--output FOLDER]
    python bench/gpu.py --plan       # what it would do, in which time, with what; needs no GPU

Parity tests come first; without them green no speed is measured. Each section is a process of its
own, what is worth most comes first, and gpu-NAME-DATE.json and .md are written after every single
case, into --output, the folder that the environment variable OUT names, or bench/results: cut at
any moment, the run leaves what it had. Needs torch, triton, accelerate, numpy, pytest, scipy,
safetensors and huggingface_hub; what needs another package is left out and named. `--device cpu
--quick` tries the same code at tiny sizes where there is no GPU.
Status: 0, 1 if a section failed, 2 if there is no GPU.
"""

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from report import short_table, to_markdown
from runner import NoDevice, Warmers, run_section, serve
from sections import HOW, SECTIONS, Section
from settings import ROOT, Settings

UNKNOWN = {"device": "unknown", "cpu": "unknown", "system": "unknown", "versions": {}}
"""The machine, where the process that describes it died."""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    if arguments.section:
        return serve(arguments.section, Settings.from_json(arguments.settings), arguments.lines)
    chosen = [section for section in SECTIONS if section.name in arguments.only]
    if arguments.plan:
        print(plan(chosen, arguments))
        return 0
    # Runs from a source tree too, installed or not.
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    given = sys.argv[1:] if argv is None else argv
    results: dict[str, Any] = {
        "command": shlex.join(["python", "bench/gpu.py", *given]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "quick": arguments.quick,
        "rounds": arguments.rounds,
        "cut": True,  # until it has ended
        "sections": {},
    }
    report = _Report(results, arguments)
    try:
        _run(chosen, arguments, results, report)
    except NoDevice as problem:
        print(
            f"bench/gpu.py measures a CUDA GPU and finds none ({problem}); "
            "`--device cpu --quick` tries the same code on a CPU",
            file=sys.stderr,
        )
        return 2
    results["cut"] = False
    report.write()
    print(short_table(results))
    print(f"written: {report.path}.json and .md".replace(f"{ROOT}/", ""))
    return int(any(s["status"] == "failed" for s in results["sections"].values()))


def _run(
    chosen: list[Section], arguments: argparse.Namespace, results: dict[str, Any], report: "_Report"
) -> None:
    """All sections in their order, within --minutes. SIGTERM and SIGINT end what runs."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    ends = time.monotonic() + 60 * arguments.minutes
    figure = arguments.figure.resolve() if arguments.figure else None
    base = Settings(
        on=arguments.device,
        quick=arguments.quick,
        rounds=arguments.rounds,
        mnist_dir=str(arguments.mnist_dir.resolve()) if arguments.mnist_dir else None,
        fresh=arguments.fresh,
        cases=tuple(arguments.cases),
    )
    done = results["sections"]
    warmers = None
    try:
        for place, section in enumerate(chosen):
            began = time.monotonic()
            found: dict[str, Any] = {"status": "running"}
            done[section.name] = found
            later = [] if place + 1 == len(chosen) else chosen[place + 1 :]
            if why := _why_not(section, done, ends - began):
                found |= {"status": "skipped", "why": why}
                report.write()
                continue
            # Of a CPU nobody knows the times, and half a compilation leaves half a library there.
            limit = warming = ends - began
            if arguments.device != "cpu":
                limit = time_for(section, later, limit)
                warming = min(limit, 2 * section.seconds)
            settings = replace(
                base,
                deadline=began + limit,
                copy_bytes_per_second=done.get("copy", {}).get("bytes_per_second"),
                figure=str(figure or f"{report.path}-growth.png") if report.path else None,
            )
            if section.name == "smoke":
                warmers = Warmers(later, settings)
            run_section(section, settings, found, report.write)
            if warmers is not None:  # nothing is timed beside them
                results["warm"] = warmers.wait(began + warming - time.monotonic())
                warmers = None
            found["section_seconds"] = round(time.monotonic() - began, 1)
            report.write()
            print(f"{section.name}: {found['status']}, {found['section_seconds']} s", flush=True)
            for failure in found["failures"]:
                print(failure, file=sys.stderr, flush=True)
    finally:
        if warmers is not None:
            warmers.close()
        signal.signal(signal.SIGTERM, before)


def time_for(section: Section, later: Sequence[Section], left: float) -> float:
    """Seconds that a section may take of those that are left: what it is known to take and a third
    more, since it is worth more than what comes later; and where there is plenty, its share. The
    last one takes all."""
    share = section.seconds / (section.seconds + sum(each.seconds for each in later))
    return min(left, max(1.33 * section.seconds, max(share, section.share) * left))


def _why_not(section: Section, done: dict[str, Any], left: float) -> str:
    """Why a section is not run; empty if it is."""
    if left < 5:
        return "no time left"
    if red := not_green(done, section.needs):
        return f"parity tests not green ({', '.join(red)}): no speed is reported"
    return ""


def not_green(done: dict[str, Any], needs: Sequence[str]) -> list[str]:
    """Which of these parity tests have not been seen green, or have been seen red."""
    rows = [row for name in ("smoke", "parity") for row in done.get(name, {}).get("rows", [])]
    red = {row["suite"] for row in rows if row["problem"]}
    green = {row["suite"] for row in rows if row["green"]}
    return [suite for suite in needs if suite in red or suite not in green]


class _Report:
    """The files of the results, written anew whenever there is something to write."""

    def __init__(self, results: dict[str, Any], arguments: argparse.Namespace) -> None:
        self.results, self.arguments = results, arguments
        self.folder = arguments.output or Path(os.environ.get("OUT") or ROOT / "bench" / "results")
        self.path: Path | None = None
        """Without suffix; None before the machine is known, which the first section describes."""

    def write(self) -> None:
        results = self.results
        if self.path is None:
            copy = results["sections"]["copy"]
            if "machine" not in copy and copy["status"] == "running":
                return
            results["machine"] = copy.pop("machine", UNKNOWN)
            self.folder.mkdir(parents=True, exist_ok=True)
            self.path = self.folder.resolve() / self._name(results["machine"]["device"])
        for suffix, text in (
            (".json", json.dumps(results, indent=1) + "\n"),
            (".md", to_markdown(results)),
        ):
            new = self.path.with_name(f"{self.path.name}{suffix}.new")
            new.write_text(text)
            new.replace(self.path.with_name(f"{self.path.name}{suffix}"))  # whole at any moment

    def _name(self, device: str) -> str:
        kind = "gpu" if self.arguments.device.startswith("cuda") else "cpu"
        name = re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-")
        quick = "quick-" if self.arguments.quick else ""
        part = "growth-" if set(self.arguments.only) == {"copy", "smoke", "growth"} else ""
        return f"{quick}{part}{kind}-{name}-{self.results['date'][:10]}"


def plan(chosen: Sequence[Section], arguments: argparse.Namespace) -> str:
    """The sections with the seconds that they are expected to take, and what must be at hand."""
    lines = [f"{'section':<12}{'seconds':>8}{'until':>7}  needs"]
    total = 0.0
    budget = 60 * arguments.minutes
    for section in chosen:
        total += section.seconds
        fits = "" if total <= budget else "  (as time is left)"
        lines.append(
            f"{section.name:<12}{section.seconds:>8.0f}{total:>7.0f}  "
            f"{', '.join(section.needs) or '–'}{fits}"
        )
    lines += [
        f"{total:.0f} s expected in all, {budget:.0f} s allowed (--minutes {arguments.minutes:g}).",
        HOW,
        f"To carry: {_mebibytes(_tree())} of source"
        + (
            f", {_mebibytes(_mnist(arguments.mnist_dir))} of MNIST from {arguments.mnist_dir}."
            if arguments.mnist_dir
            else "; no --mnist-dir: whole runs on made-up digits, no time to quality."
        ),
    ]
    return "\n".join(lines)


def _tree() -> list[Path]:
    """The files that git knows, or all that are there."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    names = listed.stdout.split("\0") if listed.returncode == 0 else ROOT.rglob("*")
    return [path for name in names if (path := ROOT / name).is_file()]


def _mnist(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*-ubyte*") if path.is_file()]


def _mebibytes(paths: Sequence[Path]) -> str:
    return f"{sum(path.stat().st_size for path in paths) / 2**20:.1f} MiB"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    names = [section.name for section in SECTIONS]
    add("--device", default="cuda", help="cuda, cuda:1, … or cpu (default: cuda)")
    add("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    add("--plan", action="store_true", help="say what would be done and in which time, and stop")
    add("--only", nargs="+", choices=names, metavar="SECTION", help=f"of {', '.join(names)}")
    add("--rounds", type=int, default=7, help="interleaved rounds of each comparison (default: 7)")
    add("--minutes", type=float, default=8.0, help="stop measuring after so long (default: 8)")
    add("--fresh", action="store_true", help="show parity again that this machine has shown before")
    add("--cases", nargs="+", default=[], help="those with one of these in their names")
    add("--figure", type=Path, help="of the growth (default: beside the results)")
    add("--mnist-dir", type=Path, help="where MNIST lies: adds the time to quality")
    add("--output", type=Path, help="folder of the results (default: $OUT, or bench/results)")
    add("--section", help=argparse.SUPPRESS)  # in the process of a section, by `runner`
    add("--settings", help=argparse.SUPPRESS)
    add("--lines", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.rounds < 5:
        parser.error("--rounds: quartiles of fewer than 5 say nothing")
    # In the order of the table, whatever the order on the command line.
    asked = arguments.only or names
    needed = {"copy"} | ({"smoke"} if any(s.needs for s in SECTIONS if s.name in asked) else set())
    arguments.only = [name for name in names if name in asked or name in needed]
    return arguments


if __name__ == "__main__":
    sys.exit(main())
