"""How fast a training step is: fastvae against its rivals, in interleaved rounds."""

import gc
import itertools
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from measure import Timing, interleaved, synchronize
from settings import Settings
from step_cases import (
    WHAT,
    Candidate,
    StepCase,
    check_losses,
    digit_like_images,
    make_candidate,
    why_left_out,
)

from fastvae.allocator import keep_freed_memory
from fastvae.compiler import keep_compiled_code
from fastvae.precision import use_matmul_precision

PRESETS = ("mnist-mlp", "vae", "mnist-conv", "cifar10-conv")
BATCHES = (20, 128, 1024, 8192)
# Compiling takes most of the time: the most telling come first, then all that there are.
FIRST = [
    StepCase("mnist-mlp", 128),
    StepCase("mnist-mlp", 20),
    StepCase("cifar10-conv", 128, "bf16"),
    StepCase("vae", 20),
    StepCase("mnist-conv", 128),
    StepCase("mnist-mlp", 8192, "bf16"),
    StepCase("cifar10-conv", 1024, "bf16"),
    StepCase("mnist-mlp", 1024, "bf16"),
]
ALL = [
    StepCase(name, batch, precision)  # type: ignore[arg-type]
    for batch, precision, name in itertools.product((128, 20, 1024, 8192), ("no", "bf16"), PRESETS)
]
CASES = {
    "cuda": list(dict.fromkeys(FIRST + ALL)),
    "cpu": [StepCase("mnist-mlp", 128), StepCase("vae", 20), StepCase("mnist-conv", 128)],
}
QUICK_CASES = [StepCase("mnist-mlp", 32), StepCase("cifar10-conv", 8, "bf16")]
STEPS_BEFORE = 20
WARM_STEPS = 100
"""Further ones on a GPU: until the step is captured, timed, and captured again as several."""

TARGETS = {"pythae": 50.0, "compiled": 1.3}
"""How many times as fast fastvae is to be on a GPU."""
TARGET_STEPS = {20: 10_000.0}
"""Steps a second, by batch."""


def run(settings: Settings) -> dict[str, Any]:
    """Time what there is time for. `left_out` names the rest, `failures` what went wrong."""
    keep_compiled_code()
    keep_freed_memory()
    precision = use_matmul_precision("auto", settings.device)
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    failures: list[str] = []
    longest = 10.0
    with side_stream(settings.device):
        for case in _cases(settings):
            if settings.seconds_left < longest:
                left_out.append(f"{case}: no time left")
                continue
            began = time.monotonic()
            try:
                row = _measure(case, settings)
            except Exception as error:  # one case must not cost the others
                failures.append(f"{case}: {type(error).__name__}: {error}")
            else:
                rows.append(row)
                failures += [f"{case}: {name}: {why}" for name, why in row["broken"].items()]
            longest = max(longest, time.monotonic() - began)
            _forget(settings.device)
    return {
        "what": WHAT,
        "targets": {"ratios": TARGETS, "steps_per_second": TARGET_STEPS},
        "matmul_precision": precision,
        "rows": rows,
        "left_out": left_out,
        "failures": failures,
    }


def _cases(settings: Settings) -> Iterator[StepCase]:
    for case in QUICK_CASES if settings.quick else CASES[settings.device.type]:
        if not settings.cases or any(name in str(case) for name in settings.cases):
            yield case


def _measure(case: StepCase, settings: Settings) -> dict[str, Any]:
    torch._dynamo.reset()
    images = digit_like_images(
        2_000 if settings.quick else 60_000, settings.device, case.image_shape
    )
    absent = {name: why_left_out(name, case, settings.device) for name in WHAT}
    broken: dict[str, str] = {}
    candidates: dict[str, Candidate] = {}
    losses = {}
    for name in WHAT:
        if absent[name]:
            continue
        try:
            candidate = make_candidate(name, case, images)
            losses[name] = candidate.mean_loss(STEPS_BEFORE)
            if settings.device.type == "cuda" and name.startswith("fastvae"):
                candidate.advance(WARM_STEPS)
            candidates[name] = candidate
        except Exception as error:  # nor one candidate the rest of its row
            broken[name] = f"{type(error).__name__}: {str(error).splitlines()[:1]}"
    check_losses(losses)
    called = interleaved(
        {name: _call(candidate) for name, candidate in candidates.items()},
        settings.device,
        rounds=settings.rounds,
        # Long enough for the host and the device to run as they do in a long training run.
        seconds_per_round=20 * settings.seconds_per_round,
    )
    timings = {name: called[name].of_one(each.steps) for name, each in candidates.items()}
    ratios = {
        name: timing.median / timings["fastvae"].median
        for name, timing in timings.items()
        if "fastvae" in timings and name != "fastvae"
    }
    held_to_targets = settings.device.type == "cuda" and not settings.quick
    return {
        "case": str(case),
        "preset": case.preset,
        "batch": case.batch,
        "precision": case.precision,
        "losses": losses,
        "seconds": {name: timing.as_dict() for name, timing in timings.items()},
        "images_per_second": {name: rates(timing, case.batch) for name, timing in timings.items()},
        "steps_per_second": {name: rates(timing, 1) for name, timing in timings.items()},
        "ratios": ratios,
        "absent": {name: why for name, why in absent.items() if why},
        "broken": broken,
        "missed": missed(case.batch, timings, ratios) if held_to_targets else None,
        "replay": {name: each.replay() for name, each in candidates.items() if each.replay},
    }


def _call(candidate: Candidate) -> Any:
    return lambda: candidate.advance(candidate.steps)


def rates(timing: Timing, count: int) -> dict[str, float]:
    """Of so many things a step: how many a second."""
    return {
        "median": count / timing.median,
        "q1": count / timing.q3,
        "q3": count / timing.q1,
    }


def missed(batch: int, timings: dict[str, Timing], ratios: dict[str, float]) -> list[str]:
    """The targets that a row is held to and does not reach."""
    if "fastvae" not in timings:
        return ["fastvae itself"]
    found = [
        f"{rival} {target:g}×"
        for rival, target in TARGETS.items()
        if rival in ratios and ratios[rival] < target
    ]
    steps = TARGET_STEPS.get(batch)
    if steps and 1 / timings["fastvae"].median < steps:
        found.append(f"{steps:,.0f} steps/s")
    return found


def side_stream(device: torch.device) -> AbstractContextManager[Any]:
    """A stream of its own, as in a run: on the default one nothing can be captured."""
    if device.type != "cuda":
        return nullcontext()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(stream)


def _forget(device: torch.device) -> None:
    synchronize(device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
