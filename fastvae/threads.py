"""How long a thread that waits for work keeps its core busy."""

import os
import sys
from collections.abc import MutableMapping

# GNU OpenMP's own 300,000 turns outlast the Python between two operations, which every thread but
# one then spends at full load: heat for a machine of one's own, and for a shared one a step that
# waits for threads which other programs have pushed aside. 2,000 turns put threads to sleep between
# the operations of a compiled step, which then wakes them again and again.
TURNS = 60_000

_NAMES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


_held: dict[str, str] = {}


def let_waiting_threads_sleep(environment: MutableMapping[str, str] = os.environ) -> None:
    """Have GNU OpenMP's threads sleep after a short wait, unless the user has said how they wait.

    Without effect once PyTorch is loaded, which reads the environment then.
    """
    if not any(name in environment for name in _NAMES) and "torch" not in sys.modules:
        environment["GOMP_SPINCOUNT"] = str(TURNS)
    _held.update({name: environment[name] for name in _NAMES if name in environment})


def waiting() -> dict[str, str]:
    """What the environment said of it when fastvae was imported, for results."""
    return dict(_held)
