"""What the processes of a run tell each other beside the gradients: on the host, in JSON."""

import json
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator

from fastvae.errors import UserError

Answer = TypeVar("Answer")


class Together:
    """Every method is called on all processes alike. With one process nothing is sent."""

    def __init__(self, accelerator: Accelerator, patience: timedelta) -> None:
        """`patience`: how long to wait for the others before they count as lost."""
        self.world, self.rank = accelerator.num_processes, accelerator.process_index
        # Of its own, on the host: to ask it no GPU has to finish what it was given.
        self.group: Any = None
        if self.world > 1:
            self.group = dist.new_group(backend="gloo", timeout=patience)
        self.first_here = accelerator.is_local_main_process

    def largest(self, *values: float) -> list[float]:
        """The largest of each over the processes."""
        if self.world == 1:
            return list(values)
        found = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.group)
        return found.tolist()

    def all(self, value: Any) -> list[Any]:
        """The JSON value of each process, in their order, on all."""
        if self.world == 1:
            return [value]
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([len(own)]), group=self.group)
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(own)] = own
        found = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(found, padded, group=self.group)
        texts = (text[: int(size)] for text, size in zip(found, sizes, strict=True))
        return [json.loads(text.numpy().tobytes()) for text in texts]

    def on_main(self, action: Callable[[], Answer]) -> Answer:
        """Do it on the first process alone; its answer, a JSON value, or its UserError, is that of
        every process."""
        answer: Any = None
        problem = None
        if self.rank == 0:
            try:
                answer = action()
            except UserError as error:
                problem = str(error)
        answer, problem = self.all([answer, problem])[0]
        if problem:
            raise UserError(problem)
        return answer

    def everywhere(self, action: Callable[[], Answer]) -> Answer:
        """Do it on all processes, on each host first on one, for the others to find what it left in
        caches. Returns each process's own answer; a UserError of one is raised on all."""
        answer: Any = None
        for first in (True, False):
            problem = None
            if self.first_here == first:
                try:
                    answer = action()
                except UserError as error:
                    problem = str(error)
            for found in self.all(problem):
                if found:
                    raise UserError(found)
        return answer

    def require_equal(self, facts: dict[str, Any]) -> None:
        """Raise UserError, everywhere, where a process has another value of one of `facts`."""
        every = self.all(facts)
        different = [
            f"  {key}: "
            + ", ".join(f"{mine.get(key)!r} on process {i}" for i, mine in enumerate(every))
            for key in every[0]
            if any(mine.get(key) != every[0][key] for mine in every)
        ]
        if different:
            raise UserError(
                "\n".join(
                    [
                        "the processes of this run do not agree:",
                        *different,
                        "Start all of them with the same command, code and data.",
                    ]
                )
            )


def leave_the_others() -> None:
    """End what connects this process with the others, if anything does, before Python ends: a
    thread of theirs that then lets go of a tensor would abort the process."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def is_loss_of_another(error: BaseException) -> bool:
    """Whether `error` says that another process of the run no longer answers."""
    if isinstance(error, dist.DistError):
        return True
    signs = ("closed by peer", "reset by peer", "Broken pipe", "Timed out", "timed out", "NCCL")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def shares(rows: int, parts: int) -> Sequence[range]:
    """`rows` rows cut into so many parts, none longer than another by more than one."""
    bounds = [rows * part // parts for part in range(parts + 1)]
    return [range(a, b) for a, b in pairwise(bounds)]
