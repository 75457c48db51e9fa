"""Checkpoints written while training goes on."""

import threading
from pathlib import Path

from fastvae import checkpoints
from fastvae.errors import UserError
from fastvae.training.checkpoint import Snapshot


class Saver:
    """Writes snapshots into a run's folder by a thread, one at a time, and deletes old ones."""

    def __init__(self, run: Path, keep: int) -> None:
        """`keep`: so many of the newest stay, besides the best."""
        self.run, self.keep = run, keep
        self.begun = self.saved = -1
        """The steps of the last checkpoint whose writing began, and of the last that is written."""
        self._thread: threading.Thread | None = None
        self._failure: tuple[int, Exception] | None = None

    def save(self, snapshot: Snapshot) -> None:
        """Begin to write it, once the one before is written. Raises as `check` does."""
        self.wait()
        self.begun = snapshot.step
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint")
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether `check` will raise."""
        return self._failure is not None

    def check(self) -> None:
        """Raise UserError if a snapshot could not be written."""
        if self._failure is None:
            return
        step, error = self._failure
        self._failure = None
        reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        kept = f"the one of step {self.saved} is" if self.saved >= 0 else "older ones are"
        raise UserError(
            f"the checkpoint of step {step} could not be written to {self.run}: {reason}; {kept} "
            f"untouched. Make room, then continue with --resume {self.run}"
        ) from error

    def wait(self) -> None:
        """Until nothing is being written. Raises as `check` does."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def _write(self, snapshot: Snapshot) -> None:
        try:
            snapshot.write(self.run)
            self.saved = snapshot.step
            checkpoints.keep(self.run, self.keep)
        except Exception as error:  # raised by the main thread, at its next step
            self._failure = (snapshot.step, error)
