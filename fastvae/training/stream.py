"""Batches decoded ahead of the step by worker processes, in the order of the run."""

import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

from torch.utils.data import DataLoader, Dataset, Sampler

from fastvae.data import EpochOrder
from fastvae.data.stored import Pixels, StoredImages
from fastvae.errors import UserError

BATCHES_AHEAD = 4  # of each worker
MOST_WORKERS = 8
PATIENCE = 5.0  # seconds, until the signal of a worker's death


class Decoded(NamedTuple):
    """A batch as a worker hands it over, or why there is none."""

    position: int
    found: Pixels | None
    problem: str = ""


class Stream:
    """The batches at given positions, if they are asked for in the order they were announced."""

    def __init__(
        self, images: StoredImages, order: EpochOrder, workers: int | None, pinned: bool
    ) -> None:
        """`workers`: processes that decode; None: as many as there are cores, at most 8."""
        self.images, self.order, self.pinned = images, order, pinned
        self.workers = workers or min(MOST_WORKERS, len(os.sched_getaffinity(0)))
        self._batches: Iterator[Decoded] | None = None
        self.waited = 0.0
        """Seconds that batches were waited for, since it was last set to 0."""

    def begin(self, batch_size: int, rows: list[range], first_step: int) -> None:
        """Announce: of every batch from step `first_step` on these rows, part by part."""
        loader = DataLoader(
            _Batches(self.images, self.order),
            sampler=_Positions(batch_size, rows, first_step),
            batch_size=None,  # an item is a batch
            num_workers=self.workers,
            prefetch_factor=BATCHES_AHEAD,
            pin_memory=self.pinned,
            worker_init_fn=_begin_quietly if self.pinned else _stand_back,
            # What reads the images cannot be sent to a process that is started afresh.
            multiprocessing_context=multiprocessing.get_context("fork"),
        )
        self._batches = iter(loader)

    def next(self, position: int) -> Pixels:
        """The next batch, whose first row is at `position`. Raises UserError where an image cannot
        be read. If a worker dies, PyTorch raises RuntimeError wherever the main thread is."""
        assert self._batches is not None
        began = time.perf_counter()
        try:
            decoded = next(self._batches)
        except (EOFError, ConnectionError) as error:
            # The worker has died as it handed over a batch. PyTorch says so at the signal of its
            # death, which must not come later, in the middle of something else.
            time.sleep(PATIENCE)
            raise RuntimeError("DataLoader worker broke off the handing over of a batch") from error
        self.waited += time.perf_counter() - began
        assert decoded.position == position, (decoded.position, position)
        if decoded.found is None:
            raise UserError(decoded.problem)
        return decoded.found


def _begin_quietly(worker: int) -> None:
    """A thread hands over a batch's memory, and has nothing to tell if training ends then. What
    goes wrong in decoding is told otherwise."""
    sys.excepthook = lambda *_: None


def _stand_back(worker: int) -> None:
    """Decode while the step waits, where it computes on the same cores: its threads wait for one
    another, so that whoever takes the time of one takes that of all."""
    _begin_quietly(worker)
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


class _Positions(Sampler[tuple[int, int]]):
    """Position and number of rows of each part of each batch, without end."""

    def __init__(self, batch_size: int, rows: list[range], first_step: int) -> None:
        self.batch_size, self.rows, self.first_step = batch_size, rows, first_step

    def __iter__(self) -> Iterator[tuple[int, int]]:
        step = self.first_step
        while True:
            for part in self.rows:
                yield step * self.batch_size + part.start, len(part)
            step += 1


class _Batches(Dataset[Decoded]):
    """Decodes in a worker, where an error is a value: raised, it would arrive as a traceback."""

    def __init__(self, images: StoredImages, order: EpochOrder) -> None:
        self.images, self.order = images, order

    def __getitem__(self, wanted: tuple[int, int]) -> Decoded:  # type: ignore[override]
        position, count = wanted
        try:
            rows = self.images.view(self.order.indices(position, count))
            return Decoded(position, rows.read(threads=1))
        except UserError as error:
            return Decoded(position, None, str(error))
