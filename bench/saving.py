"""What a checkpoint takes from training, beside Accelerate's own `save_state`.

    python bench/saving.py [--rounds N] [--output FOLDER]

Steps of a preset with a checkpoint among them, in interleaved rounds. fastvae's is hashed, flushed
to the disk and renamed by a thread: the steps wait for the copy, and are slower while the thread
works. `save_state` returns when its files are with the operating system; steps wait for all of it.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from preset_steps import CPU, updates_of
from record import write_results

from fastvae.allocator import keep_freed_memory
from fastvae.models import Model
from fastvae.precision import use_matmul_precision
from fastvae.training.checkpoint import Snapshot
from fastvae.training.saver import Saver
from fastvae.training.updates import Updates

ROOT = Path(__file__).resolve().parents[1]
CASES = ("mnist-mlp", "cifar10-conv", "mnist-static-400")
STEPS = 20


def measured(name: str, rounds: int) -> dict[str, Any]:
    """Seconds that a checkpoint takes from the steps around it, and its size in bytes."""
    updates = updates_of(name, compiled=False)
    updates.advance(3)
    found: dict[str, list[float]] = {"step": [], "held": [], "slower": [], "save_state": []}
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        saver = Saver(Path(folder), keep=2)
        for _ in range(rounds):
            step = statistics.median(timed(lambda: updates.advance(1)) for _ in range(STEPS))
            found["step"].append(step)
            found["held"].append(timed(lambda: saver.save(snapshot(updates))))
            meanwhile = []
            while saver.saved != updates.done - len(meanwhile):
                meanwhile.append(timed(lambda: updates.advance(1)))
            saver.wait()
            found["slower"].append(sum(meanwhile) - len(meanwhile) * step)
            save_state = partial(updates.accelerator.save_state, f"{folder}/state")
            found["save_state"].append(timed(save_state))
            updates.advance(3)
        newest = max((Path(folder) / "checkpoints").iterdir())
        size = sum(path.stat().st_size for path in newest.iterdir())
    return {
        "preset": name,
        "bytes": size,
        **{kind: statistics.median(values) for kind, values in found.items()},
        "spread": {kind: sorted(values) for kind, values in found.items()},
    }


def snapshot(updates: Updates) -> Snapshot:
    model = updates.model
    assert isinstance(model, Model)
    return Snapshot.of(
        model=model,
        trained=model,
        optimizer=updates.bare_optimizer,
        state={"step": updates.done},
        heldout=None,
    )


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def to_markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| preset | checkpoint, MB | one step, ms | fastvae: steps wait, ms | and take longer by, "
        "ms | `save_state`: steps wait, ms |",
        "| --- " * 6 + "|",
    ]
    for row in rows:
        values = (row[key] * 1e3 for key in ("step", "held", "slower", "save_state"))
        lines.append(
            f"| `{row['preset']}` | {row['bytes'] / 1e6:.1f} | "
            + " | ".join(f"{value:.1f}" for value in values)
            + " |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--output", type=Path, default=ROOT / "bench/results")
    arguments = parser.parse_args()
    keep_freed_memory()
    use_matmul_precision("auto", CPU)
    rows = [measured(name, arguments.rounds) for name in CASES]
    text = to_markdown(rows)
    print(text)
    head = f"# What a checkpoint takes from training\n\nMedians of {arguments.rounds} rounds."
    write_results(arguments.output, "saving", CPU, head, text, rows=rows)


if __name__ == "__main__":
    main()
