"""What `evaluate` measures, against the closed forms of linear models; and its figures."""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from small_models import grey_images, grey_set, linear_vae, make_vae, rough
from torch import Tensor

from fastvae import (
    VAE,
    Batch,
    Bernoulli,
    Deterministic,
    Gaussian,
    GaussianMixture,
    InverseAutoregressive,
    NoPrior,
    Refinement,
    estimators,
)
from fastvae.assessment import Effort, assess, training_means
from fastvae.data import ImageSet
from fastvae.errors import UserError
from fastvae.noise import derived_seed
from fastvae.ranks import Share
from fastvae.scores import score, scoring_seed

SHAPE = (1, 8, 8)
LINEAR_SHAPE = (1, 3, 4)
# Columns so short that few draws of the prior suffice.
EASY = (0.5, 0.3)
LITTLE = Effort(iw_samples=3)


def paths(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """One flat dictionary: {"annealed.nll": …}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= (
            paths(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


# Truth


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Tensor, Path]:
    """A wrong encoder of a linear model, assessed by every estimate; log p(x), and the figures."""
    model = linear_vae(LINEAR_SHAPE, EASY, perturbed=0.1)
    data = grey_set(33, LINEAR_SHAPE, classes=4)
    effort = Effort(
        iw_samples=2000,
        annealed_images=9,
        annealed_chains=204,
        annealed_steps=40,
        prior_samples=3000,
    )
    folder = tmp_path_factory.mktemp("assessed") / "figures"
    found = assess(model.vae, data, data, effort, seed=7, folder=folder)
    return found, model.log_marginal(data), folder


def test_four_estimates_of_one_likelihood(known: tuple[dict[str, Any], Tensor, Path]) -> None:
    found, truth, _ = known
    first = truth[:9].mean().item()
    assert found["elbo"] < truth.mean().item() - 0.2
    assert -found["importance_weighted"]["nll"] == pytest.approx(truth.mean().item(), abs=0.05)
    assert found["annealed"]["images"] == found["prior_average"]["images"] == 9
    assert -found["annealed"]["nll"] == pytest.approx(first, abs=0.05)
    assert -found["prior_average"]["nll"] == pytest.approx(first, abs=0.05)
    of_the_same = found["annealed"]["importance_weighted_nll_of_the_same_images"]
    assert -of_the_same == pytest.approx(first, abs=0.05)
    assert found["annealed"]["elbo_of_the_same_images"] < first
    assert 0.5 < found["annealed"]["acceptance"] < 0.95
    for name in ("importance_weighted", "annealed", "prior_average"):
        assert 0 < found[name]["standard_error_of_draws"] < 0.05
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_bits_per_dimension(known: tuple[dict[str, Any], Tensor, Path]) -> None:
    """Of a density on [0, 1], of which 256 levels are told apart: 8 bits are added."""
    found, _, _ = known
    assert found["bits_per_dim"] == pytest.approx(8 - found["elbo"] / (12 * math.log(2)))
    weighted = found["importance_weighted"]
    assert weighted["bits_per_dim"] == pytest.approx(8 + weighted["nll"] / (12 * math.log(2)))
    discrete = assess(make_vae(), grey_set(3, SHAPE), None, LITTLE, seed=0)
    assert discrete["bits_per_dim"] == pytest.approx(-discrete["elbo"] / (64 * math.log(2)))
    images = ImageSet(grey_images(3, SHAPE).float() / 255, None, "floating")
    floating = assess(make_vae(likelihood=Gaussian()), images, None, LITTLE, seed=0)
    assert not [name for name in paths(floating) if "bits_per_dim" in name]


def test_the_means_are_those_of_the_scores(known: tuple[dict[str, Any], Tensor, Path]) -> None:
    found, _, _ = known
    model, data = linear_vae(LINEAR_SHAPE, EASY, perturbed=0.1), grey_set(33, LINEAR_SHAPE)
    scores = score(model.vae, data, seed=scoring_seed(7), samples=2000)
    assert found["elbo"] == pytest.approx(scores.elbo.mean().item())
    error = scores.elbo.std().item() / math.sqrt(33)
    assert found["elbo_standard_error"] == pytest.approx(error)
    assert found["nll"] + found["kl"] == pytest.approx(-found["elbo"])
    latents = found["latents"]
    assert scores.kl_of_each_latent is not None
    assert latents["kl_of_each_latent"] == pytest.approx(scores.kl_of_each_latent.mean(0).tolist())
    assert sum(latents["kl_of_each_latent"]) == pytest.approx(found["kl"], rel=1e-5)
    assert latents["active_units"] == int((scores.latents.mu.var(0) > 0.01).sum()) == 2
    # One draw of z for each image, against the KL that is known.
    surgery = latents["mutual_information"] + latents["marginal_kl"]
    assert surgery == pytest.approx(found["kl"], abs=1.5)
    assert latents["mutual_information"] <= latents["mutual_information_ceiling"] == math.log(33)


def test_reconstruction(known: tuple[dict[str, Any], Tensor, Path]) -> None:
    """At the posterior means, against the closed form of a linear decoder."""
    found, _, _ = known
    model, data = linear_vae(LINEAR_SHAPE, EASY, perturbed=0.1), grey_set(33, LINEAR_SHAPE)
    x = data.images.float() / 255
    shown = model.vae.reconstruct(data.images).detach()
    expected = estimators.ReconstructionMetrics(LINEAR_SHAPE)
    expected.update(x, shown)
    assert found["reconstruction"]["images"] == 33
    assert found["reconstruction"]["mse"] == pytest.approx(expected.compute().mse, rel=1e-5)
    direct = (shown.clamp(0, 1) - x).square().mean().item()
    assert found["reconstruction"]["mse"] == pytest.approx(direct, rel=1e-5)


@pytest.mark.parametrize(
    "arguments",
    [
        {"prior": "mixture"},
        {"prior": "vamp"},
        {"num_classes": 3, "prior": "class-normal"},
        {"posterior": "inverse-autoregressive", "perturbed": 0.1},
    ],
    ids=str,
)
def test_no_encoder_takes_part_in_annealing(arguments: dict[str, Any]) -> None:
    model = linear_vae(LINEAR_SHAPE, EASY, **arguments)
    data = grey_set(7, LINEAR_SHAPE, arguments.get("num_classes", 0))
    effort = Effort(
        iw_samples=2000,
        annealed_images=7,
        annealed_chains=204,
        annealed_steps=30,
        prior_samples=3000,
    )
    found = assess(model.vae, data, None, effort, seed=1)
    truth = model.log_marginal(data).mean().item()
    assert -found["annealed"]["nll"] == pytest.approx(truth, abs=0.06)
    assert -found["prior_average"]["nll"] == pytest.approx(truth, abs=0.06)
    assert -found["importance_weighted"]["nll"] == pytest.approx(truth, abs=0.06)


@pytest.mark.parametrize("table", [True, False], ids=["table", "semi-amortised"])
def test_amortization_gap(table: bool) -> None:
    perturbed = 0.0 if table else 0.2
    model = linear_vae(LINEAR_SHAPE, table=table, perturbed=perturbed, refinement=Refinement(150))
    data = grey_set(60, LINEAR_SHAPE)
    found = assess(model.vae, data, None, Effort(iw_samples=50), seed=1)
    truth = model.log_marginal(data).mean().item()
    gap = found["amortization_gap"]
    assert -1.0 < found["elbo"] - truth < 0.1
    assert gap["nats"] > 1
    assert gap["nats"] == pytest.approx(found["elbo"] - gap["elbo_before_refinement"])
    assert gap["refinement_steps"] == 150
    assert gap["begins_at"] == ("the prior" if table else "the encoder's answer")
    if table:
        expected = model.log_likelihood_under_prior(data).mean().item()
        assert gap["elbo_before_refinement"] == pytest.approx(expected, abs=1.0)
    plain = assess(linear_vae(LINEAR_SHAPE).vae, data, None, LITTLE, seed=1)
    assert "amortization_gap" not in plain


# Memory, shares, repetition


def test_memory_changes_nothing_and_the_same_seed_repeats() -> None:
    vae, data = rough(make_vae()), grey_set(13, SHAPE)
    effort = {"iw_samples": 60, "annealed_images": 5, "annealed_chains": 90}
    effort |= {"annealed_steps": 5, "prior_samples": 30}
    expected = paths(assess(vae, data, None, Effort(**effort), seed=3))
    again = paths(assess(vae, data, None, Effort(**effort), seed=3))
    small = paths(assess(vae, data, None, Effort(**effort, memory_mb=1), seed=3))
    other = paths(assess(vae, data, None, Effort(**effort), seed=4))
    assert again == expected
    assert small.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, (float, list)):
            assert small[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name
        else:
            assert small[name] == value, name
    for name in ("elbo", "annealed.nll", "prior_average.nll", "latents.mutual_information"):
        assert other[name] != expected[name], name


def test_too_little_memory_says_how_much_is_needed() -> None:
    vae = make_vae("mlp", (1, 200, 200))
    data = grey_set(2, (1, 200, 200))
    with pytest.raises(UserError, match=r"draws of z for one image take [\d,]+ bytes"):
        assess(vae, data, None, Effort(iw_samples=50, memory_mb=1), seed=0)
    effort = Effort(iw_samples=1, annealed_images=1, annealed_chains=50, memory_mb=2)
    with pytest.raises(UserError) as caught:
        assess(vae, data, None, effort, seed=0)
    assert "--memory-mb 2 is too little for 50 annealed chains" in str(caught.value)
    needed = int(str(caught.value).split("allow ")[1].split()[0])
    enough = Effort(
        iw_samples=1, annealed_images=1, annealed_chains=50, annealed_steps=1, memory_mb=needed
    )
    assess(vae, data, None, enough, seed=0)


def test_another_process_measures_the_same_but_speaks_not(tmp_path: Path) -> None:
    """The second of two knows the sums, and writes no figure."""

    class Second:
        process_index, num_processes, is_main_process = 1, 2, False

        def reduce(self, values: Tensor, reduction: str) -> Tensor:
            return values

    share = Share(5, Second())  # type: ignore[arg-type]
    found = assess(
        make_vae(), grey_set(5, SHAPE), None, LITTLE, seed=0, folder=tmp_path / "f", share=share
    )
    assert "frechet" not in found
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool) -> None:
    vae = make_vae().train(training)
    effort = Effort(iw_samples=1, annealed_images=1, annealed_steps=2)
    assess(vae, grey_set(3, SHAPE), None, effort, seed=0)
    assert vae.training is training
    assert all(p.grad is None for p in vae.parameters())


# Kinds of models: what is measured, what is drawn

MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "plain": ({}, 0),
    "two latents": ({"latent_dim": 2}, 0),
    "one latent": ({"latent_dim": 1}, 0),
    "gaussian, colour": ({"likelihood": Gaussian(), "image_shape": (3, 8, 8)}, 0),
    "conditional": ({"num_classes": 3}, 3),
    "conditional, two latents": ({"num_classes": 3, "latent_dim": 2}, 3),
    "deterministic": (
        {"likelihood": Gaussian(), "posterior": Deterministic(), "prior": NoPrior()},
        0,
    ),
    "deterministic, prior": (
        {"likelihood": Gaussian(), "posterior": Deterministic(), "latent_dim": 2},
        0,
    ),
    "cross-entropy": ({"likelihood": Bernoulli("none")}, 0),
    "mixture": ({"prior": GaussianMixture(5, 3)}, 0),
    "flow": ({"posterior": InverseAutoregressive(5, hidden=(8,))}, 0),
    "refined": ({"refinement": Refinement(2)}, 0),
}
ALWAYS = {"reconstructions.png", "interpolations.png", "latent_plane.png"}


def model_and_data(name: str, images: int) -> tuple[VAE, ImageSet]:
    arguments, classes = MODELS[name]
    shape = arguments.get("image_shape", SHAPE)
    return make_vae(**arguments), grey_set(images, shape, classes)


@pytest.mark.parametrize("name", MODELS)
def test_figures_that_make_sense(name: str, tmp_path: Path) -> None:
    vae, data = model_and_data(name, 20)
    found = assess(vae, data, None, LITTLE, seed=0, folder=tmp_path)
    expected = set(ALWAYS)
    if name != "deterministic":
        expected.add("samples.png")
    if vae.posterior.is_gaussian and name != "mixture":
        expected |= {"latent_kl.png", "traversals.png"}
    if vae.latent_dim == 2:
        expected.add("manifold.png")
    if vae.num_classes:
        expected.add("classes.png")
    assert {file.name for file in tmp_path.iterdir()} == expected
    for file in tmp_path.iterdir():
        with Image.open(file) as picture:
            low, high = picture.convert("L").getextrema()
            assert low < high, file
    flat = paths(found)
    assert all(math.isfinite(value) for value in flat.values() if isinstance(value, float))
    assert None not in [v for k, v in flat.items() if "standard_error" in k]
    assert found["images"] == 20
    assert found["latents"]["latent_dim"] == vae.latent_dim
    assert ("importance_weighted" in found) == ("elbo" in found) == vae.is_bound
    assert ("bound" in found) == (not vae.is_bound)
    surgery = vae.posterior.is_gaussian and not vae.num_classes
    assert ("mutual_information" in found["latents"]) == surgery
    assert "linear_probe" not in found
    assert "unavailable" in found["frechet"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("images", [1, 2])
def test_very_few_images(name: str, images: int, tmp_path: Path) -> None:
    """What a single image cannot tell is None or absent, never a NaN."""
    vae, data = model_and_data(name, images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = assess(vae, data, data, LITTLE, seed=0, folder=tmp_path)
    json.dumps(found, allow_nan=False)
    assert (tmp_path / "interpolations.png").exists() == (images == 2)
    if images == 1:
        objective = next(key for key in found if key.endswith("_standard_error"))
        assert found[objective] is None
        assert "active_units" not in found["latents"]


def test_a_likelihood_that_is_none_has_no_annealed_estimate() -> None:
    for name in ("deterministic", "cross-entropy"):
        vae, data = model_and_data(name, 3)
        with pytest.raises(UserError, match="--annealed-images estimates log p"):
            assess(vae, data, None, Effort(iw_samples=1, annealed_images=1), seed=0)


def test_why_there_is_no_bound() -> None:
    said = {}
    for name in ("deterministic", "cross-entropy"):
        vae, data = model_and_data(name, 3)
        found = assess(vae, data, None, LITTLE, seed=0)
        assert not {"elbo", "nll", "bits_per_dim", "importance_weighted"} & found.keys()
        assert found["draws"] == (1 if name == "deterministic" else 3)
        said[name] = found["bound"]
    assert said["deterministic"] == "none: the posterior is deterministic"
    assert said["cross-entropy"] == "none: cross-entropy"


def test_labels_that_do_not_fit() -> None:
    vae = make_vae(num_classes=2)
    with pytest.raises(UserError, match=r"labels lie in 0\.\.1 for this model, got 0\.\.2"):
        assess(vae, grey_set(3, SHAPE, 3), None, LITTLE, seed=0)
    with pytest.raises(UserError, match="it needs the labels"):
        assess(vae, grey_set(3, SHAPE), None, LITTLE, seed=0)


# The linear probe


def separable(count: int, labels: Tensor) -> ImageSet:
    """Images of one grey level for each class, and a little noise."""
    images = (60 * labels).view(-1, 1, 1, 1) + grey_images(count, SHAPE) // 16
    return ImageSet(images.to(torch.uint8), labels, "separable")


def test_classes_that_a_line_can_tell() -> None:
    labels = torch.arange(90) % 3
    train_set, heldout = separable(90, labels), separable(90, labels).select(slice(45, None))
    vae = make_vae(likelihood=Gaussian())
    found = assess(vae, heldout, train_set, LITTLE, seed=0)["linear_probe"]
    assert found["metric"] == "accuracy"
    assert found["score"] > 0.95
    assert (found["train_images"], found["held_out_images"]) == (90, 45)
    shuffled = ImageSet(train_set.images, labels[torch.randperm(90)], "shuffled")
    assert assess(vae, heldout, shuffled, LITTLE, seed=0)["linear_probe"]["score"] < 0.8


def test_no_probe_without_labels_or_classes() -> None:
    vae, data = make_vae(likelihood=Gaussian()), grey_set(20, SHAPE, 2)
    unlabelled = ImageSet(data.images, None, "unlabelled")
    one_class = ImageSet(data.images, torch.zeros(20, dtype=torch.int64), "one class")
    for train_set, heldout in ((unlabelled, data), (data, unlabelled), (None, data)):
        assert "linear_probe" not in assess(vae, heldout, train_set, LITTLE, seed=0)
    found = assess(vae, data, one_class, LITTLE, seed=0)
    assert "at least two classes" in found["linear_probe"]["unavailable"]


def test_real_targets_are_regressed() -> None:
    data = grey_set(40, SHAPE)
    brightness = data.images.float().mean((1, 2, 3))
    data = ImageSet(data.images, brightness, "brightness")
    found = assess(make_vae(likelihood=Gaussian()), data, data, LITTLE, seed=0)["linear_probe"]
    assert found["metric"] == "r2"
    assert 0.0 < found["score"] <= 1.0


@pytest.mark.parametrize(("count", "most"), [(10, 10), (10, 7), (1999, 1000), (5, 50), (1200, 600)])
def test_training_means_are_spread_over_the_whole_set(count: int, most: int) -> None:
    """Also where the set is less than twice as large, so that no class at its end is left out."""
    vae = make_vae(likelihood=Gaussian())
    data = ImageSet(grey_images(count, SHAPE), torch.arange(count), "sorted")
    means, labels = training_means(vae, data, most, seed=0)
    assert labels is not None
    assert len(means) == len(labels) == min(count, most)
    gaps = torch.cat([labels, torch.tensor([count])]).diff()
    assert labels[0] == 0
    assert gaps.min() >= 1 and gaps.max() <= -(-count // min(count, most))
    expected = vae.encode(data.images[labels]).mu
    torch.testing.assert_close(means, expected.detach(), rtol=1e-5, atol=1e-6)


def test_training_means_are_of_what_the_encoder_is_given() -> None:
    """Binarised, as the held-out images that a probe compares them with."""
    vae, data = rough(make_vae()), grey_set(6, SHAPE)
    means, labels = training_means(vae, data, 100, seed=5)
    assert labels is None
    observed = vae.infer(Batch(data.images), derived_seed("training means", 5), 0)
    assert observed.x.unique().tolist() == [0.0, 1.0]
    expected = vae.posterior.moments(observed.statistics).mu
    torch.testing.assert_close(means, expected.detach())
    assert (means - vae.encode(data.images).mu).abs().max() > 0.01


def test_a_table_knows_its_training_images() -> None:
    model = linear_vae(LINEAR_SHAPE, table=True, refinement=Refinement(3))
    with torch.no_grad():
        model.vae.encoder.statistics.weight.normal_()
    means, _ = training_means(model.vae, grey_set(7, LINEAR_SHAPE), 4, seed=0)
    assert torch.equal(means, model.vae.encoder.statistics.weight[[0, 1, 3, 5], :2].detach())


# The Fréchet distance


def test_frechet_distance_of_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """With pixels in place of the network's features, whose weights are not here."""
    features = estimators.Features("pixels", lambda images: images.flatten(1).float())
    monkeypatch.setattr(estimators, "inception_features", lambda device: features)
    vae, data = make_vae(likelihood=Gaussian()), grey_set(150, SHAPE)
    found = assess(vae, data, None, LITTLE, seed=3)["frechet"]
    samples = vae.sample(150, seed=3).clamp(0, 1).flatten(1)
    expected = estimators.frechet_distance(
        data.images.float().flatten(1) / 255, samples, name="pixels"
    )
    assert found == {"distance": found["distance"], "features": "pixels", "images": (150, 150)}
    assert found["distance"] == pytest.approx(expected.distance, rel=1e-4)
    model, images = model_and_data("deterministic", 3)
    assert "no prior" in assess(model, images, None, LITTLE, seed=0)["frechet"]["unavailable"]
    model, images = make_vae(image_shape=(2, 8, 8)), grey_set(3, (2, 8, 8))
    assert "2 channels" in assess(model, images, None, LITTLE, seed=0)["frechet"]["unavailable"]
    assert (
        "two images"
        in assess(vae, grey_set(1, SHAPE), None, LITTLE, seed=0)["frechet"]["unavailable"]
    )
    model, images = model_and_data("conditional", 9)
    assert assess(model, images, None, LITTLE, seed=0)["frechet"]["images"] == (9, 9)


# Effort


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"iw_samples": 0}, "--iw-samples must be at least 1, got 0"),
        ({"memory_mb": 0}, "--memory-mb must be at least 1, got 0"),
        ({"annealed_steps": 0}, "--annealed-steps must be at least 1, got 0"),
        ({"annealed_images": -1}, r"--annealed-images must be 0 \(off\) or more, got -1"),
        ({"prior_samples": -3}, r"--prior-samples must be 0 \(off\) or more, got -3"),
        ({"annealed_chains": 4}, r"--annealed-chains must be at least 5 .* got 4"),
        ({"prior_samples": 3}, "--prior-samples averages over the images of --annealed-images"),
    ],
)
def test_impossible_efforts(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Effort(**arguments)
