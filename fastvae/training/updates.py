"""Optimizer steps in a row, with nothing between them that waits for the host.

All that changes from one step to the next (the position in the data, the learning rate, the
average's decay, the sums to log) is a tensor on the device, so that a step is the same sequence of
operations every time and a GPU can replay it.
"""

import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor

from fastvae.config import Config
from fastvae.models import Model
from fastvae.training.compiler import Gradients, gradients_in_one_graph
from fastvae.training.ema import EMA
from fastvae.training.feed import Feed
from fastvae.training.replay import Replay
from fastvae.training.schedule import learning_rate
from fastvae.training.step import METRICS, FedStep, TrainingStep


class Updates:
    """Takes optimizer steps and sums what is to be logged of them."""

    sums: Tensor
    """Sums over this process's images of `METRICS`, since they were last set to 0."""

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
        self.model, self.feed, self.ema = model, feed, ema
        self.accelerator, self.config = accelerator, config
        self.total_steps, self.compiled = total_steps, compiled
        device = accelerator.device
        self.parts = config.gradient_accumulation_steps
        self.rows = config.batch_size // (accelerator.num_processes * self.parts)
        self.first_row = accelerator.process_index * self.parts * self.rows
        self.done = done
        self._begun = False
        self.step = torch.tensor(done, device=device)
        self.sums = torch.zeros(len(METRICS), dtype=torch.float64, device=device)

        # Compiled before it is wrapped: autocast is inside the graph; in place: names stay clean.
        module = FedStep(step, feed, self.rows) if feed.on_device else step
        simple = feed.on_device and accelerator.num_processes == self.parts == 1
        self.gradients: Gradients | None = None
        if compiled and simple and accelerator.scaler is None:
            self.gradients = gradients_in_one_graph(module, list(model.parameters()), accelerator)
        if compiled and self.gradients is None:
            module.compile(fullgraph=True, dynamic=False)
        with warnings.catch_warnings():
            # New in PyTorch under another name, which Accelerate does not pass on yet.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            self.wrapped, prepared = accelerator.prepare(module, optimizer)
        # Accelerate's optimizer is there to scale losses; the bare one does no work in Python.
        self.optimizer = prepared if accelerator.scaler else prepared.optimizer
        for group in self.optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"], device=device)

        # What makes the host wait, or goes on in Python between two steps, cannot be replayed.
        alone = feed.on_device and self.parts == 1 and accelerator.scaler is None
        self.replay: Replay | None = None
        if device.type == "cuda" and alone:
            self.replay = Replay(self._update, accelerator, config.steps_per_launch)

    def advance(self, steps: int) -> None:
        """Take so many optimizer steps; the host may be back before the device is done."""
        batch = self.config.batch_size
        end = self.done + steps
        with self._without_guards(steps):
            while self.done < end:
                count = 1 if self.replay is None else self.replay.size(end - self.done)
                if self.feed.on_device:
                    self.feed.prepare(self.done * batch, (self.done + count) * batch)
                if self.replay is None:
                    self._update()
                else:
                    self.replay(count)
                self.done += count
        self._begun = True

    def learning_rate(self, step: int) -> float:
        """That of step `step` (from 0), for the log."""
        return float(self._learning_rate(torch.tensor(step)))

    def _without_guards(self, steps: int) -> AbstractContextManager[object]:
        """Do not ask compiled code before each call whether it still holds.

        What held in the first step holds in all. Asking takes 0.3 ms on a CPU, a twentieth of a
        short step; not to ask takes about a millisecond once.
        """
        if not (self.compiled and self._begun and self.replay is None and steps >= 10):
            return nullcontext()
        return torch.compiler.set_stance(skip_guard_eval_unsafe=True)

    def _update(self) -> None:
        """One optimizer step over `batch_size` images, this process's in `parts`."""
        self.optimizer.zero_grad(set_to_none=True)
        rate = self._learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"].copy_(rate)
        first = self.step * self.config.batch_size + self.first_row
        if self.gradients:
            found, sums = self.gradients(first)
            for parameter, gradient in zip(self.model.parameters(), found, strict=True):
                parameter.grad = gradient
            self.sums += sums
        else:
            for part in range(self.parts):
                self._accumulate(first + part * self.rows, part)
        if self.config.optimizer.clip_norm:
            self.accelerator.clip_grad_norm_(
                self.model.parameters(), self.config.optimizer.clip_norm
            )
        self.optimizer.step()
        if self.ema:
            self.ema.update(self.model, self.step)
        self.step += 1

    def _accumulate(self, position: Tensor, part: int) -> None:
        with self.accelerator.accumulate(self.wrapped):
            if self.feed.on_device:
                loss, sums = self.wrapped(position)
            else:
                at = self.done * self.config.batch_size + self.first_row + part * self.rows
                loss, sums = self.wrapped(self.feed.copied_batch(at, self.rows), position)
            self.accelerator.backward(loss)
        self.sums += sums

    def _learning_rate(self, step: Tensor) -> Tensor:
        per_epoch = self.feed.size / self.config.batch_size
        return learning_rate(self.config.optimizer, step, self.total_steps, per_epoch)
