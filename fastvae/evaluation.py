"""How good a model is on images it has not seen: sums over images on each rank, then one mean."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from fastvae.batch import Batch
from fastvae.data import ImageSet
from fastvae.models import Model
from fastvae.noise import derived_seed
from fastvae.parts.terms import Terms


@dataclass(frozen=True)
class Evaluation:
    """Means over images, in nats. `is_density` is False where nll is only a cross-entropy,
    `is_bound` where −(nll + kl) bounds no log p(x)."""

    images: int
    nll: float
    kl: float
    bits_per_dim: float | None
    is_density: bool
    is_bound: bool

    @property
    def elbo(self) -> float:
        """−(nll + kl): the ELBO where it is a bound."""
        return -(self.nll + self.kl)

    def named(self) -> dict[str, Any]:
        """The values under their honest names (see `quantity_names`)."""
        names = quantity_names(self.is_density, self.is_bound)
        values = {
            names["elbo"]: self.elbo,
            names["nll"]: self.nll,
            "kl": self.kl,
            "images": self.images,
        }
        if self.bits_per_dim is not None:
            values["bits_per_dim"] = self.bits_per_dim
        return values


def quantity_names(is_density: bool, is_bound: bool) -> dict[str, str]:
    """What the bound and the reconstruction term are called wherever they are shown.

    A Bernoulli likelihood of grey pixels is no density: its term is a cross-entropy and the sum
    with the KL bounds no likelihood; nor does that of a deterministic posterior. Neither may carry
    the name of what it is not.
    """
    if is_bound:
        return {"elbo": "elbo", "nll": "nll"}
    if is_density:
        return {"elbo": "reconstruction_objective", "nll": "reconstruction_nll"}
    return {"elbo": "cross_entropy_objective", "nll": "cross_entropy"}


class BrokenOff(Exception):
    """An evaluation was asked not to go on."""


@torch.no_grad()
def evaluate(
    model: Model,
    heldout: ImageSet,
    *,
    seed: int,
    accelerator: Accelerator | None = None,
    batch_size: int = 500,
    until: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Mean nll and kl over a set, one draw of z for each image (or of the weights, for all).

    Every image counts exactly once however many ranks share the work, and meets noise that is a
    function of (seed, its index) alone, so that one model always gets the same figures. Raises
    BrokenOff, on every rank, where `until` said on one of them between two batches to end it.
    """
    device = next(model.parameters()).device
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    first, last = len(heldout) * rank // world, len(heldout) * (rank + 1) // world
    noise_seed = derived_seed("evaluation", seed)
    was_training = model.training
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # the last: who did not go on
    for start in range(first, last, batch_size):
        if until():
            sums[2] = 1.0
            break
        part = heldout.select(slice(start, min(start + batch_size, last))).to(device)
        terms: Terms = model(Batch(part.tensor, part.labels), noise_seed, start)
        sums[:2] += torch.stack([terms.nll.double().mean(0).sum(), terms.kl.double().sum()])
    model.train(was_training)
    if accelerator:
        sums = accelerator.reduce(sums, reduction="sum")
    nll, kl, broken_off = (sums / len(heldout)).tolist()
    if broken_off:
        raise BrokenOff
    offset, bits = model.likelihood.bits_offset, None
    # Bits of what was stored need a step of storage: floating values have none.
    levels_unknown = heldout.images.is_floating_point()
    if model.is_bound and offset is not None and not (offset and levels_unknown):
        bits = (nll + kl) / (math.log(2) * math.prod(model.image_shape)) + offset
    return Evaluation(
        len(heldout),
        nll,
        kl,
        bits,
        is_density=model.likelihood.is_density,
        is_bound=model.is_bound,
    )
