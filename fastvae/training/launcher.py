"""What a launcher asks for by the environment: obeyed, or refused before anything is read."""

import os
from collections.abc import Mapping
from dataclasses import replace

from fastvae.config import Config
from fastvae.errors import UserError

_ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
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
    if environment.get(_DYNAMO, "no").lower() != "no":
        raise UserError(
            f"the launcher asks for the dynamo backend {environment[_DYNAMO]} ({_DYNAMO}): fastvae "
            "compiles the whole step itself, so launch with --dynamo_backend no and say --compile "
            "on, off or auto"
        )
    if environment.get("ACCELERATE_MIXED_PRECISION", "no") == "fp8" and (
        config.mixed_precision == "auto"
    ):
        raise UserError(
            "the launcher asks for mixed precision fp8: fastvae computes in no, bf16 or fp16"
        )
    return _accumulating(config, environment.get(_ACCUMULATION, ""))


def _accumulating(config: Config, asked: str) -> Config:
    own = config.gradient_accumulation_steps
    if not asked or asked == str(own):
        return config
    if not (asked.isascii() and asked.isdigit() and int(asked) >= 1):
        raise UserError(f"{_ACCUMULATION} must be a whole number, at least 1, got {asked!r}")
    if int(asked) != 1 and own != 1:
        raise UserError(
            f"the launcher asks for {asked} gradient accumulation steps ({_ACCUMULATION}) and "
            f"--gradient-accumulation-steps for {own}: give one of them"
        )
    return replace(config, gradient_accumulation_steps=max(int(asked), own))
