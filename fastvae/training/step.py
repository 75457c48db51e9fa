"""What one step computes: the modules that are compiled and wrapped for distribution."""

from typing import Protocol

import torch
from fastvae_kernels import uniform
from torch import Tensor, nn

from fastvae import noise as streams
from fastvae.batch import Batch
from fastvae.parts.objectives import Objective
from fastvae.parts.terms import Terms
from fastvae.training.feed import Feed

METRICS = ("loss", "nll", "kl")

Sums = tuple[Tensor, Tensor, Tensor]
"""Over rows, of each of `METRICS`: 0-d. One tensor of them would take one kernel more."""


class Model(Protocol):
    """What can be trained: anything that gives the terms of a bound for a batch."""

    def __call__(self, batch: Batch, seed: Tensor, offset: Tensor, num_samples: int) -> Terms:
        """`seed` is for `fastvae.noise.stream`; `offset` is the number of rows that the run met
        before the first of `batch`."""


class TrainingStep(nn.Module):
    """A batch in, a scalar to differentiate and the sums to log out."""

    def __init__(self, model: Model, objective: Objective, seed: int, flip: bool = False) -> None:
        """`flip`: mirror each image left to right with probability 1/2."""
        super().__init__()
        self.model = model
        self.objective = objective
        self.flip = flip
        self.seed: Tensor
        self.register_buffer("seed", streams.all_streams(seed), persistent=False)

    def forward(self, batch: Batch, position: Tensor) -> tuple[Tensor, Sums]:
        """One part of a batch.

        Args:
            batch: B rows.
            position: 0-d int64, the number of rows that the run met before the first of them.

        Returns:
            The mean loss (0-d, nats per row) and the sums over rows of `METRICS`.
        """
        losses, sums = self.each(batch, position)
        return losses.mean(), sums

    def each(self, batch: Batch, position: Tensor) -> tuple[Tensor, Sums]:
        """The same, but the loss of each row, `[B]`."""
        losses, terms = self.losses(batch, position)
        of_rows = (losses, terms.mean_nll, terms.kl)
        loss, nll, kl = (x.detach().sum() for x in of_rows)
        return losses, (loss, nll, kl)

    def losses(self, batch: Batch, position: Tensor) -> tuple[Tensor, Terms]:
        """The loss of each row `[B]`, and what it is made of."""
        if self.flip:
            batch = batch._replace(images=mirrored(batch.x, self.seed, position), chosen=None)
        terms = self.model(batch, self.seed, position, self.objective.num_samples)
        positions = position + torch.arange(batch.rows, device=batch.images.device)
        return self.objective(terms, positions, self.seed), terms


def mirrored(x: Tensor, seed: Tensor, offset: Tensor) -> Tensor:
    """Images `[B, C, H, W]`, each left to right with probability 1/2: row b is a function of
    (seed, offset + b)."""
    seed = streams.stream(seed, streams.FLIP)  # type: ignore[assignment]
    draws = uniform((len(x), 1, 1, 1), seed, offset=offset, device=x.device)
    return torch.where(draws < 0.5, x.flip(-1), x)


class FedStep(nn.Module):
    """The same for data that live on the device: the position of `rows` rows in."""

    def __init__(self, step: TrainingStep, feed: Feed) -> None:
        super().__init__()
        self.step, self.feed = step, feed

    def forward(self, position: Tensor, rows: int) -> tuple[Tensor, Sums]:
        """`position` and what is returned are as in `TrainingStep.forward`."""
        return self.step(self.feed.batch(position, rows), position)

    def each(self, position: Tensor, rows: int) -> tuple[Tensor, Sums]:
        """As `TrainingStep.each`."""
        return self.step.each(self.feed.batch(position, rows), position)
