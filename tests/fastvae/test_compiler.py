"""Compiled steps of networks that keep values in Python, that fail, or that cannot be compiled:
they compute what they compute uncompiled."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import preset_steps
import pytest
import torch
from torch import Tensor, nn
from torch._inductor.cpp_builder import get_cpp_compiler

from fastvae.compiler import Compiled, _remove_relics
from fastvae.errors import UserError
from fastvae.training import replay
from fastvae.training.updates import Updates


@pytest.fixture(autouse=True)
def _without_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as for Inductor, which takes ten seconds to make code of it."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


class Own(nn.Module):
    """An encoder that counts its calls and does `what` with the count."""

    def __init__(self, inner: nn.Module, what: Callable[["Own", Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.what, self.calls, self.begun = inner, what, 0, False

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        return self.inner(self.what(self, x), *rest)


def counts(self: Own, x: Tensor) -> Tensor:
    self.calls += 1
    return x


def warms_up(self: Own, x: Tensor) -> Tensor:
    self.calls += 1
    return x * min(1.0, self.calls / 20)


def breaks_later(self: Own, x: Tensor) -> Tensor:
    self.calls += 1
    if self.calls > 3:
        torch._dynamo.graph_break()
    return x


def begins(self: Own, x: Tensor) -> Tensor:
    """As layers that set themselves up by the first batch they meet."""
    if not self.begun:
        self.begun = True
        return x * 0.5
    return x


def branches(self: Own, x: Tensor) -> Tensor:
    return -x if x.sum() > 1e9 else x


def raises(self: Own, x: Tensor) -> Tensor:
    raise ValueError("an error of the model's own")


def does_not_fit(self: Own, x: Tensor) -> Tensor:
    return x @ torch.zeros(3, 3)


def updates_of(
    what: Callable[[Own, Tensor], Tensor],
    monkeypatch: pytest.MonkeyPatch,
    *,
    compiled: bool = True,
    required: bool = False,
) -> Updates:
    torch._dynamo.reset()
    build = preset_steps.build_model

    def own(*arguments: object) -> nn.Module:
        model = build(*arguments)  # type: ignore[arg-type]
        model.encoder = Own(model.encoder, what)  # type: ignore[assignment, arg-type]
        return model

    monkeypatch.setattr(preset_steps, "build_model", own)
    torch.manual_seed(0)
    updates = preset_steps.updates_of("digits-mlp", compiled, batch_size=16)
    monkeypatch.setattr(preset_steps, "build_model", build)
    for part in updates._compiled:
        part.required = required
    return updates


def own_of(updates: Updates) -> Own:
    encoder = updates.model.encoder
    assert isinstance(encoder, Own)
    return encoder


@pytest.mark.parametrize("what", [counts, warms_up, breaks_later, begins, branches])
def test_values_in_python_count_as_if_nothing_were_compiled(
    what: Callable[[Own, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = updates_of(what, monkeypatch, compiled=False)
    fast = updates_of(what, monkeypatch)
    for updates in (plain, fast):
        updates.advance(1)
        updates.advance(29)
    assert own_of(fast).calls == own_of(plain).calls
    torch.testing.assert_close(fast.model.state_dict(), plain.model.state_dict())
    torch.testing.assert_close(fast.sums, plain.sums)
    if what is begins:
        assert fast.compiled and not fast.compile_problem
    else:
        assert fast.compile_problem and "\n" not in fast.compile_problem


def test_a_value_that_changes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    updates = updates_of(counts, monkeypatch)
    updates.advance(12)
    assert "change from call to call" in updates.compile_problem
    assert "calls" in updates.compile_problem


def test_a_branch_is_found_in_whose_code_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    updates = updates_of(branches, monkeypatch)
    updates.advance(1)
    assert f"{Path(__file__).name}:" in updates.compile_problem


@pytest.mark.parametrize("what", [counts, branches])
def test_what_must_be_compiled_and_cannot_be_is_refused(
    what: Callable[[Own, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    updates = updates_of(what, monkeypatch, required=True)
    with pytest.raises(UserError, match="--compile on: this model cannot be compiled: ") as refused:
        updates.advance(12)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("required", [False, True])
@pytest.mark.parametrize(
    ("what", "error", "words"),
    [(raises, ValueError, "of the model's own"), (does_not_fit, RuntimeError, "mat1 and mat2")],
)
def test_an_error_of_the_models_own_is_no_compilers(
    what: Callable[[Own, Tensor], Tensor],
    error: type[Exception],
    words: str,
    required: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    updates = updates_of(what, monkeypatch, required=required)
    with pytest.raises(error, match=words):
        updates.advance(1)


@pytest.mark.parametrize(("what", "changes"), [(counts, True), (begins, False)])
def test_values_in_python_are_not_replayed(
    what: Callable[[Own, Tensor], Tensor], changes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CUDA graph would go on with what they were when it was captured."""
    updates = updates_of(what, monkeypatch, compiled=False)
    asked: list[int] = []

    def captured(function: object, times: int) -> tuple[None, str]:
        asked.append(times)
        return None, "no GPU"

    monkeypatch.setattr(replay, "captured", captured)
    updates.replay = replay.Replay(updates._update, updates.accelerator, 4)
    updates.advance(10)
    problem = "model.encoder.calls changes from step to step" if changes else "no GPU"
    assert updates.replay.facts() == {"steps_per_launch": 1, "problem": problem}
    assert asked == ([] if changes else [1])


def test_a_limit_of_recompilations_is_no_end() -> None:
    """A function that is compiled for each of its callers' values, until PyTorch has enough."""
    scale = [0.0]
    function = Compiled(lambda x: x * scale[0], required=False)
    x = torch.ones(3)
    for n in range(20):
        scale[0] = float(n)
        assert torch.equal(function(x), x * n)
    assert "change from call to call" in function.problem


@pytest.mark.parametrize("times", [1, 1000])
def test_what_cannot_be_loaded_is_deleted(
    times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the folder of compiled code alone, and not for ever."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    broken = tmp_path / "inductor/ab/cabcd.main.so"
    elsewhere, beside = tmp_path / "other.so", broken.with_name("cabce.main.so")
    parts = [broken, broken.with_name("cabcd.main.o"), broken.with_name("cabcd.kernel.o")]
    broken.parent.mkdir(parents=True)
    for file in (*parts, elsewhere, beside):
        file.touch()
    function = Compiled(lambda x: x + 1, required=False)
    calls = 0

    def loads(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > times:
            return x + 1
        broken.touch()
        words = f"ImportError: {broken}: file too short, {elsewhere}: file too short"
        raise torch._dynamo.exc.TorchRuntimeError(words)

    function.compiled = loads
    assert torch.equal(function(torch.zeros(2)), torch.ones(2))
    assert bool(function.problem) is (times > 1)
    assert calls == (2 if times == 1 else 21)
    assert elsewhere.exists() and beside.exists()
    assert not any(file.exists() for file in parts[1:])


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.99, 1.0])
def test_libraries_without_their_end_are_deleted(kept: float, tmp_path: Path) -> None:
    (tmp_path / "one.c").write_text("int one() { return 1; }")
    made = ["-shared", "-fPIC", str(tmp_path / "one.c"), "-o", str(tmp_path / "one.so")]
    subprocess.run([get_cpp_compiler(), *made], check=True)
    whole = (tmp_path / "one.so").read_bytes()
    old, fresh = tmp_path / "ab/old.so", tmp_path / "ab/fresh.so"
    old.parent.mkdir()
    for file in (old, fresh):
        file.write_bytes(whole[: int(kept * len(whole))])
    os.utime(old, (0, 0))
    _remove_relics(str(tmp_path))
    assert old.exists() is (kept == 1.0)
    assert fresh.exists()


@pytest.mark.slow
@pytest.mark.parametrize("old", [True, False])
def test_code_that_was_left_broken_is_made_again(old: bool, tmp_path: Path) -> None:
    """As a process leaves it that is killed while it links, long ago or just now. Old ones may be
    those by which PyTorch tells what the processor can."""
    program = """
import torch
from fastvae.compiler import Compiled
function = Compiled(lambda x: (x.sin() + 1).sum(), required=True)
torch.testing.assert_close(function(torch.ones(100)), (torch.ones(100).sin() + 1).sum())
"""
    cache = tmp_path / "inductor"

    def run() -> None:
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr

    run()
    libraries = list(cache.rglob("*.so" if old else "*.main.so"))
    assert libraries
    for library in libraries:
        library.write_bytes(b"")
        if old:
            os.utime(library, (0, 0))
    run()
    assert all(library.stat().st_size for library in libraries if library.exists())
