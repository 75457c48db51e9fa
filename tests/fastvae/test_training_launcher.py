"""What `accelerate launch` asks for by the environment: obeyed or refused, never half done."""

from pathlib import Path

import pytest
from running import TINY, fastvae, results

from fastvae.config import Config
from fastvae.errors import UserError
from fastvae.training.launcher import obeyed, precision

PRECISION = "ACCELERATE_MIXED_PRECISION"
ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"ACCELERATE_USE_FSDP": "false"},
        {ACCUMULATION: "1"},
        {"ACCELERATE_DYNAMO_BACKEND": "", ACCUMULATION: ""},
    ],
)
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
        ({ACCUMULATION: "2"}, ("2", "4")),
        ({ACCUMULATION: "many"}, ("'many'", "at least 1")),
        ({ACCUMULATION: "0"}, ("'0'", "at least 1")),
        ({ACCUMULATION: "9" * 5000}, ("99999", "at least 1")),
    ],
)
def test_refused_in_one_sentence(environment: dict[str, str], named: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as refused:
        obeyed(Config(gradient_accumulation_steps=4), environment)
    assert "\n" not in str(refused.value)
    for words in (*named, *environment):
        assert words in str(refused.value)


@pytest.mark.parametrize(
    ("said", "meant"),
    [("", "no"), ("NO", "no"), ("bf16", "bf16"), ("BF16", "bf16"), ("Fp16", "fp16")],
)
def test_a_precision_in_any_spelling(said: str, meant: str) -> None:
    assert precision(Config(), {PRECISION: said}) == meant
    assert precision(Config(mixed_precision="bf16"), {PRECISION: said}) == "bf16"


@pytest.mark.parametrize("said", ["fp8", "FP8", "float16", "garbage", "8" * 9999])
def test_a_precision_that_is_none(said: str) -> None:
    with pytest.raises(UserError) as refused:
        precision(Config(), {PRECISION: said})
    assert said[:30] in str(refused.value) and len(str(refused.value)) < 200
    assert precision(Config(mixed_precision="no"), {PRECISION: said}) == "no"


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        pytest.param("ACCELERATE_USE_CPU", "garbage", marks=pytest.mark.slow),
        pytest.param("ACCELERATE_DEBUG_MODE", "rubbish", marks=pytest.mark.slow),
        ("ACCELERATE_TORCH_DEVICE", "nowhere"),
    ],
)
def test_what_accelerate_does_not_understand_is_named(
    variable: str, value: str, tmp_path: Path
) -> None:
    refused = fastvae("train", *TINY, folder=tmp_path, **{variable: value})
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1
    assert f"{variable}={value}" in refused.stderr


@pytest.mark.slow
def test_a_resumed_run_is_told_by_its_own_launcher(tmp_path: Path) -> None:
    """Not by that of the run's beginning, which was no word of the user's."""
    first = fastvae("train", *TINY, "--output", "run", folder=tmp_path, **{ACCUMULATION: "4"})
    assert first.returncode == 0, first.stderr
    again = ("train", "--resume", "run", "--max-steps", "66")
    second = fastvae(*again, folder=tmp_path, **{ACCUMULATION: "2"})
    assert second.returncode == 0, second.stderr


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
