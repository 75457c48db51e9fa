"""Optimizer steps: the fast ways compute what the plain one does, and none waits for the host."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastvae.build import build_model, build_objective
from fastvae.compiler import compile_in_place
from fastvae.config import Config, ModelConfig, ObjectiveConfig, OptimizerConfig
from fastvae.data import DataConfig, ImageSet, load_data
from fastvae.errors import UserError
from fastvae.training import replay
from fastvae.training.compiler import (
    Compiled,
    add_gradients,
    loss_not_finite,
    not_finite,
)
from fastvae.training.ema import EMA
from fastvae.training.feed import Feed
from fastvae.training.loop import make_optimizer
from fastvae.training.replay import PLAIN_STEPS, Replay, steps_per_launch
from fastvae.training.step import TrainingStep, mirrored
from fastvae.training.updates import Updates

CPU = torch.device("cpu")
BATCH = 24
SMALL = ModelConfig(hidden=(16,), latent_dim=3)
CONFIG = Config(model=SMALL, batch_size=BATCH)


@pytest.fixture(scope="module")
def digits() -> ImageSet:
    train_set, _ = load_data(DataConfig(), seed=0)
    return train_set


def make(config: Config, digits: ImageSet, compiled: bool = False, done: int = 0) -> Updates:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=config.gradient_accumulation_steps
    )
    torch.manual_seed(1)
    model = build_model(config.model, digits, config.batch_size)
    model.to(memory_format=torch.channels_last)
    objective = build_objective(config.objective, len(digits))
    feed = Feed(digits, 0, CPU, samples_ahead=64 * config.batch_size)
    return Updates(
        model,
        TrainingStep(model, objective, 0, config.data.flip),
        feed,
        make_optimizer(config.optimizer, model),
        EMA(model, 0.99) if config.optimizer.ema_decay else None,
        accelerator,
        config,
        total_steps=200,
        done=done,
        compiled=compiled,
    )


# ------------------------------------------------------------------------- nothing waits


@dataclass
class Recorded(TorchDispatchMode):
    """Every operation with its arguments that are no tensors."""

    calls: list[tuple[Any, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = torch.utils._pytree.tree_leaves((args, kwargs or {}))
        numbers = [x for x in leaves if not isinstance(x, Tensor)]
        shapes = [tuple(x.shape) for x in leaves if isinstance(x, Tensor)]
        if not str(func).startswith("profiler."):
            self.calls.append((str(func), *map(repr, numbers), *shapes))
        return func(*args, **(kwargs or {}))


HOST_READS = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal.default", "unique")
# A tensor made of Python's numbers: on a GPU a copy from the host.
HOST_COPIES = ("lift_fresh",)

STEPS = {
    "plain": CONFIG,
    "ema, clipped, cosine": replace(
        CONFIG,
        optimizer=OptimizerConfig(
            ema_decay=0.99, clip_norm=1.0, schedule="cosine", lr_warmup_steps=5
        ),
    ),
    "steps down, warm-up of the KL": replace(
        CONFIG,
        objective=ObjectiveConfig(kl_warmup_epochs=1.0),
        optimizer=OptimizerConfig(schedule="step", lr_step_epochs=0.5),
    ),
    "importance-weighted": replace(
        CONFIG, objective=ObjectiveConfig(objective="importance-weighted", num_samples=3)
    ),
    "optimal variance": replace(
        CONFIG, model=replace(SMALL, likelihood="gaussian", variance="optimal")
    ),
    "conv, conditional, mirrored": replace(
        CONFIG,
        data=DataConfig(flip=True),
        model=replace(SMALL, network="conv", widths=(4,), conditional=True),
    ),
    "stages": replace(CONFIG, optimizer=OptimizerConfig(schedule="stages", beta1=0.99)),
    "muon": replace(CONFIG, optimizer=OptimizerConfig(optimizer="muon")),
    "accumulated": replace(CONFIG, gradient_accumulation_steps=2),
    "vamp": replace(CONFIG, model=replace(SMALL, prior="vamp", prior_components=5)),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_always_the_same_operations(name: str, digits: ImageSet) -> None:
    """No result is read by the host, and no number that Python hands over changes, also across
    the end of an epoch (67 steps). That is what a CUDA graph can replay."""
    updates = make(STEPS[name], digits, done=55)
    updates.advance(PLAIN_STEPS)  # the first makes the optimizer's state, all show what they change
    expected: list[tuple[Any, ...]] | None = None
    for _ in range(100 if name == "plain" else 20):
        # The order of the next epoch is put in place between steps.
        first = updates.done * BATCH
        updates.feed.prepare(first, first + BATCH)
        with Recorded() as recorded:
            updates._update()
        updates.done += 1
        waits = [
            call for call in recorded.calls if any(r in call[0] for r in HOST_READS + HOST_COPIES)
        ]
        assert not waits
        expected = expected or recorded.calls
        assert recorded.calls == expected
    assert len(expected or []) > 50


def test_the_recorder_sees_what_it_is_for(digits: ImageSet) -> None:
    with Recorded() as recorded:
        torch.ones(()).item()
    assert any(r in call[0] for call in recorded.calls for r in HOST_READS)


# ----------------------------------------------------------------- the same by another way


def weights(updates: Updates) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in updates.model.state_dict().items()}


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> Iterator[None]:
    yield
    torch._dynamo.reset()


COMPILED = (
    "plain",
    pytest.param("optimal variance", marks=pytest.mark.slow),
    pytest.param("conv, conditional, mirrored", marks=pytest.mark.slow),
)


@pytest.mark.parametrize("one_graph", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", COMPILED)
def test_200_compiled_steps_are_200_plain_steps(
    name: str, one_graph: bool, digits: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward in one graph, or in one each."""
    plain, compiled = make(STEPS[name], digits), make(STEPS[name], digits, compiled=True)
    assert compiled.gradients is not None
    if not one_graph:
        compiled.gradients = None
        compiled._compiled = [compile_in_place(compiled.wrapped, required=True)]
    for steps in (1, 199):
        plain.advance(steps)
        compiled.advance(steps)
        torch.testing.assert_close(compiled.sums, plain.sums, rtol=1e-4, atol=1e-4)
        for a, b in zip(weights(compiled).values(), weights(plain).values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=3e-3)
        compiled.reset()
        plain.reset()
    assert compiled.compiled and not compiled.compile_problem


def slow_updates(what: str, digits: ImageSet, monkeypatch: pytest.MonkeyPatch) -> Updates:
    """The steps as they would be without one of the things that make them fast."""
    config = STEPS["conv, conditional, mirrored"]
    if what == "channels first":
        monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_, **__: self)
    if what == "noise by PyTorch":
        monkeypatch.setattr("fastvae_kernels.philox._c_code", lambda: None)
    if what == "an optimizer that is not fused":
        adam = torch.optim.Adam

        def unfused(*args: Any, fused: bool, **rest: Any) -> torch.optim.Adam:
            return adam(*args, fused=False, foreach=False, **rest)

        monkeypatch.setattr(torch.optim, "Adam", unfused)
    return make(config, digits)


@pytest.mark.parametrize(
    "what",
    ["channels first", "noise by PyTorch", "an optimizer that is not fused", "other products"],
)
def test_200_fast_steps_are_200_slow_ones(
    what: str, digits: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = make(STEPS["conv, conditional, mirrored"], digits)
    with monkeypatch.context() as patch:
        slow = slow_updates(what, digits, patch)
        layouts = {p.is_contiguous() for p in slow.model.parameters()}
        assert layouts == ({True} if what == "channels first" else {True, False})
        if what == "other products":
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest" if before == "medium" else "medium")
        slow.advance(200)
        if what == "other products":
            torch.set_float32_matmul_precision(before)
    fast.advance(200)
    exactly = {"rtol": 0.0, "atol": 0.0} if what == "noise by PyTorch" else {"rtol": 1e-4}
    torch.testing.assert_close(fast.sums, slow.sums, **{"atol": 1e-4, **exactly})
    for a, b in zip(weights(fast).values(), weights(slow).values(), strict=True):
        torch.testing.assert_close(a, b, **{"rtol": 1e-2, "atol": 3e-3, **exactly})


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gradients_have_the_layout_of_their_weights(compiled: bool, digits: ImageSet) -> None:
    """A fused optimizer goes through both in the order of memory."""
    updates = make(STEPS["conv, conditional, mirrored"], digits, compiled=compiled)
    seen = []
    step = updates.optimizer.step

    def look() -> None:
        for p in updates.model.parameters():
            assert p.grad is not None and p.grad.stride() == p.stride()
            seen.append(p.dim())
        step()

    updates.optimizer.step = look  # type: ignore[method-assign, assignment]
    updates.advance(2)
    assert seen.count(4) > 0


@pytest.mark.parametrize(
    "optimizer",
    [
        OptimizerConfig(),
        OptimizerConfig(clip_norm=1.0, ema_decay=0.9),
        OptimizerConfig(optimizer="muon", ema_decay=0.9),
    ],
    ids=["adam", "clipped, averaged", "muon, averaged"],
)
@pytest.mark.parametrize("parts", [1, 2])
def test_losses_that_are_scaled(
    parts: int, optimizer: OptimizerConfig, digits: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With PyTorch's own scaler, as for fp16, but in float32 to compare exactly: the same steps are
    taken, that without finite gradients is not, and the scale is halved."""
    losses = TrainingStep.losses

    def spoiled(self: TrainingStep, batch: Any, position: Tensor) -> Any:
        found, terms = losses(self, batch, position)
        return found * torch.where(position // BATCH == 12, torch.inf, 1.0), terms

    monkeypatch.setattr(TrainingStep, "losses", spoiled)
    config = replace(CONFIG, optimizer=optimizer, gradient_accumulation_steps=parts)
    plain = make(config, digits)
    plain.advance(30)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    init = Accelerator.__init__

    def scaling(self: Accelerator, *arguments: Any, **keywords: Any) -> None:
        init(self, *arguments, **keywords)
        self.scaler = scaler

    monkeypatch.setattr(Accelerator, "__init__", scaling)
    scaled = make(config, digits)
    # After its autocast was set up: what tells Accelerate to unscale before it clips.
    scaled.accelerator.native_amp = True
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")
    scaled.advance(30)
    assert scaler.get_scale() == 512.0
    for updates in (scaled, plain):
        assert (int(updates.skipped), updates.in_a_row) == (1, 0)
    torch.testing.assert_close(scaled.sums, plain.sums, rtol=1e-6, atol=0)
    models = [(scaled.model, plain.model)]
    if scaled.ema and plain.ema:
        models.append((scaled.ema.model, plain.ema.model))
    for model, expected in models:
        found, truth = (torch.cat([p.flatten() for p in m.parameters()]) for m in (model, expected))
        assert (found - truth).norm() < 1e-5 * truth.norm()


# --------------------------------------------------------------------------------- replays


class Graph:
    """Stands in for a CUDA graph: remembers the updates of its capture, and calls them."""

    updates: list[Any]

    def replay(self) -> None:
        for update in self.updates:
            update()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)


def replayed(steps: int | None, monkeypatch: pytest.MonkeyPatch) -> tuple[Replay, list[str]]:
    done: list[str] = []

    def update() -> None:
        done.append("plain")

    class Processes:
        num_processes = 1

    found = Replay(update, Processes(), steps)  # type: ignore[arg-type]

    def capture(count: int) -> None:
        graph = Graph()
        graph.updates = [lambda: done.append(f"of {count}")] * count
        found.graphs[count] = graph  # type: ignore[assignment]

    monkeypatch.setattr(found, "_capture", capture)
    return found, done


def advance(found: Replay, steps: int) -> None:
    while steps:
        count = found.size(steps)
        assert 1 <= count <= steps
        found(count)
        steps -= count


def test_every_step_is_taken_once(cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    found, done = replayed(8, monkeypatch)
    for steps in (1, 50, 7, 16, 3):
        before = len(done)
        advance(found, steps)
        assert len(done) == before + steps
    assert done[: replay.PLAIN_STEPS] == ["plain"] * replay.PLAIN_STEPS
    assert "plain" not in done[replay.PLAIN_STEPS :]
    assert set(done) == {"plain", "of 1", "of 2", "of 4", "of 8"}


def test_a_number_is_found_by_measuring(cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    found, done = replayed(None, monkeypatch)
    advance(found, 200)
    assert found.steps_per_launch == replay.MOST_STEPS_PER_LAUNCH  # a stand-in takes no time
    assert len(done) == 200 and "of 64" in done


def test_many_steps_a_launch_where_a_line_of_the_log_comes_sooner(
    cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, done = replayed(64, monkeypatch)
    for _ in range(4):
        advance(found, 50)
    assert len(done) == 200
    assert set(done[50:]) == {"of 32", "of 16", "of 2"}


def test_a_failed_capture_goes_on_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU cannot capture: the steps are taken all the same."""
    done = []

    class Processes:
        num_processes = 1

    found = Replay(lambda: done.append(1), Processes(), 8)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: None)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", broken)
    advance(found, 100)
    assert len(done) == 100
    assert found.problem == "operation not permitted when stream is capturing"


def test_steps_per_launch() -> None:
    assert steps_per_launch(1.0) == 1
    assert steps_per_launch(1e-4) == 16  # 1.6 ms
    assert steps_per_launch(1e-9) == 64


# ------------------------------------------------------------------- what cannot be compiled


class HostReads(torch.nn.Module):
    """A decoder that asks the device for a number: the compiler cannot trace it."""

    def __init__(self, decoder: torch.nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, *inputs: Any) -> Tensor:
        found = self.decoder(*inputs)
        return found * (2.0 if float(found.detach().sum()) > 1e9 else 1.0)


def reading(config: Config, digits: ImageSet, compiled: bool) -> Updates:
    updates = make(config, digits, compiled=compiled)
    updates.model.decoder = HostReads(updates.model.decoder)  # type: ignore[arg-type]
    return updates


@pytest.mark.parametrize("parts", [1, 2])
def test_what_cannot_be_compiled_is_run_as_it_is(parts: int, digits: ImageSet) -> None:
    """From the first step on, with nothing counted twice; and it is said why."""
    config = replace(CONFIG, gradient_accumulation_steps=parts)
    config = replace(config, optimizer=OptimizerConfig(ema_decay=0.9))
    plain, fallen = (reading(config, digits, compiled) for compiled in (False, True))
    assert fallen.compiled and not plain.compiled
    for updates in (plain, fallen):
        updates.advance(12)
    assert not fallen.compiled
    assert fallen.compile_problem and "\n" not in fallen.compile_problem
    assert not plain.compile_problem
    assert torch.equal(fallen.snapshot(), plain.snapshot())
    for a, b in zip(weights(fallen).values(), weights(plain).values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("parts", [1, 2])
def test_compiled_code_that_was_asked_for(parts: int, digits: ImageSet) -> None:
    config = replace(CONFIG, compile="on", gradient_accumulation_steps=parts)
    updates = reading(config, digits, compiled=True)
    before = weights(updates)
    with pytest.raises(UserError, match=r"^--compile on: this model cannot be compiled: "):
        updates.advance(2)
    assert (int(updates.step), updates.snapshot().abs().sum()) == (0, 0)
    for name, value in weights(updates).items():
        assert torch.equal(value, before[name])


def test_an_error_of_the_step_is_no_problem_of_the_compiler(digits: ImageSet) -> None:
    def wrong(x: Tensor) -> Tensor:
        calls.append(len(x))
        raise ArithmeticError("wrong")

    calls: list[int] = []
    compiled = Compiled(torch.compiler.disable(wrong), required=False)
    compiled.compiled = compiled.function  # what runs it, once it is compiled
    with pytest.raises(ArithmeticError):
        compiled(torch.ones(3))
    assert calls == [3] and not compiled.problem


# ----------------------------------------------------------------------------- what is counted


def test_a_snapshot_and_a_reset(digits: ImageSet) -> None:
    updates = make(CONFIG, digits)
    updates.advance(3)
    kept = updates.snapshot()
    assert torch.equal(kept, torch.cat([updates.sums, kept.new_tensor([0.0, 3.0])]))
    updates.reset()
    assert updates.snapshot().tolist() == [0, 0, 0, 0, 3] and kept[0] > 0
    assert updates.in_a_row == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["loss", "one gradient"])
def test_a_gradient_that_is_not_finite(where: str, value: float) -> None:
    """By both ways to look: a CPU's, and a GPU's (whose kernel PyTorch has for a CPU too)."""
    loss, gradients = torch.ones((), dtype=torch.float64), [torch.ones(5, 3), None, torch.ones(7)]
    spoil = loss if where == "loss" else gradients[2][4]  # type: ignore[index]
    for expected in (0.0, 1.0):
        bad = loss_not_finite(loss)
        add_gradients(bad, gradients, torch.ones(()))
        assert (bad.dtype, bad.item()) == (torch.float32, expected)
        assert not_finite(loss, gradients).item() == expected
        assert gradients[0].sum() == 15  # type: ignore[union-attr]
        spoil.fill_(value)


def test_mirrored_images() -> None:
    """About half of them, always the same for a place in the run, the rest untouched."""
    x = torch.arange(400 * 2 * 3 * 5).view(400, 2, 3, 5).to(torch.uint8)
    seed = torch.tensor(3)
    found = mirrored(x, seed, torch.tensor(0))
    same = (found == x).flatten(1).all(1)
    assert torch.equal(found[~same], x[~same].flip(-1))
    assert 150 < same.sum() < 250
    assert torch.equal(mirrored(x[100:], seed, torch.tensor(100)), found[100:])
    assert not torch.equal(mirrored(x, seed, torch.tensor(1)), found)
