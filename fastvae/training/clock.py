"""How fast training goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from fastvae.training.readings import Mark


@dataclass(frozen=True)
class Window:
    """A stretch of training, without its pauses."""

    images: int
    spans: list[tuple[Mark, Mark]] = field(default_factory=list)

    def seconds(self) -> float:
        """How long it took. Waits until the device has come to its end."""
        return sum(end.since(begin) for begin, end in self.spans)


class Clock:
    """Images per second of training alone: no first step (it compiles), no evaluation.

    On a GPU it is the device that is timed, for which the host does not wait.
    """

    def __init__(self, launched: float | None = None) -> None:
        """`launched`: when the program was started, as time.time() has it; now unless given."""
        self.launched = time.time() if launched is None else launched
        self.first_step_seconds: float | None = None
        """From the launch to the end of the first step."""
        self.images = 0
        self.seconds = 0.0
        self._device = torch.device("cpu")
        self._begun: Mark | None = None
        self._spans: list[tuple[Mark, Mark]] = []
        self._images = 0

    @staticmethod
    def now() -> float:
        return time.perf_counter()

    def first_step(self, device: torch.device) -> None:
        """The first step has been taken. Waits for it."""
        self._device = device
        Mark(device).wait()
        self.first_step_seconds = time.time() - self.launched
        self._begun = Mark(device)

    def count(self, images: int) -> None:
        """So many images more, after the first step."""
        self._images += images

    def window(self) -> Window:
        """What there was since the last call."""
        self._pause()
        window = Window(self._images, self._spans)
        self._images, self._spans = 0, []
        self._go_on()
        return window

    def rate(self, window: Window) -> float:
        """Images per second in it, which counts towards `overall` now. Waits for its end."""
        seconds = window.seconds()
        self.seconds += seconds
        self.images += window.images
        return round(window.images / seconds, 1) if window.images else 0.0

    def overall(self) -> float:
        return round(self.images / self.seconds, 1) if self.images else 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What the device does inside does not count."""
        self._pause()
        try:
            yield
        finally:
            self._go_on()

    def _pause(self) -> None:
        if self._begun is not None:
            self._spans.append((self._begun, Mark(self._device)))

    def _go_on(self) -> None:
        if self._begun is not None:
            self._begun = Mark(self._device)
