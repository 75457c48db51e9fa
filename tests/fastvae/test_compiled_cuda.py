"""A compiled step in bfloat16 learns what the plain step in float32 learns from the same noise.

Needs nothing of conftest.py, so that `bench/gpu.py` can run it where few packages are installed.
"""

from dataclasses import replace

import pytest
import torch
from measure import side_stream
from step_cases import digit_like_images, make_accelerator, make_updates

from fastvae.config import Config, ModelConfig, OptimizerConfig

CONFIG = Config(
    model=ModelConfig(hidden=(64,), latent_dim=7),
    optimizer=OptimizerConfig(learning_rate=3e-3),
    batch_size=24,
)
STEPS = 60
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.slow),
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
        ],
    ),
]


@pytest.mark.parametrize("device", DEVICES)
def test_a_compiled_bf16_step(device: str) -> None:
    """Replayed, on a GPU."""
    images = digit_like_images(300, torch.device(device))

    def trained(config: Config, compiled: bool) -> list[float]:
        """The mean loss of each fifth of the steps, nats per image."""
        accelerator = make_accelerator(config, images.device)
        updates = make_updates(config, images, accelerator, compiled=compiled, replayed=compiled)
        losses = []
        for _ in range(5):
            updates.sums.zero_()
            updates.advance(STEPS // 5)
            losses.append(updates.sums[0].item() * 5 / (STEPS * config.batch_size))
        if compiled and device == "cuda":
            assert updates.replay is not None and updates.replay.graphs, updates.replay
        return losses

    with side_stream(images.device):
        plain = trained(CONFIG, compiled=False)
        fast = trained(replace(CONFIG, mixed_precision="bf16"), compiled=True)
    assert plain[-1] < 0.9 * plain[0]
    # bfloat16 keeps 8 bits; the noise is the same, or the losses would differ by more.
    assert fast == pytest.approx(plain, rel=1e-2)
