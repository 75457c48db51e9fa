"""Images decoded as they are needed, beside the same images in memory: images a second of training.

    python bench/stream.py [--rounds N] [--workers N] [--output FOLDER]

PNG files of several sizes in a temporary folder; the steps are those of a run (`Updates.advance`),
in interleaved rounds. The workers alone, with nobody training, say what reading could give at most.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from preset_steps import CPU, updates_of
from record import write_results

from fastvae.allocator import keep_freed_memory
from fastvae.data import DataConfig, EpochOrder, load_all
from fastvae.data.stored import StoredImages
from fastvae.precision import use_matmul_precision
from fastvae.training.stream import Stream

ROOT = Path(__file__).resolve().parents[1]
COUNT = 1024


@dataclass(frozen=True)
class Case:
    """A preset on images of `side` pixels."""

    preset: str
    side: int
    batch_size: int


CASES = (
    Case("mnist-conv", 28, 128),
    Case("cifar10-conv", 32, 128),
    Case("cifar10-conv", 64, 64),
    Case("mnist-mlp", 28, 128),
)


def write_images(folder: Path, side: int, colour: bool) -> None:
    """Smooth pictures with a little noise, as photographs have."""
    generator = np.random.default_rng(0)
    for i in range(COUNT):
        coarse = generator.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
        noisy = np.asarray(image).astype(int) + generator.integers(-4, 5, (side, side, 3))
        image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        (image if colour else image.convert("L")).save(folder / f"{i:04d}.png")


def measured(case: Case, rounds: int, workers: int | None) -> dict[str, Any]:
    """Images a second: in memory, streamed, and read alone."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder, case.side, colour=case.preset.startswith("cifar10"))
        inside = load_all(name, DataConfig())
        outside = load_all(name, DataConfig(data_budget=0.0))
        assert isinstance(outside.images, StoredImages)
        kinds = {
            kind: updates_of(case.preset, False, case.batch_size, data)
            for kind, data in (("memory", inside), ("streamed", outside))
        }
        alone = Stream(outside.images, EpochOrder(COUNT, 0), workers, pinned=False)
        alone.begin(case.batch_size, [range(case.batch_size)], 0)
        position = 0
        found: dict[str, list[float]] = {"memory": [], "streamed": [], "reading alone": []}
        began = time.perf_counter()
        kinds["memory"].advance(3)
        steps = max(8, round(4 * 3 / (time.perf_counter() - began)))
        kinds["streamed"].advance(3)
        for _ in range(rounds):
            for kind, updates in kinds.items():
                # What was decoded while others had their turn is used up first.
                updates.advance(12)
                began = time.perf_counter()
                updates.advance(steps)
                taken = steps * case.batch_size
                found[kind].append(taken / (time.perf_counter() - began))
            for count in (20, 100):
                began = time.perf_counter()
                for _ in range(count):
                    alone.next(position)
                    position += case.batch_size
            found["reading alone"].append(count * case.batch_size / (time.perf_counter() - began))
    ratios = [s / m for s, m in zip(found["streamed"], found["memory"], strict=True)]
    return {
        "case": vars(case),
        "workers": alone.workers,
        **{kind: statistics.median(values) for kind, values in found.items()},
        "ratio": statistics.median(ratios),
        "ratios": sorted(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--output", type=Path, default=ROOT / "bench/results")
    arguments = parser.parse_args()
    keep_freed_memory()
    use_matmul_precision("auto", CPU)
    rows = [measured(case, arguments.rounds, arguments.workers) for case in CASES]
    text = to_markdown(rows)
    print(text)
    head = f"# Streamed images on a CPU\n\nMedians of {arguments.rounds} interleaved rounds."
    write_results(arguments.output, "stream", CPU, head, text, rows=rows)


def to_markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| preset | images | in memory, images/s | streamed | streamed / memory | reading alone |",
        "| --- " * 6 + "|",
    ]
    for row in rows:
        low, high = row["ratios"][0], row["ratios"][-1]
        lines.append(
            f"| `{row['case']['preset']}` | {row['case']['side']}×{row['case']['side']} PNG | "
            f"{row['memory']:,.0f} | {row['streamed']:,.0f} | {row['ratio']:.2f} "
            f"[{low:.2f}–{high:.2f}] | {row['reading alone']:,.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
