"""What `accelerate launch` asks for by the environment: obeyed or refused, never half done."""

from pathlib import Path

import pytest
from running import TINY, fastvae, results

from fastvae.config import Config
from fastvae.errors import UserError
from fastvae.training.launcher import obeyed

ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"


@pytest.mark.parametrize("environment", [{}, {"ACCELERATE_USE_FSDP": "false"}, {ACCUMULATION: "1"}])
def test_nothing_asked_for_changes_nothing(environment: dict[str, str]) -> None:
    for config in (Config(), Config(gradient_accumulation_steps=4)):
        assert obeyed(config, environment) == config


def test_accumulation_is_taken_over() -> None:
    assert obeyed(Config(), {ACCUMULATION: "4"}) == Config(gradient_accumulation_steps=4)
    config = Config(gradient_accumulation_steps=4)
    assert obeyed(config, {ACCUMULATION: "4"}) == config


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, ("FSDP", "--multi_gpu")),
        ({"ACCELERATE_USE_DEEPSPEED": "True"}, ("DeepSpeed", "--multi_gpu")),
        ({"ACCELERATE_USE_MEGATRON_LM": "1"}, ("Megatron-LM",)),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, ("tensor",)),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, ("--dynamo_backend no", "--compile on")),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, ("fp8", "bf16")),
        ({ACCUMULATION: "2"}, ("2", "4")),
        ({ACCUMULATION: "many"}, ("'many'", "at least 1")),
        ({ACCUMULATION: "0"}, ("'0'", "at least 1")),
    ],
)
def test_refused_in_one_sentence(environment: dict[str, str], named: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as refused:
        obeyed(Config(gradient_accumulation_steps=4), environment)
    assert "\n" not in str(refused.value)
    for words in (*named, *environment):
        if words != "ACCELERATE_MIXED_PRECISION":
            assert words in str(refused.value)


def test_the_real_command_is_told(tmp_path: Path) -> None:
    refused = fastvae("train", *TINY, folder=tmp_path, ACCELERATE_USE_FSDP="true")
    assert refused.returncode == 2
    assert refused.stderr.startswith("fastvae train: the launcher asks for FSDP")
    assert len(refused.stderr.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_accumulation_by_the_launcher_is_the_flags(tmp_path: Path) -> None:
    asked = {"by": {ACCUMULATION: "3"}, "flag": {}}
    for name, environment in asked.items():
        flags = ["--gradient-accumulation-steps", "3"] if name == "flag" else []
        done = fastvae("train", *TINY, *flags, "--output", name, folder=tmp_path, **environment)
        assert done.returncode == 0, done.stderr
    assert results(tmp_path / "by")["heldout"] == results(tmp_path / "flag")["heldout"]
