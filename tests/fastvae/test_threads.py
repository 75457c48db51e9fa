"""How waiting threads wait: said before PyTorch is loaded, the user's own word first."""

import os
import subprocess
import sys

import pytest
from conftest import Trained
from running import results

from fastvae.threads import TURNS, waiting

NAMES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


@pytest.mark.parametrize("said", [{}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "PASSIVE"}])
def test_before_pytorch_is_loaded(said: dict[str, str]) -> None:
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
    assert done.stdout == f"{said or {'GOMP_SPINCOUNT': str(TURNS)}}\n"


def test_the_results_say_it(trained: Trained) -> None:
    said = waiting()  # by who started the tests; here fastvae comes after PyTorch and says nothing
    found = results(trained.run)["hardware"]["threads_wait"]
    assert found == (said or {"GOMP_SPINCOUNT": str(TURNS)})


def test_what_is_said_later_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    before = waiting()
    monkeypatch.setenv("GOMP_SPINCOUNT", "5")
    assert waiting() == before
