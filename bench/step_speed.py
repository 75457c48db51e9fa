"""How fast a training step is: fastvae against its rivals, in interleaved rounds."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch._inductor.config as inductor_config
from measure import Timing, interleaved, side_stream
from settings import Found, Settings, each
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
CORE = [
    StepCase("mnist-mlp", 128),
    StepCase("iwae-5", 20),
    StepCase("cifar10-conv", 128, "bf16"),
    StepCase("cifar10-conv", 1024, "bf16"),
    StepCase("mnist-mlp", 8192, "bf16"),
]
ALL = [
    StepCase(name, batch, precision)  # type: ignore[arg-type]
    for batch, precision, name in itertools.product((128, 20, 1024, 8192), ("no", "bf16"), PRESETS)
]
CASES = {
    "cuda": CORE,
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


def run(settings: Settings) -> Iterator[Found]:
    """Time the most telling steps."""
    yield from _timed(QUICK_CASES if settings.quick else CASES[settings.device.type], settings)


def run_more(settings: Settings) -> Iterator[Found]:
    """Time the others."""
    done = CASES[settings.device.type]
    more = [StepCase("iwae-5", 8)] if settings.quick else [case for case in ALL if case not in done]
    yield from _timed(more, settings)


def warm(settings: Settings) -> Iterator[Found]:
    """Compile every so-manieth of the cases that `run` times, for the caches."""
    _prepare(settings)
    part, parts = settings.part
    cases = QUICK_CASES if settings.quick else CASES[settings.device.type]

    def compiled(case: StepCase) -> list[dict[str, Any]]:
        torch._dynamo.reset()
        images = _images(case, settings)
        for name in ("fastvae", "compiled"):
            make_candidate(name, case, images).mean_loss(2)
        return [{"compiled": str(case)}]

    # Which variant of a kernel is the fastest is not to be decided while others use the device.
    with inductor_config.patch(autotune_local_cache=False), side_stream(settings.device):
        yield from each(cases[part::parts], compiled, settings)


def _timed(cases: list[StepCase], settings: Settings) -> Iterator[Found]:
    yield (
        "facts",
        {
            "what": WHAT,
            "targets": {"ratios": TARGETS, "steps_per_second": TARGET_STEPS},
            "matmul_precision": _prepare(settings),
        },
    )
    with side_stream(settings.device):
        for kind, value in each(cases, partial(_measure, settings=settings), settings, least=10.0):
            yield kind, value
            if kind == "row":
                for name, why in value["broken"].items():
                    yield "failure", f"{value['case']}: {name}: {why}"


def _prepare(settings: Settings) -> str:
    """As a run prepares its process; the precision of float32 products."""
    keep_compiled_code()
    keep_freed_memory()
    return use_matmul_precision("auto", settings.device)


def _images(case: StepCase, settings: Settings) -> torch.Tensor:
    count = 2_000 if settings.quick else 60_000
    return digit_like_images(count, settings.device, case.image_shape)


def _measure(case: StepCase, settings: Settings) -> Iterator[dict[str, Any]]:
    torch._dynamo.reset()
    images = _images(case, settings)
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
    yield {
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


def _call(candidate: Candidate) -> Callable[[], None]:
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
