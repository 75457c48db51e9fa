"""What every candidate of `peers.py` trains: one network in plain PyTorch, one loss, one step size.

Imports torch alone, so that it runs in pythae's environment too.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGE_SHAPE = (1, 28, 28)
LEARNING_RATE = 1e-3
LATENTS = {"mlp": 64, "conv": 20}
HIDDEN = {"mlp": (512, 512), "conv": (256,)}
WIDTHS = (32, 64)


@dataclass(frozen=True)
class Case:
    """One configuration: which network, on how many images at a time, how precisely."""

    model: Literal["mlp", "conv"]
    batch: int
    precision: Literal["no", "bf16"] = "no"

    def __str__(self) -> str:
        return f"{self.model}-{self.batch}-{'float32' if self.precision == 'no' else 'bf16'}"


CASES = {
    str(case): case
    for case in (
        Case("mlp", 128),
        Case("mlp", 128, "bf16"),
        Case("mlp", 512),
        Case("mlp", 512, "bf16"),
        Case("conv", 128),
        Case("conv", 128, "bf16"),
    )
}

CANDIDATES: dict[str, tuple[str, ...]] = {
    "fastvae": ("",),
    "fastvae-binarized": ("",),
    "hand-written": ("two-graphs", "one-graph", "channels-last"),
    "hand-written-allocator": ("two-graphs", "one-graph", "channels-last"),
    "accelerate": ("0-workers", "2-workers"),
    "script": ("0-workers", "2-workers"),
    "pythae": ("0-workers", "2-workers"),
    "limit": ("contiguous", "channels-last"),
}
"""Each with the variants of which the better one is reported."""


def variants(candidate: str, case: Case) -> tuple[str, ...]:
    """Those that differ in this case: channels come last in convolutions alone."""
    convolves = case.model == "conv"
    return tuple(v for v in CANDIDATES[candidate] if convolves or v != "channels-last")


# ------------------------------------------------------------------------------- the network


def encoder(model: str) -> nn.Sequential:
    """`[B, 1, 28, 28]` → `[B, 2 · latents]`: mu beside logvar, by one linear layer."""
    outputs = 2 * LATENTS[model]
    if model == "mlp":
        first, second = HIDDEN[model]
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(784, first),
            nn.ReLU(),
            nn.Linear(first, second),
            nn.ReLU(),
            nn.Linear(second, outputs),
        )
    (hidden,), (narrow, wide) = HIDDEN[model], WIDTHS
    return nn.Sequential(
        nn.Conv2d(1, narrow, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(narrow, wide, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(wide * 7 * 7, hidden),
        nn.ReLU(),
        nn.Linear(hidden, outputs),
    )


def decoder(model: str) -> nn.Sequential:
    """`[B, latents]` → logits `[B, 1, 28, 28]`."""
    latents = LATENTS[model]
    if model == "mlp":
        first, second = HIDDEN[model][::-1]
        return nn.Sequential(
            nn.Linear(latents, first),
            nn.ReLU(),
            nn.Linear(first, second),
            nn.ReLU(),
            nn.Linear(second, 784),
            nn.Unflatten(1, IMAGE_SHAPE),
        )
    (hidden,), (narrow, wide) = HIDDEN[model], WIDTHS
    return nn.Sequential(
        nn.Linear(latents, hidden),
        nn.ReLU(),
        nn.Linear(hidden, wide * 7 * 7),
        nn.ReLU(),
        nn.Unflatten(1, (wide, 7, 7)),
        nn.ConvTranspose2d(wide, narrow, 3, stride=2, padding=1, output_padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(narrow, narrow, 3, stride=2, padding=1, output_padding=1),
        nn.ReLU(),
        nn.Conv2d(narrow, 1, 3, padding=1),
    )


class PlainVAE(nn.Module):
    """A variational autoencoder as it is written by hand."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder(model), decoder(model)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """`x` in [0, 1] → logits, mu, logvar; `noise` `[B, latents]` is drawn unless given."""
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        noise = torch.randn_like(mu) if noise is None else noise
        z = mu + torch.exp(0.5 * logvar) * noise
        return self.decoder(z), mu, logvar


def loss_of(x: Tensor, logits: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """Nats per image (0-d): cross-entropy of the grey pixels, and the KL divergence."""
    nll = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
    kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    return (nll + kl) / len(x)
