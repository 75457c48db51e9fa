"""What a launcher asks for by the environment: obeyed, or refused before anything is read; and this
process among those that it started."""

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from importlib import import_module
from importlib.util import find_spec

from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import (
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
)

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


def make_accelerator(config: Config, patience: timedelta) -> Accelerator:
    """This process among the launched ones, which wait for one another for so long.

    Raises UserError for what the launcher or the flags ask for and is not here.
    """
    if config.tracker != "none" and find_spec(config.tracker) is None:
        raise UserError(
            f"--tracker {config.tracker} is not installed: pip install 'fastvae[{config.tracker}]'"
        )
    # PyTorch's optimizers import its compiler. If the processes' group is there by then, functions
    # keep it as a default argument, and its threads outlive the run.
    import_module("torch._dynamo")
    computing_in = precision(config)
    try:
        accelerator = Accelerator(
            mixed_precision=computing_in,
            # As a plugin: a number would give way to what the launcher's environment says.
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=config.gradient_accumulation_steps
            ),
            log_with=None if config.tracker == "none" else config.tracker,
            # The trackers' folder is the run's, which is made once all else is known to be right.
            project_config=ProjectConfiguration(project_dir=".", logging_dir="."),
            kwargs_handlers=[
                DistributedDataParallelKwargs(
                    broadcast_buffers=False, gradient_as_bucket_view=True
                ),
                InitProcessGroupKwargs(timeout=patience),
            ],
        )
    except (ValueError, RuntimeError) as error:
        told = str(error).splitlines()[0]
        if named := _named_in(error):
            raise UserError(f"Accelerate cannot begin with {named}: {told}") from error
        if isinstance(error, ValueError):
            raise UserError(f"mixed precision {computing_in}: {told}") from error
        raise
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("mixed precision fp16 needs a GPU; on a CPU use bf16 or no")
    return accelerator


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


def _named_in(error: Exception, environment: Mapping[str, str] = os.environ) -> str:
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
