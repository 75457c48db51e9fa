"""What share of a training step on a CPU the counter-based noise takes, in every preset.

    python bench/noise.py [PRESET …] [--compiled] [--threads N] [--rounds N] [--output FOLDER]

Steps are taken by `fastvae.training.updates.Updates`, as in a run, on random pixels of the shape of
the preset's data. Eager, the calls that draw are timed inside the steps. Compiled, they are fused
with what uses them: the same draws are compiled alone, which is more than they cost in the step.
"""

import argparse
import importlib
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import fastvae_kernels.philox as philox
import torch
from preset_steps import CPU, updates_of
from record import write_results
from torch import Tensor

from fastvae.allocator import keep_freed_memory
from fastvae.precision import use_matmul_precision
from fastvae.presets import PRESETS, preset

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 0.05
# The function of the same name hides the module.
reparameterize_kl = importlib.import_module("fastvae_kernels.reference.reparameterize_kl")

Draw = Callable[..., Tensor]


class Watched:
    """Stands in for a function that draws: how long its calls take, and what they were."""

    seconds: ClassVar[float] = 0.0
    calls: ClassVar[list[tuple[Draw, tuple[Any, ...]]]] = []

    def __init__(self, draw: Draw) -> None:
        self.draw = draw

    def __call__(self, *arguments: Any) -> Tensor:
        began = time.perf_counter()
        found = self.draw(*arguments)
        Watched.seconds += time.perf_counter() - began
        Watched.calls.append((self.draw, arguments))
        return found


def share_of_noise(name: str, compiled: bool, rounds: int) -> dict[str, Any]:
    """Medians over rounds of at least a few steps each."""
    eager = updates_of(name, compiled=False)
    eager.advance(2)
    steps = max(3, round(0.2 / _seconds(lambda: eager.advance(1), 2)))
    step_seconds, noise_seconds = [], []
    originals = philox.row_uniforms, philox.row_normals
    philox.row_uniforms, philox.row_normals = map(Watched, originals)  # type: ignore[assignment]
    reparameterize_kl.row_normals = philox.row_normals
    try:
        for _ in range(rounds):
            Watched.seconds, Watched.calls = 0.0, []
            step_seconds.append(_seconds(lambda: eager.advance(steps), 1) / steps)
            noise_seconds.append(Watched.seconds / steps)
    finally:
        philox.row_uniforms, philox.row_normals = originals
        reparameterize_kl.row_normals = originals[1]
    if compiled:
        calls = Watched.calls[: len(Watched.calls) // steps]
        fast = updates_of(name, compiled=True)
        fast.advance(2)
        tensors = [[a for a in given if isinstance(a, Tensor)] for _, given in calls]

        def draw(tensors: list[list[Tensor]]) -> list[Tensor]:
            drawn = []
            for (function, given), own in zip(calls, tensors, strict=True):
                at = iter(own)
                drawn.append(function(*(next(at) if isinstance(a, Tensor) else a for a in given)))
            return drawn

        alone = torch.compile(draw, fullgraph=True, dynamic=False)
        alone(tensors)
        step_seconds = [_seconds(lambda: fast.advance(steps), 1) / steps for _ in range(rounds)]
        noise_seconds = [_seconds(lambda: alone(tensors), 20) for _ in range(rounds)]
        torch._dynamo.reset()
    shares = [n / s for n, s in zip(noise_seconds, step_seconds, strict=True)]
    return {
        "preset": name,
        "compiled": compiled,
        "share": statistics.median(shares),
        "lowest": min(shares),
        "highest": max(shares),
        "draws": len(Watched.calls) // steps,
    }


def _seconds(call: Callable[[], object], times: int) -> float:
    began = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - began) / times


def to_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table; more than the limit stands in bold."""
    lines = [
        "| preset | | share of a step | lowest–highest of the rounds |",
        "|---|---|---|---|",
    ]
    for row in rows:
        share = f"{row['share']:.1%}"
        lines.append(
            f"| {row['preset']} | {'compiled' if row['compiled'] else 'eager'} | "
            f"{share if row['share'] < LIMIT else f'**{share}**'} | "
            f"{row['lowest']:.1%}–{row['highest']:.1%} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("presets", nargs="*", default=list(PRESETS), help="of the presets (default: all)")
    add("--compiled", action="store_true", help="compiled steps too: half a minute a preset")
    add("--threads", type=int, help="of PyTorch (default: its own choice)")
    add("--rounds", type=int, default=5)
    add("--output", type=Path, default=ROOT / "bench/results")
    arguments = parser.parse_args()
    if unknown := set(arguments.presets) - set(PRESETS):
        parser.error(f"no preset is called {', '.join(sorted(unknown))}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    use_matmul_precision("auto", CPU)
    rows = []
    for name in arguments.presets:
        if preset(name).model.refine_steps and arguments.compiled:
            modes: tuple[bool, ...] = (False,)  # never compiled
        else:
            modes = (False, True) if arguments.compiled else (False,)
        for compiled in modes:
            rows.append(share_of_noise(name, compiled, arguments.rounds))
            print(
                f"{name} {'compiled' if compiled else 'eager'}: {rows[-1]['share']:.1%}", flush=True
            )
    note = f"Medians of {arguments.rounds} rounds; the aim is less than {LIMIT:.0%}."
    path = write_results(
        arguments.output, "noise", CPU, f"# Noise on a CPU\n\n{note}", to_markdown(rows), rows=rows
    )
    print(f"written: {path}.json and .md".replace(f"{ROOT}/", ""))


if __name__ == "__main__":
    main()
