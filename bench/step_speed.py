"""Images per second of a training step: fastvae against plain PyTorch, in interleaved rounds."""

from typing import Any

import torch
from measure import Timing, interleaved
from settings import Settings
from step_cases import (
    BACKENDS,
    StepCase,
    check_losses,
    digit_like_images,
    make_accelerator,
    make_step,
)

CASES = {
    "cuda": [
        StepCase("mlp", 128),
        StepCase("mlp", 1024, "bf16"),
        StepCase("mlp", 8192),
        StepCase("mlp", 8192, "bf16"),
        StepCase("mlp", 1024),
        StepCase("mlp", 128, "bf16"),
        StepCase("mlp", 32768, "bf16"),
    ],
    "cpu": [StepCase("mlp", 128), StepCase("mlp", 512), StepCase("conv", 128)],
}
QUICK_CASES = [StepCase("mlp", 32), StepCase("mlp", 32, "bf16")]
STEPS_BEFORE = 20


def run(settings: Settings) -> dict[str, Any]:
    """Time what there is time for. `left_out` names the rest, `failures` what went wrong."""
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    failures: list[str] = []
    images = digit_like_images(2_000 if settings.quick else 60_000, settings.device)
    for case in QUICK_CASES if settings.quick else CASES[settings.device.type]:
        if settings.seconds_left < 10:
            left_out.append(f"{case}: no time left")
            continue
        try:
            rows.append(_measure(case, images, settings))
        except Exception as error:  # one case must not cost the others
            failures.append(f"{case}: {type(error).__name__}: {error}")
    return {"rows": rows, "left_out": left_out, "failures": failures}


def _measure(case: StepCase, images: torch.Tensor, settings: Settings) -> dict[str, Any]:
    torch._dynamo.reset()
    accelerator = make_accelerator(case, settings.device)
    steps = {name: make_step(name, case, images, accelerator) for name in BACKENDS}
    losses = {}
    for name, step in steps.items():
        for _ in range(STEPS_BEFORE):
            loss = step()
        losses[name] = loss.item()
    check_losses(losses)
    timings = interleaved(
        steps,
        settings.device,
        rounds=settings.rounds,
        # Long enough for the host and the device to run as they do in a long training run.
        seconds_per_round=20 * settings.seconds_per_round,
    )
    return {
        "model": case.model,
        "batch": case.batch,
        "precision": case.precision,
        "losses": losses,
        "seconds": {name: timing.as_dict() for name, timing in timings.items()},
        "images_per_second": {name: _rates(case, timing) for name, timing in timings.items()},
        "ratios": {
            f"{ours} / {rival}": timings[rival].median / timings[ours].median
            for ours in ("fastvae", "fastvae-compiled")
            for rival in ("pytorch", "compiled", "tuned")
        },
    }


def _rates(case: StepCase, timing: Timing) -> dict[str, float]:
    return {
        "median": case.batch / timing.median,
        "q1": case.batch / timing.q3,
        "q3": case.batch / timing.q1,
    }
