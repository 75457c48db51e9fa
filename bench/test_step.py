"""Images per second of one training step: fastvae against plain PyTorch of the same architecture.

    pytest bench/test_step.py

Each group is one table: the rows are timed one after the other. `python bench/gpu.py --only step`
times them in interleaved rounds instead (add `--device cpu` where there is no GPU).
"""

import measure
import pytest
import torch
from step_cases import (
    BACKENDS,
    StepCase,
    check_losses,
    digit_like_images,
    make_accelerator,
    make_step,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = [StepCase("mlp", 128), StepCase("mlp", 512), StepCase("conv", 128)]
if DEVICE.type == "cuda":
    CASES += [StepCase("mlp", 4096), StepCase("mlp", 16384), StepCase("mlp", 16384, "bf16")]

STEPS_BEFORE = 20
ROUNDS = 9
SECONDS_PER_ROUND = 0.2


@pytest.fixture(scope="module")
def images():
    return digit_like_images(60_000, DEVICE)


@pytest.fixture(scope="module", params=CASES, ids=str)
def steps(request, images):
    """All that are compared, warmed up, and seen to learn alike before any is timed."""
    torch._dynamo.reset()
    accelerator = make_accelerator(request.param, DEVICE)
    made = {name: make_step(name, request.param, images, accelerator) for name in BACKENDS}
    losses = {}
    for name, step in made.items():
        for _ in range(STEPS_BEFORE):
            loss = step()
        losses[name] = loss.item()
    check_losses(losses)
    # As many steps a round for all, so that the table's times compare.
    seconds = measure.seconds(made["pytorch"], 5, DEVICE)
    return request.param, made, max(1, round(SECONDS_PER_ROUND / seconds))


@pytest.mark.parametrize("backend", BACKENDS)
def test_step(benchmark, steps, backend):
    case, made, count = steps

    def several():
        for _ in range(count):
            made[backend]()
        measure.synchronize(DEVICE)

    benchmark.group = f"training step, {case}, {DEVICE.type}: {count} steps"
    benchmark.pedantic(several, rounds=ROUNDS, warmup_rounds=1)
    if benchmark.stats is not None:  # None with --benchmark-disable
        rate = case.batch * count / benchmark.stats.stats.median
        benchmark.extra_info["images_per_second"] = round(rate)
        benchmark.extra_info["steps_per_round"] = count
