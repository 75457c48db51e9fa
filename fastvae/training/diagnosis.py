"""What was wrong with steps whose loss or gradient was not finite."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvae.batch import Batch
from fastvae.parts.latents import LatentGaussian
from fastvae.training.together import Together
from fastvae.training.updates import Updates

REPORT = "bad-steps.json"
MOST_ROWS = 512


def report_bad_steps(
    run: Path, updates: Updates, together: Together, since: int, count: int
) -> str:
    """Write `bad-steps.json`, on the first process, of the `count` steps from step `since` (from 0)
    on, which were skipped; say in a few words what it holds.

    The weights are those that the first of them met: its batch is computed again, row by row.
    """
    rows: list[dict[str, Any]] = []
    statistics: dict[str, Any] = {}
    for cut in updates.rows:
        found, statistics = _examined(updates, since, cut)
        rows += found
    every = together.all({"rows": rows[:MOST_ROWS], "statistics": statistics})
    bad = [row for process in every for row in process["rows"]]
    report = {
        "first_step": since + 1,
        "steps_in_a_row": count,
        "batch_size": updates.config.batch_size,
        "rows": bad,
        "statistics_of_the_posterior": [process["statistics"] for process in every],
    }

    def write() -> str:
        (run / REPORT).write_text(json.dumps(report, indent=2) + "\n")
        return str(run / REPORT)

    path = together.on_main(write)
    indices = ", ".join(str(row["index"]) for row in bad[:5])
    more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
    which = f"images {indices}{more}" if bad else "no single image is to blame"
    return f"{which} of the first of them; {path} says more"


def _examined(
    updates: Updates, step: int, cut: range
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of one part whose loss or gradient is not finite, and what q is like."""
    training = updates.training_step
    first = step * updates.config.batch_size + cut.start
    batch = updates.feed.copied_batch(first, len(cut))
    position = torch.tensor(first, device=updates.accelerator.device)
    weights = [p for p in updates.model.parameters() if p.requires_grad]
    indices = batch.indices
    assert indices is not None
    with updates.accelerator.autocast(), torch.no_grad():
        _, terms = training.losses(batch, position)
    bad = []
    for row in range(len(cut)):
        # By itself: in a batch, 0 times what is not finite makes the gradients of all so.
        own = Batch(*(None if x is None else x[row : row + 1] for x in batch))  # type: ignore[arg-type]
        with updates.accelerator.autocast():
            (loss,), _ = training.losses(own, position + row)
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        finite = all(bool(g.isfinite().all()) for g in gradients if g is not None)
        if not (finite and bool(loss.isfinite())):
            index = int(indices[row])
            bad.append({"index": index, "loss": _number(loss), "gradient_finite": finite})
    statistics = {}
    if isinstance(terms.q, LatentGaussian):
        statistics = {name: _statistics(getattr(terms.q, name)) for name in ("mu", "logvar")}
    return bad, statistics


def _statistics(x: Tensor) -> dict[str, Any]:
    x = x.detach().float()
    finite = x[x.isfinite()]
    return {
        "not_finite": int(x.numel() - finite.numel()),
        "min": _number(finite.min()) if len(finite) else None,
        "mean": _number(finite.mean()) if len(finite) else None,
        "max": _number(finite.max()) if len(finite) else None,
    }


def _number(x: Tensor) -> float | str:
    """As JSON has it, which knows no NaN."""
    value = x.item()
    return value if math.isfinite(value) else str(value)
