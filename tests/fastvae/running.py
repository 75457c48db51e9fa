"""Running fastvae as its users do, and reading what a run left behind."""

import contextlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastvae import checkpoints
from fastvae.cli import main

REPOSITORY = Path(__file__).parents[2]
LAUNCH = REPOSITORY / "launch"
ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]

# A run of a second on the embedded digits: 1617 images to train on, 25.3 steps an epoch.
TINY = shlex.split(
    "--data digits --hidden 32 --latent-dim 4 --batch-size 64 --max-steps 60 "
    "--log-every 10 --eval-every 1 --checkpoint-every 1 --compile off"
)
EPOCH = 1617
# Measured, and therefore different in every run.
MEASURED = "images_per_second"


def command_line() -> list[str]:
    """The installed command, or the module where only the source tree is there."""
    script = Path(sys.executable).parent / "fastvae"
    return [str(script)] if script.exists() else [sys.executable, "-m", "fastvae.cli"]


def environment(folder: Path, **changes: str) -> dict[str, str]:
    """This process's environment, with every cache below `folder` and one thread."""
    caches = {
        "HF_HOME": str(folder / "huggingface"),
        "MPLCONFIGDIR": str(folder / "matplotlib"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "OMP_NUM_THREADS": "1",
    }
    return {**os.environ, **caches, **changes}


def started(arguments: list[str], folder: Path, **changes: str) -> subprocess.Popen[bytes]:
    """A program that runs in `folder`, in a session of its own."""
    return subprocess.Popen(
        arguments,
        cwd=folder,
        env=environment(folder, **changes),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def ended(
    process: subprocess.Popen[bytes], timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """Wait for it; kill it and all it started if it takes too long."""
    with process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            kill(process)
            raise
    # Not as text=True would: that hides carriage returns.
    return subprocess.CompletedProcess(process.args, process.returncode, out.decode(), err.decode())


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to it and to all it started, wherever these belong, at once."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        for found in [*parent.children(recursive=True), parent]:
            with contextlib.suppress(psutil.NoSuchProcess):
                found.kill()
    process.communicate()


def run_process(
    arguments: list[str], folder: Path, timeout: float = 240, **changes: str
) -> subprocess.CompletedProcess[str]:
    return ended(started(arguments, folder, **changes), timeout)


def ranks(count: int, script: Path | str = LAUNCH / "train.py") -> list[str]:
    """The start of a command line for so many processes on this machine."""
    return [*TORCHRUN, "--standalone", "--nproc_per_node", str(count), str(script)]


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Until then, while the process runs; five minutes at most, on a machine that others use."""
    end = time.monotonic() + 300
    while not happened():
        assert process.poll() is None, ended(process).stderr
        assert time.monotonic() < end
        time.sleep(0.002)


def lines_written(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def fastvae(
    *arguments: object, folder: Path, timeout: float = 240, **changes: str
) -> subprocess.CompletedProcess[str]:
    """The real command in a process of its own."""
    return run_process([*command_line(), *map(str, arguments)], folder, timeout, **changes)


def train(*flags: object, output: Path) -> Path:
    """`fastvae train` in this process: a tiny run, changed by `flags`."""
    main(["train", *TINY, *map(str, flags), "--output", str(output)])
    return output


def resume(run: Path, *flags: object) -> Path:
    main(["train", "--resume", str(run), *map(str, flags)])
    return run


def metrics(run: Path, *, measured: bool = False) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl as strict JSON, without what the clock says unless asked."""

    def refuse(constant: str) -> float:
        raise ValueError(f"{constant} is not JSON")

    lines = (run / "metrics.jsonl").read_text().splitlines()
    parsed = [json.loads(line, parse_constant=refuse) for line in lines]
    if not measured:
        for line in parsed:
            del line[MEASURED]
    return parsed


def results(run: Path) -> dict[str, Any]:
    return json.loads((run / "results.json").read_text())


def kept(run: Path) -> Path:
    """The folder of the newest checkpoint."""
    return checkpoints.newest(run)[0].folder


def weights(run: Path) -> dict[str, Tensor]:
    """The model to use."""
    return load_file(kept(run) / "model.safetensors")


def training_state(run: Path) -> dict[str, Tensor]:
    """The weights in training and the optimizer's state."""
    return load_file(kept(run) / "training.safetensors")


def assert_same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Equal to the bit, name by name."""
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"these differ: {different}"


def assert_same_run(a: Path, b: Path) -> None:
    """Weights, optimizer, averages, metrics, results and pictures, to the bit."""
    assert metrics(a) == metrics(b)
    assert_same_tensors(training_state(a), training_state(b))
    assert_same_tensors(weights(a), weights(b))
    assert results(a)["heldout"] == results(b)["heldout"]
    for name in ("samples.png", "reconstructions.png"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
