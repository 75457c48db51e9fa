"""What every section of `gpu.py` is told, and what it says."""

import gc
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parent.parent

Found = tuple[str, Any]
"""What a section says, as soon as it knows it: ("row", a dictionary) of one measured case,
("facts", a dictionary) of all of them, ("begun" or "left_out" or "failure", a line of text)."""


@dataclass(frozen=True)
class Settings:
    """One section of one run. Goes to the section's process as JSON."""

    on: str = "cpu"
    """The device: cpu, cuda, cuda:1, …"""
    quick: bool = False
    """Tiny sizes, to see that everything runs."""
    rounds: int = 7
    """Interleaved rounds of every comparison."""
    deadline: float = float("inf")
    """When the section should be done, on `time.monotonic`, which all processes share; what is
    not begun by then is left out."""
    mnist_dir: str | None = None
    fresh: bool = False
    """Whether parity that was shown before on this machine, of this code, is shown again."""
    cases: tuple[str, ...] = ()
    """Those alone whose names hold one of these; all unless given."""
    skipped: tuple[str, ...] = ()
    """Cases that a process which died had begun."""
    part: tuple[int, int] = (0, 1)
    """Which part of the cases is compiled ahead, and of how many parts."""
    figure: str | None = None
    """Where the figure of the growth goes."""
    copy_bytes_per_second: float | None = None
    """Of this device, where it has been measured."""

    @property
    def device(self) -> "torch.device":
        import torch

        return torch.empty(0, device=self.on).device  # "cuda" becomes "cuda:0"

    @property
    def seconds_left(self) -> float:
        """Until the deadline."""
        return self.deadline - time.monotonic()

    @property
    def seconds_per_round(self) -> float:
        """How long one candidate runs in one round."""
        return 0.002 if self.quick else 0.01

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Settings":
        given: dict[str, Any] = json.loads(text)
        assert given.keys() == {field.name for field in fields(cls)}
        for name, value in given.items():
            given[name] = tuple(value) if isinstance(value, list) else value
        return cls(**given)


def each(
    cases: Iterable[Any],
    measure: Callable[[Any], Iterable[dict[str, Any]]],
    settings: Settings,
    *,
    least: float = 5.0,
) -> Iterator[Found]:
    """Measure case after case while there is time for one more: what the last one took, and at
    least so many seconds. What goes wrong in one costs the others nothing, unless the device
    itself is lost: that is raised."""
    left_out, seconds = [], least
    for case in cases:
        name = str(case)
        if name in settings.skipped or not any(part in name for part in settings.cases or ("",)):
            continue
        if settings.seconds_left < seconds:
            left_out.append(name)
            continue
        yield "begun", name
        began = time.monotonic()
        try:
            rows = list(measure(case))
        except Exception as error:
            yield "failure", f"{name}: {type(error).__name__}: {str(error)[:1000]}"
        else:
            yield from (("row", row) for row in rows)
        seconds = max(least, time.monotonic() - began)
        forget(settings.device)
    if left_out:
        yield "left_out", f"no time left for {len(left_out)}: {', '.join(left_out)}"


def forget(device: "torch.device") -> None:
    """Give back the memory of what nobody holds any more. Raises RuntimeError if the device is
    lost."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
