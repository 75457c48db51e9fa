"""What the tests of fastvae share: small caches, fresh processes' state, one trained run."""

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from running import TINY, fastvae

from fastvae import figures


@pytest.fixture(autouse=True)
def like_a_fresh_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, as the processes started here have; and Accelerate's state as at the start,
    which is otherwise shared by all the runs of a process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    _forget_accelerate()
    yield
    _forget_accelerate()
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_curves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chart takes as long as a tiny run: the fast tests draw none of the runs in this process.
    test_figures looks at charts, others at those of runs in processes of their own."""
    is_slow = request.node.get_closest_marker("slow") is not None
    if not is_slow and request.path.stem != "test_figures":
        monkeypatch.setattr(figures, "save_curves", lambda lines, names, path, *_: path.touch())


def _forget_accelerate() -> None:
    GradientState._reset_state()
    AcceleratorState._reset_state()
    PartialState._reset_state()


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keeps what matplotlib and Inductor write below pytest's temporary folder."""
    folder = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLCONFIGDIR", str(folder / "matplotlib"))
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
        yield folder


@dataclass(frozen=True)
class Trained:
    """A finished run, and what the command that made it said."""

    run: Path
    process: subprocess.CompletedProcess[str]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A tiny run by the real command, not to be changed: copy it first."""
    folder = tmp_path_factory.mktemp("trained")
    process = fastvae("train", *TINY, "--output", "run", folder=folder)
    assert process.returncode == 0, process.stderr
    return Trained(folder / "run", process)
