"""How waiting threads wait: said before PyTorch is loaded, the user's own word first; and how many
threads a run's steps take."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import Trained
from running import results, train

from fastvae.threads import ALONE, BESIDE_OTHERS, others_need_our_cores, waiting
from fastvae.training import threads

NAMES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


EITHER = (ALONE, BESIDE_OTHERS)


def said_at_import(**said: str) -> str:
    """Not PyTorch itself is loaded here: what would load it ends the program."""
    program = """
import sys
class Ending:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            import fastvae.threads
            print(fastvae.threads.waiting())
            sys.exit()
sys.meta_path.insert(0, Ending())
import fastvae
"""
    others = {name: value for name, value in os.environ.items() if name not in NAMES}
    done = subprocess.run(
        [sys.executable, "-c", program], env={**others, **said}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@contextmanager
def busy_cores() -> Iterator[None]:
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE
        )
        for _ in range(os.cpu_count() or 1)
    ]
    try:
        for program in programs:
            assert program.stdout
            program.stdout.readline()
        yield
    finally:
        for program in programs:
            program.kill()
            program.communicate()


@pytest.mark.parametrize("said", [{"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "PASSIVE"}])
def test_the_users_own_word(said: dict[str, str]) -> None:
    assert said_at_import(**said) == str(said)


def test_before_pytorch_is_loaded() -> None:
    assert said_at_import() in map(str, EITHER)  # whatever else runs here now


@pytest.mark.skipif(not Path("/proc/loadavg").exists(), reason="the load is in Linux's /proc")
def test_beside_programs_that_need_the_cores() -> None:
    with busy_cores():
        assert said_at_import() == str(BESIDE_OTHERS)


@pytest.mark.parametrize(
    ("cores", "ours", "running", "others"),
    [(2, 2, 1, False), (2, 2, 2, True), (8, 8, 3, True), (8, 2, 7, False), (8, 2, 8, True)],
)
def test_whose_cores(
    cores: int,
    ours: int,
    running: int,
    others: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`running` counts this program; what fits on the cores it may not use is in nobody's way."""
    load = tmp_path / "loadavg"
    load.write_text(f"0.20 0.18 0.12 {running}/80 11206\n")
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(ours)))
    assert others_need_our_cores(load) == others


def test_where_the_system_does_not_say(tmp_path: Path) -> None:
    assert not others_need_our_cores(tmp_path / "absent")
    (tmp_path / "other").write_text("0.20\n")
    assert not others_need_our_cores(tmp_path / "other")


def test_the_results_say_it(trained: Trained) -> None:
    said = waiting()  # by who started the tests; here fastvae comes after PyTorch and says nothing
    found = results(trained.run)["hardware"]["threads_wait"]
    assert found in ([said] if said else EITHER)


@pytest.mark.parametrize(
    ("said", "enough", "expected"),
    [({}, 1e30, 1), ({}, 0.0, 2), ({"OMP_NUM_THREADS": "2"}, 1e30, 2)],
)
def test_the_threads_of_a_run(
    said: dict[str, str],
    enough: float,
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One where steps are short, unless the user has said a number; then as many as before."""
    monkeypatch.setattr(threads, "FLOPS_WORTH_THREADS", enough)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run = train("--max-steps", 2, output=tmp_path / "run")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert results(run)["hardware"]["threads"] == expected


def test_what_is_said_later_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    before = waiting()
    monkeypatch.setenv("GOMP_SPINCOUNT", "5")
    assert waiting() == before
