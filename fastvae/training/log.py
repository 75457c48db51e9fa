"""What a run says while it trains: metrics.jsonl, trackers, and the person watching."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from accelerate import Accelerator
from tqdm import tqdm

from fastvae.files import without_nan, write_whole
from fastvae.runs import METRICS

# Where there is no terminal to draw a bar on.
SECONDS_BETWEEN_LINES = 5.0


class RunLog:
    """Writes on the main process only; every method may be called on all of them."""

    def __init__(
        self,
        accelerator: Accelerator,
        run: Path,
        *,
        bound: str,
        start_step: int,
        last_line: int,
        total_steps: int,
    ) -> None:
        """`bound` is the name of the ELBO's column (see `evaluation.quantity_names`). Lines after
        step `last_line` will be written anew, and those that are there are dropped."""
        self.accelerator = accelerator
        self.main = accelerator.is_main_process
        self.total_steps = total_steps
        self.started = time.perf_counter()
        self.start_step = start_step
        self.lines: TextIO | None = None
        self.bar: tqdm | None = None
        self.bound = bound
        self.heldout = ""
        self.say_again = 0.0
        self.subjects: set[str] = set()
        if self.main:
            _drop_lines_after(run / METRICS, last_line)
            self.lines = (run / METRICS).open("a")
            if sys.stderr.isatty():
                self.bar = tqdm(total=total_steps, initial=start_step, unit="step", leave=False)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl, the trackers, and the progress shown."""
        self.accelerator.log(values, step=step)
        if self.lines is None:
            return
        self.lines.write(json.dumps(without_nan(values), allow_nan=False) + "\n")
        self.lines.flush()
        self._show(step, values)

    def flush(self) -> None:
        """Have the disk hold the lines."""
        if self.lines is not None:
            os.fsync(self.lines.fileno())

    def say(self, text: str) -> None:
        """A line for the person watching, above the bar."""
        if self.main:
            tqdm.write(text, file=sys.stderr)

    def say_once(self, subject: str, text: str) -> None:
        """The same, for the first time that it is about `subject`."""
        if subject not in self.subjects:
            self.subjects.add(subject)
            self.say(text)

    def close(self) -> None:
        """Leave the terminal and the files tidy."""
        if self.bar is not None:
            self.bar.close()
        if self.lines is not None:
            self.lines.close()

    def _show(self, step: int, values: dict[str, Any]) -> None:
        bound = self.bound
        shown = {name: _shown(values[name]) for name in ("loss", bound)}
        # Evaluations are rarer than lines: the last one is shown until the next.
        if f"heldout_{bound}" in values:
            self.heldout = f"{values[f'heldout_{bound}']:.2f}"
        if self.heldout:
            shown["held out"] = self.heldout
        shown["images/s"] = f"{values['images_per_second']:.0f}"
        if self.bar is not None:
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update(step - self.bar.n)
            return
        # A file or a pipe gets a readable line every few seconds.
        now = time.perf_counter()
        if now < self.say_again and step < self.total_steps:
            return
        self.say_again = now + SECONDS_BETWEEN_LINES
        per_step = (now - self.started) / max(1, step - self.start_step)
        left = tqdm.format_interval(per_step * (self.total_steps - step))
        numbers = "  ".join(f"{key} {value}" for key, value in shown.items())
        self.say(f"step {step}/{self.total_steps}  {numbers}  {left} left")


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _drop_lines_after(path: Path, step: int) -> None:
    """Forget what was logged after the checkpoint that the run continues from."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line.decode() + "\n")
        except (ValueError, KeyError, TypeError, RecursionError):
            continue  # cut short by a crash
    write_whole(path, "".join(kept))
