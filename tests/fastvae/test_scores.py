"""Scores of images against the closed forms of linear models, and what may not change them."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch
from conftest import Trained
from running import train
from small_models import LinearModel, grey_images, grey_set, linear_vae, make_vae, rough
from torch import Tensor, nn

from fastvae import VAE, Bernoulli, Deterministic, Gaussian, NoPrior, Refinement
from fastvae import scores as module
from fastvae.cli import main
from fastvae.data import DataConfig, ImageSet, load_all
from fastvae.errors import UserError
from fastvae.ranks import Share
from fastvae.runs import read_config
from fastvae.scores import Scores, activation_numbers, score, scoring_seed

SHAPE = (1, 3, 4)
REFINEMENT = Refinement(200)
# Models of which log p(x) is known, whatever the encoder answers.
LINEAR: dict[str, dict[str, Any]] = {
    "standard normal": {},
    "conditional": {"num_classes": 3},
    "class normal": {"num_classes": 3, "prior": "class-normal"},
    "flow": {"posterior": "inverse-autoregressive"},
    "mixture": {"prior": "mixture"},
    "vamp": {"prior": "vamp"},
    "flow, mixture": {"posterior": "inverse-autoregressive", "prior": "mixture"},
}
# Those whose encoder can answer the posterior itself.
EXACT = ["standard normal", "conditional", "class normal", "flow"]


def linear(name: str, count: int, **changes: Any) -> tuple[LinearModel, ImageSet, Tensor]:
    """A linear model, images, and their log p(x)."""
    model = linear_vae(SHAPE, **LINEAR[name], **changes)
    data = grey_set(count, SHAPE, LINEAR[name].get("num_classes", 0))
    return model, data, model.log_marginal(data)


def assert_mean_zero(differences: Tensor) -> None:
    """Within five standard errors."""
    error = differences.std().item() / math.sqrt(len(differences))
    assert abs(differences.mean().item()) < 5 * error + 1e-6


# Truth


@pytest.mark.parametrize("name", EXACT)
def test_the_exact_posterior_gives_log_p(name: str) -> None:
    """Every importance weight is then p(x) itself; the ELBO is it on average over z."""
    model, data, truth = linear(name, 41)
    found = score(model.vae, data, seed=3, samples=20_000)
    assert truth.std() > 1
    assert found.log_marginal is not None
    assert found.log_marginal_error is not None
    assert found.effective_samples is not None
    torch.testing.assert_close(found.log_marginal, truth, rtol=0, atol=1e-4)
    assert found.log_marginal_error.max() < 1e-5
    assert found.effective_samples.min() > 20_000 * 0.999
    # log p(x | z) has a standard deviation of about 1 over two latents.
    assert (found.elbo - truth).abs().max() < 5 / math.sqrt(20_000)
    assert (found.elbo - truth).mean().abs() < 5 / math.sqrt(20_000 * 41)


@pytest.mark.parametrize("name", LINEAR)
def test_importance_weights_mend_a_wrong_posterior(name: str) -> None:
    model, data, truth = linear(name, 31, perturbed=0.05 if "flow" in name else 0.1)
    found = score(model.vae, data, seed=3, samples=8000)
    assert found.log_marginal is not None
    assert (truth - found.elbo).mean() > 0.2
    assert abs((found.log_marginal - truth).mean().item()) < 0.05
    # The standard errors say how far each estimate may be off.
    assert found.log_marginal_error is not None
    off = (found.log_marginal - truth) / found.log_marginal_error
    assert 0.4 < off.square().mean().sqrt() < 2.5


def test_more_draws_come_nearer_from_below() -> None:
    model, data, truth = linear("standard normal", 200, perturbed=0.15)
    means = [
        score(model.vae, data, seed=1, samples=samples).log_marginal.mean().item()  # type: ignore[union-attr]
        for samples in (1, 10, 100, 1000)
    ]
    assert means == sorted(means)
    assert means[-1] < truth.mean().item() + 0.05
    assert means[-1] - means[0] > 0.5


@pytest.mark.parametrize("name", ["standard normal", "class normal"])
def test_kl_of_each_latent(name: str) -> None:
    model, data, _ = linear(name, 9, perturbed=0.1)
    found = score(model.vae, data, seed=3, samples=7)
    assert found.kl_of_each_latent is not None
    assert found.kl_of_each_latent.shape == (9, 2)
    torch.testing.assert_close(found.kl_of_each_latent.sum(1), found.kl, rtol=1e-5, atol=1e-5)
    q = torch.distributions.Normal(found.latents.mu.double(), found.latents.std.double())
    p = torch.distributions.Normal(torch.zeros(1).double(), 1.0)
    if name == "class normal":
        p = torch.distributions.Normal(model.vae.prior.mu.double()[data.labels], 0.7)
    kl = torch.distributions.kl_divergence(q, p)
    torch.testing.assert_close(found.kl_of_each_latent, kl, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mixture", "flow"])
def test_what_has_no_kl_of_each_latent(name: str) -> None:
    model, data, _ = linear(name, 3)
    assert score(model.vae, data, seed=3).kl_of_each_latent is None


# Refinement


@pytest.mark.parametrize("name", ["standard normal", "class normal", "mixture"])
@pytest.mark.parametrize("table", [True, False], ids=["table", "semi-amortised"])
def test_refinement_finds_the_posterior(name: str, table: bool) -> None:
    """What is left below log p(x) is little; before, it was much."""
    perturbed = 0.0 if table else 0.2
    model, data, truth = linear(
        name, 101, table=table, perturbed=perturbed, refinement=Refinement(300)
    )
    found = score(model.vae, data, seed=4, samples=100)
    assert found.first_elbo is not None
    assert (truth - found.first_elbo).mean() > 0.5
    assert -0.1 < (truth - found.elbo).mean() < 0.3
    assert found.log_marginal is not None
    assert abs((found.log_marginal - truth).mean().item()) < 0.05
    plain = VAE(
        model.vae.encoder,
        model.vae.decoder,
        model.vae.likelihood,
        image_shape=SHAPE,
        latent_dim=2,
        prior=model.vae.prior,
        num_classes=model.vae.num_classes,
        refinement=REFINEMENT if table else None,
    )
    if not table:  # the encoder's own answer, by a model that does not refine it
        assert_mean_zero(found.first_elbo - score(plain, data, seed=9, samples=100).elbo)


def test_a_table_begins_at_the_prior() -> None:
    model, data, _ = linear("standard normal", 300, table=True, refinement=Refinement(1))
    found = score(model.vae, data, seed=4, samples=50)
    assert found.first_elbo is not None
    expected = model.log_likelihood_under_prior(data)
    differences = found.first_elbo - expected
    assert_mean_zero(differences)
    assert torch.corrcoef(torch.stack([found.first_elbo, expected]))[0, 1] > 0.7


# What may not change the scores


def columns(found: Scores) -> dict[str, Tensor]:
    values = {**found._asdict(), **found.latents._asdict()}
    del values["latents"]
    return {name: value for name, value in values.items() if value is not None}


def assert_alike(found: Scores, expected: Scores) -> None:
    a, b = columns(found), columns(expected)
    assert a.keys() == b.keys()
    for name, value in b.items():
        assert a[name].dtype == value.dtype
        torch.testing.assert_close(a[name], value, rtol=1e-5, atol=2e-5, equal_nan=True, msg=name)


CASES: dict[str, Callable[[], VAE]] = {
    "dynamic": lambda: rough(make_vae("mlp", (2, 5, 3))),
    "gaussian, conv": lambda: rough(make_vae("conv", (2, 5, 3), Gaussian(0.3))),
    "conditional": lambda: rough(make_vae("mlp", (2, 5, 3), num_classes=3)),
    "refined": lambda: rough(make_vae("mlp", (2, 5, 3), refinement=Refinement(3))),
    "deterministic": lambda: make_vae(
        "mlp", (2, 5, 3), Gaussian(0.3), posterior=Deterministic(), prior=NoPrior()
    ),
    "no density": lambda: rough(make_vae("mlp", (2, 5, 3), Bernoulli("none"))),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("samples", [1, 120])
def test_neither_memory_nor_cut_changes_scores(name: str, samples: int) -> None:
    vae, data = CASES[name]().eval(), grey_set(23, (2, 5, 3), 3)
    expected = score(vae, data, seed=2, samples=samples)
    block = min(50, samples) if vae.posterior.is_distribution else 1
    one_image = 4 * activation_numbers(vae) * block
    for rows in (1, 5, 22):
        few = score(vae, data, seed=2, samples=samples, memory_bytes=rows * one_image)
        assert_alike(few, expected)
    with pytest.raises(UserError) as caught:
        score(vae, data, seed=2, samples=samples, memory_bytes=one_image - 1)
    assert f"take {one_image:,} bytes" in str(caught.value)
    assert f"more than the {one_image - 1:,} allowed" in str(caught.value)


def test_no_more_rows_are_met_at_once_than_memory_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vae, data, met = make_vae("mlp", SHAPE), grey_set(23, SHAPE), []
    vae.decoder.register_forward_hook(lambda m, inputs, output: met.append(len(output)))
    one_image = 4 * activation_numbers(vae) * 50
    score(vae, data, seed=2, samples=120, memory_bytes=int(5.9 * one_image))
    assert max(met) == 5 * 50
    met.clear()
    monkeypatch.setattr(module, "MOST_ROWS", 3)
    score(vae, data, seed=2, samples=1)
    assert max(met) == 3


@pytest.mark.parametrize("name", CASES)
def test_shares_tile_the_whole(name: str) -> None:
    """Three processes, one after another, of which each knows its own rows only."""
    vae, data = CASES[name]().eval(), grey_set(23, (2, 5, 3), 3)
    expected = score(vae, data, seed=2, samples=60)
    parts = []
    for rank in range(3):
        share = Share(23)
        share.first, share.last = 23 * rank // 3, 23 * (rank + 1) // 3
        parts.append(columns(score(vae, data, seed=2, samples=60, share=share)))
        for value in parts[-1].values():
            assert not value[: share.first].any() and not value[share.last :].any()
    for column, value in columns(expected).items():
        # NaN would pass for equal: a sum of the parts, each zero outside its own rows.
        assert torch.allclose(sum(part[column] for part in parts), value, rtol=1e-5, atol=2e-5)


def test_more_processes_than_images() -> None:
    class Fifth:
        process_index, num_processes, is_main_process = 4, 5, False

    with pytest.raises(UserError, match="4 images are too few for 5 processes: use 4 at most"):
        Share(4, Fifth())  # type: ignore[arg-type]
    assert (Share(5, Fifth()).first, Share(5, Fifth()).last) == (4, 5)  # type: ignore[arg-type]


def test_an_image_meets_the_noise_of_its_place() -> None:
    """The same image at another place has another draw; the same place, the same."""
    vae = rough(make_vae("mlp", SHAPE))
    image = grey_images(1, SHAPE)
    data = ImageSet(image.expand(4, *SHAPE).contiguous(), None, "one image")
    found = score(vae, data, seed=2)
    assert len(found.nll.unique()) == 4
    assert not torch.equal(score(vae, data, seed=3).nll, found.nll)
    fewer = score(vae, data.select(slice(2)), seed=2)
    # Of rough weights, so that rounding shows: a batch of another size sums in another order.
    torch.testing.assert_close(fewer.nll, found.nll[:2], rtol=1e-6, atol=0)


def test_one_draw_is_that_of_the_model_itself() -> None:
    vae, data = rough(make_vae("mlp", SHAPE)), grey_set(11, SHAPE)
    terms = vae(data.images, 2, 0)
    found = score(vae, data, seed=2)
    torch.testing.assert_close(found.elbo.float(), terms.elbo)
    torch.testing.assert_close(found.log_marginal, terms.log_weights()[0].double())


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["gaussian, conv", "conditional", "refined"])
def test_compiled(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A last batch of another size is filled up, and nothing is compiled again."""
    vae, data = CASES[name]().eval(), grey_set(23, (2, 5, 3), 3)
    memory, compiled = 4 * activation_numbers(vae) * 5 * 10, []

    def compile_with(terms: nn.Module, *, required: bool) -> None:
        compiled.append(required)
        terms.compile(backend=backend, fullgraph=True, dynamic=False)

    monkeypatch.setattr(module, "compile_in_place", compile_with)
    expected = score(vae, data, seed=2, samples=5, memory_bytes=memory, compile=False)
    assert not compiled
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = score(vae, data, seed=2, samples=5, memory_bytes=memory, compile=True)
    assert compiled == [False]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert_alike(found, expected)


def test_work_that_pays_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    vae, data, compiled = make_vae("mlp", SHAPE), grey_set(10, SHAPE), []
    monkeypatch.setitem(module.WORTH_COMPILING, "cpu", 40)
    monkeypatch.setattr(module, "compile_in_place", lambda terms, required: compiled.append(1))
    score(vae, data, seed=0, samples=4)
    assert not compiled
    score(vae, data, seed=0, samples=5)
    assert compiled


# What is there, and what is not


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool) -> None:
    vae = make_vae("mlp", SHAPE, refinement=Refinement(2)).train(training)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    score(vae, grey_set(3, SHAPE), seed=0)
    with pytest.raises(UserError):
        score(vae, grey_set(3, SHAPE), seed=0, memory_bytes=1)
    assert vae.training is training
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    assert all(parameter.grad is None for parameter in vae.parameters())
    assert not vae.decoder._forward_hooks


def test_no_bound_no_importance_weights() -> None:
    for vae in (CASES["deterministic"](), CASES["no density"]()):
        found = score(vae, grey_set(4, (2, 5, 3)), seed=0, samples=10)
        assert found.log_marginal is None
        assert found.log_marginal_error is None
        assert found.effective_samples is None
    point = score(CASES["deterministic"](), grey_set(4, (2, 5, 3)), seed=0, samples=10)
    assert torch.equal(point.kl, torch.zeros(4, dtype=torch.float64))
    assert (point.latents.logvar == -math.inf).all()


def test_grey_values_compared_with_none_drawn() -> None:
    """Bernoulli("none") against torch's own cross-entropy."""
    vae, data = CASES["no density"]().eval(), grey_set(6, (2, 5, 3))
    found = score(vae, data, seed=0)
    with torch.no_grad():
        z = vae(data.images, 0, 0).z[0]
        expected = nn.functional.binary_cross_entropy_with_logits(
            vae.decoder(z).double(), data.images.double() / 255, reduction="none"
        )
    torch.testing.assert_close(found.nll, expected.flatten(1).sum(1), rtol=1e-5, atol=1e-4)


def test_labels_that_are_missing_or_no_classes() -> None:
    vae = make_vae("mlp", SHAPE, num_classes=3)
    with pytest.raises(UserError, match="conditional on 3 classes: it needs the labels"):
        score(vae, grey_set(4, SHAPE), seed=0)
    with pytest.raises(UserError, match=r"labels lie in 0\.\.2 for this model, got 0\.\.3"):
        score(vae, grey_set(8, SHAPE, classes=4), seed=0)


def test_floating_images() -> None:
    vae, data = rough(make_vae("mlp", SHAPE, Gaussian(0.3))), grey_set(5, SHAPE)
    floating = ImageSet(data.images.float() / 255, None, "floating")
    assert_alike(score(vae, floating, seed=1), score(vae, data, seed=1))


# fastvae score


def refused(arguments: list[object], capsys: pytest.CaptureFixture[str]) -> str:
    """What is said; one line of it."""
    with pytest.raises(SystemExit) as caught:
        main(list(map(str, arguments)))
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return said


@pytest.fixture(scope="module")
def digits() -> ImageSet:
    return load_all("digits", DataConfig())


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_the_file_holds_the_scores(
    ending: str,
    trained: Trained,
    digits: ImageSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["digits", "-o", f"new/s.{ending}", "--iw-samples", "6", "--memory-mb", "1"]
    main(["score", str(trained.run), *flags])
    names = ["row", "elbo", "nll", "kl", "iw_nll", "iw_standard_error", "label"]
    assert capsys.readouterr().out == f"new/s.{ending}: 1797 rows, {', '.join(names)}\n"
    found = read(tmp_path / "new" / f"s.{ending}")
    assert list(found) == names
    assert found["row"].tolist() == list(range(1797))
    assert torch.equal(found["label"], digits.labels)
    seed = scoring_seed(read_config(trained.run).seed)
    expected = score(VAE.from_pretrained(trained.run), digits, seed=seed, samples=6)
    assert expected.log_marginal is not None
    for name, value in (
        ("elbo", expected.elbo),
        ("nll", expected.nll),
        ("kl", expected.kl),
        ("iw_nll", -expected.log_marginal),
        ("iw_standard_error", expected.log_marginal_error),
    ):
        assert found[name].dtype == torch.float64
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-4, msg=name)


def test_images_without_labels_are_rows_without_labels(
    trained: Trained, digits: ImageSet, tmp_path: Path
) -> None:
    np.save(tmp_path / "images.npy", digits.images[:7].numpy())
    flags = ["-o", str(tmp_path / "s.csv"), "--iw-samples", "2"]
    main(["score", str(trained.run), str(tmp_path / "images.npy"), *flags])
    found = read(tmp_path / "s.csv")
    assert list(found) == ["row", "elbo", "nll", "kl", "iw_nll", "iw_standard_error"]
    whole = score(
        VAE.from_pretrained(trained.run),
        digits.select(slice(7)),
        seed=scoring_seed(0),
        samples=2,
    )
    torch.testing.assert_close(found["elbo"], whole.elbo, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (
            ["--posterior", "deterministic", "--prior", "none"],
            ["reconstruction_objective", "reconstruction_nll", "kl"],
        ),
        (
            ["--likelihood", "bernoulli", "--binarize", "none"],
            ["cross_entropy_objective", "cross_entropy", "kl"],
        ),
    ],
)
def test_what_is_no_bound_is_not_called_one(
    flags: list[str], names: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train("--max-steps", 1, *flags, output=tmp_path / "run")
    capsys.readouterr()
    main(["score", str(run), "digits", "-o", str(tmp_path / "s.parquet")])
    assert list(read(tmp_path / "s.parquet")) == ["row", *names, "label"]
    said = capsys.readouterr().out
    assert "elbo" not in said
    assert ", nll" not in said


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["-o", "s.json"], "-o ends in .parquet or .csv, got s.json"),
        (["-o", "s"], "-o ends in .parquet or .csv, got s"),
        (["-o", "folder.csv"], "cannot write folder.csv: it is a folder"),
        (["-o", "/proc/none/s.csv"], "cannot write /proc/none/s.csv"),
        (["-o", "s.csv", "--iw-samples", "0"], "--iw-samples must be at least 1, got 0"),
        (["-o", "s.csv", "--memory-mb", "0"], "--memory-mb must be at least 1, got 0"),
        (["-o", "s.csv", "--device", "foo"], "--device foo cannot be used here"),
    ],
)
def test_what_cannot_be_scored(
    trained: Trained,
    flags: list[str],
    part: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Said before any image is scored."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.csv").mkdir()
    monkeypatch.setattr(module, "score", None)
    assert part in refused(["score", trained.run, "digits", *flags], capsys)


def test_a_file_that_cannot_be_written(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "images.npy", grey_images(2, (1, 8, 8)).numpy())
    for name in ("/proc/s.csv", "/proc/s.parquet"):
        message = refused(["score", trained.run, tmp_path / "images.npy", "-o", name], capsys)
        assert f"cannot write {name}" in message


def test_missing_data_and_runs(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["-o", tmp_path / "s.csv"]
    assert "no file or folder nosuch" in refused(["score", trained.run, "nosuch", *output], capsys)
    missing = tmp_path / "missing"
    assert f"no folder {missing}" in refused(["score", missing, "digits", *output], capsys)
    assert not (tmp_path / "s.csv").exists()


def test_noise_is_less_likely_than_digits(
    trained: Trained, digits: ImageSet, tmp_path: Path
) -> None:
    """What the scores are for: after a second of training already."""
    np.save(tmp_path / "noise.npy", grey_images(200, (1, 8, 8)).numpy())
    files = []
    for data in (str(tmp_path / "noise.npy"), "digits"):
        files.append(tmp_path / f"{len(files)}.parquet")
        main(["score", str(trained.run), data, "-o", str(files[-1]), "--iw-samples", "10"])
    noise, normal = (read(file)["iw_nll"] for file in files)
    # The chance that a noise image has the higher NLL: the area under the ROC curve.
    assert (noise[:, None] > normal).double().mean() > 0.99


def read(path: Path) -> dict[str, Tensor]:
    table = (
        pyarrow.csv.read_csv(path) if path.suffix == ".csv" else pyarrow.parquet.read_table(path)
    )
    return {name: torch.from_numpy(table[name].to_numpy().copy()) for name in table.column_names}
