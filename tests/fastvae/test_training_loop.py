"""Training from the command to the run's folder."""

import json
import math
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Trained
from PIL import Image
from running import (
    EPOCH,
    MEASURED,
    TINY,
    assert_same_tensors,
    kept,
    metrics,
    results,
    train,
    training_state,
    weights,
)
from safetensors import safe_open

from fastvae import VAE, UserError, training
from fastvae.cli import main
from fastvae.config import OptimizerConfig, from_json
from fastvae.data import DataConfig, load_data
from fastvae.evaluation import evaluate
from fastvae.training.ema import EMA
from fastvae.training.schedule import learning_rate
from fastvae.vae import build_vae


def picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["train", *map(str, arguments)])
    assert caught.value.code == 2
    return capsys.readouterr().err


# The folder of a run


def test_the_folder(trained: Trained) -> None:
    files = {str(p.relative_to(trained.run)) for p in trained.run.rglob("*") if p.is_file()}
    assert files == {
        "config.json",
        "metrics.jsonl",
        "results.json",
        "samples.png",
        "reconstructions.png",
        "curves.png",
        *(
            f"checkpoints/{step}/{name}"
            for step in ("step-000000051", "step-000000060")
            for name in (
                "manifest.json", "config.json", "model.safetensors", "training.safetensors",
                "state.json",
            )
        ),
    }  # fmt: skip
    for name in ("model", "training"):
        with safe_open(kept(trained.run) / f"{name}.safetensors", "pt") as file:
            assert file.keys()
    state = json.loads((kept(trained.run) / "state.json").read_text())
    assert (state["step"], state["samples"]) == (60, 60 * 64)
    config = from_json((trained.run / "config.json").read_text(), "config.json")
    assert (config.max_steps, config.model.hidden, config.output) == (60, (32,), Path("run"))


def test_the_pictures(trained: Trained) -> None:
    """Real PNGs of a sensible size, with something on them."""
    for name, size in (("samples", (402, 402)), ("reconstructions", (402, 802))):
        shown = picture(trained.run / f"{name}.png")
        assert shown.shape == (*size, 3)
        assert shown.std() > 20
    curves = picture(trained.run / "curves.png")
    assert curves.shape[0] > 300
    assert curves.shape[1] > 1000
    assert len(np.unique(curves.reshape(-1, 3), axis=0)) > 20
    # Each panel has lines in two colours on white.
    for panel in np.array_split(curves, 3, axis=1):
        assert (panel.std(axis=2) > 30).sum() > 100


def test_the_lines_of_metrics(trained: Trained) -> None:
    lines = metrics(trained.run, measured=True)
    assert [line["step"] for line in lines] == [10, 20, 26, 30, 40, 50, 51, 60]
    keys = ["step", "epoch", "samples", "loss", "elbo", "nll", "kl", "lr", MEASURED]
    held_out = [f"heldout_{name}" for name in ("elbo", "nll", "kl", "bits_per_dim")]
    for line in lines:
        # Where an epoch ends, and at the end of the run.
        evaluated = line["step"] in (26, 51, 60)
        assert list(line) == keys + held_out * evaluated
        assert line["samples"] == line["step"] * 64
        assert line["epoch"] == pytest.approx(line["samples"] / EPOCH, abs=1e-4)
        assert line["elbo"] == pytest.approx(-(line["nll"] + line["kl"]))
        assert line["loss"] == pytest.approx(-line["elbo"], rel=1e-6)
        assert line[MEASURED] > 0
    assert lines[0]["loss"] > lines[3]["loss"] > lines[-1]["loss"]
    assert lines[-1]["heldout_elbo"] > lines[2]["heldout_elbo"]
    schedule = OptimizerConfig(learning_rate=2e-3, schedule="cosine")
    for line in lines:
        assert line["lr"] == learning_rate(schedule, torch.tensor(line["step"] - 1), 60, EPOCH / 64)


def test_the_results(trained: Trained) -> None:
    found, last = results(trained.run), metrics(trained.run)[-1]
    held_out = found["heldout"]
    assert held_out["images"] == 180
    for name in ("elbo", "nll", "kl", "bits_per_dim"):
        assert held_out[name] == last[f"heldout_{name}"]
    assert held_out["elbo"] == pytest.approx(-(held_out["nll"] + held_out["kl"]))
    bits = -held_out["elbo"] / math.log(2) / 64 + 8
    assert held_out["bits_per_dim"] == pytest.approx(bits)
    assert found[MEASURED] > 0
    assert 0 <= found["seconds_to_first_step"] < 60
    assert found["versions"]["torch"] == torch.__version__.split("+")[0]
    assert {"python", "fastvae", "accelerate", "numpy"} <= found["versions"].keys()
    hardware = found["hardware"]
    assert (hardware["device"], hardware["processes"], hardware["threads"]) == ("cpu", 1, 1)
    assert hardware["name"]
    assert (found["mixed_precision"], found["compiled"]) == ("no", False)


def test_training_beats_the_start(trained: Trained) -> None:
    _, held_out = load_data(DataConfig(), seed=0)
    spec = json.loads((kept(trained.run) / "config.json").read_text())
    torch.manual_seed(0)
    fresh = evaluate(build_vae(spec), held_out, seed=0)
    assert results(trained.run)["heldout"]["elbo"] > fresh.elbo + 20


def test_the_checkpoint_is_the_model(trained: Trained) -> None:
    """Loaded as anybody would, it gives the figures of the run."""
    vae = VAE.from_pretrained(trained.run)
    _, held_out = load_data(DataConfig(), seed=0)
    found = evaluate(vae, held_out, seed=0).named()
    # The run may have multiplied its matrices by another library than this process does.
    assert found == pytest.approx(results(trained.run)["heldout"], rel=1e-6)
    assert_same_tensors(weights(trained.run), vae.state_dict())
    state = training_state(trained.run)
    for name, parameter in vae.named_parameters():
        assert torch.equal(state[f"weight/{name}"], parameter)
        assert state[f"optimizer.exp_avg/{name}"].abs().max() > 0
        assert state[f"optimizer.step/{name}"].item() == 60


def test_what_is_printed(trained: Trained) -> None:
    """To a pipe: whole lines, few of them, and everything a reader needs."""
    process = trained.process
    assert process.stdout == ""
    text = process.stderr
    assert "\r" not in text
    assert "\x1b" not in text
    assert "Warning" not in text
    assert "1617 images 1×8×8 to train on (digits train), 180 held out" in text
    assert "1 process(es) on cpu, precision no, batch 64" in text
    steps = [line for line in text.splitlines() if line.startswith("step ")]
    assert 1 <= len(steps) <= 4
    assert steps[-1].startswith("step 60/60  loss ")
    elbo = results(trained.run)["heldout"]["elbo"]
    assert f"elbo {elbo:.2f}, nll " in text
    assert "samples.png" in text
    assert "checkpoints/" in text


def test_the_run_repeats_itself(trained: Trained, tmp_path: Path) -> None:
    run = train(output=tmp_path / "again")
    assert metrics(run) == metrics(trained.run)
    assert_same_tensors(training_state(run), training_state(trained.run))


def test_another_seed_is_another_run(trained: Trained, tmp_path: Path) -> None:
    run = train("--seed", 1, output=tmp_path / "other")
    losses = [{line["loss"] for line in metrics(folder)} for folder in (run, trained.run)]
    assert not losses[0] & losses[1]


# Likelihoods


def test_a_fixed_variance_stays(tmp_path: Path) -> None:
    run = train("--variance", 0.05, output=tmp_path / "run")
    assert weights(run)["likelihood.logvar"].item() == pytest.approx(math.log(0.05))
    assert not [n for n in training_state(run) if n.startswith("optimizer") and "logvar" in n]


def test_a_learned_variance_is_trained(tmp_path: Path) -> None:
    """To the mean squared error of what is decoded, where the likelihood is greatest."""
    flags = ["--learning-rate", 0.01, "--schedule", "constant", "--max-steps", 400]
    run = train(*flags, "--log-every", 400, "--eval-every", 100, output=tmp_path / "run")
    assert "optimizer.exp_avg/likelihood.logvar" in training_state(run)
    vae = VAE.from_pretrained(run)
    images = load_data(DataConfig(), seed=0)[0].images
    q = vae.encode(images)
    decoded = vae.decode(q.mu + q.std * torch.randn(q.mu.shape))
    error = (decoded - images / 255).square().mean().item()
    learned = weights(run)["likelihood.logvar"].exp().item()
    assert error < 0.05
    assert learned == pytest.approx(error, rel=0.1)


@pytest.mark.parametrize("binarize", ["dynamic", "static"])
def test_binary_pixels(binarize: str, tmp_path: Path) -> None:
    flags = ["--likelihood", "bernoulli", "--binarize", binarize]
    run = train(*flags, output=tmp_path / "run")
    held_out = results(run)["heldout"]
    assert held_out["bits_per_dim"] == pytest.approx(-held_out["elbo"] / math.log(2) / 64)
    # Less than one bit for a binary pixel, since something was learned.
    assert 0.3 < held_out["bits_per_dim"] < 0.99
    main(["evaluate", str(run), "--iw-samples", "1"])  # the draw that training looked at
    again = json.loads((run / "evaluation.json").read_text())
    assert again["elbo"] == pytest.approx(held_out["elbo"], rel=1e-6)


def test_a_cross_entropy_carries_no_other_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--likelihood", "bernoulli", "--binarize", "none"]
    run = train(*flags, output=tmp_path / "run")
    for line in metrics(run):
        names = [name.removeprefix("heldout_") for name in line]
        assert {"cross_entropy", "cross_entropy_objective", "kl"} <= set(names)
        assert not {"elbo", "nll", "bits_per_dim"} & set(names)
    found = results(run)
    assert found["heldout"].keys() == {"cross_entropy_objective", "cross_entropy", "kl", "images"}
    assert "cross-entropy" in found["note"]
    assert "no likelihood" in found["note"]
    printed = capsys.readouterr().err
    assert "cross_entropy" in printed
    for word in ("elbo", "nll", "bits"):
        assert word not in printed.lower()


def test_static_binarisation_differs_from_dynamic(tmp_path: Path) -> None:
    """One draw for the run is easier to learn by heart; and the draws differ by seed."""
    runs = {
        name: train("--likelihood", "bernoulli", *flags, "--max-steps", 2, output=tmp_path / name)
        for name, flags in {
            "dynamic": ["--binarize", "dynamic"],
            "auto": ["--binarize", "auto"],
            "static": ["--binarize", "static"],
        }.items()
    }
    losses = {name: metrics(run)[-1]["loss"] for name, run in runs.items()}
    assert losses["dynamic"] == losses["auto"] != losses["static"]


# The objective


def test_the_bound_is_logged_unweighted(tmp_path: Path) -> None:
    run = train("--beta", 4, "--max-steps", 10, "--log-every", 1, output=tmp_path / "run")
    for line in metrics(run):
        assert line["loss"] == pytest.approx(line["nll"] + 4 * line["kl"], rel=1e-5)
        assert line["elbo"] == pytest.approx(-(line["nll"] + line["kl"]), rel=1e-9)


def test_the_warm_up_follows_the_samples(tmp_path: Path) -> None:
    """With one image in a step, each line shows the weight of one position."""
    flags = ["--batch-size", 1, "--log-every", 1, "--beta", 3, "--kl-warmup-epochs", 10 / EPOCH]
    run = train(*flags, "--max-steps", 15, output=tmp_path / "run")
    lines = metrics(run)
    for line in lines:
        weight = 3 * min(1.0, (line["samples"] - 1) / 10)
        assert line["loss"] == pytest.approx(line["nll"] + weight * line["kl"], rel=1e-5)
    assert lines[0]["loss"] == pytest.approx(lines[0]["nll"], rel=1e-7)


# The optimizer


def test_schedules_reach_the_optimizer(tmp_path: Path) -> None:
    flags = shlex.split(
        "--schedule step --lr-step-epochs 0.2 --lr-step-factor 0.1 --lr-warmup-steps 3"
    )
    run = train(*flags, "--max-steps", 12, "--log-every", 1, output=tmp_path / "run")
    rates = [line["lr"] / 2e-3 for line in metrics(run)]
    # 25.3 steps an epoch: the first reduction comes after 5.05 steps, the second after 10.1.
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.01])


def first_gradient(run: Path) -> torch.Tensor:
    """From Adam's first moment after one step, which is a tenth of it."""
    state = training_state(run)
    return torch.cat([v.flatten() for k, v in sorted(state.items()) if "exp_avg/" in k]) / 0.1


def test_clipping(tmp_path: Path) -> None:
    free = first_gradient(train("--max-steps", 1, output=tmp_path / "free"))
    norm = free.norm().item()
    run = train("--max-steps", 1, "--clip-norm", norm / 7, output=tmp_path / "clipped")
    torch.testing.assert_close(first_gradient(run), free / 7, rtol=1e-4, atol=1e-6)
    run = train("--max-steps", 1, "--clip-norm", norm * 2, output=tmp_path / "untouched")
    assert torch.equal(first_gradient(run), free)
    parts = ["--gradient-accumulation-steps", 4, "--clip-norm", norm / 7]
    run = train("--max-steps", 1, *parts, output=tmp_path / "parts")
    torch.testing.assert_close(first_gradient(run), free / 7, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("optimizer", "decoupled"), [("adam", False), ("adamw", True)])
def test_weight_decay(optimizer: str, decoupled: bool, tmp_path: Path) -> None:
    """Against PyTorch's own optimizer over the same first gradient."""
    flags = ["--max-steps", 1, "--optimizer", optimizer, "--schedule", "constant"]
    plain = train(*flags, output=tmp_path / "plain")
    decayed = train(*flags, "--weight-decay", 0.5, output=tmp_path / "decayed")
    weight, moment = "weight/decoder.head.weight", "optimizer.exp_avg/decoder.head.weight"
    gradient = training_state(plain)[moment] / 0.1
    before = training_state(plain)[weight] + 2e-3 * gradient / (gradient.abs() + 1e-8)
    if decoupled:
        assert torch.equal(training_state(decayed)[moment] / 0.1, gradient)
        expected = training_state(plain)[weight] - 2e-3 * 0.5 * before
        torch.testing.assert_close(training_state(decayed)[weight], expected)
    else:
        torch.testing.assert_close(training_state(decayed)[moment] / 0.1, gradient + 0.5 * before)


def test_averaged_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The average of all the steps' weights, in float64, and everything final is made with it."""
    history: list[dict[str, torch.Tensor]] = []
    update = EMA.update

    def remember(self: EMA, vae: VAE, *rest: Any) -> None:
        history.append({k: v.detach().double().clone() for k, v in vae.named_parameters()})
        update(self, vae, *rest)

    monkeypatch.setattr(EMA, "update", remember)
    start = build_start(tmp_path)
    run = train("--ema-decay", 0.9, "--max-steps", 40, output=tmp_path / "run")
    assert len(history) == 40
    average = {name: value.double() for name, value in start.items()}
    for step, now in enumerate(history):
        decay = min(0.9, (1 + step) / (10 + step))
        average = {k: decay * average[k] + (1 - decay) * now[k] for k in now}
    saved, state = weights(run), training_state(run)
    for name, value in average.items():
        torch.testing.assert_close(saved[name].double(), value, rtol=1e-5, atol=1e-6)
        assert torch.equal(state[f"weight/{name}"].double(), history[-1][name])
        assert not torch.equal(saved[name], state[f"weight/{name}"])
    _, held_out = load_data(DataConfig(), seed=0)
    found = evaluate(VAE.from_pretrained(run), held_out, seed=0)
    assert found.named() == results(run)["heldout"]


def build_start(folder: Path) -> dict[str, torch.Tensor]:
    """The weights before the first step: those after one that changes nothing."""
    flags = ["--learning-rate", 1e-30, "--max-steps", 1]
    state = training_state(train(*flags, output=folder / "start"))
    return {k.removeprefix("weight/"): v for k, v in state.items() if k.startswith("weight/")}


def test_accumulation_changes_nothing_but_rounding(trained: Trained, tmp_path: Path) -> None:
    run = train("--gradient-accumulation-steps", 4, output=tmp_path / "run")
    for a, b in zip(metrics(run), metrics(trained.run), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    assert training_state(run)["optimizer.step/decoder.head.weight"].item() == 60


# Networks, data, precision, trackers


def test_convolutions(tmp_path: Path) -> None:
    flags = shlex.split("--preset digits-conv --widths 4 8 --hidden 16 --max-steps 30")
    run = train(*flags, output=tmp_path / "run")
    lines = metrics(run)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert weights(run)["encoder.convolutions.0.weight"].shape == (4, 1, 3, 3)


def test_colour_images_in_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for i in range(40):
        (tmp_path / f"images/{i % 2}").mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, 3) + rng.integers(-20, 20, (12, 10, 3))
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        image.save(tmp_path / f"images/{i % 2}/{i}.png")
    flags = ["--data", tmp_path / "images", "--network", "conv", "--widths", 4, 8, "--holdout", 0.2]
    run = train(*flags, "--batch-size", 48, "--max-steps", 40, output=tmp_path / "run")
    printed = capsys.readouterr().err
    assert "32 images 3×12×10 to train on" in printed
    assert "8 held out" in printed
    lines = metrics(run)
    assert lines[-1]["loss"] < lines[0]["loss"] - 100
    assert picture(run / "samples.png").std() > 5
    photo = tmp_path / "images/0/0.png"
    main(["reconstruct", str(run), str(photo), "-o", str(tmp_path / "pair.png")])
    assert picture(tmp_path / "pair.png").shape == (62 + 2, 2 * 52 + 2, 3)
    main(["encode", str(run), str(tmp_path / "images"), "-o", str(tmp_path / "z.safetensors")])


def test_bfloat16(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train("--mixed-precision", "bf16", output=tmp_path / "run")
    assert results(run)["mixed_precision"] == "bf16"
    assert "precision bf16" in capsys.readouterr().err
    differences = [
        abs(a["loss"] / b["loss"] - 1)
        for a, b in zip(metrics(run), metrics(trained.run), strict=True)
    ]
    assert 1e-6 < max(differences) < 0.05
    assert all(tensor.dtype == torch.float32 for tensor in training_state(run).values())


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train("--tracker", "tensorboard", "--max-steps", 30, output=tmp_path / "run")
    file = next(f for f in run.rglob("events.out.tfevents.*") if len(f.relative_to(run).parts) == 2)
    events = EventAccumulator(str(file)).Reload()
    lines = metrics(run)
    for key in ("loss", "elbo", "kl", "lr"):
        written = [(event.step, event.value) for event in events.Scalars(key)]
        assert written == [(line["step"], pytest.approx(line[key], rel=1e-6)) for line in lines]
    assert [event.step for event in events.Scalars("heldout_elbo")] == [26, 30]
    assert not [path for path in run.rglob("*") if path.suffix in (".pt", ".pkl", ".pickle")]


# How long, and when it goes wrong


def test_the_length_of_a_run(tmp_path: Path) -> None:
    epochs = ["--epochs", 0.5, "--batch-size", 100, "--max-steps", 1000]
    lines = metrics(train(*epochs, output=tmp_path / "half"))
    assert lines[-1]["step"] == 8
    assert lines[-1]["epoch"] == pytest.approx(800 / EPOCH, abs=1e-4)
    lines = metrics(train("--epochs", 1e-6, output=tmp_path / "least"))
    assert [line["step"] for line in lines] == [1]
    lines = metrics(train("--batch-size", 4000, "--max-steps", 2, output=tmp_path / "large"))
    assert lines[-1]["samples"] == 8000


def test_a_run_that_diverges_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And neither the log nor the checkpoint is spoiled by it."""
    run = tmp_path / "run"
    message = refused(capsys, *TINY, "--learning-rate", 1e18, "--output", run)
    assert "steps in a row, from step 2 on, had a loss or gradient that is not finite" in message
    assert "--learning-rate" in message
    assert all(math.isfinite(x) for line in metrics(run) for x in line.values() if x is not None)
    assert all(bool(x.isfinite().all()) for x in weights(run).values())


def test_nothing_is_written_where_another_run_lies(trained: Trained, tmp_path: Path) -> None:
    copied = shutil.copytree(trained.run, tmp_path / "run")
    before = {p: p.read_bytes() for p in copied.rglob("*") if p.is_file()}
    config = from_json((copied / "config.json").read_text(), "config.json")
    with pytest.raises(UserError, match="already holds a run"):
        training.train(replace(config, output=copied), name="x")
    assert {p: p.read_bytes() for p in copied.rglob("*") if p.is_file()} == before
