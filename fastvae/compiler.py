"""torch.compile on this machine: whether it works, and where it keeps what it made."""

import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from fastvae_kernels.cpu.build import cache_folder


def keep_compiled_code() -> None:
    """Let Inductor keep its code where the next process, or the one after a restart, finds it.

    Its own default is the system's folder of temporary files. $TORCHINDUCTOR_CACHE_DIR goes first.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))


def compiled_or_not(
    function: Callable[..., Any], tell: Callable[[str], None]
) -> Callable[..., Any]:
    """`function`, compiled for the shapes that it is called with; as it is where that fails, which
    `tell` is told of once, in one line. What it changes must not matter if it is called twice."""
    compiled = torch.compile(function, dynamic=False)
    chosen: list[Callable[..., Any]] = []

    def call(*arguments: Any) -> Any:
        if chosen:
            return chosen[0](*arguments)
        try:
            found = compiled(*arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler fails in many ways
            found = function(*arguments)  # which raises what is wrong without a compiler too
            chosen.append(function)
            tell(first_line(error))
        else:
            chosen.append(compiled)
        return found

    return call


def first_line(error: BaseException) -> str:
    """What went wrong, of messages that fill pages."""
    cause = error.__cause__ or error
    return next(iter(str(cause).strip().splitlines()), type(cause).__name__)


def compiler_problem(device: torch.device) -> str:
    """What goes wrong when the smallest function is compiled and run, or nothing."""
    logger = logging.getLogger("torch._inductor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        torch.compile(lambda x: x + 1, fullgraph=True)(torch.zeros(8, device=device))
    except Exception as error:  # a missing compiler or header has many faces
        return first_line(error)
    finally:
        logger.setLevel(level)
    return ""
