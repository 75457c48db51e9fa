"""Candidates in processes of their own, of which one runs at a time.

Each is started once and trains for ever. SIGSTOP halts its whole process group, with the workers
of its data loader; SIGCONT lets it go on for one turn. In every round each candidate has one turn,
with the machine to itself. How far it is, a candidate says without being asked: fastvae in the
metrics.jsonl of its run, the others in a few bytes of shared memory (`peers_worker.Beat`).
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peers_cases import HIDDEN, LATENTS, LEARNING_RATE, WIDTHS, Case
from peers_worker import LAYOUT
from settings import ROOT

from fastvae.config import Config, ModelConfig, OptimizerConfig
from fastvae.data.config import DataConfig

NEVER = 1e12
PATIENCE = 600.0
"""Seconds without a step after which a candidate has failed; compiling may take minutes."""
POLL = 0.01
TAIL = 4096
"""Bytes at the end of metrics.jsonl that hold its last line for certain."""


class Failed(Exception):
    """A candidate that could not be started, or ended, with the last that it said."""


@dataclass(frozen=True)
class Place:
    """Where and with what the candidates of one run of the benchmark work."""

    folder: Path
    images: Path
    cores: int
    pythae: Path
    """The Python of its environment."""


@dataclass(frozen=True)
class Reading:
    """How far a candidate is, by its own count of images and a clock's seconds."""

    images: int
    seconds: float
    loss: float


def fastvae_config(case: Case, images: Path, *, binarize: bool) -> Config:
    """The run of fastvae that is measured: with evaluations and checkpoints never due, as none of
    the others makes any."""
    return Config(
        data=DataConfig(data=str(images)),
        model=ModelConfig(
            network=case.model,
            hidden=HIDDEN[case.model],
            widths=WIDTHS,
            latent_dim=LATENTS[case.model],
            binarize="auto" if binarize else "none",
        ),
        optimizer=OptimizerConfig(learning_rate=LEARNING_RATE),
        epochs=1e6,
        batch_size=case.batch,
        mixed_precision=case.precision,
        compile="on",
        eval_every=NEVER,
        checkpoint_every=NEVER,
    )


class Worker:
    """One candidate at work on one case. Use as a context, which ends with its process."""

    def __init__(
        self,
        candidate: str,
        variant: str,
        case: Case,
        place: Place,
        cache: Path,
        *,
        log_every: int | None = None,
    ) -> None:
        """Compiled code goes to and comes from `cache`; `log_every` is fastvae's, if not its
        default."""
        self.name = f"{candidate} {variant}".strip()
        self.batch = case.batch
        self.folder = place.folder / f"{case}-{self.name.replace(' ', '-')}-{time.time_ns()}"
        self.folder.mkdir(parents=True)
        self.metrics = self.folder / "run/metrics.jsonl"
        self.beat = self.folder / "beat"
        self.is_fastvae = candidate.startswith("fastvae")
        if self.is_fastvae:
            config = fastvae_config(case, place.images, binarize=candidate != "fastvae")
            config = replace(config, log_every=log_every or config.log_every)
            file = self.folder / "config.json"
            file.write_text(config.to_json())
            command = [sys.executable, "-m", "fastvae.cli", "train", "--config", str(file)]
            command += ["--output", str(self.metrics.parent)]
        else:
            self.beat.write_bytes(bytes(LAYOUT.size))
            python = str(place.pythae) if candidate == "pythae" else sys.executable
            script = str(ROOT / "bench/peers_worker.py")
            command = [python, script, candidate, variant, str(case), str(place.images)]
            command.append(str(self.beat))
        self.said = self.folder / "log.txt"
        self.began = time.time()
        with self.said.open("w") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=_environment(place.cores, cache),
                cwd=self.folder,
                start_new_session=True,  # a process group of its own, to be stopped as one
            )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """Halt it where it is."""
        self._signal(signal.SIGSTOP)
        time.sleep(0.05)

    def resume(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def read(self) -> Reading:
        """Where it is now, or of fastvae: where it was at its last line, and when that was."""
        if self.is_fastvae:
            return self._read_metrics()
        while True:  # until it was not written to meanwhile
            content = self.beat.read_bytes()
            if content == self.beat.read_bytes():
                return Reading(*LAYOUT.unpack(content))

    def _read_metrics(self) -> Reading:
        while True:
            try:
                before = self.metrics.stat()
                with self.metrics.open("rb") as file:
                    file.seek(max(0, before.st_size - TAIL))
                    lines = file.read().rpartition(b"\n")[0].splitlines()
                after = self.metrics.stat()
            except FileNotFoundError:
                return Reading(0, 0.0, float("nan"))
            if before.st_mtime_ns == after.st_mtime_ns and before.st_size == after.st_size:
                break
        if not lines:
            return Reading(0, 0.0, float("nan"))
        last = json.loads(lines[-1])
        return Reading(last["step"] * self.batch, after.st_mtime_ns / 1e9, last["loss"])

    def wait_beyond(self, images: int) -> Reading:
        """The first reading of more images than so many. Raises Failed."""
        deadline = time.monotonic() + PATIENCE
        while (now := self.read()).images <= images:
            if self._has_ended():
                raise Failed(f"ended with status {self.process.wait()}:\n{self.last_words()}")
            if time.monotonic() > deadline:
                raise Failed(f"no step in {PATIENCE:.0f} s:\n{self.last_words()}")
            time.sleep(POLL)
        return now

    def last_words(self) -> str:
        """The end of what it printed."""
        return self.said.read_text(errors="replace")[-1500:]

    def own_rate(self, first: Reading, last: Reading) -> float:
        """Images per second between two readings as fastvae's own lines have it."""
        whole = self.metrics.read_text().rpartition("\n")[0]  # the last may be being written
        lines = map(json.loads, whole.splitlines())
        rates = [
            line["images_per_second"]
            for line in lines
            if first.images < line["step"] * self.batch <= last.images
        ]
        return len(rates) / sum(1 / rate for rate in rates)  # lines are of as many images each

    def _has_ended(self) -> bool:
        """Without `poll`, which keeps its lock if a signal ends the benchmark inside of it."""
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self.process.pid, flags) is not None

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):  # it has ended, as the next reading says
            os.killpg(self.process.pid, number)


def seconds_to_first_step(worker: Worker) -> float:
    """From the start of its process, which must have been now, to the end of its first step."""
    worker.wait_beyond(0)
    return time.time() - worker.began


def take_turn(worker: Worker, *, warm: float, seconds: float) -> dict[str, Any]:
    """Let a stopped worker train for `warm` seconds and then be measured for `seconds` at least.

    Returns images per second by the wall clock, for fastvae also by its own. Raises Failed.
    """
    halted = worker.read()
    worker.resume()
    try:
        time.sleep(warm)
        first = worker.wait_beyond(max(halted.images, worker.read().images))
        time.sleep(seconds)
        last = worker.wait_beyond(max(first.images, worker.read().images))
    finally:
        worker.stop()
    rate = (last.images - first.images) / (last.seconds - first.seconds)
    loss = None if math.isnan(last.loss) else last.loss  # nobody has looked at it yet
    turn = {"images_per_second": rate, "loss": loss}
    if worker.is_fastvae:
        turn["own_images_per_second"] = worker.own_rate(first, last)
    return turn


def _environment(cores: int, cache: Path) -> dict[str, str]:
    """So many threads; the source tree, installed or not; a cache that is ours alone."""
    old = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, old)]
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(cores),
        "PYTHONPATH": os.pathsep.join(paths),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "FASTVAE_CACHE_DIR": str(cache / "fastvae"),
        "CUDA_VISIBLE_DEVICES": "",
    }
