"""How fast fastvae trains beside its peers on a CPU, in one command and one run.

    python bench/peers.py [--data-dir DIR] [--only NAME …] [--rounds N] [--seconds S] [--quick]

Each candidate trains in a process of its own; they take turns, so that each has the machine alone
(`peers_rounds.py`). Writes peers-cpu-NAME-DATE.json and .md into --output (bench/results), and
docs/speed.md with its figure where everything was measured. Status: 0, or 1 if a candidate failed.

`--only` takes candidates and configurations; what it leaves out makes the run a partial one, which
writes into .cache/peers, as `--quick` does, whose tiny sizes only show that everything runs.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe
from peers_cases import CANDIDATES, CASES, Case, variants
from peers_page import to_markdown, write_page
from peers_pythae import environment
from peers_rounds import Failed, Place, Worker, seconds_to_first_step, take_turn
from settings import ROOT
from step_cases import digit_like_images

from fastvae.data import load_data
from fastvae.data.config import DataConfig

CACHE = ROOT / ".cache/peers"
IMAGES = 60_000
COLD_STARTS = ("fastvae", "hand-written")
"""Started twice before they are measured: with nothing compiled yet, and with everything."""
UNTRAINED = 784 * np.log(2)
"""Nats of an image for who knows nothing of it; whoever trains is below."""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    if arguments.page:
        _write_page(json.loads(arguments.page.read_text()), ROOT / "docs")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the candidates end with us
    allowed = sorted(os.sched_getaffinity(0))[: arguments.cores]
    os.sched_setaffinity(0, allowed)  # the candidates inherit it
    torch.set_num_threads(len(allowed))
    work = CACHE / f"work-{os.getpid()}"
    work.mkdir(parents=True)
    try:
        return _run(arguments, work, len(allowed), sys.argv[1:] if argv is None else argv)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _run(arguments: argparse.Namespace, work: Path, cores: int, given: Sequence[str]) -> int:
    images, data = _write_images(arguments, work)
    place = Place(work, images, cores, CACHE / "pythae-venv/bin/python")
    missing = {}
    if "pythae" in arguments.candidates:
        try:
            environment(place.pythae.parent.parent)
        except (RuntimeError, OSError) as error:
            missing["pythae"] = str(error)
    results: dict[str, Any] = {
        "command": shlex.join(["python", "bench/peers.py", *given]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "quick": arguments.quick,
        "rounds": arguments.rounds,
        "seconds": arguments.seconds,
        "warm": arguments.warm,
        "cores": cores,
        "load_before": os.getloadavg()[0],
        "data": data,
        "machine": describe(torch.device("cpu")),
        "cases": {},
    }
    path = _result_path(arguments, results)
    for name in arguments.cases:
        began = time.monotonic()
        found = results["cases"][name] = _measure(CASES[name], arguments, place, missing)
        # Written after each, so that a run that is cut short leaves what it has.
        path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
        path.with_suffix(".md").write_text(to_markdown(results))
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
        for failed, why in found["failures"].items():
            print(f"{name}, {failed}: {why}", file=sys.stderr, flush=True)
    print(to_markdown(results))
    failures = any(case["failures"] for case in results["cases"].values())
    complete = not arguments.partial and not failures
    _write_page(results, ROOT / "docs" if complete else path.parent)
    print(f"written: {path}.json and .md")
    return int(failures)


def _measure(
    case: Case, arguments: argparse.Namespace, place: Place, missing: dict[str, str]
) -> dict[str, Any]:
    """All rounds of one case: {"rows": {candidate: {variant: …}}, "failures": {name: why}}."""
    rows: dict[str, Any] = {}
    failures = dict(missing)
    with ExitStack() as stack:
        workers = {}
        for candidate in (c for c in arguments.candidates if c not in missing):
            for variant in variants(candidate, case):
                try:
                    worker, first = _start(candidate, variant, case, place, stack)
                except Failed as error:
                    failures[f"{candidate} {variant}".strip()] = str(error)
                    continue
                workers[candidate, variant] = worker
                rows.setdefault(candidate, {})[variant] = {
                    "seconds_to_first_step": first,
                    "turns": [],
                }
                print(f"{case}: {worker.name} started", first, flush=True)
        for number in range(arguments.rounds):
            names = list(workers)
            shift = number % max(1, len(names))  # nobody always follows the same one
            for candidate, variant in names[shift:] + names[:shift]:
                worker = workers[candidate, variant]
                try:
                    turn = take_turn(worker, warm=arguments.warm, seconds=arguments.seconds)
                    _require_learning(turn["loss"])
                except Failed as error:
                    failures[worker.name] = str(error)
                    del workers[candidate, variant], rows[candidate][variant]
                    continue
                rows[candidate][variant]["turns"].append(turn)
            print(f"{case}: round {number + 1} of {arguments.rounds}", flush=True)
    return {"rows": {name: row for name, row in rows.items() if row}, "failures": failures}


def _start(
    candidate: str, variant: str, case: Case, place: Place, stack: ExitStack
) -> tuple[Worker, dict[str, float]]:
    """A worker past its first step, halted, and the seconds that first steps took."""
    first: dict[str, float] = {}
    cache = place.folder / "compiled"
    if candidate in COLD_STARTS:
        cache = place.folder / f"compiled-{case}-{candidate}-{variant}"
        for state in ("cold", "warm"):
            with Worker(candidate, variant, case, place, cache, log_every=1) as worker:
                first[state] = seconds_to_first_step(worker)
    worker = stack.enter_context(Worker(candidate, variant, case, place, cache))
    seconds = seconds_to_first_step(worker)
    worker.stop()
    if candidate in ("accelerate", "script", "pythae"):  # nothing compiled: cold is no other
        first["warm"] = seconds
    return worker, first


def _require_learning(loss: float | None) -> None:
    """None is a loss that nobody has looked at yet, or that there is not (the products alone)."""
    if loss is not None and loss > UNTRAINED:
        raise Failed(f"its loss is {loss:.1f}: it does not learn")


def _write_images(arguments: argparse.Namespace, work: Path) -> tuple[Path, str]:
    """The same bytes for all, in a file that fastvae reads as data of its own."""
    path = work / "images.npz"
    if arguments.data_dir:
        train, heldout = load_data(DataConfig("mnist", data_dir=arguments.data_dir), seed=0)
        train_images, heldout_images, data = train.tensor, heldout.tensor, "MNIST"
    else:
        count = 6000 if arguments.quick else IMAGES
        all_images = digit_like_images(count + 1000, torch.device("cpu"))
        train_images, heldout_images = all_images[:count], all_images[count:]
        data = "random images with the look of digits"
    np.savez(path, x_train=train_images.numpy(), x_test=heldout_images.numpy())
    return path, f"{len(train_images):,} {data}" if not arguments.data_dir else data


def _result_path(arguments: argparse.Namespace, results: dict[str, Any]) -> Path:
    """Without its suffix."""
    folder = arguments.output or (CACHE if arguments.partial else ROOT / "bench/results")
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^A-Za-z0-9]+", "-", results["machine"]["device"]).strip("-")
    quick = "quick-" if arguments.quick else ""
    return folder.resolve() / f"{quick}peers-cpu-{name}-{results['date'][:10]}"


def _write_page(results: dict[str, Any], folder: Path) -> None:
    write_page(results, folder / "speed.md", folder / "figures/peers.png")
    print(f"written: {folder / 'speed.md'} and figures/peers.png")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--data-dir", type=Path, help="where MNIST lies (default: random digit-like images)")
    names = [*CANDIDATES, *CASES]
    add("--only", nargs="+", choices=names, default=[], metavar="NAME", help=f"of {names}")
    add("--rounds", type=int, help="interleaved rounds (default: 5; with --quick 2)")
    add("--seconds", type=float, help="of each turn that is measured (default: 5; quick 0.3)")
    add("--warm", type=float, help="seconds of each turn before that (default: 1; quick 0.1)")
    add("--cores", type=int, default=2, help="use so many (default: 2)")
    add("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    add("--output", type=Path, help="folder of the results")
    add("--page", type=Path, metavar="JSON", help="only write docs/speed.md anew, from these")
    arguments = parser.parse_args(argv)
    quick = arguments.quick
    for name, value in {"rounds": (5, 2), "seconds": (5.0, 0.3), "warm": (1.0, 0.1)}.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value[quick])
        if getattr(arguments, name) <= 0:
            parser.error(f"--{name} is above 0")
    if arguments.cores < 1:
        parser.error("--cores is at least 1")
    # All of a kind where none of it is named.
    arguments.candidates = [n for n in CANDIDATES if n in arguments.only] or list(CANDIDATES)
    arguments.cases = [n for n in CASES if n in arguments.only] or list(CASES)
    arguments.partial = bool(arguments.only) or quick or arguments.rounds < 5
    return arguments


if __name__ == "__main__":
    sys.exit(main())
