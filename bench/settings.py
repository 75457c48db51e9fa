"""What every section of `gpu.py` is told."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Settings:
    """One run of the benchmark."""

    device: torch.device
    quick: bool
    rounds: int
    """Interleaved rounds of every comparison."""
    tests: tuple[str, ...]
    """What pytest is given as the parity tests."""
    mnist_dir: Path | None
    deadline: float
    """When the section should be done, on `time.monotonic`; what is left by then is left out."""
    cases: tuple[str, ...] = ()
    """Of the training step: those alone whose names hold one of these; all unless given."""
    figure: Path | None = None
    """Where the figure of the growth goes."""

    @property
    def seconds_left(self) -> float:
        """Until the deadline."""
        return self.deadline - time.monotonic()

    @property
    def seconds_per_round(self) -> float:
        """How long one candidate runs in one round."""
        return 0.002 if self.quick else 0.01
