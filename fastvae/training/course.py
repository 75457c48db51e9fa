"""The course of a run: steps, and what is said and kept of them in between."""

import json
import math
import signal
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from fastvae.config import Config
from fastvae.data import ImageSet
from fastvae.errors import Stopped, UserError
from fastvae.evaluation import BrokenOff, Evaluation, evaluate, quantity_names
from fastvae.models import Model
from fastvae.training.checkpoint import Snapshot
from fastvae.training.clock import Clock
from fastvae.training.diagnosis import report_bad_steps
from fastvae.training.interrupt import Interrupt
from fastvae.training.log import RunLog
from fastvae.training.plan import Plan
from fastvae.training.saver import Saver
from fastvae.training.step import METRICS
from fastvae.training.together import Together
from fastvae.training.updates import Updates

# With several processes: how long each goes on before they ask one another whether to stop.
SECONDS_BETWEEN_WORDS = 1.0


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


class Course:
    """Takes the steps of a run to their end, or to a signal."""

    def __init__(
        self,
        run: Path,
        config: Config,
        plan: Plan,
        updates: Updates,
        final_model: Model,
        heldout: ImageSet,
        accelerator: Accelerator,
        together: Together,
        log: RunLog,
        clock: Clock,
        counters: Counters,
        facts: dict[str, Any],
    ) -> None:
        """`final_model`: the one to evaluate and keep. `facts`: what checkpoints say besides."""
        self.run, self.config, self.plan, self.updates = run, config, plan, updates
        self.final_model, self.heldout = final_model, heldout
        self.accelerator, self.together, self.log, self.clock = accelerator, together, log, clock
        self.facts = facts
        self.names = quantity_names(final_model.likelihood.is_density, final_model.is_bound)
        self.saver = Saver(run, config.keep)
        self.saver.begun = counters.step if counters.step else -1
        self.images = counters.pending_images
        self.said = counters.said
        self.result: Evaluation | None = None
        self.minded = False
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
        seconds_of_step = 0.0
        while True:
            done = updates.done
            if not self.said:
                self._say()
            if self.said and done != self.saver.begun and plan.is_checkpoint_due(done, config):
                self._keep()
            seconds_of_step = self._words(seconds_of_step)
            if done == plan.steps:
                break
            steps = plan.undisturbed(done, config)
            if self.clock.first_step_seconds is None:
                steps = 1
            elif self.together.world > 1:
                steps = min(steps, max(1, int(SECONDS_BETWEEN_WORDS / max(seconds_of_step, 1e-6))))
            seconds_of_step = self._advance(steps)
        self.together.on_main(self.saver.wait)
        return self.result

    def _advance(self, steps: int) -> float:
        """Take so many steps, fewer where a lone process is told to stop or fails to keep a
        checkpoint; the seconds of one."""
        updates, clock = self.updates, self.clock
        before, alone = updates.done, self.together.world == 1
        began = clock.now()
        updates.advance(steps, lambda: alone and bool(self.interrupt.noted or self.saver.failed))
        taken = updates.done - before
        self.images += taken * self.config.batch_size
        if taken:
            self.said = not self.plan.is_line_due(updates.done, self.config)
        if clock.first_step_seconds is None:
            clock.first_step(self.accelerator.device)
            self.interrupt.stop_at_once(None)
            self.log.say(f"first step {clock.first_step_seconds:.1f} s after the start")
        else:
            clock.count(taken * self.config.batch_size)
        return (clock.now() - began) / max(1, taken)

    def _words(self, seconds_of_step: float) -> float:
        """Ask the others: stop if one of them was told to, or failed to keep a checkpoint. Returns
        the longest of `seconds_of_step`."""
        noted, failed, slowest = self.together.largest(
            self.interrupt.noted, self.saver.failed, seconds_of_step
        )
        if failed:
            self.together.on_main(self.saver.check)
        if noted and self.updates.done < self.plan.steps:
            if self.saver.begun != self.updates.done:
                self._keep()
            self.together.on_main(self.saver.wait)
            name = signal.Signals(int(noted)).name
            raise Stopped(
                f"stopped by {name} after step {self.updates.done} of {self.plan.steps}, and kept: "
                f"continue with --resume {self.run}",
                int(noted),
            )
        return slowest

    def _say(self) -> None:
        """Write the line of this step, with an evaluation where one is due. The host waits for the
        device here and nowhere else. A signal during the evaluation leaves all of it unsaid."""
        updates, config, done = self.updates, self.config, self.updates.done
        *sums, unread = self._pending()
        skipped = int(updates.skipped)
        counted = self.images - skipped * config.batch_size
        means = [x / counted if counted else None for x in sums]
        self._require_finite(means)
        line = self._line(dict(zip(METRICS, means, strict=True)), skipped)
        if unread:
            line["bad_samples"] = int(unread)
        line["lr"] = updates.learning_rate(done - 1)
        self._mind_the_stream(self.clock.window())
        line["images_per_second"] = self.clock.rate()
        with self.clock.paused(self.accelerator.device):
            if self.plan.is_evaluation_due(done, config):
                try:
                    self.result = evaluate(
                        self.final_model,
                        self.heldout,
                        seed=config.seed,
                        accelerator=self.accelerator,
                        until=lambda: bool(self.interrupt.noted),
                    )
                except BrokenOff:
                    return
                found = self.result.named().items()
                line |= {f"heldout_{k}": v for k, v in found if k != "images"}
            self.log.write(done, line)
        updates.sums.zero_()
        updates.feed.bad_samples = 0
        updates.skipped.zero_()
        self.images = 0
        self.said = True

    def _mind_the_stream(self, seconds: float) -> None:
        """Say it once if steps wait for images more than a tenth of the time."""
        stream = self.updates.feed.stream
        if stream is None:
            return
        waited, stream.waited = stream.waited, 0.0
        if self.clock.window_images and waited > 0.1 * seconds and not self.minded:
            self.minded = True
            self.log.say(
                f"reading is the bound: {stream.workers} processes decode "
                f"{self.clock.window_images / seconds:.0f} images/s, for which steps wait "
                f"{100 * waited / seconds:.0f}% of the time; more --data-workers help where there "
                "are cores, smaller image files everywhere"
            )

    def _keep(self) -> None:
        """Begin to write a checkpoint of this step."""
        updates = self.updates
        with self.clock.paused(self.accelerator.device):
            faults = [int(updates.skipped), updates.in_a_row]
            counters = Counters(updates.done, self._pending(), self.images, faults, self.said)
            if not self.accelerator.is_main_process:
                self.saver.begun = updates.done
                return
            self.log.flush()  # lines up to this step are there if the checkpoint is
            state = {**vars(counters), "samples": updates.done * self.config.batch_size}
            if self.accelerator.scaler is not None:
                state["scaler"] = self.accelerator.scaler.state_dict()
            self.saver.save(
                Snapshot.of(
                    model=self.final_model,
                    trained=updates.model,
                    optimizer=updates.bare_optimizer,
                    state={**state, **self.facts},
                    heldout=self.result.elbo if self.result and self.said else None,
                )
            )

    def _pending(self) -> list[float]:
        """As in `Counters`, on all processes."""
        sums = self.updates.sums
        own = torch.cat([sums, sums.new_tensor([self.updates.feed.bad_samples])])
        return self.accelerator.reduce(own, reduction="sum").tolist()

    def _line(self, means: dict[str, float | None], skipped: int) -> dict[str, Any]:
        """The training part of a line of metrics.jsonl: the loss, and beside it the bound itself.
        Its values are None where every step since the last line was skipped."""
        done, names = self.updates.done, self.names
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

    def _require_finite(self, means: list[float | None]) -> None:
        """End a run that no longer gets anywhere, before it replaces its checkpoints."""
        in_a_row = self.updates.in_a_row
        if in_a_row >= self.config.max_bad_steps:
            since = self.updates.done - in_a_row
            report = report_bad_steps(self.run, self.updates, self.together, in_a_row)
            raise UserError(
                f"{in_a_row} steps in a row, from step {since + 1} on, had a loss or gradient that "
                f"is not finite, and were skipped: {report}. Try a lower --learning-rate, or "
                f"--clip-norm 1; {self.run} keeps its checkpoints"
            )
        if not all(x is None or math.isfinite(x) for x in means):
            raise UserError(
                f"what is logged is no longer finite at step {self.updates.done}: try a lower "
                f"--learning-rate, or --clip-norm 1; {self.run} keeps its checkpoints"
            )
