"""One training step, by fastvae and by hand in plain PyTorch: same architecture, same data.

The rivals are given every advantage that does not change what they are: images as bytes on the
device, no `.item()`, sums over pixels in one call.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from fastvae.build import build_model, build_objective
from fastvae.config import Config, ModelConfig, ObjectiveConfig, OptimizerConfig
from fastvae.data import ImageSet
from fastvae.training.feed import Feed
from fastvae.training.loop import make_optimizer
from fastvae.training.replay import MOST_STEPS_PER_LAUNCH
from fastvae.training.step import TrainingStep
from fastvae.training.updates import Updates

Step = Callable[[], Tensor]
"""Takes one optimizer step on the next batch and returns its loss, on the device."""

IMAGE_SHAPE = (1, 28, 28)
LEARNING_RATE = 1e-3
LATENTS = 20

MODELS = {
    "mlp": ModelConfig(network="mlp", hidden=(400, 400), latent_dim=LATENTS),
    "conv": ModelConfig(network="conv", hidden=(256,), widths=(32, 64), latent_dim=LATENTS),
}


@dataclass(frozen=True)
class StepCase:
    """What is trained, and on how many images at a time."""

    model: Literal["mlp", "conv"]
    batch: int
    precision: Literal["no", "bf16"] = "no"

    def __str__(self) -> str:
        mixed = "" if self.precision == "no" else f" {self.precision}"
        return f"{self.model}-{self.batch}{mixed}"


def digit_like_images(count: int, device: torch.device) -> Tensor:
    """Random bytes with the look of digits: ten coarse shapes, black around, grey at the edges."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(10, 1, 5, 5, generator=generator)
    shapes = F.interpolate(coarse, size=(20, 20), mode="bicubic", align_corners=False)
    shapes = F.pad(shapes, (4, 4, 4, 4), value=-9.0)
    kinds = torch.randint(10, (count,), generator=generator).to(device)
    images = shapes.to(device)[kinds] * 4
    return (torch.sigmoid(images + torch.randn_like(images)) * 255).to(torch.uint8)


# ---------------------------------------------------------------------------------- fastvae


def fastvae_step(
    case: StepCase, images: Tensor, accelerator: Accelerator, *, compiled: bool
) -> Step:
    """What `fastvae.training.train` takes its steps with."""
    device = images.device
    train_set = ImageSet(images, None, "random")
    config = Config(model=MODELS[case.model], batch_size=case.batch)
    vae = build_model(config.model, train_set, case.batch).to(device)
    vae.to(memory_format=torch.channels_last)
    objective = build_objective(ObjectiveConfig(), len(images))
    updates = Updates(
        vae,
        TrainingStep(vae, objective, seed=0).to(device),
        Feed(train_set, 0, device, samples_ahead=MOST_STEPS_PER_LAUNCH * case.batch),
        make_optimizer(OptimizerConfig(learning_rate=LEARNING_RATE), vae),
        None,
        accelerator,
        config,
        total_steps=10**9,
        done=0,
        compiled=compiled,
    )

    def step() -> Tensor:
        updates.sums.zero_()
        updates.advance(1)
        return updates.sums[0] / case.batch

    return step


def make_accelerator(case: StepCase, device: torch.device) -> Accelerator:
    """A fresh one: its precision is otherwise that of the first in the process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(mixed_precision=case.precision, cpu=device.type == "cpu")


# ------------------------------------------------------------------------------ plain PyTorch


class PlainVAE(nn.Module):
    """As tutorials write it: two heads, noise from torch's generator."""

    def __init__(self, encoder: nn.Module, features: int, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.mu = nn.Linear(features, LATENTS)
        self.logvar = nn.Linear(features, LATENTS)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.encoder(x)
        mu, logvar = self.mu(h), self.logvar(h)
        z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
        return self.decoder(z), mu, logvar


def plain_mlp() -> PlainVAE:
    """784–400–400–20 and back."""
    encoder = nn.Sequential(
        nn.Flatten(), nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU()
    )
    decoder = nn.Sequential(
        nn.Linear(LATENTS, 400),
        nn.ReLU(),
        nn.Linear(400, 400),
        nn.ReLU(),
        nn.Linear(400, 784),
        nn.Unflatten(1, IMAGE_SHAPE),
    )
    return PlainVAE(encoder, 400, decoder)


def plain_conv() -> PlainVAE:
    """Two convolutions that halve the image, 256 hidden units, 20 latents, and back."""
    encoder = nn.Sequential(
        nn.Conv2d(1, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 7 * 7, 256),
        nn.ReLU(),
    )
    decoder = nn.Sequential(
        nn.Linear(LATENTS, 256),
        nn.ReLU(),
        nn.Linear(256, 64 * 7 * 7),
        nn.ReLU(),
        nn.Unflatten(1, (64, 7, 7)),
        nn.ConvTranspose2d(64, 32, 3, stride=2, padding=1, output_padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 32, 3, stride=2, padding=1, output_padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 1, 3, padding=1),
    )
    return PlainVAE(encoder, 256, decoder)


def plain_step(case: StepCase, images: Tensor, *, compiled: bool, fused_adam: bool) -> Step:
    """The plain loop. The zeros and ones are drawn outside of the compiled function: Inductor's
    random numbers are slow on a CPU, and this is the faster way."""
    device = images.device
    vae = {"mlp": plain_mlp, "conv": plain_conv}[case.model]().to(device)
    optimizer = torch.optim.Adam(vae.parameters(), lr=LEARNING_RATE, fused=fused_adam or None)
    order = torch.randperm(len(images), device=device)
    position = 0

    def loss_of(x: Tensor) -> Tensor:
        logits, mu, logvar = vae(x)
        nll = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
        kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
        return (nll + kl) / len(x)

    if compiled:
        loss_of = torch.compile(loss_of, fullgraph=True, dynamic=False)

    def step() -> Tensor:
        nonlocal position
        if position + case.batch > len(images):
            position = 0
        indices = order[position : position + case.batch]
        position += case.batch
        x = torch.bernoulli(images[indices].float() / 255)
        with torch.autocast(device.type, torch.bfloat16, enabled=case.precision == "bf16"):
            loss = loss_of(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


# ------------------------------------------------------------------------------ side by side

BACKENDS = ("pytorch", "compiled", "tuned", "fastvae", "fastvae-compiled")
"""Plain PyTorch eager, compiled, compiled with fused Adam; fastvae eager and compiled."""


def make_step(backend: str, case: StepCase, images: Tensor, accelerator: Accelerator) -> Step:
    """One of BACKENDS, with fresh weights."""
    torch.manual_seed(0)
    if backend.startswith("fastvae"):
        return fastvae_step(case, images, accelerator, compiled=backend == "fastvae-compiled")
    return plain_step(case, images, compiled=backend != "pytorch", fused_adam=backend == "tuned")


def check_losses(losses: dict[str, float]) -> None:
    """After as many steps from as fresh weights, all have come as far."""
    values = torch.tensor(list(losses.values()))
    assert values.isfinite().all(), f"losses are not finite: {losses}"
    middle = values.median()
    assert ((values - middle).abs() < 0.1 * middle).all(), f"losses differ: {losses}"
