"""What a launcher asks for by the environment: obeyed, or refused before anything is read."""

import os
import re
from collections.abc import Mapping
from dataclasses import replace

from fastvae.config import Config
from fastvae.errors import UserError

_ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
_PRECISION = "ACCELERATE_MIXED_PRECISION"
_DYNAMO = "ACCELERATE_DYNAMO_BACKEND"
_SHARDED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker's own data parallelism",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config (tensor, context or sequence)",
}


def obeyed(config: Config, environment: Mapping[str, str] = os.environ) -> Config:
    """`config` with what `accelerate launch` or `accelerate config` asks for besides.

    Gradient accumulation is taken over. What would split the model among the processes, compile it
    a second time or compute in 8 bits is refused. Raises UserError, in one sentence, with what
    works instead.
    """
    for variable, name in _SHARDED.items():
        if environment.get(variable, "").lower() in ("true", "1", "yes", "y"):
            raise UserError(
                f"the launcher asks for {name} ({variable}), which would split the model among "
                "processes: fastvae trains it whole on each (DDP), so launch with --multi_gpu, or "
                "--config_file launch/all_gpus.yaml, and to save memory take "
                "--gradient-accumulation-steps or --mixed-precision bf16"
            )
    if (environment.get(_DYNAMO) or "no").lower() != "no":
        raise UserError(
            f"the launcher asks for the dynamo backend {environment[_DYNAMO]} ({_DYNAMO}): fastvae "
            "compiles the whole step itself, so launch with --dynamo_backend no and say --compile "
            "on, off or auto"
        )
    return _accumulating(config, environment.get(_ACCUMULATION, ""))


def precision(config: Config, environment: Mapping[str, str] = os.environ) -> str:
    """What to compute in: "no", "bf16" or "fp16". Raises UserError for anything else that the
    launcher asks for where the flag leaves it to the launcher ("auto")."""
    if config.mixed_precision != "auto":
        return config.mixed_precision
    asked = environment.get(_PRECISION) or "no"
    if asked.lower() not in ("no", "bf16", "fp16"):
        raise UserError(
            f"the launcher asks for mixed precision {asked[:40]} ({_PRECISION}): fastvae computes "
            "in no, bf16 or fp16"
        )
    return asked.lower()


def named_in(error: Exception, environment: Mapping[str, str] = os.environ) -> str:
    """Which of the launcher's variables, with their values, an error of Accelerate's is about; or
    nothing."""
    about = (
        f"{name}={value[:40]}"
        for name, value in environment.items()
        if name.startswith("ACCELERATE_")
        and value
        and re.search(rf"(?<!\w){re.escape(value)}(?!\w)", str(error))
    )
    return ", ".join(about)


def _accumulating(config: Config, asked: str) -> Config:
    own = config.gradient_accumulation_steps
    if not asked or asked == str(own):
        return config
    is_number = asked.isascii() and asked.isdigit() and len(asked) < 10
    if not (is_number and int(asked) >= 1):
        raise UserError(f"{_ACCUMULATION} must be a whole number, at least 1, got {asked[:40]!r}")
    if int(asked) != 1 and own != 1:
        raise UserError(
            f"the launcher asks for {asked} gradient accumulation steps ({_ACCUMULATION}) and "
            f"--gradient-accumulation-steps for {own}: give one of them"
        )
    return replace(config, gradient_accumulation_steps=max(int(asked), own))
