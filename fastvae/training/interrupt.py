"""Signals that ask a run to stop: it does so between two steps, with a checkpoint."""

import ctypes
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from fastvae.errors import Stopped

PR_SET_PDEATHSIG = 1


class Interrupt:
    """While it is entered, SIGTERM and SIGINT are noted instead of ending the process.

    A second SIGINT ends it at once. Where signals cannot be had (on a thread that is not the main
    one) none is noted.
    """

    def __init__(self) -> None:
        self.noted = 0
        """The number of the signal; 0 if there was none."""
        self._at_once: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
            _hear_of_the_launcher()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def stop_at_once(self, words: str | None) -> None:
        """From now on a signal raises Stopped, with these words, wherever it finds us, and so does
        one that was noted: nothing is to be kept, and the first step may compile for longer than
        whoever sends it waits. None: it is noted again."""
        self._at_once = words
        if words is not None and self.noted:
            raise Stopped(words, self.noted)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._at_once is not None:
            raise Stopped(self._at_once, number)
        if self.noted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.noted = self.noted or number


def _hear_of_the_launcher() -> None:
    """Get SIGTERM when `accelerate launch` or torchrun ends, which else leave their processes to
    themselves: the one passes no signal on, the other none that it does not survive."""
    command = _command_of(os.getppid())
    launchers = ("accelerate", "torchrun", "torch.distributed")
    if sys.platform != "linux" or not any(name in command for name in launchers):
        return
    launcher = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != launcher:  # it ended meanwhile
        os.kill(os.getpid(), signal.SIGTERM)


def _command_of(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except (OSError, UnicodeDecodeError):
        return ""
