"""Whether to compile the training step."""

import torch

from fastvae.compiler import compiler_problem
from fastvae.config import Config
from fastvae.errors import UserError

# Shorter runs end sooner without the seconds that compilation takes.
WORTHWHILE_STEPS = 3000


def should_compile(config: Config, total_steps: int, device: torch.device) -> tuple[bool, str]:
    """Decide, and say why in one line where "auto" decides against it (else an empty line)."""
    if config.compile == "off":
        return False, ""
    if config.model.refine_steps and config.model.inference == "encoder":
        return False, "not compiled: --refine-steps differentiates inside the forward pass"
    if config.compile == "auto" and total_steps < WORTHWHILE_STEPS:
        return (
            False,
            f"not compiled: {total_steps} steps end sooner without (or --compile on)",
        )
    if problem := compiler_problem(device):
        if config.compile == "on":
            raise UserError(f"--compile on: torch.compile does not work here: {problem}")
        return False, f"not compiled: torch.compile does not work here: {problem}"
    return True, ""
