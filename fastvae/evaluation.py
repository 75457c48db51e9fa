"""How good a model is on images it has not seen: sums over images on each rank, then one mean."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from fastvae.batch import Batch
from fastvae.compiler import Compiled
from fastvae.data import ImageSet
from fastvae.graphs import captured
from fastvae.hardware import fits_on, image_format
from fastvae.models import Model
from fastvae.noise import derived_seed
from fastvae.parts.terms import Terms

_log = logging.getLogger(__name__)

# Of a batch: its activations take some tens of times the memory of its images.
MOST_IMAGES = 500
MOST_VALUES = 1 << 22


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


def evaluate(
    model: Model,
    heldout: ImageSet,
    *,
    seed: int,
    accelerator: Accelerator | None = None,
    batch_size: int | None = None,
) -> Evaluation:
    """`Evaluator`, once."""
    return Evaluator(model, heldout, seed=seed, accelerator=accelerator, batch_size=batch_size)()


class Evaluator:
    """Mean nll and kl over a set, one draw of z for each image (or of the weights, for all).

    Every image counts exactly once however many ranks share the work, and meets noise that is a
    function of (seed, its index) alone, so that one model always gets the same figures.

    Where the images fit they stay on the model's device: an evaluation then asks nothing of the
    host before its end, and a GPU replays it batch by batch from the second one on.
    """

    def __init__(
        self,
        model: Model,
        heldout: ImageSet,
        *,
        seed: int,
        accelerator: Accelerator | None = None,
        batch_size: int | None = None,
        compiled: bool = False,
    ) -> None:
        """`batch_size`: as many images as hold MOST_VALUES values, at most MOST_IMAGES, unless
        given. `compiled`: if there is a compiler that can."""
        self.model, self.heldout, self.accelerator = model, heldout, accelerator
        self.device = next(model.parameters()).device
        self.memory_format = image_format(model)
        rank, world = 0, 1
        if accelerator:
            rank, world = accelerator.process_index, accelerator.num_processes
        self.first = len(heldout) * rank // world
        own = heldout.select(slice(self.first, len(heldout) * (rank + 1) // world))
        self.size = len(own)
        self.on_device = fits_on(self.device, own)
        self.set = own.to(self.device, self.memory_format) if self.on_device else own
        most = batch_size or min(MOST_IMAGES, max(1, MOST_VALUES // math.prod(heldout.image_shape)))
        self.batches = -(-self.size // most)
        # As even as can be: all batches have one shape, and few rows are computed for nothing.
        self.rows = -(-self.size // max(1, self.batches))
        self.noise_seed = derived_seed("evaluation", seed)
        self.begin = torch.zeros((), dtype=torch.int64, device=self.device)
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        self._terms: Callable[[Batch, Tensor], Tensor] = self._sums
        if compiled:
            self._terms = Compiled(self._sums, required=False)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.evaluations = 0

    @torch.no_grad()
    def __call__(self, until: Callable[[], bool] = lambda: False) -> Evaluation:
        """Raises BrokenOff, on every rank, where `until` said on one of them between two batches
        to end it."""
        was_training = self.model.training
        self.model.eval()
        self.begin.zero_()
        self.sums.zero_()
        take = self._replayed() if self.evaluations and self.on_device else self._take
        broken_off = False
        for _ in range(self.batches):
            if broken_off := until():
                break
            take()
        self.evaluations += 1
        if isinstance(self._terms, Compiled) and self._terms.problem:
            _log.warning("evaluations are not compiled: %s", self._terms.problem)
            self._terms = self._sums
        self.model.train(was_training)
        sums = torch.cat([self.sums, self.sums.new_full((1,), float(broken_off))])
        if self.accelerator:
            sums = self.accelerator.reduce(sums, reduction="sum")
        nll, kl, broken_off = (sums / len(self.heldout)).tolist()
        if broken_off:
            raise BrokenOff
        return self._evaluation(nll, kl)

    def _take(self) -> None:
        """Add the next batch to the sums."""
        places = self.begin + torch.arange(self.rows, device=self.device)
        # The last batch ends with rows that were there before; they do not count.
        index = places.clamp(max=self.size - 1)
        if self.on_device:
            labels = self.set.labels
            labels = None if labels is None else labels.index_select(0, index)
            batch = Batch(self.set.tensor, labels, chosen=index)
        else:
            part = self.set.select(index.cpu()).to(self.device, self.memory_format)
            batch = Batch(part.tensor, part.labels)
        self.sums += self._terms(batch, places)
        self.begin += self.rows

    def _sums(self, batch: Batch, places: Tensor) -> Tensor:
        """Of nll and kl over the rows of a batch that are in the set, float64."""
        terms: Terms = self.model(batch, self.noise_seed, self.first + places[0])
        values = torch.stack([terms.nll.double().mean(0), terms.kl.double()])
        return torch.where(places < self.size, values, 0.0).sum(1)

    def _replayed(self) -> Callable[[], None]:
        """`_take` by a CUDA graph, where there can be one."""
        if self.device.type != "cuda":
            return self._take
        if self.graph is None and self.evaluations == 1:
            self.graph, problem = captured(self._take)
            if problem:
                _log.warning("evaluations are not replayed: %s", problem)
        return self.graph.replay if self.graph else self._take

    def _evaluation(self, nll: float, kl: float) -> Evaluation:
        model = self.model
        offset, bits = model.likelihood.bits_offset, None
        # Bits of what was stored need a step of storage: floating values have none.
        levels_unknown = self.heldout.images.is_floating_point()
        if model.is_bound and offset is not None and not (offset and levels_unknown):
            bits = (nll + kl) / (math.log(2) * math.prod(model.image_shape)) + offset
        return Evaluation(
            len(self.heldout),
            nll,
            kl,
            bits,
            is_density=model.likelihood.is_density,
            is_bound=model.is_bound,
        )
