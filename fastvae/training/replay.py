"""Whole training steps as CUDA graphs: launched once, without Python between their kernels."""

import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator

from fastvae.graphs import captured
from fastvae.training.buffers import STEPS_THAT_SHOW

# Before a capture: what is compiled, cached or allocated at first use must have been.
# DistributedDataParallel measures and rebuilds its buckets in its first steps.
PLAIN_STEPS, PLAIN_STEPS_DISTRIBUTED = STEPS_THAT_SHOW, 11
TIMED_STEPS = 20
# A launch costs the host some ten microseconds; with this much work in each they do not show.
SECONDS_PER_LAUNCH = 2e-3
MOST_STEPS_PER_LAUNCH = 64


class Replay:
    """Calls `update` some times, then replays it: one step at a time, or several in one launch.

    `update` must do the same operations on the same tensors every time. What it computes is the
    same either way. If the capture fails, `update` goes on being called and `problem` says why.
    """

    def __init__(
        self, update: Callable[[], None], accelerator: Accelerator, steps_per_launch: int | None
    ) -> None:
        """`steps_per_launch`: None finds a number by measuring the first replays."""
        self.update = update
        distributed = accelerator.num_processes > 1
        self.plain_steps = PLAIN_STEPS_DISTRIBUTED if distributed else PLAIN_STEPS
        self.steps_per_launch = steps_per_launch
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.problem = ""
        self.done = 0
        self.timed = 0
        self.began = 0.0

    def facts(self) -> dict[str, Any]:
        """For results: how many steps are launched at once, and why none is replayed, if so."""
        found: dict[str, Any] = {"steps_per_launch": self.steps_per_launch}
        return {**found, "problem": self.problem} if self.problem else found

    def size(self, steps: int) -> int:
        """How many of the next `steps` one call takes: no more different numbers than powers of
        two, since each is captured."""
        several = self.steps_per_launch
        if not self.graphs or several is None:
            return 1
        return several if several <= steps else 1 << (steps.bit_length() - 1)

    def __call__(self, count: int) -> None:
        """Take `count` steps, 1 or what `size` said."""
        if self.done >= self.plain_steps and not self.problem and count not in self.graphs:
            self._capture(count)
        if count in self.graphs:
            self.graphs[count].replay()
            self._choose()
        else:
            for _ in range(count):
                self.update()
        self.done += count

    def _capture(self, count: int) -> None:
        graph, problem = captured(self.update, count)
        if graph is None:
            self.give_up(problem)
        else:
            self.graphs[count] = graph

    def give_up(self, problem: str) -> None:
        """Replay nothing from now on, for this reason."""
        self.problem, self.steps_per_launch = problem, 1
        self.graphs.clear()

    def _choose(self) -> None:
        """Find `steps_per_launch` from the time that the first replays of one step take."""
        if self.steps_per_launch is not None:
            return
        if self.timed == 0:
            torch.cuda.synchronize()
            self.began = time.perf_counter()
        elif self.timed == TIMED_STEPS:
            torch.cuda.synchronize()
            seconds = (time.perf_counter() - self.began) / TIMED_STEPS
            self.steps_per_launch = steps_per_launch(seconds)
        self.timed += 1


def steps_per_launch(seconds: float) -> int:
    """A power of two of steps that together take about `SECONDS_PER_LAUNCH`."""
    count = 1
    while 2 * count * seconds <= SECONDS_PER_LAUNCH and count < MOST_STEPS_PER_LAUNCH:
        count *= 2
    return count
