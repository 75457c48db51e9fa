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
WAYS: tuple[tuple[Literal["no", "bf16"], Literal["auto", "on"]], ...] = (
    ("no", "auto"),
    ("no", "on"),
    ("bf16", "on"),
)


def run(settings: Settings) -> dict[str, Any]:
    """Train the preset as it comes, compiled, and compiled in bf16 mixed precision; quickly, 20
    steps of the first."""
    if settings.device.type == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    rows = []
    for precision, compiling in WAYS[:1] if settings.quick else WAYS:
        AcceleratorState._reset_state(reset_partial_state=True)
        base = preset(PRESET)
        with tempfile.TemporaryDirectory() as folder:
            config = replace(
                base,
                data=replace(base.data, data_dir=settings.mnist_dir),
                output=Path(folder) / "run",
                max_steps=20 if settings.quick else None,
                mixed_precision=precision,
                compile=compiling,
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
