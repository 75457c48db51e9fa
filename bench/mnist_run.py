"""A short real run on MNIST through the library's own `train`: held-out ELBO and images per second.

No command line is involved, so that it also runs where `tyro` is not installed.
"""

import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from accelerate.state import AcceleratorState
from settings import Settings

from fastvae.presets import preset
from fastvae.training import train

PRESET = "mnist-mlp"


def run(settings: Settings) -> dict[str, Any]:
    """Train the preset in float32 and in bf16 mixed precision; quickly, 20 steps of the first."""
    if settings.device.type == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    rows = []
    precisions: tuple[Literal["no", "bf16"], ...] = ("no",) if settings.quick else ("no", "bf16")
    for precision in precisions:
        AcceleratorState._reset_state(reset_partial_state=True)
        base = preset(PRESET)
        with tempfile.TemporaryDirectory() as folder:
            config = replace(
                base,
                data=replace(base.data, data_dir=settings.mnist_dir),
                output=Path(folder) / "run",
                max_steps=20 if settings.quick else None,
                mixed_precision=precision,
            )
            began = time.monotonic()
            results = json.loads((train(config, name=PRESET) / "results.json").read_text())
        rows.append(
            {
                "preset": PRESET,
                "epochs": config.epochs,
                "max_steps": config.max_steps,
                "precision": precision,
                "compiled": results["compiled"],
                "heldout": results["heldout"],
                "images_per_second": results["images_per_second"],
                "seconds_to_first_step": results["seconds_to_first_step"],
                "seconds": round(time.monotonic() - began, 1),
            }
        )
    return {"rows": rows}
