"""On a GPU: steps that are skipped when replayed or scaled, copies that are made while steps go on,
and images that are streamed.

Needs nothing of conftest.py, so that `bench/gpu.py` can run it where few packages are installed.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from step_cases import digit_like_images, make_accelerator, make_updates
from step_speed import side_stream
from torch import Tensor

from fastvae.config import Config, ModelConfig, OptimizerConfig
from fastvae.data import DataConfig, EpochOrder, load_all
from fastvae.data.stored import StoredImages
from fastvae.training.checkpoint import Snapshot
from fastvae.training.feed import Feed
from fastvae.training.step import TrainingStep
from fastvae.training.updates import Updates

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

BATCH = 24
BAD = 60  # the number, from 0, of the step that is skipped
CONFIG = Config(model=ModelConfig(hidden=(64,), latent_dim=7), batch_size=BATCH)
CONFIGS = {
    "adam": CONFIG,
    "averaged, clipped": replace(CONFIG, optimizer=OptimizerConfig(ema_decay=0.99, clip_norm=1.0)),
    "muon": replace(CONFIG, optimizer=OptimizerConfig(optimizer="muon")),
}


@pytest.fixture(autouse=True)
def _own_stream() -> Iterator[None]:
    with side_stream(torch.device("cuda")):
        yield


def made(config: Config, *, replayed: bool) -> Updates:
    images = digit_like_images(300, torch.device("cuda"))
    accelerator = make_accelerator(config, images.device)
    return make_updates(config, images, accelerator, compiled=False, replayed=replayed)


@pytest.fixture
def spoiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of one step is infinite."""
    losses = TrainingStep.losses

    def spoiling(self: TrainingStep, batch: Any, position: Tensor) -> Any:
        found, terms = losses(self, batch, position)
        return found * torch.where(position == BAD * BATCH, torch.inf, 1.0), terms

    monkeypatch.setattr(TrainingStep, "losses", spoiling)


def tensors(updates: Updates) -> list[Tensor]:
    averaged = list(updates.ema.model.parameters()) if updates.ema else []
    kept = [x for values in updates.bare_optimizer.state.values() for x in values.values()]
    return [*updates.model.parameters(), *averaged, *kept]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_replayed_step_is_skipped_as_a_plain_one(name: str, spoiled: None) -> None:
    plain, replayed = (made(CONFIGS[name], replayed=x) for x in (False, True))
    for updates in (plain, replayed):
        for steps in (1, 50, 149):
            updates.advance(steps)
        assert (int(updates.skipped), updates.in_a_row) == (1, 0)
        assert bool(updates.sums.isfinite().all())
    assert replayed.replay is not None and replayed.replay.graphs
    for a, b in zip(tensors(replayed), tensors(plain), strict=True):
        assert bool(a.isfinite().all()) and torch.equal(a, b)


@pytest.mark.parametrize("name", CONFIGS)
def test_fp16(name: str, spoiled: None) -> None:
    """Steps whose scaled gradients are too large are skipped and counted as well: the scale begins
    high. Weights and averages never hear of them."""
    updates = made(replace(CONFIGS[name], mixed_precision="fp16"), replayed=False)
    scaler = updates.accelerator.scaler
    assert scaler is not None
    began = scaler.get_scale()
    updates.advance(BAD)
    scale, skipped = scaler.get_scale(), int(updates.skipped)
    assert scale == began / 2**skipped and updates.in_a_row == 0
    before = [x.clone() for x in tensors(updates)]
    updates.advance(1)
    assert scaler.get_scale() == scale / 2
    assert (int(updates.skipped), updates.in_a_row) == (skipped + 1, 1)
    for a, b in zip(tensors(updates), before, strict=True):
        assert bool(a.isfinite().all()) and torch.equal(a, b)


def test_a_snapshot_is_of_its_step(tmp_path: Path) -> None:
    """However many steps are launched before it is written."""
    updates = made(CONFIG, replayed=True)
    updates.advance(100)
    model = updates.model
    expected = {name: x.cpu().clone() for name, x in model.state_dict().items()}
    snapshot = Snapshot.of(
        model=model,  # type: ignore[arg-type]
        trained=model,
        optimizer=updates.bare_optimizer,
        state={"step": 100},
        heldout=None,
    )
    updates.advance(200)
    found = snapshot._on_host(snapshot.weights)
    assert found.keys() == expected.keys()
    for name, x in found.items():
        assert x.device.type == "cpu" and torch.equal(x, expected[name])


def test_streamed_through_pinned_memory(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    device = torch.device("cuda")
    pixels = digit_like_images(100, torch.device("cpu"))
    for i, x in enumerate(pixels):
        image.fromarray(x[0].numpy()).save(tmp_path / f"{i:03d}.png")
    images = load_all(str(tmp_path), DataConfig(data_budget=0))
    assert isinstance(images.images, StoredImages)
    feed = Feed(images, 3, device, samples_ahead=BATCH, workers=2)
    assert feed.stream is not None
    feed.stream.begin(BATCH, [range(4, 20)], first_step=2)
    order = EpochOrder(100, 3)
    for step in range(2, 30):
        batch = feed.streamed_batch(step * BATCH + 4, 16)
        assert batch.x.is_cuda
        assert torch.equal(batch.x.cpu(), pixels[order.indices(step * BATCH + 4, 16)])
