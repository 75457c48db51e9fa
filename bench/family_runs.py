"""Training and evaluating a system by the real commands, each step a process; and what was found.

A run lies in runs/family/PRESET; its family.json says with which settings it was made and how long
that took.
"""

import argparse
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from family_systems import System

from fastvae import runs
from fastvae.config import Config, differences, from_json
from fastvae.errors import UserError
from fastvae.presets import preset

ROOT = Path(__file__).resolve().parents[1]

IMAGES = ("mnist", "cifar10")
QUICK = {"max_steps": 30, "compile": "off", "data.train_limit": 1000, "data.heldout_limit": 200}
QUICK_DRAWS = 20
# Where things lie changes no number.
PLACES = {"output", "data.data_dir", "data.download"}

RECORD, EVALUATION, SCORES = "family.json", "evaluation.json", "evaluation/scores.parquet"


class Plan(NamedTuple):
    """What is to be run: the same plan leads to the same numbers."""

    system: System
    config: Config
    effort: dict[str, int]
    """Flags of `fastvae evaluate`."""


def plan_of(system: System, arguments: argparse.Namespace) -> Plan:
    """The preset as it is, or made quick."""
    config, draws = preset(system.preset), system.draws
    if arguments.quick:
        draws = min(draws, QUICK_DRAWS)
        config = _changed(config, QUICK)
        if arguments.data and config.data.data in IMAGES:
            config = _changed(config, {"data.data": arguments.data})
    return Plan(system, config, {"iw_samples": draws} if draws else {})


def passes(config: Config) -> float:
    """How often each image is decoded in training: a guess at how long that takes."""
    return config.epochs * config.objective.num_samples


def _changed(config: Config, settings: dict[str, Any]) -> Config:
    """With settings as {"epochs": 3.0, "model.latent_dim": 2}."""
    for key, value in settings.items():
        part, _, name = key.rpartition(".")
        if part:
            value = replace(getattr(config, part), **{name: value})
        config = replace(config, **{part or name: value})
    return config


class Failed(Exception):
    """A command that did not succeed, and the last that it said."""


def bring_up_to_date(plan: Plan, folder: Path, arguments: argparse.Namespace) -> None:
    """Train and evaluate as planned, each unless that has been done."""
    name = plan.system.preset
    places = ["--data-dir", str(arguments.data_dir)] if arguments.data_dir else []
    record = None if arguments.fresh else read_record(folder)
    if record is None or not is_same_run(record["config"], plan.config):
        print(f"{name}: training", flush=True)
        fresh = folder.with_name(f"{name}.new")  # a training that fails leaves the old run alone
        shutil.rmtree(fresh, ignore_errors=True)
        changes = differences(preset(name), plan.config)
        seconds = _timed(
            [
                *_launch(arguments.jobs),
                *("--preset", name, "--output", str(fresh)),
                *flags({key: new for key, (_, new) in changes.items()}),
                *places,
                *(["--download"] if arguments.download else []),
            ],
            fresh / "train.log",
            arguments.jobs,
        )
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)
        record = {"config": runs.read_config(folder), "train_seconds": seconds}
        _write_record(record, folder)
    if record.get("effort") != plan.effort:
        print(f"{name}: evaluating", flush=True)
        evaluate = [sys.executable, "-m", "fastvae.cli", "evaluate", str(folder)]
        command = [*evaluate, *flags(plan.effort), *places]
        seconds = _timed(command, folder / "evaluate.log", arguments.jobs)
        record |= {"effort": plan.effort, "evaluate_seconds": seconds}
        _write_record(record, folder)


def is_same_run(a: Config, b: Config) -> bool:
    """Whether two configurations lead to the same numbers."""
    return differences(a, b).keys() <= PLACES


def flags(settings: dict[str, Any]) -> list[str]:
    """As on the command line: {"model.hidden": (9, 8), "pooling": True} → --hidden 9 8 --pooling"""
    given: list[str] = []
    for key, value in settings.items():
        name = key.rpartition(".")[2].replace("_", "-")
        if isinstance(value, bool):
            given.append(f"--{name}" if value else f"--no-{name}")
        else:
            values = value if isinstance(value, list | tuple) else (value,)
            given += [f"--{name}", *(f"{v:g}" if isinstance(v, float) else str(v) for v in values)]
    return given


def _threads(jobs: int) -> str:
    """For each of so many commands at once."""
    cores = len(os.sched_getaffinity(0))
    return os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // jobs))


def _launch(jobs: int) -> list[str]:
    """How the Makefile launches a training run."""
    one_process = "--num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"
    return [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *(*one_process.split(), "--num_cpu_threads_per_process", _threads(jobs)),
        str(ROOT / "launch/train.py"),
    ]


def _timed(command: list[str], log: Path, jobs: int) -> float:
    """Seconds that a command takes. Raises Failed with its last lines if it does not succeed."""
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with log.open("w") as said:
        process = subprocess.run(
            command,
            env={**os.environ, "OMP_NUM_THREADS": _threads(jobs)},
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if process.returncode:
        last = log.read_text(errors="replace").splitlines()[-15:]
        raise Failed(
            "\n".join([f"status {process.returncode}: {shlex.join(command)}", *last, f"({log})"])
        )
    return round(time.monotonic() - began, 1)


# ----------------------------------------------------------------------------- what has been run


class Run(NamedTuple):
    """A system that has been trained and evaluated, and what was found."""

    folder: Path
    config: Config
    effort: dict[str, int]
    train_seconds: float
    evaluate_seconds: float
    evaluation: dict[str, Any]
    results: dict[str, Any]


def read_run(folder: Path) -> Run | None:
    """The run in a folder, or None if it is not complete."""
    record = read_record(folder)
    if record is None or "effort" not in record:
        return None
    names = (EVALUATION, runs.RESULTS)
    evaluation, results = (json.loads((folder / name).read_text()) for name in names)
    return Run(folder, **record, evaluation=evaluation, results=results)


def read_record(folder: Path) -> dict[str, Any] | None:
    """The settings and times of a run; None where there are none that can be understood."""
    path = folder / RECORD
    try:
        record = json.loads(path.read_text())
        return {**record, "config": from_json(json.dumps(record["config"]), str(path))}
    except (FileNotFoundError, json.JSONDecodeError, UserError):
        return None


def _write_record(record: dict[str, Any], folder: Path) -> None:
    plain = {**record, "config": json.loads(record["config"].to_json())}
    (folder / RECORD).write_text(json.dumps(plain, indent=2) + "\n")


class Difference(NamedTuple):
    """Of two means, with its standard error."""

    mean: float
    error: float
    paired: bool


def difference(a: Run, b: Run) -> Difference:
    """The importance-weighted NLL of `a` less that of `b`, in nats.

    Taken image by image where both runs kept the values: what makes an image hard for both then
    falls out of it. Else as of two independent samples, which is less sharp.
    """
    values, others = _nll_of_each_image(a), _nll_of_each_image(b)
    if values is not None and others is not None and len(values) == len(others) > 1:
        gaps = values - others
        return Difference(gaps.mean(), gaps.std(ddof=1) / math.sqrt(len(gaps)), True)
    x, y = (run.evaluation["importance_weighted"] for run in (a, b))
    error = math.hypot(x["standard_error"], y["standard_error"])
    return Difference(x["nll"] - y["nll"], error, False)


def _nll_of_each_image(run: Run) -> Any:
    """A NumPy array `[N]` in nats; None where it was not kept."""
    from pyarrow import parquet

    path = run.folder / SCORES
    return parquet.read_table(path)["iw_nll"].to_numpy() if path.is_file() else None
