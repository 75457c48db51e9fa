"""Optimizer steps in a row, with nothing between them that waits for the host.

All that changes from one step to the next (the position in the data, the learning rate, the
average's decay, the sums to log) is a tensor on the device, so that a step is the same sequence of
operations every time and a GPU can replay it.
"""

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor

from fastvae.compiler import CALLS_THAT_SHOW, Compiled, compile_in_place
from fastvae.config import Config
from fastvae.models import Model
from fastvae.training.buffers import Buffers, values_in_python
from fastvae.training.compiler import (
    add_gradients,
    gradients_in_one_graph,
    not_finite,
)
from fastvae.training.ema import EMA
from fastvae.training.feed import Feed
from fastvae.training.replay import Replay
from fastvae.training.schedule import is_constant, learning_rate
from fastvae.training.step import METRICS, FedStep, TrainingStep
from fastvae.training.together import shares


class Updates:
    """Takes optimizer steps and sums what is to be logged of them."""

    tally: Tensor
    """All that is counted on the device, float64 `[len(METRICS) + 2]`; these are views of it:"""
    sums: Tensor
    """Sums over this process's images of `METRICS`, since they were last set to 0; without steps
    that were skipped."""
    skipped: Tensor
    """Steps skipped since it was last set to 0: 0-d."""
    last_good: Tensor
    """How many steps there were after the last that was not skipped: 0-d."""

    def __init__(
        self,
        model: Model,
        step: TrainingStep,
        feed: Feed,
        optimizer: torch.optim.Optimizer,
        ema: EMA | None,
        accelerator: Accelerator,
        config: Config,
        *,
        total_steps: int,
        done: int,
        compiled: bool,
    ) -> None:
        """`done`: optimizer steps that the run has taken before."""
        self.model, self.training_step, self.feed, self.ema = model, step, feed, ema
        self.bare_optimizer = optimizer
        self.accelerator, self.config = accelerator, config
        self._learning_rate = partial(
            learning_rate,
            config.optimizer,
            total_steps=total_steps,
            steps_per_epoch=feed.size / config.batch_size,
        )
        device = accelerator.device
        self.parts = config.gradient_accumulation_steps
        # This process's rows of each part of a batch: all processes' together are what one process
        # alone would take as that part.
        cuts = shares(config.batch_size, self.parts * accelerator.num_processes)
        self.rows = cuts[accelerator.process_index :: accelerator.num_processes]
        self.done = done
        self._taken = 0  # by this process
        self.buffers = Buffers(step)
        self.step = torch.tensor(done, device=device)
        self.position = self.step * config.batch_size
        """Of the first row of the next step: 0-d int64."""
        self.tally = torch.zeros(len(METRICS) + 2, dtype=torch.float64, device=device)
        self.sums, self.skipped, self.last_good = (
            self.tally[: len(METRICS)], self.tally[-2], self.tally[-1],
        )  # fmt: skip
        self.last_good.fill_(done)
        # What the optimizer and the average take of the weights in the step that is being taken.
        self.rate = self._learning_rate(self.step).float()
        self.share = torch.zeros((), device=device)
        self._one = torch.ones((), device=device)

        # Compiled before it is wrapped: autocast is inside the graph; in place: names stay clean.
        module = FedStep(step, feed) if feed.on_device else step
        simple = accelerator.num_processes == self.parts == 1 and accelerator.scaler is None
        required = config.compile == "on"
        self.gradients: Compiled | None = None
        self._compiled: list[Compiled] = []
        self._account = self._accounting()
        if compiled and simple and isinstance(module, FedStep):
            self.gradients = gradients_in_one_graph(
                module, list(model.parameters()), config.batch_size, accelerator, required=required
            )
            self._compiled.append(self.gradients)
        elif compiled:
            self._compiled.append(compile_in_place(module, required=required))
        if compiled and device.type == "cuda":
            # A dozen launches become two. On a CPU a call of compiled code costs as much as they.
            self._account = Compiled(self._account, required=required)
            self._compiled.append(self._account)
        with warnings.catch_warnings():
            # New in PyTorch under another name, which Accelerate does not pass on yet.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            self.wrapped, prepared = accelerator.prepare(module, optimizer)
        # Accelerate's optimizer is there to scale losses; the bare one does no work in Python.
        self.optimizer = prepared if accelerator.scaler else prepared.optimizer
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        # Fused optimizers, and Muon, know from the scaling of losses how to leave all as it is.
        fused = optimizer.defaults.get("fused", False) or hasattr(optimizer, "found_inf")
        self.skips = fused and accelerator.scaler is None

        if feed.stream is not None:
            feed.stream.begin(config.batch_size, list(self.rows), done)

        # What makes the host wait, or goes on in Python between two steps, cannot be replayed.
        alone = feed.on_device and self.parts == 1 and accelerator.scaler is None
        self.replay: Replay | None = None
        if device.type == "cuda" and alone:
            self.replay = Replay(self._update, accelerator, config.steps_per_launch)

    def advance(self, steps: int, until: Callable[[], bool] = lambda: False) -> None:
        """Take so many optimizer steps, fewer if `until` says so between two; the host may be back
        before the device is done."""
        end = self.done + steps
        while self.done < end and self._taken < CALLS_THAT_SHOW and not until():
            with self._stance(1):
                self._advance(1)
        with self._stance(end - self.done):
            while self.done < end and not until():
                self._advance(1 if self.replay is None else self.replay.size(end - self.done))

    def _advance(self, count: int) -> None:
        batch = self.config.batch_size
        if self.feed.on_device:
            self.feed.prepare(self.done * batch, (self.done + count) * batch)
        if self.replay is None:
            self._update()
        else:
            before = values_in_python(self.training_step) if self._taken == 1 else {}
            self.replay(count)
            after = values_in_python(self.training_step) if before else {}
            if changed := [name for name, value in after.items() if before.get(name) != value]:
                self.replay.give_up(f"{changed[0]} changes from step to step")
        self._taken += count
        self.done += count

    def snapshot(self) -> Tensor:
        """A copy of `tally` as it is after the steps that were asked for. Nobody waits for it: a
        GPU makes it when it gets there."""
        return self.tally.clone()

    def reset(self) -> None:
        """Count the sums and the skipped steps from 0."""
        self.tally[:-1].zero_()

    @property
    def compiled(self) -> bool:
        """Whether steps are compiled, of which one can be sure after the first."""
        return bool(self._compiled) and not self.compile_problem

    @property
    def compile_problem(self) -> str:
        """Why they are not although they should be, in one line; or nothing."""
        return next((part.problem for part in self._compiled if part.problem), "")

    @property
    def in_a_row(self) -> int:
        """Steps skipped since the last good one. The host waits for the device."""
        return self.done - int(self.last_good)

    def learning_rate(self, step: int) -> float:
        """That of step `step` (from 0), for the log."""
        return float(self._learning_rate(torch.tensor(step)))

    def _stance(self, steps: int) -> AbstractContextManager[object]:
        """Whether compiled code is asked before each of the next `steps` if it still holds.

        The second step may compile it anew, for what the first has left behind. In the third it
        must hold, since no later one asks: that takes 0.3 ms on a CPU, a twentieth of a short step;
        not to ask takes about a millisecond once.
        """
        if not self.gradients or self.replay is not None:
            return nullcontext()  # other compiled code is not this run's alone
        if self._taken == CALLS_THAT_SHOW - 1:
            return torch.compiler.set_stance("fail_on_recompile")
        if self._taken >= CALLS_THAT_SHOW and steps >= 10:
            return torch.compiler.set_stance(skip_guard_eval_unsafe=True)
        return nullcontext()

    def _update(self) -> None:
        """One optimizer step over `batch_size` images, this process's in `parts`; none where a
        gradient is not finite, of which all processes are sure alike."""
        self.optimizer.zero_grad(set_to_none=True)
        self.buffers.keep()
        if self.gradients:
            found, sums, bad = self.gradients(self.position)
            for parameter, gradient in zip(self.model.parameters(), found, strict=True):
                parameter.grad = gradient
            if bad.is_cuda:
                add_gradients(bad, found, self._one)
        else:
            sums = self._accumulate(self.rows[0], 0)
            for part, rows in enumerate(self.rows[1:], start=1):
                more = self._accumulate(rows, part)
                sums = tuple(a.double() + b for a, b in zip(sums, more, strict=True))
            bad = not_finite(sums[0], [p.grad for p in self.model.parameters()])
        self._account(sums, bad)
        self.buffers.restore(bad)
        if self.config.optimizer.clip_norm:
            self.accelerator.clip_grad_norm_(
                self.model.parameters(), self.config.optimizer.clip_norm
            )
        if self.skips:
            self.optimizer.found_inf = bad  # type: ignore[attr-defined]
        self.optimizer.step()
        if self.ema:
            self.ema.update(self.model, self.share)

    def _accounting(self) -> Callable[[Sequence[Tensor], Tensor], None]:
        """A function of a step's sums and whether it is bad (as `not_finite` says it), that brings
        all numbers of the run up to date: the counts, the rate of this step, the average's share
        in it. No tensor but these is used, so that it can be compiled."""
        step, tally, rate, share, ema = self.step, self.tally, self.rate, self.share, self.ema
        position, batch_size = self.position, self.config.batch_size
        rate_of, rate_is_constant = self._learning_rate, is_constant(self.config.optimizer)
        # Where these two lie in `tally`: what is found place by place is one kernel of Inductor's.
        places = torch.arange(len(tally), device=tally.device)
        is_skipped, is_last_good = places == len(METRICS), places == len(METRICS) + 1

        def account(sums: Sequence[Tensor], bad: Tensor) -> None:
            is_bad = bad.bool()
            if not rate_is_constant:
                rate.copy_(rate_of(step))
            if ema:
                share.copy_(ema.share(step, is_bad))
            step.add_(1)
            torch.mul(step, batch_size, out=position)
            good = torch.where(is_last_good, step, tally + torch.stack([*sums, bad, bad]))
            tally.copy_(torch.where(is_bad, tally + is_skipped, good))

        return account

    def _accumulate(self, rows: range, part: int) -> tuple[Tensor, ...]:
        """Add the gradient of some rows of the batch that begins at `position`; their sums."""
        position = self.position + rows.start
        with self.accelerator.accumulate(self.wrapped):
            if self.feed.on_device:
                loss, sums = self.wrapped(position, len(rows))
            else:
                at = self.done * self.config.batch_size + rows.start
                loss, sums = self.wrapped(self.feed.streamed_batch(at, len(rows)), position)
            # Processes and parts are averaged as if they had equally many rows.
            parts = self.accelerator.num_processes * self.parts
            if (weight := len(rows) * parts / self.config.batch_size) != 1.0:
                loss = loss * weight
            if self.accelerator.num_processes > 1:
                # A loss that is not finite makes no gradient finite. So all processes hear of it by
                # the gradients, which they exchange anyway. Times one, exactly, otherwise.
                loss = loss * (1.0 + 0.0 * loss.detach())
            self.accelerator.backward(loss)
        return sums
