"""The course of a run: steps, and what is said and kept of them in between."""

import json
import math
import signal
from collections import deque
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from fastvae.config import Config
from fastvae.errors import Stopped, UserError
from fastvae.evaluation import BrokenOff, Evaluation, Evaluator, quantity_names
from fastvae.models import Model
from fastvae.training.checkpoint import Snapshot
from fastvae.training.clock import Clock, Window
from fastvae.training.diagnosis import report_bad_steps
from fastvae.training.interrupt import Interrupt
from fastvae.training.log import RunLog
from fastvae.training.plan import Plan
from fastvae.training.readings import Reading
from fastvae.training.saver import Saver
from fastvae.training.step import METRICS
from fastvae.training.together import Together
from fastvae.training.updates import Updates

# With several processes: how long each goes on before they ask one another whether to stop.
SECONDS_BETWEEN_WORDS = 1.0
# A line of the log may be written when the next is due, where these come as fast as this.
SECONDS_OF_DELAY = 0.5


@dataclass
class Counters:
    """What a checkpoint keeps of the course beside the tensors of model and optimizer."""

    step: int
    pending: list[float]
    """Sums of METRICS over the images since the last line, and how many of these could not be read,
    of all processes."""
    pending_images: int
    faults: list[int]
    """Steps skipped since the last line, and in a row until now."""
    said: bool
    """Whether all that was due at this step has been logged."""

    @classmethod
    def at_the_start(cls) -> "Counters":
        return cls(0, [0.0] * (len(METRICS) + 1), 0, [0, 0], True)

    @classmethod
    def read(cls, state: dict[str, Any], source: Path, step: int) -> "Counters":
        """From a checkpoint's state, that of step `step`. Raises UserError naming `source`."""
        from pydantic import TypeAdapter, ValidationError  # only where a run is resumed

        own = {field.name: state[field.name] for field in fields(cls) if field.name in state}
        try:
            read = TypeAdapter(cls).validate_json(json.dumps(own), strict=True)
        except ValidationError as error:
            wrong = ", ".join(str(e["loc"][0]) for e in error.errors())
            raise UserError(f"{source} is not as fastvae writes it: see {wrong}") from error
        lengths = len(read.pending), len(read.faults)
        if read.step != step or read.pending_images < 0 or lengths != (len(METRICS) + 1, 2):
            raise UserError(
                f"{source} does not belong to this checkpoint of step {step}: it has step "
                f"{read.step}, {read.pending_images} images and lists of {lengths} numbers"
            )
        return read


@dataclass(frozen=True)
class Line:
    """A line of the log whose numbers are on their way from the device."""

    step: int
    images: int
    reading: Reading
    """As in `Course._reading`."""
    window: Window
    waited: float
    """Seconds that steps waited for images to be decoded."""


class Course:
    """Takes the steps of a run to their end, or to a signal."""

    def __init__(
        self,
        run: Path,
        config: Config,
        plan: Plan,
        updates: Updates,
        final_model: Model,
        evaluator: Evaluator,
        accelerator: Accelerator,
        together: Together,
        log: RunLog,
        clock: Clock,
        counters: Counters,
        facts: dict[str, Any],
    ) -> None:
        """`final_model`: the one to keep, which `evaluator` evaluates. `facts`: what checkpoints
        say besides."""
        self.run, self.config, self.plan, self.updates = run, config, plan, updates
        self.final_model, self.evaluator = final_model, evaluator
        self.accelerator, self.together, self.log, self.clock = accelerator, together, log, clock
        self.facts = facts
        self.names = quantity_names(final_model.likelihood.is_density, final_model.is_bound)
        self.saver = Saver(run, config.keep)
        self.saver.begun = counters.step if counters.step else -1
        self.images = counters.pending_images
        self.said = counters.said
        self.lines: deque[Line] = deque()
        self.result: Evaluation | None = None
        self.evaluated = -1
        """The step that `result` is of."""
        self.seconds_of_step = self.slowest_step = 0.0
        """Of this process, and the longest of all when they last asked one another."""
        self.asked = counters.step
        """At which step that was."""
        self.kept_at = clock.now()
        if accelerator.is_main_process:  # what a checkpoint holds is the sum over all processes
            *sums, unread = counters.pending
            updates.sums.copy_(torch.tensor(sums, dtype=torch.float64))
            updates.feed.bad_samples = int(unread)
        skipped, in_a_row = counters.faults
        updates.skipped.fill_(skipped)
        updates.last_good.fill_(counters.step - in_a_row)

    def go(self, interrupt: Interrupt) -> Evaluation | None:
        """To the last step. Returns the evaluation after it, None where an earlier process made it.

        Raises Stopped after a signal, with a checkpoint; UserError for what the user can mend.
        """
        self.interrupt = interrupt
        updates, plan, config = self.updates, self.plan, self.config
        if updates.done == 0:
            self._keep()
        while True:
            done = updates.done
            if not self.said:
                self._say()
            overdue = self._exchange()
            if self.said and done != self.saver.begun and self._is_checkpoint_due(overdue):
                self._keep()
            if done == plan.steps:
                break
            self._advance(self._steps_to_take(plan.undisturbed(done, config)))
        self._write_lines(0)
        self.together.on_main(self.saver.wait)
        return self.result

    def _steps_to_take(self, undisturbed: int) -> int:
        """So many that the processes ask one another in time."""
        if self.clock.first_step_seconds is None:
            return 1
        if self.together.world == 1:
            return undisturbed
        return min(undisturbed, self.asked + self._steps_between_words() - self.updates.done)

    def _steps_between_words(self) -> int:
        """The same on all processes."""
        if not self.slowest_step:
            return 1
        return max(1, int(SECONDS_BETWEEN_WORDS / self.slowest_step))

    def _is_checkpoint_due(self, overdue: bool) -> bool:
        if self.config.checkpoint_minutes is None or self.updates.done == self.plan.steps:
            return self.plan.is_checkpoint_due(self.updates.done, self.config)
        return overdue

    def _advance(self, steps: int) -> None:
        """Take so many steps, fewer where a lone process is told to stop, fails to keep a
        checkpoint or is to make one."""
        updates, clock = self.updates, self.clock
        before, alone = updates.done, self.together.world == 1
        began = clock.now()
        updates.advance(steps, lambda: alone and self._has_reason_to_halt())
        taken = updates.done - before
        self.images += taken * self.config.batch_size
        if updates.replay and updates.replay.problem:
            self.log.say_once(
                "replay",
                "steps are launched one operation at a time, not replayed as a CUDA graph: "
                f"{updates.replay.problem}",
            )
        if updates.compile_problem:
            self.log.say_once("compilation", f"not compiled: {updates.compile_problem}")
        if taken:
            self.said = not self.plan.is_line_due(updates.done, self.config)
        if clock.first_step_seconds is None:
            clock.first_step(self.accelerator.device)
            self.interrupt.stop_at_once(None)
            self.log.say(f"first step {clock.first_step_seconds:.1f} s after the start")
        else:
            clock.count(taken * self.config.batch_size)
        self.seconds_of_step = (clock.now() - began) / max(1, taken)

    def _has_reason_to_halt(self) -> bool:
        return bool(self.interrupt.noted or self.saver.failed or self._is_overdue())

    def _is_overdue(self) -> bool:
        """Whether `--checkpoint-minutes` have passed, by this process's clock, and there is a step
        to keep: where keeping takes longer than that, one is taken between two checkpoints."""
        minutes = self.config.checkpoint_minutes
        if minutes is None or self.updates.done == self.saver.begun:
            return False
        return self.clock.now() - self.kept_at >= 60 * minutes

    def _exchange(self) -> bool:
        """Ask the other processes, from time to time: stop if one of them was told to, or failed to
        keep a checkpoint. Returns whether the first finds a checkpoint overdue."""
        done = self.updates.done
        is_early = (
            self.asked < done < min(self.asked + self._steps_between_words(), self.plan.steps)
        )
        if self.together.world > 1 and is_early and self.said:
            return False
        self.asked = done
        is_main = self.accelerator.is_main_process
        noted, failed, overdue, self.slowest_step = self.together.largest(
            self.interrupt.noted,
            self.saver.failed,
            is_main and self._is_overdue(),
            self.seconds_of_step,
        )
        if failed:
            self.together.on_main(self.saver.check)
        if noted and done < self.plan.steps:
            if self.saver.begun != done:
                self._keep()
            self.together.on_main(self.saver.wait)
            name = signal.Signals(int(noted)).name
            raise Stopped(
                f"stopped by {name} after step {done} of {self.plan.steps}, and kept: "
                f"continue with --resume {self.run}",
                int(noted),
            )
        return bool(overdue)

    def _say(self) -> None:
        """Begin the line of this step, with an evaluation where one is due. A signal during the
        evaluation leaves all of it unsaid."""
        updates, done = self.updates, self.updates.done
        is_evaluated = self.plan.is_evaluation_due(done, self.config)
        if is_evaluated:
            self._write_lines(0)
            try:
                with self.clock.paused():
                    self.result = self.evaluator(until=lambda: bool(self.interrupt.noted))
                self.evaluated = done
                self._doubt(self.result)
            except BrokenOff:
                return
        stream = updates.feed.stream
        waited = 0.0 if stream is None else stream.waited
        line = Line(done, self.images, self._reading(), self.clock.window(), waited)
        self.lines.append(line)
        updates.reset()
        updates.feed.bad_samples = 0
        if stream is not None:
            stream.waited = 0.0
        self.images = 0
        self.said = True
        self._write_lines(1 if self._lines_may_wait() and not is_evaluated else 0)

    def _doubt(self, result: Evaluation) -> None:
        """Say it once if an evaluation is no number."""
        if not math.isfinite(result.elbo):
            self.log.say_once(
                "evaluation",
                f"warning: the bound on held-out images is {result.elbo}, which the log and the "
                "results hold as null: an image, a weight or a running mean gives no finite value",
            )

    def _lines_may_wait(self) -> bool:
        """Whether a line may be written when the next is due, so that a GPU has work while the host
        waits for it; the same on all processes."""
        is_fast = self.slowest_step * self.config.log_every < SECONDS_OF_DELAY
        return is_fast and self.accelerator.device.type == "cuda"

    def _write_lines(self, left: int) -> None:
        """Write the lines of the log that were begun, but for so many of the last. The host waits
        for their numbers."""
        while len(self.lines) > left:
            self._write(self.lines.popleft())

    def _write(self, line: Line) -> None:
        *sums, unread, skipped, in_a_row = line.reading.get()
        counted = line.images - int(skipped) * self.config.batch_size
        means = [x / counted if counted else None for x in sums]
        self._require_finite(line.step, means, int(in_a_row))
        values = self._line(line.step, dict(zip(METRICS, means, strict=True)), int(skipped))
        if unread:
            values["bad_samples"] = int(unread)
        values["lr"] = self.updates.learning_rate(line.step - 1)
        values["images_per_second"] = self.clock.rate(line.window)
        self._mind_the_stream(line)
        if self.evaluated == line.step and self.result is not None:
            found = self.result.named().items()
            values |= {f"heldout_{k}": v for k, v in found if k != "images"}
        with self.clock.paused():
            self.log.write(line.step, values)

    def _mind_the_stream(self, line: Line) -> None:
        """Say it once if steps wait for images more than a tenth of the time."""
        stream, seconds = self.updates.feed.stream, line.window.seconds()
        if stream is None or not line.window.images:
            return
        if line.waited > 0.1 * seconds:
            self.log.say_once(
                "stream",
                f"reading is the bound: {stream.workers} processes decode "
                f"{line.window.images / seconds:.0f} images/s, for which steps wait "
                f"{100 * line.waited / seconds:.0f}% of the time; more --data-workers help where "
                "there are cores, smaller image files everywhere",
            )

    def _keep(self) -> None:
        """Begin to write a checkpoint of this step, once the lines up to it are written."""
        updates = self.updates
        self._write_lines(0)
        self.kept_at = self.clock.now()
        with self.clock.paused():
            *pending, skipped, in_a_row = self._reading().get()
            faults = [int(skipped), int(in_a_row)]
            counters = Counters(updates.done, pending, self.images, faults, self.said)
            if not self.accelerator.is_main_process:
                self.saver.begun = updates.done
                return
            self.log.flush()  # lines up to this step are there if the checkpoint is
            state = {**vars(counters), "samples": updates.done * self.config.batch_size}
            state["compiled"] = updates.compiled
            if self.accelerator.scaler is not None:
                state["scaler"] = self.accelerator.scaler.state_dict()
            is_measured = self.evaluated == updates.done and self.said
            heldout = self.result.elbo if self.result and is_measured else math.nan
            self.saver.save(
                Snapshot.of(
                    model=self.final_model,
                    trained=updates.model,
                    optimizer=updates.bare_optimizer,
                    state={**state, **self.facts},
                    heldout=heldout if math.isfinite(heldout) else None,
                )
            )

    def _reading(self) -> Reading:
        """Sums of METRICS and the images that could not be read, since the last line, of all
        processes; the steps skipped since then, and in a row until now."""
        updates = self.updates
        bad = updates.sums.new_full((1,), updates.feed.bad_samples)  # new_tensor would wait
        own = torch.cat([updates.sums, bad])
        faults = torch.stack([updates.skipped, updates.step - updates.last_good])
        return Reading(torch.cat([self.accelerator.reduce(own, reduction="sum"), faults]))

    def _line(self, done: int, means: dict[str, float | None], skipped: int) -> dict[str, Any]:
        """The training part of a line of metrics.jsonl: the loss, and beside it the bound itself.
        Its values are None where every step since the last line was skipped."""
        names = self.names
        nll, kl = means["nll"], means["kl"]
        line = {
            "step": done,
            "epoch": round(self.plan.epoch(done), 4),
            "samples": done * self.config.batch_size,
            "loss": means["loss"],
            names["elbo"]: None if nll is None or kl is None else -(nll + kl),
            names["nll"]: nll,
            "kl": kl,
        }
        return {**line, "skipped_steps": skipped} if skipped else line

    def _require_finite(self, done: int, means: list[float | None], in_a_row: int) -> None:
        """End a run that no longer gets anywhere, before it replaces its checkpoints. `in_a_row`:
        steps that were skipped up to step `done`."""
        if in_a_row >= self.config.max_bad_steps:
            since = done - in_a_row
            report = report_bad_steps(self.run, self.updates, self.together, since, in_a_row)
            raise UserError(
                f"{in_a_row} steps in a row, from step {since + 1} on, had a loss or gradient that "
                f"is not finite, and were skipped: {report}. Try a lower --learning-rate, or "
                f"--clip-norm 1; {self.run} keeps its checkpoints"
            )
        if not all(x is None or math.isfinite(x) for x in means):
            raise UserError(
                f"what is logged is no longer finite at step {done}: try a lower "
                f"--learning-rate, or --clip-norm 1; {self.run} keeps its checkpoints"
            )
