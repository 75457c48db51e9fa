"""How the time of a training step grows with what it is given, beside its work.

    python bench/growth.py     # gpu.py --only growth --device cpu, and its flags

Batch, latents, size of the images, number of images, and apart from the step the drawing of an
epoch's order. Work is counted: operations of matrix products and convolutions, or images to order.
At the upper end of each, time may grow by no more than 0.1 in the exponent beyond the work; by 0.5
where a permutation is drawn, which reaches into memory at random: once it leaves a cache, each
place takes longer.
A CPU takes one thread. The figure needs matplotlib.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from measure import interleaved, side_stream
from settings import Found, Settings, each

FITTED = 3
"""Points at the upper end, through which the exponent is fitted."""
LABELS = {
    "batch": "images in a batch",
    "latents": "latents",
    "side": "side of the images, pixels",
    "images": "images in the data set",
    "order": "images in the data set",
}
TITLES = {
    "batch": "MLP: step against batch",
    "latents": "MLP: step against latents",
    "side": "convolutions: step against image size",
    "images": "MLP: step against data",
    "order": "order of an epoch against data",
}


@dataclass(frozen=True)
class Axis:
    """One quantity that grows, all else as it is; `rows` images in a batch."""

    name: str
    sizes: tuple[int, ...]
    rows: int = 128
    tolerance: float = 0.1
    """By how much the exponent of time may exceed that of work."""

    def __str__(self) -> str:
        return self.name


AXES = {
    "cpu": (
        Axis("batch", (32, 64, 128, 256, 512, 1024, 2048)),
        Axis("latents", (64, 256, 1024, 2048, 4096, 8192)),
        Axis("side", (8, 16, 32, 64, 128), rows=16),
        Axis("images", (1_000, 3_000, 10_000, 30_000, 100_000, 300_000)),
        Axis("order", (1_000, 10_000, 100_000, 1_000_000, 10_000_000), tolerance=0.5),
    ),
    "cuda": (
        Axis("batch", (128, 512, 2048, 8192, 32768, 65536)),
        Axis("latents", (64, 512, 4096, 16384, 32768, 65536), rows=1024),
        Axis("side", (16, 32, 64, 128, 256)),
        Axis("images", (1_000, 10_000, 100_000, 300_000, 1_000_000), rows=1024),
        Axis("order", (1_000, 10_000, 100_000, 1_000_000, 10_000_000), tolerance=0.5),
    ),
}
QUICK_AXES = (
    Axis("batch", (8, 16, 32)),
    Axis("latents", (4, 8, 16), rows=8),
    Axis("side", (8, 16, 32), rows=2),
    Axis("images", (100, 200, 400), rows=8),
    Axis("order", (100, 200, 400)),
)


def run(settings: Settings) -> Iterator[Found]:
    """Time every axis; a failure names one that grows faster than its work."""
    from fastvae.allocator import keep_freed_memory
    from fastvae.precision import use_matmul_precision

    keep_freed_memory()
    use_matmul_precision("auto", settings.device)
    on_cpu = settings.device.type == "cpu"
    if on_cpu:
        torch.set_num_threads(1)
    yield "facts", {"threads": 1 if on_cpu else None, "fitted": FITTED, "figure": ""}
    rows: list[dict[str, Any]] = []
    axes = QUICK_AXES if settings.quick else AXES[settings.device.type]
    with side_stream(settings.device):
        for kind, value in each(axes, lambda axis: [_measure(axis, settings)], settings):
            yield kind, value
            if kind == "row":
                rows.append(value)
                if not settings.quick and value["excess"] > value["tolerance"]:
                    yield (
                        "failure",
                        f"{value['axis']}: time grows by the power {value['exponent']:.2f} at the "
                        f"upper end, work by {value['work_exponent']:.2f}",
                    )
    if settings.figure and rows:
        yield "facts", {"figure": save_figure(rows, Path(settings.figure))}


def _measure(axis: Axis, settings: Settings) -> dict[str, Any]:
    prepare = _order if axis.name == "order" else _step
    calls: dict[str, Callable[[], object]] = {}
    work, steps = [], []
    for size in axis.sizes:
        call, operations, count = prepare(axis, size, settings.device)
        calls[str(size)] = call
        work.append(operations)
        steps.append(count)
    timings = interleaved(
        calls,
        settings.device,
        rounds=settings.rounds,
        seconds_per_round=5 * settings.seconds_per_round,
    )
    each = [timing.of_one(n) for timing, n in zip(timings.values(), steps, strict=True)]
    exponent = slope(axis.sizes[-FITTED:], [t.median for t in each[-FITTED:]])
    work_exponent = slope(axis.sizes[-FITTED:], work[-FITTED:])
    return {
        "axis": axis.name,
        "rows": axis.rows,
        "sizes": axis.sizes,
        "work": work,
        "seconds": [timing.as_dict() for timing in each],
        "exponent": exponent,
        "work_exponent": work_exponent,
        "excess": exponent - work_exponent,
        "tolerance": axis.tolerance,
    }


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """b of the least-squares fit log y = a + b log x."""
    u, v = ([math.log(value) for value in values] for values in (x, y))
    mean_u, mean_v = sum(u) / len(u), sum(v) / len(v)
    across = sum((a - mean_u) ** 2 for a in u)
    return sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True)) / across


def _step(axis: Axis, size: int, device: torch.device) -> tuple[Callable[[], object], float, int]:
    """Steps of a preset, not compiled (on a GPU replayed), their operations, and how many."""
    from step_cases import StepCase, make_accelerator, make_updates

    from fastvae.training.compiler import training_flops
    from fastvae.training.step import TrainingStep

    rows = size if axis.name == "batch" else axis.rows
    case = StepCase("mnist-conv" if axis.name == "side" else "mnist-mlp", rows)
    config = case.config
    if axis.name == "latents":
        config = replace(config, model=replace(config.model, latent_dim=size))
    side = size if axis.name == "side" else 28
    count = size if axis.name == "images" else min(10_000, 2**24 // side**2)
    images = torch.randint(256, (count, 1, side, side), dtype=torch.uint8, device=device)
    accelerator = make_accelerator(config, device)
    updates = make_updates(config, images, accelerator, compiled=False, replayed=True)
    step = updates.wrapped.step
    assert isinstance(step, TrainingStep)
    operations = training_flops(step, updates.feed.copied_batch(0, rows))
    steps = 10 if device.type == "cuda" else 1
    updates.advance(60 if device.type == "cuda" else 2)
    return lambda: updates.advance(steps), operations, steps


def _order(axis: Axis, size: int, device: torch.device) -> tuple[Callable[[], object], float, int]:
    from bare import MISSING  # noqa: F401

    from fastvae.data import EpochOrder

    order = EpochOrder(size, seed=0)
    epochs = iter(range(10**9))
    return lambda: order.epoch(next(epochs)), float(size), 1


# ------------------------------------------------------------------------------- the figure


def save_figure(rows: list[dict[str, Any]], path: Path) -> str:
    """Chart each axis on logarithmic scales, with the line of its work through the last point.

    Returns what to say of it: its name, or why there is none.
    """
    if find_spec("matplotlib") is None:
        return "no figure: matplotlib is not installed"
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from fastvae.figures import BLUE, DPI, ORANGE

    figure, axes = pyplot.subplots(2, 3, figsize=(12, 6.8), layout="constrained")
    for row, axis in zip(rows, axes.flat, strict=False):
        sizes, seconds = row["sizes"], row["seconds"]
        milliseconds = [1e3 * s["median"] for s in seconds]
        spread = [[1e3 * (s["median"] - s["q1"]) for s in seconds]]
        spread.append([1e3 * (s["q3"] - s["median"]) for s in seconds])
        work = [milliseconds[-1] * w / row["work"][-1] for w in row["work"]]
        axis.plot(sizes, work, "--", color=ORANGE, linewidth=1.2, label="as its work")
        axis.errorbar(
            sizes,
            milliseconds,
            spread,
            fmt="o-",
            color=BLUE,
            markersize=4,
            linewidth=1.2,
            capsize=3,
            label="measured",
        )
        axis.set(xscale="log", yscale="log", xlabel=LABELS[row["axis"]], ylabel="milliseconds")
        axis.set_title(TITLES[row["axis"]], fontsize=11)
        low, high = min(milliseconds), max(milliseconds)
        axis.set_ylim(0.4 * low, 2.5 * max(high, 4 * low))
        axis.grid(alpha=0.3)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    for axis in axes.flat[len(rows) :]:
        axis.set_axis_off()
    axes.flat[-1].legend(handles, labels, loc="center", frameon=False)
    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)
    return path.name


if __name__ == "__main__":
    from gpu import main

    sys.exit(main(["--only", "growth", "--device", "cpu", *sys.argv[1:]]))
