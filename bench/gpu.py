"""Every measurement on a GPU in one command, in under ten minutes.

    python bench/gpu.py [--mnist-dir DIR] [--output FOLDER]

Runs the parity tests first; without them green no speed is measured. Writes
gpu-NAME-DATE.json and .md into --output, the folder that the environment variable OUT names, or
bench/results. Needs torch, triton, accelerate, numpy, pytest, scipy, safetensors and
huggingface_hub; what needs another package is left out and named. `--device cpu --quick` tries the
same code at tiny sizes where there is no GPU.
Status: 0, 1 if a section failed, 2 if there is no GPU.
"""

import argparse
import json
import os
import re
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from settings import ROOT, Settings

# Each with the share of the time that is left when it begins that it may take.
SECTIONS = {
    "parity": 1.0,
    "copy": 1.0,
    "step": 0.4,
    "memory": 0.1,
    "growth": 0.2,
    "ops": 0.5,
    "speedrun": 1.0,
    "limits": 1.0,
}
# Which of the parity tests must be green before each is measured.
NEEDS = {
    "ops": ("kernels",),
    "memory": ("kernels",),
    "step": ("kernels", "replay"),
    "growth": ("kernels", "replay"),
    "speedrun": ("kernels", "replay"),
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        print(
            "bench/gpu.py measures a CUDA GPU and finds none; "
            "`--device cpu --quick` tries the same code on a CPU",
            file=sys.stderr,
        )
        return 2
    # Runs from a source tree too, installed or not.
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    from bare import MISSING  # before fastvae
    from machine import describe
    from report import short_table, to_markdown

    given = sys.argv[1:] if argv is None else argv
    device = torch.empty(0, device=arguments.device).device  # "cuda" becomes "cuda:0"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    results: dict[str, Any] = {
        "command": shlex.join(["python", "bench/gpu.py", *given]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "quick": arguments.quick,
        "rounds": arguments.rounds,
        "machine": describe(device),
        "missing": MISSING,
        "sections": {},
    }
    path = _result_path(arguments, results)
    ends = time.monotonic() + 60 * arguments.minutes
    for name in arguments.only:
        began = time.monotonic()
        deadline = began + SECTIONS[name] * (ends - began)
        settings = Settings(
            device=device,
            quick=arguments.quick,
            rounds=arguments.rounds,
            tests=tuple(arguments.tests),
            mnist_dir=arguments.mnist_dir,
            deadline=deadline,
            cases=tuple(arguments.cases),
            figure=arguments.figure or path.with_name(f"{path.name}-growth.png"),
        )
        section = _run_section(name, settings, results)
        section["section_seconds"] = round(time.monotonic() - began, 1)
        results["sections"][name] = section
        print(f"{name}: {section['status']}, {section['section_seconds']} s", flush=True)
        if section["status"] == "failed":
            print(section["error"], file=sys.stderr, flush=True)
        # Written after every section, so that a run that is cut short leaves what it has.
        path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
        path.with_suffix(".md").write_text(to_markdown(results))
    print(short_table(results))
    print(f"written: {path}.json and .md".replace(f"{ROOT}/", ""))
    return int(any(s["status"] == "failed" for s in results["sections"].values()))


def _run_section(name: str, settings: Settings, results: dict[str, Any]) -> dict[str, Any]:
    """The section's results with its status: ok, failed (and why), or skipped (and why)."""
    done = results["sections"]
    if name == "speedrun" and (why := _why_no_speedrun(settings, results["missing"])):
        return {"status": "skipped", "why": why}
    if name == "limits" and settings.seconds_left < 30:
        why = "no time left; `python bench/limits.py` needs no GPU"
        return {"status": "skipped", "why": why}
    red = done.get("parity", {}).get("red", {})
    if not_green := [tests for tests in NEEDS.get(name, ()) if red.get(tests, "not run")]:
        why = f"parity tests not green ({', '.join(not_green)}): no speed is reported"
        return {"status": "skipped", "why": why}
    try:
        found = RUN[name](settings, results)
    except Exception as error:
        found = getattr(error, "found", {})
        trace = traceback.format_exc(limit=-4)
        return {**found, "status": "failed", "error": str(error) or repr(error), "trace": trace}
    failures = found.get("failures", [])
    if failures and name != "parity":
        return {**found, "status": "failed", "error": "\n".join(failures)}
    return {**found, "status": "ok"}


def _why_no_speedrun(settings: Settings, missing: list[str]) -> str:
    if find_spec("matplotlib") is None:
        missing = [*missing, "matplotlib"]
    if missing:
        return f"not installed: {', '.join(missing)}"
    return "" if settings.mnist_dir or settings.quick else "no --mnist-dir"


# Imported where they are run: what one of them lacks must not cost the others.


def _parity(settings: Settings, results: dict[str, Any]) -> dict[str, Any]:
    import parity

    return parity.run(settings)


def _copy(settings: Settings, results: dict[str, Any]) -> dict[str, Any]:
    import machine

    return machine.copy_bandwidth(settings)


def _limits(settings: Settings, results: dict[str, Any]) -> dict[str, Any]:
    import limits

    return limits.run(results["machine"], _copy_rate(results))


def _step(settings: Settings, results: dict[str, Any]) -> dict[str, Any]:
    import step_speed

    return step_speed.run(settings)


def _memory(settings: Settings, results: dict[str, Any]) -> dict[str, Any]:
    import memory

    return memory.run(settings)


def _growth(settings: Settings, results: dict[str, Any]) -> dict[str, Any]:
    import growth

    return growth.run(settings)


def _ops(settings: Settings, results: dict[str, Any]) -> dict[str, Any]:
    import op_speed

    return op_speed.run(settings, _copy_rate(results) or float("nan"))


def _speedrun(settings: Settings, results: dict[str, Any]) -> dict[str, Any]:
    import seeds

    return seeds.run(settings)


RUN: dict[str, Callable[[Settings, dict[str, Any]], dict[str, Any]]] = {
    "parity": _parity,
    "copy": _copy,
    "limits": _limits,
    "step": _step,
    "memory": _memory,
    "growth": _growth,
    "ops": _ops,
    "speedrun": _speedrun,
}


def _copy_rate(results: dict[str, Any]) -> float | None:
    return results["sections"].get("copy", {}).get("bytes_per_second")


def _result_path(arguments: argparse.Namespace, results: dict[str, Any]) -> Path:
    """Without its suffix."""
    folder = arguments.output or Path(os.environ.get("OUT") or ROOT / "bench" / "results")
    folder.mkdir(parents=True, exist_ok=True)
    kind = "gpu" if arguments.device.startswith("cuda") else "cpu"
    name = re.sub(r"[^A-Za-z0-9]+", "-", results["machine"]["device"]).strip("-")
    quick = "quick-" if arguments.quick else ""
    part = "growth-" if set(arguments.only) == {"parity", "growth"} else ""
    return folder / f"{quick}{part}{kind}-{name}-{results['date'][:10]}"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--device", default="cuda", help="cuda, cuda:1, … or cpu (default: cuda)")
    add("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    add("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=f"of {', '.join(SECTIONS)}")
    add("--rounds", type=int, default=7, help="interleaved rounds of each comparison (default: 7)")
    add("--minutes", type=float, default=9.0, help="stop measuring after so long (default: 9)")
    add("--tests", nargs="+", default=["tests/kernels"], help="the kernels' tests, for pytest")
    add("--cases", nargs="+", default=[], help="of the step: those with this in their names")
    add("--figure", type=Path, help="of the growth (default: beside the results)")
    add("--mnist-dir", type=Path, help="where MNIST lies: adds the time to quality")
    add("--output", type=Path, help="folder of the results (default: $OUT, or bench/results)")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 5:
        parser.error("--rounds: quartiles of fewer than 5 say nothing")
    # In the order of the table above, whatever the order on the command line.
    chosen = arguments.only or list(SECTIONS)
    if any(name in chosen for name in NEEDS):
        chosen = ["parity", *chosen]
    if "ops" in chosen:
        chosen = ["copy", *chosen]
    arguments.only = [name for name in SECTIONS if name in chosen]
    return arguments


if __name__ == "__main__":
    sys.exit(main())
