"""`fastvae evaluate`: its file, its figures, its messages, and its processes."""

import json
import math
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from conftest import Trained
from running import LAUNCH, TORCHRUN, results, run_process, train

from fastvae import VAE
from fastvae.cli import main
from fastvae.data import DataConfig, load_data
from fastvae.scores import score, scoring_seed

HELDOUT = 180


def evaluated(run: Path, *flags: object, output: Path | None = None) -> dict[str, Any]:
    """What `fastvae evaluate` writes, read as strict JSON."""
    more = ["-o", str(output)] if output else []
    main(["evaluate", str(run), "--iw-samples", "3", *map(str, flags), *more])
    path = output or run / "evaluation.json"

    def refuse(constant: str) -> float:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def numbers(value: Any) -> list[float]:
    """All of a nested structure."""
    if isinstance(value, dict):
        return [number for item in value.values() for number in numbers(item)]
    if isinstance(value, list):
        return [number for item in value for number in numbers(item)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def refused(arguments: list[object], capsys: pytest.CaptureFixture[str]) -> str:
    """What is said, in one line: by the command itself, or by the parser in its frame."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(list(map(str, arguments)))
    assert caught.value.code == 2
    said = capsys.readouterr().err
    if "Value error" not in said.split("\n")[0]:
        assert said.count("\n") == 1 and said.startswith("fastvae "), said
    assert "Traceback" not in said
    return " ".join(said.split())


# One process


def test_the_file(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluated(trained.run, output=tmp_path / "new/e.json")
    assert set(found) == {
        *("run", "data", "images", "elbo", "elbo_standard_error", "nll", "kl", "draws", "units"),
        *("bits_per_dim", "importance_weighted", "latents", "reconstruction", "linear_probe"),
        "frechet",
    }
    assert found["run"] == str(trained.run)
    assert (found["data"], found["images"], found["draws"]) == ("digits held-out", HELDOUT, 3)
    assert all(map(math.isfinite, numbers(found)))
    vae = VAE.from_pretrained(trained.run)
    _, heldout = load_data(DataConfig(), seed=0)
    scores = score(vae, heldout, seed=scoring_seed(0), samples=3)
    assert found["elbo"] == pytest.approx(scores.elbo.mean().item(), rel=1e-5)
    assert found["nll"] + found["kl"] == pytest.approx(-found["elbo"])
    assert found["linear_probe"]["metric"] == "accuracy"
    assert found["linear_probe"]["held_out_images"] == HELDOUT
    assert found["linear_probe"]["score"] > 0.5  # guessing: 0.1
    # Three draws of z against the one that the training's own evaluation takes.
    assert found["elbo"] == pytest.approx(results(trained.run)["heldout"]["elbo"], rel=0.05)
    said = capsys.readouterr().out
    assert f"elbo {found['elbo']:.4f}" in " ".join(said.split())
    assert said.endswith(f"{tmp_path}/new/e.json, figures in {tmp_path}/new/e/\n")
    assert {file.name for file in (tmp_path / "new/e").iterdir()} == {
        *("reconstructions.png", "samples.png", "interpolations.png", "latent_kl.png"),
        *("traversals.png", "latent_plane.png", "scores.parquet"),
    }
    rows = pyarrow.parquet.read_table(tmp_path / "new/e/scores.parquet")
    assert rows.num_rows == HELDOUT
    assert rows["label"].to_pylist() == heldout.labels.tolist()
    assert rows["iw_nll"].to_numpy().mean() == pytest.approx(found["importance_weighted"]["nll"])
    torch.testing.assert_close(
        torch.from_numpy(rows["elbo"].to_numpy().copy()), scores.elbo, rtol=1e-5, atol=1e-4
    )


def test_one_draw_is_the_training_s_own_evaluation(trained: Trained, tmp_path: Path) -> None:
    found = evaluated(trained.run, "--iw-samples", 1, output=tmp_path / "e.json")
    for name, value in results(trained.run)["heldout"].items():
        assert found[name] == pytest.approx(value, rel=1e-6), name
    assert found["importance_weighted"]["standard_error_of_draws"] is None


def test_it_lies_in_the_run_unless_told(tmp_path: Path) -> None:
    run = train("--max-steps", 1, output=tmp_path / "run")
    evaluated(run, "--limit", 5)
    assert (run / "evaluation.json").is_file()
    assert (run / "evaluation/samples.png").is_file()


def test_every_estimate(trained: Trained, tmp_path: Path) -> None:
    flags = shlex.split(
        "--annealed-images 3 --annealed-chains 6 --annealed-steps 4 --prior-samples 12 --limit 7"
    )
    found = evaluated(trained.run, *flags, output=tmp_path / "e.json")
    assert (found["annealed"]["images"], found["annealed"]["chains"]) == (3, 6)
    assert found["prior_average"]["samples"] == 12
    assert (tmp_path / "e/bounds.png").is_file()
    assert all(map(math.isfinite, numbers(found)))


@pytest.mark.parametrize("limit", [1, 2, 5, 1000])
def test_limit(trained: Trained, tmp_path: Path, limit: int) -> None:
    found = evaluated(trained.run, "--limit", limit, output=tmp_path / "e.json")
    assert found["images"] == min(limit, HELDOUT)
    _, heldout = load_data(DataConfig(), seed=0)
    first = heldout.select(slice(limit))
    vae = VAE.from_pretrained(trained.run)
    expected = score(vae, first, seed=scoring_seed(0), samples=3).elbo.mean().item()
    assert found["elbo"] == pytest.approx(expected, rel=1e-5)
    assert (found["elbo_standard_error"] is None) == (limit == 1)


def test_other_images(trained: Trained, tmp_path: Path) -> None:
    """A source of its own is evaluated whole, and no probe is trained on what is not there."""
    train_set, _ = load_data(DataConfig(), seed=0)
    mine = train_set.images[:33].numpy()
    np.save(tmp_path / "mine.npy", mine)
    flags = ["--data", tmp_path / "mine.npy"]
    found = evaluated(trained.run, *flags, output=tmp_path / "e.json")
    assert found["images"] == 33
    assert str(tmp_path / "mine.npy") in found["data"]
    assert "linear_probe" not in found
    vae = VAE.from_pretrained(trained.run)
    expected = score(vae, train_set.select(slice(33)), seed=scoring_seed(0), samples=3)
    assert found["elbo"] == pytest.approx(expected.elbo.mean().item(), rel=1e-5)


def test_training_images_without_labels_have_no_probe(tmp_path: Path) -> None:
    train_set, _ = load_data(DataConfig(), seed=0)
    np.save(tmp_path / "unlabelled.npy", train_set.images[:200].numpy())
    run = train("--data", tmp_path / "unlabelled.npy", "--max-steps", 2, output=tmp_path / "run")
    assert "linear_probe" not in evaluated(run)


# Kinds of models

PICTURES = {"reconstructions.png", "samples.png", "interpolations.png", "latent_plane.png"}
CHARTS = {"latent_kl.png", "traversals.png"}
KINDS = {
    "--latent-dim 2": PICTURES | CHARTS | {"manifold.png"},
    "--conditional": PICTURES | CHARTS | {"classes.png"},
    "--conditional --prior class-normal": PICTURES | CHARTS | {"classes.png"},
    "--posterior deterministic --prior none": PICTURES - {"samples.png"},
    "--posterior deterministic --objective mmd --latent-dim 2": PICTURES | {"manifold.png"},
    "--likelihood bernoulli --binarize static": PICTURES | CHARTS,
    "--likelihood bernoulli --binarize none": PICTURES | CHARTS,
    "--prior mixture --prior-components 3": PICTURES,
    "--prior vamp --prior-components 3": PICTURES,
    "--posterior inverse-autoregressive": PICTURES,
    "--inference table --refine-steps 3": PICTURES | CHARTS,
    "--refine-steps 2": PICTURES | CHARTS,
    "--likelihood categorical --levels 5": PICTURES | CHARTS,
    "--likelihood logistic-mixture --mixtures 2": PICTURES | CHARTS,
    "--variance predicted": PICTURES | CHARTS,
    "--variance optimal": PICTURES | CHARTS,
}


# Each of them draws what one that is not slow draws.
SLOW = (
    "--conditional",
    "--likelihood bernoulli --binarize none",
    "--prior mixture --prior-components 3",
    "--refine-steps 2",
    "--likelihood categorical --levels 5",
    "--variance predicted",
    "--variance optimal",
)


@pytest.mark.parametrize(
    "flags", [x if x not in SLOW else pytest.param(x, marks=pytest.mark.slow) for x in KINDS]
)
def test_kinds_of_models(flags: str, tmp_path: Path) -> None:
    run = train(*shlex.split(flags), "--max-steps", 3, output=tmp_path / "run")
    found = evaluated(run, "--limit", 37)
    assert {file.name for file in (run / "evaluation").glob("*.png")} == KINDS[flags]
    assert found["images"] == 37
    assert all(map(math.isfinite, numbers(found)))
    is_bound = "deterministic" not in flags and "none" not in flags
    assert ("elbo" in found) == ("importance_weighted" in found) == is_bound
    assert ("amortization_gap" in found) == ("--refine" in flags)
    heldout = evaluate_names(run)
    assert heldout <= set(found)


def evaluate_names(run: Path) -> set[str]:
    """What the training's own evaluation reported."""
    return set(results(run)["heldout"])


def test_a_network_that_predicts_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--preset bnn-classes --data digits --hidden 8 --max-steps 5 --compile off --output"
    main(["train", *shlex.split(flags), str(tmp_path / "run")])
    main(["evaluate", str(tmp_path / "run"), "--limit", "37"])
    found = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert found["images"] == 37
    assert 0 <= found["predictions"]["accuracy"] <= 1
    assert (tmp_path / "run/evaluation/calibration.png").is_file()
    whole = refused(["evaluate", tmp_path / "run", "--iw-samples", 5], capsys)
    assert "--iw-samples" in whole and "predicts labels" in whole
    for command, more in (("sample", []), ("score", ["digits", "-o", "s.csv"])):
        assert "Bayesian neural network" in refused([command, tmp_path / "run", *more], capsys)


# What is refused


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ("--limit 0", "--limit must be at least 1, got 0"),
        ("--iw-samples 0", "--iw-samples must be at least 1, got 0"),
        ("--memory-mb 0", "--memory-mb must be at least 1, got 0"),
        ("--annealed-images -1", "--annealed-images must be 0 (off) or more, got -1"),
        ("--annealed-chains 3", "--annealed-chains must be at least 5"),
        ("--annealed-steps 0", "--annealed-steps must be at least 1, got 0"),
        ("--prior-samples 10", "give it too"),
        ("--data nosuch", "no file or folder nosuch"),
        ("--device foo", "--device foo cannot be used here"),
        ("-o e.txt", "-o ends in .json, got e.txt"),
        ("-o e", "-o ends in .json, got e"),
        ("-o folder.json", "cannot write folder.json: it is a folder"),
        ("-o /proc/none/e.json", "cannot write /proc/none/e.json"),
        ("-o file.json", "cannot write file/"),
    ],
)
def test_what_cannot_be_evaluated(
    trained: Trained,
    flags: str,
    part: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Said before any image is met."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setattr("fastvae.commands.assess", None)
    assert part in refused(["evaluate", trained.run, *shlex.split(flags)], capsys)


def test_an_annealed_estimate_of_no_likelihood(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--posterior", "deterministic", "--prior", "none", "--max-steps", 1]
    run = train(*flags, output=tmp_path / "run")
    message = refused(["evaluate", run, "--annealed-images", 2], capsys)
    assert "--annealed-images estimates log p(x), and this model has none" in message


def test_images_of_a_conditional_model_need_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train("--conditional", "--max-steps", 1, output=tmp_path / "run")
    images = np.zeros((3, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "unlabelled.npy", images)
    np.savez(tmp_path / "others.npz", images=images, labels=np.array([0, 10, 3]))
    for command in (["evaluate", run, "--data"], ["score", run, "-o", tmp_path / "s.csv"]):
        message = refused([*command, tmp_path / "unlabelled.npy"], capsys)
        assert "conditional on 10 classes: it needs the labels" in message
        message = refused([*command, tmp_path / "others.npz"], capsys)
        assert "labels lie in 0..9 for this model, got 0..10" in message


# Two processes


def two_processes(script: str, folder: Path, *flags: object, fails: bool = False) -> str:
    command = [*TORCHRUN, "--standalone", "--nproc_per_node", "2", str(LAUNCH / f"{script}.py")]
    process = run_process([*command, *map(str, flags)], folder, ACCELERATE_USE_CPU="true")
    assert (process.returncode != 0) == fails, process.stderr
    return process.stderr if fails else process.stdout


def assert_alike(found: Any, expected: Any, where: str = "") -> None:
    """Equal but for the rounding of sums."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_alike(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, (float, list)):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6), where
    else:
        assert found == expected, where


@pytest.mark.slow
def test_two_processes_evaluate_as_one(trained: Trained, tmp_path: Path) -> None:
    """Of an odd number of images, each once."""
    flags = shlex.split(
        "--limit 37 --iw-samples 20 --annealed-images 5 --annealed-steps 3 --prior-samples 20"
    )
    said = two_processes("evaluate", tmp_path, trained.run, *flags, "-o", "two.json")
    assert said.count("two.json, figures in two/") == 1
    main(["evaluate", str(trained.run), *flags, "-o", str(tmp_path / "one.json")])
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert two["images"] == two["reconstruction"]["images"] == 37
    assert two["annealed"]["images"] == 5
    assert_alike(two, one)
    assert {file.name for file in (tmp_path / "one").iterdir()} == {
        file.name for file in (tmp_path / "two").iterdir()
    }


@pytest.mark.slow
def test_two_processes_score_as_one(trained: Trained, tmp_path: Path) -> None:
    train_set, _ = load_data(DataConfig(), seed=0)
    np.savez(tmp_path / "mine.npz", images=train_set.images[:37], labels=train_set.labels[:37])
    flags = ["mine.npz", "--iw-samples", 7]
    said = two_processes("score", tmp_path, trained.run, *flags, "-o", "two.parquet")
    assert said.count("two.parquet: 37 rows") == 1
    arguments = [trained.run, tmp_path / "mine.npz", *flags[1:], "-o", tmp_path / "one.parquet"]
    main(["score", *map(str, arguments)])
    one, two = (pyarrow.parquet.read_table(tmp_path / f"{n}.parquet") for n in ("one", "two"))
    assert one.column_names == two.column_names
    for name in one.column_names:
        a, b = (torch.from_numpy(table[name].to_numpy().copy()) for table in (one, two))
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.slow
def test_fewer_images_than_processes(trained: Trained, tmp_path: Path) -> None:
    said = two_processes("evaluate", tmp_path, trained.run, "--limit", 1, fails=True)
    message = "fastvae evaluate: 1 images are too few for 2 processes: use 1 at most"
    assert said.count(message) == 1
    assert "UserError" not in said
