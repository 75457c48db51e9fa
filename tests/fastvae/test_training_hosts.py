"""Several hosts, here separate launches on this machine that find each other over the network."""

import shlex
import socket
import subprocess
import time
from pathlib import Path

import pytest
from running import (
    LAUNCH,
    TINY,
    TORCHRUN,
    ended,
    kill,
    lines_written,
    metrics,
    resume,
    started,
    train,
    wait_until,
)

from fastvae import checkpoints

FLAGS = shlex.split(
    "--max-steps 4000 --epochs 1000 --eval-every 1000 --checkpoint-every 1 --schedule constant"
)
# Of the one that is left: to notice, to say so, and for its launcher to end.
SECONDS = 60.0


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def host(number: int, port: int, folder: Path, *flags: str) -> subprocess.Popen[bytes]:
    place = ["--nnodes", "2", "--node_rank", str(number), "--nproc_per_node", "1"]
    address = ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    command = [*TORCHRUN, *place, *address, str(LAUNCH / "train.py"), *flags]
    return started(command, folder, ACCELERATE_USE_CPU="true")


@pytest.mark.slow
def test_two_hosts_train_as_one(tmp_path: Path) -> None:
    port = free_port()
    hosts = [host(n, port, tmp_path, *TINY, "--output", "run") for n in (0, 1)]
    for process in hosts:
        found = ended(process)
        assert found.returncode == 0, found.stderr
    straight = train(output=tmp_path / "straight")
    for a, b in zip(metrics(tmp_path / "run"), metrics(straight), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-5)


@pytest.mark.parametrize("lost", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_one_of_two_hosts_dies(lost: int, tmp_path: Path) -> None:
    """The other one ends, says why, and the run goes on from its last checkpoint."""
    port, run = free_port(), tmp_path / "run"
    hosts = [host(n, port, tmp_path, *TINY, *FLAGS, "--output", "run") for n in (0, 1)]
    wait_until(lambda: lines_written(run) > 8, hosts[0])
    kill(hosts[lost])
    began = time.monotonic()
    found = ended(hosts[1 - lost], timeout=SECONDS)
    assert time.monotonic() - began < SECONDS
    assert found.returncode != 0
    assert "another process of this run has ended or does not answer" in found.stderr
    assert "continue with --resume run" in found.stderr
    step = checkpoints.newest(run)[0].step
    assert step > 0
    resume(run, "--max-steps", str(step + 30))
    straight = train(*FLAGS, "--max-steps", str(step + 30), output=tmp_path / "straight")
    for a, b in zip(metrics(run), metrics(straight), strict=True):
        assert a["step"] == b["step"]
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-4)
