"""How long a thread that waits for work keeps its core busy."""

import os
import sys
import time
from collections.abc import MutableMapping
from pathlib import Path

# GNU OpenMP's own 300,000 turns outlast the Python between two operations, which every thread but
# one then spends at full load. With much fewer, threads sleep that are needed again at once.
ALONE = {"GOMP_SPINCOUNT": "60000"}
# Other programs push threads aside; those that wait for them must not hold the cores on which they
# could go on.
BESIDE_OTHERS = {"OMP_WAIT_POLICY": "PASSIVE"}

_NAMES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
_LOOKS, _SECONDS_BETWEEN_LOOKS = 5, 0.004

_held: dict[str, str] = {}


def let_waiting_threads_sleep(environment: MutableMapping[str, str] = os.environ) -> None:
    """Have GNU OpenMP's threads sleep after a short wait, and at once where other programs need the
    cores now, unless the user has said how they wait. It changes no result.

    Without effect once PyTorch is loaded, which reads the environment then.
    """
    if not any(name in environment for name in _NAMES) and "torch" not in sys.modules:
        environment.update(BESIDE_OTHERS if others_need_our_cores() else ALONE)
    _held.update({name: environment[name] for name in _NAMES if name in environment})


def waiting() -> dict[str, str]:
    """What the environment said of it when fastvae was imported, for results."""
    return dict(_held)


def others_need_our_cores(load: Path = Path("/proc/loadavg")) -> bool:
    """Whether at each of some looks within 16 ms more programs run beside this one than there are
    cores that it may not use itself. False where the system does not say."""
    for look in range(_LOOKS):
        time.sleep(_SECONDS_BETWEEN_LOOKS if look else 0.0)
        try:
            running = int(load.read_text().split()[3].split("/")[0])
        except (OSError, ValueError, IndexError):
            return False
        if running - 1 <= (os.cpu_count() or 1) - len(os.sched_getaffinity(0)):
            return False
    return True
