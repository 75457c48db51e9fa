"""Time to a likelihood: from the start of a process to the importance-weighted NLL on MNIST.

One seed is one process that trains by a preset, then scores every held-out image. `main` starts
them, times each from outside, and writes what came of it as JSON and as a table.
"""

import argparse
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fastvae.allocator import keep_freed_memory
from fastvae.checkpoints import STATE_NAME
from fastvae.config import Config
from fastvae.data import load_data
from fastvae.errors import UserError
from fastvae.estimators.importance import mean_and_standard_error
from fastvae.presets import preset
from fastvae.runs import RESULTS, load_vae, prepare
from fastvae.saving import model_folder
from fastvae.scores import score, scoring_seed
from fastvae.training import train

PRESET = "mnist-speedrun"
TARGET = 86.76
"""nats: the VAE of Burda et al. 2016, table 1 (one stochastic layer, k = 1)."""
SAMPLES = 5000
QUICK_SAMPLES = 20
FOUND = "speedrun.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Train and score so many seeds; 0 if all ended well, 1 if a process failed, 2 on a mistake."""
    arguments = _arguments(argv)
    keep_freed_memory()
    try:
        if arguments.seed is not None:
            run_seed(configured(arguments), arguments.samples)
            return 0
        return run_seeds(arguments)
    except UserError as error:
        print(f"speedrun: {error}", file=sys.stderr)
        return 2


# ------------------------------------------------------------------------------------- one seed


def configured(arguments: argparse.Namespace) -> Config:
    """The preset, its place and its seed, made quick if that is asked for."""
    config = preset(PRESET)
    data = replace(
        config.data,
        data=arguments.data or ("digits" if arguments.quick else config.data.data),
        data_dir=arguments.data_dir or config.data.data_dir,
        download=arguments.download,
    )
    output = arguments.runs / f"seed-{arguments.seed}"
    config = replace(config, data=data, seed=arguments.seed, output=output)
    return replace(config, max_steps=20, compile="off") if arguments.quick else config


def run_seed(config: Config, samples: int) -> dict[str, Any]:
    """Train, then score all held-out images with `samples` draws each.

    Writes and returns `speedrun.json` of the run's folder: `nll`, its standard error over images,
    and the seconds of the steps (without the first, which compiles) and of the scoring.
    """
    run = train(config, name=PRESET)
    vae = load_vae(run)
    _, heldout = load_data(config.data, config.seed)
    began = time.monotonic()
    scores = score(vae, prepare(heldout, config), seed=scoring_seed(config.seed), samples=samples)
    scoring_seconds = time.monotonic() - began
    assert scores.log_marginal is not None
    nll = mean_and_standard_error(-scores.log_marginal)
    results = json.loads((run / RESULTS).read_text())
    found = {
        "nll": nll.mean,
        "standard_error": nll.standard_error,
        "elbo": scores.elbo.mean().item(),
        "images": len(heldout),
        "samples": samples,
        "steps_seconds": _images_trained(run) / results["images_per_second"],
        "scoring_seconds": scoring_seconds,
        **{key: results[key] for key in ("compiled", "versions", "hardware")},
    }
    (run / FOUND).write_text(json.dumps(found, indent=2) + "\n")
    print(f"{run}: {nll.mean:.3f} ± {nll.standard_error:.3f} nats, {samples} samples", flush=True)
    return found


def _images_trained(run: Path) -> int:
    return json.loads((model_folder(run) / STATE_NAME).read_text())["samples"]


# ------------------------------------------------------------------------------------ all seeds


def run_seeds(arguments: argparse.Namespace) -> int:
    """A process for each seed, `jobs` of them at a time; the table after each that ends."""
    if arguments.runs.exists() and any(arguments.runs.iterdir()):
        raise UserError(f"{arguments.runs} holds runs: remove it, or choose another --runs")
    done: dict[int, dict[str, Any]] = {}
    seeds = range(arguments.seeds)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        found_by = pool.map(lambda seed: _timed(seed, arguments), seeds)
        for seed, found in zip(seeds, found_by, strict=True):
            if found is not None:
                done[seed] = found
                written = write(summary(done, arguments), arguments)
    if done:
        print(f"\n{written.read_text()}\n{written}")
    return int(len(done) < len(seeds))


def _timed(seed: int, arguments: argparse.Namespace) -> dict[str, Any] | None:
    """One seed in a process of its own: what it found, and what the clock says from outside.

    None if it failed, which is said; what it printed is in a log beside its folder.
    """
    given = ["--seed", str(seed), "--samples", str(arguments.samples), "--runs", arguments.runs]
    given += ["--data", arguments.data] if arguments.data else []
    given += ["--data-dir", arguments.data_dir] if arguments.data_dir else []
    given += [f"--{name}" for name in ("quick", "download") if getattr(arguments, name)]
    arguments.runs.mkdir(parents=True, exist_ok=True)
    path = arguments.runs / f"seed-{seed}.log"
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    began = time.monotonic()
    process = os.posix_spawn(
        sys.executable,
        [sys.executable, "-m", "fastvae.speedrun", *map(str, given)],
        {**os.environ, "OMP_NUM_THREADS": _threads(arguments.jobs)},
        file_actions=[(os.POSIX_SPAWN_DUP2, log, 1), (os.POSIX_SPAWN_DUP2, log, 2)],
    )
    _, status, usage = os.wait4(process, 0)
    seconds = time.monotonic() - began
    os.close(log)
    if status:
        last = path.read_text(errors="replace").strip().rpartition("\n")[2]
        code = os.waitstatus_to_exitcode(status)  # below 0: the signal that ended it
        print(f"seed {seed} failed ({code}): {last} ({path})", file=sys.stderr, flush=True)
        return None
    found = json.loads((arguments.runs / f"seed-{seed}" / FOUND).read_text())
    print(f"seed {seed}: {found['nll']:.3f} nats after {seconds:.1f} s", flush=True)
    return {**found, "wall_seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime}


def _threads(jobs: int) -> str:
    """For each of so many processes at once, unless the environment says."""
    cores = len(os.sched_getaffinity(0))
    return os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // jobs))


# ---------------------------------------------------------------------------------- the results


def summary(done: dict[int, dict[str, Any]], arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that was found, with means and standard deviations over seeds."""
    first = next(iter(done.values()))
    columns = ("nll", "wall_seconds", "cpu_seconds", "steps_seconds", "scoring_seconds")
    config = configured(argparse.Namespace(**{**vars(arguments), "seed": 0}))
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "quick": arguments.quick,
        "target": TARGET,
        "jobs": arguments.jobs,
        **{key: first[key] for key in ("images", "samples", "compiled", "versions", "hardware")},
        "over_seeds": {
            name: {
                "mean": statistics.mean(values),
                "std": statistics.stdev(values) if len(values) > 1 else None,
            }
            for name in columns
            if (values := [found[name] for found in done.values()])
        },
        "reached": sum(found["nll"] <= TARGET for found in done.values()),
        "seeds": done,
        "config": json.loads(replace(config, output=None).to_json()),
    }


def write(results: dict[str, Any], arguments: argparse.Namespace) -> Path:
    """NAME.json and NAME.md in the folder of results; the latter's path."""
    hardware = results["hardware"]
    words = re.sub(r"[^A-Za-z0-9]+", "-", hardware["name"]).strip("-")
    name = f"speedrun-{hardware['device']}-{words}-{results['date'][:10]}"
    path = arguments.output / f"{name}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
    path.write_text(to_markdown(results))
    return path


def to_markdown(results: dict[str, Any]) -> str:
    """The results as a page."""
    hardware, over = results["hardware"], results["over_seeds"]
    threads = f", {hardware['threads']} thread(s) a run" if "threads" in hardware else ""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        f"# Time to {results['target']} nats on MNIST: {hardware['name']}, {results['date'][:10]}",
        "",
        f"{hardware['name']}{threads}, {results['jobs']} run(s) at a time; {versions}; "
        f"{'compiled' if results['compiled'] else 'not compiled'}.",
        "",
        f"NLL: importance-weighted, {results['samples']:,} samples for each of "
        f"{results['images']:,} held-out images, in nats, ± its standard error over images. "
        "Wall clock: from the start of the seed's process to its end, in seconds; the steps are "
        "those of training without the first, which compiles; the rest is start, compilation, "
        "the usual results of a run and its checkpoint. CPU: seconds of all threads.",
        "",
        "| seed | NLL | wall clock | steps | scoring | rest | CPU |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    if results["quick"]:
        lines[2:2] = ["**A quick run at tiny sizes: no number in it means anything.**", ""]
    for seed, found in results["seeds"].items():
        rest = found["wall_seconds"] - found["steps_seconds"] - found["scoring_seconds"]
        lines.append(
            f"| {seed} | {found['nll']:.2f} ± {found['standard_error']:.2f} | "
            f"{found['wall_seconds']:.0f} | {found['steps_seconds']:.0f} | "
            f"{found['scoring_seconds']:.0f} | {rest:.0f} | {found['cpu_seconds']:.0f} |"
        )
    spread = {name: _mean_and_spread(over[name], 2 if name == "nll" else 0) for name in over}
    lines += [
        "",
        f"Over {len(results['seeds'])} seed(s), mean and standard deviation: NLL {spread['nll']} "
        f"nats, {results['reached']} at or below {results['target']}; wall clock "
        f"{spread['wall_seconds']} s, of which {spread['steps_seconds']} s are steps and "
        f"{spread['scoring_seconds']} s scoring; CPU {spread['cpu_seconds']} s.",
    ]
    return "\n".join(lines) + "\n"


def _mean_and_spread(values: dict[str, float | None], digits: int) -> str:
    if values["std"] is None:
        return f"{values['mean']:.{digits}f}"
    return f"{values['mean']:.{digits}f} ± {values['std']:.{digits}f}"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="speedrun", description=f"Train and score --preset {PRESET}, timed, for several seeds."
    )
    add = parser.add_argument
    add("--seeds", type=int, default=5, help="run seeds 0, 1, … (default 5)")
    add("--jobs", type=int, default=1, help="run so many at once, each on its part of the cores")
    add("--samples", type=int, help=f"draws of z for each image (default {SAMPLES})")
    add("--data", help="other images than MNIST, as `fastvae train --data` takes them")
    add("--data-dir", type=Path, help="where MNIST lies (default: data)")
    add("--download", action="store_true", help="fetch it if it is not there")
    add("--runs", type=Path, help="folder of the runs (default: runs/speedrun)")
    add("--output", type=Path, help="folder of the results (default: bench/results)")
    add("--quick", action="store_true", help="tiny sizes on the digits, to see that it runs")
    add("--seed", type=int, help=argparse.SUPPRESS)  # one seed, in this process
    arguments = parser.parse_args(argv)
    for name in ("seeds", "jobs", "samples"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name} is at least 1, got {value}")
    quick = arguments.quick
    arguments.samples = arguments.samples or (QUICK_SAMPLES if quick else SAMPLES)
    arguments.runs = arguments.runs or Path("runs/speedrun-quick" if quick else "runs/speedrun")
    arguments.output = arguments.output or (arguments.runs if quick else Path("bench/results"))
    return arguments


if __name__ == "__main__":
    sys.exit(main())
