"""Whether torch.compile works on this machine."""

import logging

import torch


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
