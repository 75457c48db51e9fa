"""A step that is skipped leaves nothing behind, in a network's buffers neither."""

import json
from pathlib import Path

import preset_steps
import pytest
import torch
from preset_steps import updates_of
from running import results, train
from torch import Tensor, nn

from fastvae.checkpoints import best_of
from fastvae.evaluation import Evaluator
from fastvae.training.buffers import values_in_python


class Spoiling(nn.Module):
    """Passes on what it gets, but ∞ in its calls of these numbers (from 0)."""

    def __init__(self, calls: tuple[int, ...]) -> None:
        super().__init__()
        self.bad = calls
        self.register_buffer("count", torch.zeros((), dtype=torch.int64), persistent=False)
        self.count: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(sum(self.count == n for n in self.bad) > 0, torch.inf, x)  # type: ignore[operator, arg-type]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("bad", [(0,), (5,), (1, 2, 7)])
def test_running_means_of_a_skipped_step(
    bad: tuple[int, ...], compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **k: compile_(f, backend="aot_eager", **k))
    torch._dynamo.reset()
    spoiling = Spoiling(bad)
    build = preset_steps.build_model

    def normalised(*arguments: object) -> nn.Module:
        model = build(*arguments)  # type: ignore[arg-type]
        outputs = 2 * model.latent_dim
        model.encoder = nn.Sequential(model.encoder, spoiling, nn.BatchNorm1d(outputs))  # type: ignore[arg-type, assignment]
        return model

    monkeypatch.setattr(preset_steps, "build_model", normalised)
    updates = updates_of("digits-mlp", compiled, batch_size=16)
    states = []
    for n in range(10):
        spoiling.count.fill_(n)
        updates.advance(1)
        states.append({k: v.clone() for k, v in updates.model.state_dict().items()})
    assert updates.compiled is compiled
    assert int(updates.skipped) == len(bad)
    norm = updates.model.encoder[2]  # type: ignore[index]
    assert int(norm.num_batches_tracked) == 10 - len(bad)
    for n in bad:
        if n:
            torch.testing.assert_close(states[n], states[n - 1], rtol=0, atol=0)
    for values in states[-1].values():
        assert values.isfinite().all()


def test_a_variance_found_from_the_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The likelihood itself meets nothing bad: the gradient is spoilt behind it."""
    updates = updates_of("sigma-vae", False, batch_size=16)
    each = updates.training_step.losses
    bad = {2, 7}

    def spoilt(*arguments: object, **named: object) -> tuple[Tensor, ...]:
        loss, *rest = each(*arguments, **named)  # type: ignore[arg-type]
        return (loss * (torch.nan if updates.done in bad else 1.0), *rest)

    monkeypatch.setattr(updates.training_step, "losses", spoilt)
    for n in range(10):
        before = {k: v.clone() for k, v in updates.model.state_dict().items()}
        updates.advance(1)
        if n in bad:
            torch.testing.assert_close(dict(updates.model.state_dict()), before, rtol=0, atol=0)
    assert updates.model.likelihood.steps == 10 - len(bad)


def test_buffers_that_no_step_changes_are_not_copied() -> None:
    updates = updates_of("iaf", False, batch_size=4)
    updates.advance(4)
    assert updates.buffers.changing == []


def test_values_in_python_by_name() -> None:
    inner = nn.Linear(2, 3)
    inner.calls, inner.kept = 4, torch.zeros(2)  # type: ignore[assignment]
    found = values_in_python(nn.Sequential(inner))
    assert found["0.calls"] == 4
    assert found["0.in_features"] == 2
    assert "0.kept" not in found


def test_a_bound_that_is_no_number_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is null in what is written, which is JSON, and no checkpoint is the best by it."""
    monkeypatch.setattr(Evaluator, "_sums", lambda self, *_: torch.full((2,), torch.nan).double())
    run = train(output=tmp_path / "run")
    told = [line for line in capsys.readouterr().err.splitlines() if "is nan" in line]
    assert len(told) == 1
    for text in [(run / "results.json").read_text(), *(run / "metrics.jsonl").open()]:
        json.loads(text, parse_constant=pytest.fail)
    assert results(run)["heldout"]["elbo"] is None
    assert best_of(run) is None
