"""Timing: candidates side by side in interleaved rounds, by CUDA events or the host's clock."""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median over rounds, and between which quartiles they lay."""

    median: float
    q1: float
    q3: float
    rounds: int
    calls: int
    """Calls in one round."""

    @classmethod
    def of(cls, seconds: Sequence[float], calls: int) -> "Timing":
        q1, median, q3 = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, q1, q3, len(seconds), calls)

    def of_one(self, steps: int) -> "Timing":
        """Where a call took so many steps: seconds of one of them."""
        parts = (x / steps for x in (self.median, self.q1, self.q3))
        return Timing(*parts, self.rounds, self.calls * steps)

    @property
    def spread(self) -> float:
        """Distance between the quartiles as a share of the median."""
        return (self.q3 - self.q1) / self.median

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def synchronize(device: torch.device) -> None:
    """Wait until the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def side_stream(device: torch.device) -> AbstractContextManager[Any]:
    """A stream of its own, as in a run: on the default one nothing can be captured."""
    if device.type != "cuda":
        return nullcontext()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(stream)


def seconds(call: Call, calls: int, device: torch.device) -> float:
    """Seconds of one call, over so many in a row on the current stream."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / calls
    began = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - began) / calls


def interleaved(
    candidates: Mapping[str, Call],
    device: torch.device,
    *,
    rounds: int,
    seconds_per_round: float,
) -> dict[str, Timing]:
    """Time each candidate once in every round, so that a drifting clock meets all alike.

    Warm up beforehand whatever is compiled at its first call.
    """
    calls = {}
    for name, call in candidates.items():
        call()
        synchronize(device)
        estimate = seconds(call, 3, device)
        calls[name] = max(1, min(10_000, round(seconds_per_round / max(estimate, 1e-9))))
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            taken[name].append(seconds(call, calls[name], device))
    return {name: Timing.of(values, calls[name]) for name, values in taken.items()}


def rotating(calls: Sequence[Call]) -> Call:
    """One call that takes the next of several each time, so that no input stays in a cache."""
    endless = itertools.cycle(calls)
    return lambda: next(endless)()


def graphed(calls: Sequence[Call]) -> Call:
    """One CUDA graph of all the calls, replayed: what the device needs without launching from
    Python. Call it, like all of the timing, inside one side stream, after a warm-up."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay
