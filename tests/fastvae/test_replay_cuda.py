"""On a GPU: replayed steps are plain steps, bit for bit, however many are launched at once.

Needs nothing of conftest.py, so that `bench/gpu.py` can run it where few packages are installed.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from step_cases import digit_like_images, make_accelerator, make_updates
from step_speed import side_stream
from torch import Tensor

from fastvae.config import Config, ModelConfig, ObjectiveConfig, OptimizerConfig
from fastvae.data import ImageSet
from fastvae.evaluation import Evaluator, evaluate
from fastvae.training.updates import Updates

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

SMALL = ModelConfig(hidden=(64,), latent_dim=7)
PLAIN = Config(model=SMALL, batch_size=24)
CONFIGS = {
    "plain": PLAIN,
    "average, clipped, cosine": replace(
        PLAIN,
        optimizer=OptimizerConfig(
            ema_decay=0.99, clip_norm=1.0, schedule="cosine", lr_warmup_steps=5
        ),
    ),
    "importance-weighted": replace(
        PLAIN, objective=ObjectiveConfig(objective="importance-weighted", num_samples=3)
    ),
    "optimal variance": replace(
        PLAIN, model=replace(SMALL, likelihood="gaussian", variance="optimal")
    ),
    "convolutions": replace(PLAIN, model=replace(SMALL, network="conv", widths=(8, 16))),
    "bf16": replace(PLAIN, mixed_precision="bf16"),
}
IMAGES = 300
"""12.5 steps an epoch: their ends fall inside of launches too."""


@pytest.fixture(autouse=True)
def _own_stream_and_fixed_algorithms() -> Iterator[None]:
    deterministic = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    with side_stream(torch.device("cuda")):
        yield
    torch.backends.cudnn.deterministic = deterministic


def trained(config: Config, *, replayed: bool, device: str = "cuda") -> Updates:
    """After 200 steps, in pieces as between lines of a log."""
    images = digit_like_images(IMAGES, torch.device(device))
    accelerator = make_accelerator(config, images.device)
    updates = make_updates(config, images, accelerator, compiled=False, replayed=replayed)
    for steps in (1, 50, 7, 142):
        updates.advance(steps)
    return updates


def state(updates: Updates) -> dict[str, Tensor]:
    """All that steps change."""
    found = {f"weight {k}": v for k, v in updates.model.state_dict().items()}
    if updates.ema:
        found |= {f"average {k}": v for k, v in updates.ema.model.state_dict().items()}
    for i, values in enumerate(updates.optimizer.state.values()):
        found |= {f"{key} {i}": v for key, v in values.items()}
    return found | {"sums": updates.sums, "step": updates.step}


def assert_equal(a: Updates, b: Updates) -> None:
    different = [name for name, x in state(a).items() if not torch.equal(x, state(b)[name])]
    assert not different
    assert a.done == b.done == 200 == int(a.step)


@pytest.mark.parametrize("name", CONFIGS)
def test_200_replayed_steps_are_200_plain_steps(name: str) -> None:
    plain = trained(CONFIGS[name], replayed=False)
    replayed = trained(CONFIGS[name], replayed=True)
    assert replayed.replay is not None and replayed.replay.graphs, replayed.replay
    assert not replayed.replay.problem
    assert_equal(replayed, plain)


@pytest.mark.parametrize("steps", [8, None])
def test_how_many_are_launched_at_once_changes_nothing(steps: int | None) -> None:
    one = trained(replace(PLAIN, steps_per_launch=1), replayed=True)
    several = trained(replace(PLAIN, steps_per_launch=steps), replayed=True)
    assert one.replay is not None and set(one.replay.graphs) == {1}
    assert several.replay is not None and several.replay.steps_per_launch is not None
    if steps:
        assert set(several.replay.graphs) == {1, 8}
    assert_equal(several, one)


@pytest.mark.parametrize("name", ["plain", "optimal variance", "convolutions"])
def test_replayed_evaluations_are_plain_evaluations(name: str) -> None:
    """In between steps that change the weights in place; the last batch is not full."""
    images = digit_like_images(IMAGES, torch.device("cuda"))
    config = CONFIGS[name]
    updates = make_updates(
        config, images, make_accelerator(config, images.device), compiled=False, replayed=True
    )
    heldout = ImageSet(images[:101].cpu(), None, "held out")
    evaluator = Evaluator(updates.model, heldout, seed=0, batch_size=20)
    found = []
    for _ in range(3):
        updates.advance(30)
        found.append(evaluator())
        plain = evaluate(updates.model, heldout, seed=0, batch_size=20)
        assert (found[-1].nll, found[-1].kl) == (plain.nll, plain.kl)
    assert evaluator.graph is not None
    assert found[0] != found[2]
