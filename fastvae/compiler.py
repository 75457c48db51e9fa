"""torch.compile on this machine: whether it works, and where it keeps what it made."""

import logging
import os

import torch
from fastvae_kernels.cpu.build import cache_folder


def keep_compiled_code() -> None:
    """Let Inductor keep its code where the next process, or the one after a restart, finds it.

    Its own default is the system's folder of temporary files. $TORCHINDUCTOR_CACHE_DIR goes first.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))


def compiler_problem(device: torch.device) -> str:
    """What goes wrong when the smallest function is compiled and run, or nothing."""
    logger = logging.getLogger("torch._inductor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        torch.compile(lambda x: x + 1, fullgraph=True)(torch.zeros(8, device=device))
    except Exception as error:  # a missing compiler or header has many faces
        cause = error.__cause__ or error
        return next(iter(str(cause).strip().splitlines()), type(cause).__name__)
    finally:
        logger.setLevel(level)
    return ""
