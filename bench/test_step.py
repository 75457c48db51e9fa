"""Images per second of one training step: fastvae against plain PyTorch of the same architecture.

    pytest bench/test_step.py

Each group is one table: the rows are timed one after the other. `python bench/gpu.py --only steps`
times them in interleaved rounds instead (add `--device cpu` where there is no GPU).
"""

from collections.abc import Iterator
from typing import Any

import measure
import pytest
import torch
from step_cases import (
    WHAT,
    Candidate,
    StepCase,
    check_losses,
    digit_like_images,
    make_candidate,
    why_left_out,
)
from step_speed import CASES, STEPS_BEFORE, WARM_STEPS

from fastvae.precision import use_matmul_precision

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS = 9
SECONDS_PER_ROUND = 0.2


@pytest.fixture(scope="module", params=CASES[DEVICE.type][:3], ids=str)
def contest(request: pytest.FixtureRequest) -> Iterator[tuple[StepCase, dict[str, Candidate], int]]:
    """All that are compared, warmed up, and seen to learn alike before any is timed."""
    torch._dynamo.reset()
    use_matmul_precision("auto", DEVICE)
    case = request.param
    with measure.side_stream(DEVICE):
        images = digit_like_images(60_000, DEVICE, case.image_shape)
        made = {
            name: make_candidate(name, case, images)
            for name in WHAT
            if not why_left_out(name, case, DEVICE)
        }
        check_losses({name: each.mean_loss(STEPS_BEFORE) for name, each in made.items()})
        if DEVICE.type == "cuda":
            made["fastvae"].advance(WARM_STEPS)
        eager = made["pytorch"]
        seconds = measure.seconds(lambda: eager.advance(eager.steps), 5, DEVICE) / eager.steps
        # As many steps a round for all, so that the table's times compare.
        steps = max(each.steps for each in made.values())
        yield case, made, steps * max(1, round(SECONDS_PER_ROUND / seconds / steps))


@pytest.mark.parametrize("name", WHAT)
def test_step(benchmark: Any, contest: Any, name: str) -> None:
    case, made, steps = contest
    if name not in made:
        pytest.skip(why_left_out(name, case, DEVICE))

    def several() -> None:
        made[name].advance(steps)
        measure.synchronize(DEVICE)

    benchmark.group = f"training step, {case}, {DEVICE.type}: {steps} steps"
    benchmark.pedantic(several, rounds=ROUNDS, warmup_rounds=1)
    if benchmark.stats is not None:  # None with --benchmark-disable
        rate = case.batch * steps / benchmark.stats.stats.median
        benchmark.extra_info["images_per_second"] = round(rate)
        benchmark.extra_info["steps_per_round"] = steps
