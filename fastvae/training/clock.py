"""How fast training goes."""

import time

import torch


class Clock:
    """Images per second of training alone: no first step (it compiles), no evaluation."""

    def __init__(self, launched: float | None = None) -> None:
        """`launched`: when the program was started, as time.time() has it; now unless given."""
        self.launched = time.time() if launched is None else launched
        self.first_step_seconds: float | None = None
        """From the launch to the end of the first step."""
        self.images = self.window_images = 0
        self.seconds = 0.0
        self.window_start = time.perf_counter()

    @staticmethod
    def now() -> float:
        return time.perf_counter()

    def first_step(self, device: torch.device) -> None:
        """The first step has been taken."""
        _synchronize(device)
        self.first_step_seconds = time.time() - self.launched
        self.window_start = time.perf_counter()

    def count(self, images: int) -> None:
        """So many images more, after the first step."""
        self.window_images += images

    def window(self) -> float:
        """Seconds since `rate` was last asked."""
        return time.perf_counter() - self.window_start

    def rate(self) -> float:
        """Images per second since the last call, to be asked when the host has just waited."""
        now = time.perf_counter()
        seconds, images = now - self.window_start, self.window_images
        self.seconds += seconds
        self.images += images
        self.window_start, self.window_images = now, 0
        return round(images / seconds, 1) if images else 0.0

    def overall(self) -> float:
        return round(self.images / self.seconds, 1) if self.images else 0.0

    def paused(self, device: torch.device) -> "_Pause":
        return _Pause(self, device)


class _Pause:
    """Leaves what happens inside out of a clock."""

    def __init__(self, clock: Clock, device: torch.device) -> None:
        self.clock, self.device = clock, device

    def __enter__(self) -> None:
        _synchronize(self.device)
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        _synchronize(self.device)
        self.clock.window_start += time.perf_counter() - self.start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
