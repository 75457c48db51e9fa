"""Compiled or not: the same training; and machines where nothing can be compiled."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import Trained
from running import TINY, fastvae, metrics, results, run_process, weights

from fastvae.batch import Batch
from fastvae.build import build_model
from fastvae.config import Config, ModelConfig
from fastvae.data import ImageSet
from fastvae.parts.objectives import ELBO
from fastvae.training.compiler import should_compile, training_flops
from fastvae.training.step import TrainingStep

CPU = torch.device("cpu")


def test_short_runs_are_not_compiled() -> None:
    assert should_compile(Config(compile="off"), 10**6, 1e9, CPU) == (False, "")
    compiled, remark = should_compile(Config(), 100, 1e9, CPU)
    assert not compiled
    assert "100 steps" in remark
    assert "--compile on" in remark
    assert "\n" not in remark


def test_long_ones_are() -> None:
    """Whether they are long by their number of steps or by the work in each."""
    for steps, flops in ((10**5, 1.0), (100, 1e12)):
        assert should_compile(Config(), steps, flops, CPU) == (True, "")


def test_operations_are_counted() -> None:
    """By hand: twice the multiplications, three times the forward pass, for each of 5 images."""
    images = ImageSet(torch.zeros(5, 1, 8, 8, dtype=torch.uint8), None, "none")
    model = build_model(ModelConfig(hidden=(7,), latent_dim=2), images, 5)
    step = TrainingStep(model, ELBO(), 0)
    before = {k: v.clone() for k, v in step.state_dict().items()}
    multiplications = 64 * 7 + 7 * 4 + 2 * 7 + 7 * 64
    assert training_flops(step, Batch(images.images)) == 3 * 2 * multiplications * 5
    for name, value in step.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.slow
def test_compiled_training_agrees(trained: Trained, tmp_path: Path) -> None:
    flags = [flag for flag in TINY if flag not in ("--compile", "off")]
    process = fastvae("train", *flags, "--compile", "on", "--output", "run", folder=tmp_path)
    assert process.returncode == 0, process.stderr
    run = tmp_path / "run"
    assert results(run)["compiled"]
    assert "not compiled" not in process.stderr
    for a, b in zip(metrics(run), metrics(trained.run), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    expected = weights(trained.run)
    assert weights(run).keys() == expected.keys()
    for name, tensor in weights(run).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-2, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["elbo", "importance-weighted"])
def test_the_next_process_finds_what_was_compiled(objective: str, tmp_path: Path) -> None:
    """The derivatives as well, in fastvae's own folder; and none that other source has made."""
    program = (
        "import os, sys; del os.environ['TORCHINDUCTOR_CACHE_DIR']; import fastvae.source; "
        "fastvae.source.fingerprint = (lambda: sys.argv[1]) if sys.argv[1] else "
        "fastvae.source.fingerprint; from fastvae.cli import main; main(sys.argv[2:]); "
        "from torch._dynamo.utils import counters; found = counters['aot_autograd']; "
        "print([found[f'autograd_cache_{what}'] for what in ('hit', 'miss', 'bypass')])"
    )
    flags = [flag for flag in TINY if flag not in ("--compile", "off")] + ["--objective", objective]
    cache = tmp_path / "cache"
    for number, (source, expected) in enumerate(
        [("", "[0, 1, 0]"), ("", "[1, 0, 0]"), ("other", "[0, 1, 0]")]
    ):
        arguments = [sys.executable, "-c", program, source, "train", *flags, "--compile", "on"]
        arguments += ["--max-steps", "2", "--output", f"run{number}"]
        process = run_process(arguments, tmp_path, FASTVAE_CACHE_DIR=str(cache))
        assert process.returncode == 0, process.stderr
        assert process.stdout.splitlines()[-1] == expected
    assert list((cache / "inductor").rglob("*.so"))


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["auto", "on"])
def test_without_a_compiler(choice: str, tmp_path: Path) -> None:
    """Nothing is on the path, and what CXX names is not there."""
    flags = [flag for flag in TINY if flag not in ("--compile", "off")]
    program = (
        "import fastvae.training.compiler as compiler, sys; compiler.WORTHWHILE_SECONDS = 0; "
        "from fastvae.cli import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", program, "train", *flags, "--compile", choice]
    nothing = {"PATH": str(tmp_path / "nothing"), "CXX": str(tmp_path / "nothing/g++")}
    process = run_process([*command, "--output", "run"], tmp_path, **nothing)
    assert "Traceback" not in process.stderr
    telling = [line for line in process.stderr.splitlines() if "ompile" in line]
    assert len(telling) == 1
    if choice == "auto":
        assert process.returncode == 0
        assert telling[0].startswith("not compiled: ")
        assert not results(tmp_path / "run")["compiled"]
        assert len(process.stderr.splitlines()) <= 8
    else:
        assert process.returncode == 2
        words = "fastvae train: --compile on: torch.compile does not work here: "
        assert telling[0].startswith(words)
        assert not (tmp_path / "run").exists()
