"""The benchmarks of the training step, memory and growth: equal networks, honest arithmetic."""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import bare
import growth
import memory
import pytest
import step_speed
import torch
import train_speed
from measure import Timing
from report import RENDER, to_markdown
from runner import add
from settings import ROOT, Settings
from step_cases import (
    StepCase,
    check_losses,
    digit_like_images,
    make_accelerator,
    make_candidate,
    make_updates,
    why_left_out,
)
from step_rivals import objective_of, plain_like
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal, kl_divergence

CPU = torch.device("cpu")
CASES = [StepCase(name, 6) for name in step_speed.PRESETS]


def settings(**changes: object) -> Settings:
    return replace(Settings(quick=True, rounds=5), **changes)  # type: ignore[arg-type]


def gathered(said: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """All that a section says."""
    found: dict[str, Any] = {"rows": [], "left_out": [], "failures": []}
    for kind, value in said:
        add(found, kind, value)
    return found


# ------------------------------------------------------------------------------ equal work


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_rival_is_the_same_network(case: StepCase) -> None:
    """Same parameters, same encoder, same decoder."""
    images = digit_like_images(20, CPU, case.image_shape)
    updates = make_updates(
        case.config, images, make_accelerator(case.config, CPU), compiled=False, replayed=False
    )
    model = updates.model
    plain = plain_like(model, case.config.model, case.image_shape)
    count = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in plain.parameters()) == count
    x = images[:5].float() / 255
    torch.testing.assert_close(plain.encoder(x), model.encoder(x), rtol=1e-5, atol=1e-5)
    z = torch.randn(5, case.config.model.latent_dim)
    torch.testing.assert_close(plain.decoder(z), model.decoder(z), rtol=1e-5, atol=1e-5)


def test_sizes_of_the_presets() -> None:
    """Counted by hand."""
    layers = {
        "mnist-mlp": (784, 400, 400, 40, 20, 400, 400, 784),
        "vae": (784, 200, 200, 100, 50, 200, 200, 784),
    }
    for name, sizes in layers.items():
        expected = sum((a + 1) * b for i, (a, b) in enumerate(itertools.pairwise(sizes)) if i != 3)
        case = StepCase(name, 4)
        images = digit_like_images(10, CPU)
        updates = make_updates(
            case.config, images, make_accelerator(case.config, CPU), compiled=False, replayed=False
        )
        assert sum(p.numel() for p in updates.model.parameters()) == expected


@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=str)
def test_the_loss_of_the_rival(case: StepCase) -> None:
    """Against torch.distributions in float64."""
    config = case.config.model
    images = digit_like_images(5, CPU, case.image_shape)
    updates = make_updates(
        case.config, images, make_accelerator(case.config, CPU), compiled=False, replayed=False
    )
    plain = plain_like(updates.model, config, case.image_shape).double()
    x = images.double() / 255
    if config.likelihood == "bernoulli":
        x = (x > 0.5).double()
    noise = torch.randn(5, config.latent_dim, dtype=torch.float64)
    mu, logvar = plain.encoder(x).chunk(2, dim=1)
    q = Normal(mu, (0.5 * logvar).exp())
    decoded = plain.decoder(mu + q.stddev * noise)
    p = Bernoulli(logits=decoded)
    if config.likelihood == "gaussian":
        p = Normal(decoded, torch.tensor(0.1, dtype=torch.float64).sqrt())
    kl = kl_divergence(q, Normal(0.0, 1.0)).sum(1)
    expected = (kl - p.log_prob(x).flatten(1).sum(1)).mean()
    # The plain network's log-variance began in float32.
    torch.testing.assert_close(plain.loss(x, noise), expected, rtol=1e-6, atol=0)


def test_the_importance_weighted_loss_of_the_rival() -> None:
    """Against torch.distributions in float64, draw by draw."""
    case = StepCase("iwae-5", 4)
    images = digit_like_images(4, CPU)
    updates = make_updates(
        case.config, images, make_accelerator(case.config, CPU), compiled=False, replayed=False
    )
    plain = plain_like(updates.model, case.config.model, case.image_shape).double()
    loss_of, size = objective_of(plain, case.config)
    assert size == (5, 4, 50)
    x, noise = (images.double() / 255 > 0.5).double(), torch.randn(size, dtype=torch.float64)
    mu, logvar = plain.encoder(x).chunk(2, dim=1)
    q = Normal(mu, (0.5 * logvar).exp())
    ratios = []
    for each in noise:
        z = mu + q.stddev * each
        log_p = Bernoulli(logits=plain.decoder(z)).log_prob(x).flatten(1).sum(1)
        ratios.append(log_p + Normal(0.0, 1.0).log_prob(z).sum(1) - q.log_prob(z).sum(1))
    expected = -torch.stack(ratios).exp().mean(0).log().mean()
    torch.testing.assert_close(loss_of(x, noise), expected, rtol=1e-9, atol=0)


def test_a_rival_of_another_size_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises((AssertionError, ValueError)):
        plain_like(model, CASES[0].config.model, (1, 28, 28))


@pytest.mark.parametrize("preset", ["mnist-mlp", "iwae-5"])
def test_all_have_the_same_losses_and_move(preset: str) -> None:
    case = StepCase(preset, 16)
    images = digit_like_images(300, CPU)
    names = ("fastvae-uncompiled", "pytorch", "script")
    made = {name: make_candidate(name, case, images) for name in names}
    check_losses({name: each.mean_loss(10) for name, each in made.items()})
    for each in made.values():
        before = each.mean_loss(5)
        each.advance(20)
        assert each.mean_loss(5) < 0.98 * before
    with pytest.raises(AssertionError):
        check_losses({"a": 100.0, "b": 101.0, "c": 110.0})
    with pytest.raises(AssertionError):
        check_losses({"a": 100.0, "b": float("nan")})


def test_who_takes_part() -> None:
    cuda = torch.device("cuda")
    assert why_left_out("fastvae-unreplayed", StepCase("vae", 20), CPU)
    assert not why_left_out("fastvae-unreplayed", StepCase("vae", 20), cuda)
    assert why_left_out("fastvae-unreplayed", StepCase("vae", 1024), cuda)
    assert "bf16" not in why_left_out("script", StepCase("vae", 20, "bf16"), cuda)
    assert "float32" in why_left_out("pythae", StepCase("vae", 128, "bf16"), cuda)
    assert "connected" in why_left_out("pythae", StepCase("mnist-conv", 128), cuda)


def test_the_order_of_the_cases() -> None:
    """The most telling first; the others are all sixteen in both precisions, none twice."""
    core = step_speed.CASES["cuda"]
    assert core[:2] == [StepCase("mnist-mlp", 128), StepCase("iwae-5", 20)]
    every = {*core, *step_speed.ALL}
    assert len(step_speed.ALL) == 32 and every - set(step_speed.ALL) == {StepCase("iwae-5", 20)}


# ------------------------------------------------------------------------------ arithmetic


def timing(median: float) -> Timing:
    return Timing(median, 0.9 * median, 1.2 * median, 7, 3)


def test_rates_and_one_step_of_many() -> None:
    one = timing(5e-3).of_one(50)
    assert one.median == pytest.approx(1e-4) and one.q3 == pytest.approx(1.2e-4)
    assert (one.rounds, one.calls) == (7, 150)
    rate = step_speed.rates(one, 20)
    assert rate["median"] == pytest.approx(200_000)
    assert rate["q1"] < rate["median"] < rate["q3"]


def test_targets() -> None:
    fast, slow = {"fastvae": timing(9e-5)}, {"fastvae": timing(1.1e-4)}
    assert step_speed.missed(20, fast, {"compiled": 1.31, "pythae": 50.0}) == []
    assert step_speed.missed(20, slow, {"compiled": 1.29}) == ["compiled 1.3×", "10,000 steps/s"]
    assert step_speed.missed(128, slow, {"pythae": 49.0}) == ["pythae 50×"]
    assert step_speed.missed(20, {}, {}) == ["fastvae itself"]


def test_slope() -> None:
    sizes = (10, 20, 40, 80)
    assert growth.slope(sizes, [3 * n**1.37 for n in sizes]) == pytest.approx(1.37)
    assert growth.slope(sizes, [5.0] * 4) == pytest.approx(0.0)
    # Least squares, against numpy's.
    import numpy as np

    y = [1.0, 2.5, 3.0, 9.0]
    assert growth.slope(sizes, y) == pytest.approx(np.polyfit(np.log(sizes), np.log(y), 1)[0])


def test_growth_beyond_the_work_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """And work alone does not."""

    def measured(axis: growth.Axis, _: Settings) -> dict[str, object]:
        exponent = 1.2 if axis.name == "latents" else 1.05
        found = {"exponent": exponent, "work_exponent": 1.0, "excess": exponent - 1.0}
        return {"axis": axis.name, "tolerance": axis.tolerance, **found}

    monkeypatch.setattr(growth, "_measure", measured)
    failures = gathered(growth.run(settings(quick=False)))["failures"]
    assert len(failures) == 1 and failures[0].startswith("latents: time grows by the power 1.20")


def test_growth_is_measured_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    axes = (growth.Axis("latents", (2, 4, 8), rows=4), growth.Axis("order", (10, 20, 40)))
    monkeypatch.setattr(growth, "QUICK_AXES", axes)
    found = gathered(growth.run(settings(figure=str(tmp_path / "growth.png"))))
    assert not found["failures"] and not found["left_out"]
    assert (tmp_path / "growth.png").stat().st_size > 10_000
    latents = found["rows"][0]
    # Six operations a weight and image: of the layers away from the latents, and of those at them.
    rest, each = 784 * 400 + 400 * 400, 2 * 400 + 400
    assert latents["work"] == [6 * 4 * (2 * rest + each * d) for d in (2, 4, 8)]
    assert all(s["median"] > 0 for row in found["rows"] for s in row["seconds"])


# ---------------------------------------------------------------------------------- memory


def test_what_is_kept() -> None:
    x = torch.ones(1000, requires_grad=True)
    w = torch.ones(1000)
    assert memory.kept_bytes(lambda: ((x * w).sum(),), [x, w]) == 0
    # exp keeps its output, which is no output of the whole; the product keeps the same tensor.
    assert memory.kept_bytes(lambda: ((x.exp() * w).sum(),), [x, w]) == 4000
    assert memory.kept_bytes(lambda: (x.exp(),), [x]) == 0

    def noisy() -> tuple[Tensor]:
        return ((x * torch.randn(1000)).sum(),)

    assert memory.kept_bytes(noisy, [x]) == 4000
    assert memory.peak_bytes(lambda: None, CPU) is None


KERNEL = """
import torch, memory
from fastvae_kernels import reparameterize_kl, reparameterize_kl_packed
mu, logvar = (torch.randn(5, 300, requires_grad=True) for _ in range(2))
packed = torch.randn(5, 600, requires_grad=True)
for impl in ("triton", "torch"):
    print(memory.kept_bytes(lambda: reparameterize_kl(mu, logvar, 3, impl=impl), [mu, logvar]))
    print(memory.kept_bytes(lambda: reparameterize_kl_packed(packed, 3, impl=impl), [packed]))
"""


@pytest.mark.slow
def test_the_kernels_keep_no_noise(tmp_path: Path) -> None:
    """In Triton's interpreter; the reference, beside it, does: three tensors of 5 × 300 floats."""
    pytest.importorskip("triton")
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "bench")))
    done = subprocess.run(
        [sys.executable, "-c", KERNEL],
        env={**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    *kernels, reference, packed_reference = map(int, done.stdout.split())
    assert len(kernels) == 2 and all(kept <= 64 for kept in kernels)  # seed and offset
    assert reference >= 5 * 300 * 4 and packed_reference >= 5 * 300 * 4


# ------------------------------------------------------------------------------- whole runs


def test_what_a_whole_run_loses() -> None:
    """Images a second from outside are those of the steps that the short run has not; what is lost
    is the seconds beyond the row above, of those steps' seconds."""
    rows = [
        {
            "kind": kind,
            "steps": steps,
            "seconds": seconds,
            "lines": 1,
            "logged_images_per_second": 1,
        }
        for kind, steps, seconds in (
            ("few steps", 100, 2.0),
            ("steps alone", 1_100, 6.0),
            ("and its log", 1_100, 7.0),
        )
    ]
    section = {"preset": "p", "data": "d", "batch": 128, "rows": rows}
    page = "\n".join(RENDER["train"](section))
    assert "| steps alone | 1,100 | 6.00 | 1 | 1 | 32,000 | – |" in page  # 128 × 1000 / 4
    assert "| and its log | 1,100 | 7.00 | 1 | 1 | 25,600 | 20 % |" in page
    assert list(RENDER["train"]({**section, "rows": []}))  # before the first has ended


@pytest.mark.slow
def test_whole_runs_are_timed() -> None:
    found = gathered(train_speed.run(settings()))
    assert not found["failures"] and not found["left_out"]
    assert [row["kind"] for row in found["rows"]] == [kind.name for kind in train_speed.KINDS]
    lines = [row["lines"] for row in found["rows"]]
    assert lines[0] == lines[1] == 1 < lines[2] <= lines[3]
    assert all(row["seconds"] > 0 < row["logged_images_per_second"] for row in found["rows"])


# --------------------------------------------------------------------------------- the whole


def test_nothing_is_missing_here() -> None:
    assert bare.MISSING == []


def test_the_report_of_steps() -> None:
    row = {
        "case": "vae-20",
        "steps_per_second": {"fastvae": step_speed.rates(timing(1e-4), 1)},
        "images_per_second": {"fastvae": step_speed.rates(timing(1e-4), 20)},
        "ratios": {"compiled": 1.234},
        "missed": ["compiled 1.3×"],
        "replay": {"fastvae": {"steps_per_launch": 16, "problem": ""}},
        "absent": {"pythae": "pythae is not installed"},
    }
    section = {
        "status": "ok",
        "what": step_speed.WHAT,
        "targets": {"ratios": step_speed.TARGETS, "steps_per_second": step_speed.TARGET_STEPS},
        "matmul_precision": "highest",
        "rows": [row],
    }
    machine = {"device": "D", "cpu": "C", "system": "S", "versions": {}}
    results = {"machine": machine, "date": "2026-01-01", "command": "c", "rounds": 7, "cut": False}
    page = to_markdown({**results, "quick": False, "sections": {"steps": section}})
    assert "| vae-20 | 10,000 [8,333–11,111] | 200,000 [" in page
    assert "| 1.23 |" in page and "| fastvae: 16 | compiled 1.3× |" in page
    assert "10,000 steps/s at batch 20" in page
    assert "- pythae: pythae is not installed" in page


@pytest.mark.slow
def test_launches_are_counted() -> None:
    """The figures of docs/speed.md, of which a step is to have no more."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench/launches.py"), "mnist-mlp"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines() if "mnist-mlp" in line]
    counts = {row[2].strip(): int(row[3]) for row in rows}
    assert counts.keys() == {"eager", "compiled"}
    assert 20 < counts["compiled"] <= 40 < counts["eager"] <= 73
