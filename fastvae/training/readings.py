"""Moments and numbers of the device that the host learns of later, without waiting for them."""

import time

import torch
from torch import Tensor


class Mark:
    """A moment of a device's work: when all that it was given before is done."""

    def __init__(self, device: torch.device) -> None:
        self.event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record()
        else:
            self.seconds = time.perf_counter()

    def wait(self) -> None:
        """Until it has come."""
        if self.event is not None:
            self.event.synchronize()

    def since(self, earlier: "Mark") -> float:
        """Seconds from `earlier` to this one. Waits for both."""
        if self.event is None or earlier.event is None:
            return self.seconds - earlier.seconds
        self.wait()
        return earlier.event.elapsed_time(self.event) / 1000.0


class Reading:
    """What a tensor holds now, on its way to the host: later changes of it do not matter."""

    def __init__(self, values: Tensor) -> None:
        """`values`: one dimension."""
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
        else:
            self._values = values.clone()
        self._there = Mark(values.device)

    def get(self) -> list[float]:
        """The numbers. Waits for them."""
        self._there.wait()
        return self._values.tolist()
