"""What several processes would ask of the network: bytes a step of every preset, and at how many
processes their exchange would take longer than the step itself.

    python bench/network.py [--rounds N] [--output FOLDER] [--page docs/distributed.md]

Computed from the number of weights and the time of a step here, on one thread. Checked with two
processes of this machine: step = half of the batch on each, at once + exchange of the gradients.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from preset_steps import CPU, updates_of
from record import write_results

from fastvae.allocator import keep_freed_memory
from fastvae.precision import use_matmul_precision
from fastvae.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]
GIGABITS = (1, 10, 100, 400)
CHECKED = ("mnist-mlp", "mnist-conv", "cifar10-conv", "vae")
PROCESSES = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=ROOT / "bench/results")
    parser.add_argument("--page", type=Path, help="write the tables between its marks")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        together(arguments.rounds)
        return
    rows = [alone(name, arguments.rounds) for name in PRESETS]
    checks = checked(arguments.rounds)
    text = tables(rows, checks)
    print(text)
    head = f"# Gradients over a network\n\nMedians of {arguments.rounds} rounds."
    write_results(arguments.output, "network", CPU, head, text, rows=rows, checks=checks)
    if arguments.page:
        page = arguments.page.read_text()
        between = f"<!-- tables -->\n{text}<!-- end of tables -->"
        marks = re.compile("<!-- tables -->.*<!-- end of tables -->", re.DOTALL)
        arguments.page.write_text(marks.sub(lambda _: between, page))


def ready() -> None:
    keep_freed_memory()
    torch.set_num_threads(1)
    use_matmul_precision("auto", CPU)


def alone(name: str, rounds: int) -> dict[str, Any]:
    """A preset's bytes, and the seconds of a step of its batch."""
    ready()
    updates = updates_of(name, compiled=False)
    weights = sum(p.numel() for p in updates.model.parameters() if p.requires_grad)
    seconds = timed(partial(updates.advance, 1), rounds)
    return {
        "preset": name,
        "batch_size": updates.config.batch_size,
        "bytes": 4 * weights,
        "seconds": seconds,
        "processes": {g: most_processes(4 * weights, seconds, g) for g in GIGABITS},
    }


def most_processes(size: int, seconds: float, gigabits: float) -> int:
    """The least number N ≥ 2 of processes with which the exchange, 2 (N − 1)/N · size over the
    slowest link of a ring, takes as long as the share seconds / N of the step."""
    bytes_per_second = gigabits * 1e9 / 8
    # 2 (N − 1)/N · size / speed ≥ seconds / N
    return max(2, -int(-(1 + seconds * bytes_per_second / (2 * size)) // 1))


def timed(call: Callable[[], object], rounds: int) -> float:
    """The median over rounds of a few calls each."""
    for _ in range(3):
        call()
    began = time.perf_counter()
    call()
    calls = max(2, round(0.2 / max(1e-6, time.perf_counter() - began)))
    if dist.is_initialized():
        every = torch.tensor(calls)
        dist.all_reduce(every, op=dist.ReduceOp.MIN)
        calls = int(every)
    found = []
    for _ in range(rounds):
        if dist.is_initialized():
            dist.barrier()
        began = time.perf_counter()
        for _ in range(calls):
            call()
        found.append((time.perf_counter() - began) / calls)
    return statistics.median(found)


def together(rounds: int) -> None:
    """On each of several processes at once: the step they take together, the same without its
    exchange, and the exchange alone."""
    ready()
    found = []
    for name in CHECKED:
        updates = updates_of(name, compiled=False)
        size = sum(p.numel() for p in updates.model.parameters() if p.requires_grad)
        step = timed(partial(updates.advance, 1), rounds)
        exchange = timed(partial(dist.all_reduce, torch.zeros(size)), rounds)
        updates.wrapped.require_backward_grad_sync = False
        share = timed(partial(updates.advance, 1), rounds)
        found.append({"preset": name, "step": step, "share": share, "exchange": exchange})
    if dist.get_rank() == 0:
        print(json.dumps(found))


def checked(rounds: int) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(PROCESSES), __file__, "--worker", "--rounds", str(rounds)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    said = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    rows = json.loads(said.stdout.splitlines()[-1])
    ready()
    for row in rows:
        whole = updates_of(row["preset"], compiled=False)
        row["whole"] = timed(partial(whole.advance, 1), rounds)
    return rows


def tables(rows: list[dict[str, Any]], checks: list[dict[str, Any]]) -> str:
    lines = [
        "| preset | batch | MB a step | step here, ms | "
        + " | ".join(f"{g} Gbit/s" for g in GIGABITS)
        + " |",
        "| --- " * (4 + len(GIGABITS)) + "|",
    ]
    for row in rows:
        limits = " | ".join(f"{row['processes'][g]:,}" for g in GIGABITS)
        lines.append(
            f"| `{row['preset']}` | {row['batch_size']} | {row['bytes'] / 1e6:.2f} | "
            f"{row['seconds'] * 1e3:.1f} | {limits} |"
        )
    lines += [
        "",
        f"Checked with {PROCESSES} processes of this machine, one thread each, milliseconds:",
        "",
        "| preset | one process, whole batch | both, a half each, no exchange | exchange alone | "
        "sum | measured together | measured / sum |",
        "| --- " * 7 + "|",
    ]
    for row in checks:
        total = row["share"] + row["exchange"]
        values = (row["whole"], row["share"], row["exchange"], total, row["step"])
        lines.append(
            f"| `{row['preset']}` | "
            + " | ".join(f"{value * 1e3:.2f}" for value in values)
            + f" | {row['step'] / total:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
