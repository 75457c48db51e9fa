"""The network with random weights: its bound against torch.distributions and exact regression."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from fastvae_kernels import reparameterize_kl
from PIL import Image
from running import assert_same_tensors, metrics, results, training_state
from small_models import grey_images, grey_set, make_vae
from torch import Tensor, distributions, nn

import fastvae
from fastvae import Batch, BayesianNetwork, CategoricalLabels, GaussianTargets, UserError
from fastvae import bayes as bayes_module
from fastvae.build import build_model
from fastvae.cli import main
from fastvae.config import ModelConfig
from fastvae.data import DataConfig, ImageSet, load_data
from fastvae.evaluation import evaluate
from fastvae.noise import WEIGHTS, derived_seed
from fastvae.parts.objectives import ELBO
from fastvae.training.step import TrainingStep

SHAPE = (2, 3, 5)
N = 70


def make_network(kind: str = "classes", **changes: Any) -> BayesianNetwork:
    """With weights so large, and so uncertain, that every term matters."""
    torch.manual_seed(0)
    likelihood = CategoricalLabels(4) if kind == "classes" else GaussianTargets(50.0, 20.0)
    arguments: dict[str, Any] = {"hidden": (7, 6), "activation": "tanh", "weight_std": 1.7}
    arguments |= {"image_shape": SHAPE, "dataset_size": N, "rows_per_draw": 6, **changes}
    network = BayesianNetwork(likelihood, **arguments)
    with torch.no_grad():
        network.logvar += 4.0 * torch.rand_like(network.logvar)
        if kind != "classes":
            network.likelihood.logvar.fill_(-0.7)
    return network


def rows(count: int, kind: str = "classes") -> Batch:
    labels = torch.arange(count) % 4
    if kind != "classes":
        labels = 50.0 + 20.0 * torch.linspace(-2, 2, count)
    return Batch(grey_images(count, SHAPE), labels)


def standard_noise(network: BayesianNetwork, seed: int, draw: int, samples: int) -> Tensor:
    """What the kernel adds, float64 `[S, P]`: a draw of N(0, 1) by the same counters."""
    zeros = torch.zeros(1, len(network.mu))
    z, _ = reparameterize_kl(zeros, zeros, seed ^ WEIGHTS, offset=draw, num_samples=samples)
    return z.squeeze(1).double()


def layers(network: BayesianNetwork) -> list[tuple[slice, slice, int, int]]:
    """Where the weights and the biases of each layer lie, and its inputs and outputs."""
    sizes = [math.prod(network.image_shape), *network.hidden, network.likelihood.num_outputs]
    found, at = [], 0
    for inputs, outputs in pairwise(sizes):
        weight = slice(at, at + inputs * outputs)
        bias = slice(weight.stop, weight.stop + outputs)
        found.append((weight, bias, inputs, outputs))
        at = bias.stop
    assert at == len(network.mu)
    return found


def prior_std(network: BayesianNetwork) -> Tensor:
    """The prior's standard deviation of each weight itself, float64 `[P]`."""
    std = torch.full((len(network.mu),), network.weight_std, dtype=torch.float64)
    for weight, _, inputs, _ in layers(network):
        std[weight] /= math.sqrt(inputs)
    return std


def plain_outputs(network: BayesianNetwork, x: Tensor, weights: Tensor) -> Tensor:
    """One network by torch.nn.functional in float64: weights `[P]` → `[B, outputs]`."""
    h = x.double().flatten(1) / (255 if x.dtype == torch.uint8 else 1)
    for i, (weight, bias, inputs, outputs) in enumerate(layers(network)):
        h = nn.functional.linear(h, weights[weight].view(inputs, outputs).T, weights[bias])
        if i < len(network.hidden):
            h = torch.tanh(h)
    return h


# The terms of the bound


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("draw", [0, 5])
@pytest.mark.parametrize("kind", ["classes", "targets"])
def test_terms_against_torch_distributions(kind: str, draw: int, samples: int) -> None:
    """In float64, in the weights' own units, with the noise that is promised."""
    network, batch = make_network(kind), rows(6, kind)
    terms = network(batch, 11, draw * 6, samples)
    std = prior_std(network)
    q = distributions.Normal(network.mu.double() * std, (network.logvar.double() / 2).exp() * std)
    p = distributions.Normal(torch.zeros_like(std), std)
    kl = distributions.kl_divergence(q, p).sum() / N
    nll = []
    for epsilon in standard_noise(network, 11, draw, samples):
        outputs = plain_outputs(network, batch.x, q.mean + q.stddev * epsilon)
        if kind == "classes":
            y: distributions.Distribution = distributions.Categorical(logits=outputs)
        else:
            y = distributions.Normal(50 + 20 * outputs.squeeze(1), 20 * math.exp(-0.35))
        nll.append(-y.log_prob(batch.labels))
    assert terms.nll.shape == (samples, 6) and terms.kl.shape == (6,)
    assert terms.nll.dtype == terms.kl.dtype == torch.float32
    torch.testing.assert_close(terms.nll.double(), torch.stack(nll), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms.kl.double(), kl.expand(6), rtol=1e-5, atol=0.0)
    assert terms.nll.std() > 0.1 and kl > 1


def test_no_hidden_layer_and_other_activations() -> None:
    for hidden, activation in [((), "relu"), ((5,), "gelu"), ((3, 4, 5), "silu")]:
        network = make_network(hidden=hidden, activation=activation)
        assert network(rows(5), 0).nll.shape == (1, 5)


def test_the_gradient_reaches_everything() -> None:
    for kind in ("classes", "targets"):
        network = make_network(kind)
        (-network(rows(6, kind), 0, 0, 2).elbo).mean().backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert (parameter.grad != 0).all(), name


def test_one_draw_serves_a_batch_however_it_is_cut() -> None:
    network, batch = make_network(), rows(12)
    whole = network(Batch(batch.x[6:], batch.labels[6:]), 3, 6, 2)  # type: ignore[index]
    parts = [
        network(Batch(batch.x[a:b], batch.labels[a:b]), 3, torch.tensor(a), 2)  # type: ignore[index]
        for a, b in ((6, 7), (7, 10), (10, 12))
    ]
    pieces = torch.cat([part.nll for part in parts], dim=1)
    torch.testing.assert_close(pieces, whole.nll, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(part.kl, whole.kl[: len(part.kl)]) for part in parts)
    same_rows = Batch(batch.x[6:], batch.labels[6:])  # type: ignore[index]
    for other in (network(same_rows, 3, 5, 2), network(same_rows, 3, 12, 2)):
        assert not torch.allclose(other.nll, whole.nll)


def test_outside_of_training_all_rows_meet_the_same_draw() -> None:
    """So that an evaluation does not depend on how many processes share it."""
    network, batch = make_network().eval(), rows(12)
    whole = network(batch, 3, 0, 2)
    part = network(Batch(batch.x[5:], batch.labels[5:]), 3, 5000, 2)  # type: ignore[index]
    torch.testing.assert_close(part.nll, whole.nll[:, 5:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["classes", "targets"])
def test_accumulated_parts_have_the_gradient_of_the_batch(kind: str) -> None:
    """The step as it is trained, and its parts as gradient accumulation and processes cut them."""
    batch = rows(6, kind)
    gradients = []
    for cuts in ([(0, 6)], [(0, 2), (2, 4), (4, 6)]):
        network = make_network(kind)
        step = TrainingStep(network, ELBO(warmup_samples=1000, num_samples=2), seed=1)
        for a, b in cuts:
            part = Batch(batch.x[a:b], batch.labels[a:b])  # type: ignore[index]
            loss, _ = step(part, torch.tensor(60 + a))
            (loss * (b - a) / 6).backward()
        gradients.append({n: p.grad for n, p in network.named_parameters()})
    for name, whole in gradients[0].items():
        # The warm-up is counted by rows, so the parts' KL weights differ by less than a batch.
        torch.testing.assert_close(gradients[1][name], whole, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_as_eager(backend: str) -> None:
    batch, losses, gradients = rows(6), [], []
    for compiled in (False, True):
        network = make_network()
        step = TrainingStep(network, ELBO(num_samples=2), seed=4)
        if compiled:
            step.compile(fullgraph=True, dynamic=False, backend=backend)
        for position in (0, 6, 12):  # one graph for all positions
            loss, _ = step(batch, torch.tensor(position))
            loss.backward()
            losses.append(loss.item())
        gradients.append(network.mu.grad)
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-4)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)


def test_under_autocast() -> None:
    network, batch = make_network(), rows(6)
    exact = network(batch, 0)
    with torch.autocast("cpu", torch.bfloat16):
        rough = network(batch, 0)
    assert rough.nll.dtype == torch.float32
    assert torch.equal(rough.kl, exact.kl)
    torch.testing.assert_close(rough.nll, exact.nll, rtol=0.05, atol=0.05)
    assert not torch.equal(rough.nll, exact.nll)


# Linear regression, where everything is known


class Exact:
    """Bayesian linear regression y = x·w + b + σ ε in float64, weights in the prior's units."""

    def __init__(self, x: Tensor, y: Tensor, weight_std: float, noise_std: float) -> None:
        rows, features = x.shape
        scale = torch.full((features + 1,), weight_std, dtype=torch.float64)
        scale[:features] /= math.sqrt(features)
        self.design = torch.cat([x, torch.ones(rows, 1, dtype=torch.float64)], 1) * scale
        self.precision = torch.eye(features + 1, dtype=torch.float64)
        self.precision += self.design.T @ self.design / noise_std**2
        self.mean = torch.linalg.solve(self.precision, self.design.T @ y / noise_std**2)
        self.posterior = distributions.MultivariateNormal(
            self.mean, precision_matrix=self.precision
        )
        # y is Gaussian once the weights are integrated out.
        covariance = self.design @ self.design.T + noise_std**2 * torch.eye(rows)
        evidence = distributions.MultivariateNormal(torch.zeros_like(y), covariance)
        self.log_evidence = evidence.log_prob(y).item()


def regression(noise_std: float = 0.3) -> tuple[BayesianNetwork, Batch, Exact]:
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(40, 1, 1, 3, generator=generator)
    y = x.flatten(1) @ torch.tensor([1.5, -2.0, 0.5]) + 0.4
    y = y + noise_std * torch.randn(40, generator=generator)
    torch.manual_seed(0)
    network = BayesianNetwork(
        GaussianTargets(0.0, 1.0),
        image_shape=(1, 1, 3),
        dataset_size=40,
        rows_per_draw=40,
        hidden=(),
        weight_std=2.0,
    )
    assert isinstance(network.likelihood, GaussianTargets)
    network.likelihood.logvar.data.fill_(2 * math.log(noise_std))
    network.likelihood.logvar.requires_grad_(False)
    exact = Exact(x.flatten(1).double(), y.double(), 2.0, noise_std)
    return network, Batch(x, y), exact


def test_the_bound_falls_short_of_the_evidence_by_the_divergence_from_the_posterior() -> None:
    """log p(y | x) − ELBO = KL(q ‖ p(w | x, y)), all three independently."""
    network, batch, exact = regression()
    with torch.no_grad():  # near the best mean-field q, and not it
        network.mu.copy_(exact.mean + 0.02)
        network.logvar.copy_(-exact.precision.diagonal().log() + 0.3)
    q = distributions.MultivariateNormal(
        network.mu.double(), torch.diag(network.logvar.double().exp())
    )
    gap = distributions.kl_divergence(q, exact.posterior).item()
    with torch.no_grad():
        terms = network(batch, 5, 0, 20000)
    elbo_of_draws = -40 * (terms.nll.double().mean(1) + terms.kl[0].double())
    error = elbo_of_draws.std().item() / math.sqrt(20000)
    assert error < 0.1 < 1.0 < gap
    assert elbo_of_draws.mean().item() == pytest.approx(exact.log_evidence - gap, abs=4 * error)


def test_training_finds_the_best_mean_field_posterior() -> None:
    """Its means are the posterior's, its precisions the diagonal of the posterior's."""
    network, batch, exact = regression()
    step = TrainingStep(network, ELBO(num_samples=32), seed=0)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)
    for i in range(600):
        loss, _ = step(batch, torch.tensor(40 * i))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    std = exact.precision.diagonal().rsqrt()
    assert ((network.mu.double() - exact.mean) / std).abs().max() < 0.1
    assert (network.logvar.double().exp().sqrt() / std).log().abs().max() < 0.05
    # So its predictions are the exact ones in the mean, and in the spread but for covariances.
    mean, spread = network.predict(batch.x, num_samples=4000, seed=1)
    torch.testing.assert_close(mean.double(), exact.design @ exact.mean, rtol=0.0, atol=0.02)
    within = (exact.design.square() / exact.precision.diagonal()).sum(1)
    torch.testing.assert_close(spread.double(), (within + 0.09).sqrt(), rtol=0.02, atol=0.0)


# Predictions


def draws_of(network: BayesianNetwork, x: Tensor, samples: int, seed: int) -> Tensor:
    """The outputs for each draw that a prediction averages over, float64 `[S, B, outputs]`."""
    std = prior_std(network)
    zeros = torch.zeros(samples, len(network.mu))
    epsilon, _ = reparameterize_kl(zeros, zeros, derived_seed("predictive", seed) ^ WEIGHTS)
    weights = (network.mu + (network.logvar / 2).exp() * epsilon).detach().double() * std
    return torch.stack([plain_outputs(network, x, w) for w in weights])


@pytest.mark.parametrize("chunk", [2**20, 700])
def test_class_probabilities_average_over_the_weights(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bayes_module, "CHUNK", chunk)
    network, batch = make_network(), rows(37)
    assert batch.labels is not None
    probabilities = draws_of(network, batch.x, 9, seed=2).softmax(2)
    found = network.predict(batch.x, num_samples=9, seed=2)
    assert found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(found.double(), probabilities.mean(0), rtol=1e-4, atol=1e-6)
    assert (probabilities.std(0) > 0.01).any()
    log_p = network.log_predictive(batch.x, batch.labels, num_samples=9, seed=2)
    chosen = probabilities.mean(0)[torch.arange(37), batch.labels]
    torch.testing.assert_close(log_p.double(), chosen.log(), rtol=1e-4, atol=1e-5)
    other = network.predict(batch.x, num_samples=9, seed=3)
    assert not torch.allclose(other, found, atol=1e-3)


@pytest.mark.parametrize("chunk", [2**20, 700])
def test_targets_are_predicted_by_a_mixture(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bayes_module, "CHUNK", chunk)
    network, batch = make_network("targets"), rows(37, "targets")
    assert batch.labels is not None
    means = 50 + 20 * draws_of(network, batch.x, 9, seed=0).squeeze(2).T
    scales = torch.full_like(means, 20 * math.exp(-0.35))
    mixture = distributions.MixtureSameFamily(
        distributions.Categorical(torch.ones(37, 9)), distributions.Normal(means, scales)
    )
    found = network.predict(batch.x, num_samples=9)
    assert found._fields == ("mean", "std")
    torch.testing.assert_close(found.mean.double(), mixture.mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.std.double(), mixture.stddev, rtol=1e-4, atol=1e-4)
    log_p = network.log_predictive(batch.x, batch.labels, num_samples=9)
    torch.testing.assert_close(
        log_p.double(), mixture.log_prob(batch.labels.double()), rtol=1e-4, atol=1e-4
    )


def test_the_unit_of_the_targets_does_not_matter() -> None:
    """Targets in another unit: the same function of standardised values, log unit more nats."""
    network, batch = make_network("targets"), rows(6, "targets")
    other = make_network("targets")
    other.likelihood = GaussianTargets(50.0 * 1000, 20.0 * 1000)
    other.likelihood.load_state_dict(
        {**other.likelihood.state_dict(), "logvar": torch.tensor(-0.7)}
    )
    thousandths = Batch(batch.x, batch.labels * 1000)  # type: ignore[operator]
    torch.testing.assert_close(
        other(thousandths, 0).nll, network(batch, 0).nll + math.log(1000), rtol=1e-5, atol=1e-5
    )
    a, b = network.predict(batch.x), other.predict(batch.x)
    torch.testing.assert_close(b.mean, 1000 * a.mean)
    torch.testing.assert_close(b.std, 1000 * a.std)


# What is refused


def test_what_the_network_refuses() -> None:
    network, x = make_network(), grey_images(3, SHAPE)
    with pytest.raises(UserError, match="needs them in the batch"):
        network(Batch(x), 0)
    with pytest.raises(UserError, match=r"\('N', 2, 3, 5\).*got \(3, 1, 4, 4\)"):
        network.predict(grey_images(3, (1, 4, 4)))
    with pytest.raises(UserError, match="num_samples is at least 1, got 0"):
        network.predict(x, num_samples=0)
    with pytest.raises(UserError, match=r"knows the classes 0\.\.3, got 1\.\.4"):
        network.log_predictive(x, torch.tensor([1, 4, 2]))
    with pytest.raises(UserError, match=r"the classes 0\.\.3, got real targets"):
        network.log_predictive(x, torch.tensor([1.0, 2.0, 3.0]))
    with pytest.raises(UserError, match=r"real targets .*got classes"):
        make_network("targets").check_labels(torch.tensor([1, 2]))
    with pytest.raises(UserError, match=r"real targets .*got none"):
        make_network("targets").check_labels(None)
    for changes, message in [
        ({"image_shape": (3, 3)}, r"channels, height, width\), got \(3, 3\)"),
        ({"dataset_size": 0}, "at least 1, got 0, 6"),
        ({"rows_per_draw": 0}, "at least 1, got 70, 0"),
        ({"hidden": (4, 0)}, r"at least 1, got 70, 6 and \(4, 0\)"),
        ({"activation": "cosine"}, "relu, silu, gelu, tanh, got 'cosine'"),
        ({"weight_std": 0.0}, "weight_std is positive, got 0.0"),
    ]:
        with pytest.raises(UserError, match=message):
            make_network(**changes)


def test_data_that_cannot_be_learned_from() -> None:
    config = ModelConfig(target="labels")
    with pytest.raises(UserError, match="--target labels predicts labels, and noise has none"):
        build_model(config, grey_set(8, SHAPE), 4)
    with pytest.raises(UserError, match="2 classes or more, got 1"):
        build_model(config, grey_set(8, SHAPE, classes=1), 4)
    constant = ImageSet(grey_images(8, SHAPE), torch.full((8,), 3.0), "constant")
    with pytest.raises(UserError, match=r"must differ .* is 0\.0"):
        build_model(config, constant, 4)


def test_building_reads_the_training_set() -> None:
    config = ModelConfig(target="labels", hidden=(9,), activation="tanh", weight_std=0.7)
    network = build_model(config, grey_set(30, SHAPE, classes=3), 10)
    assert isinstance(network, BayesianNetwork)
    assert network.spec() == {
        "model": "bayesian-network",
        "image_shape": [2, 3, 5],
        "dataset_size": 30,
        "rows_per_draw": 10,
        "hidden": [9],
        "activation": "tanh",
        "weight_std": 0.7,
        "likelihood": {"name": "categorical", "num_classes": 3},
    }
    targets = torch.tensor([1.0, 2.0, 4.0, 9.0])
    network = build_model(config, ImageSet(grey_images(4, SHAPE), targets, "real"), 4)
    assert network.likelihood.target_mean.item() == 4.0
    assert network.likelihood.target_std.item() == pytest.approx(math.sqrt(9.5))


# Saving


@pytest.mark.parametrize("kind", ["classes", "targets"])
def test_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    network = make_network(kind)
    network.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written == network.spec() and written["model"] == "bayesian-network"
    x = grey_images(3, SHAPE)
    for loaded in (BayesianNetwork.from_pretrained(tmp_path), fastvae.load_pretrained(tmp_path)):
        assert isinstance(loaded, BayesianNetwork)
        assert loaded.spec() == network.spec() and not loaded.training
        assert_same_tensors(loaded.state_dict(), network.state_dict())
        found, expected = loaded.predict(x), network.predict(x)
        torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0)


def test_each_class_says_what_the_other_holds(tmp_path: Path) -> None:
    make_network().save_pretrained(tmp_path / "network")
    make_vae().save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError) as caught:
        fastvae.VAE.from_pretrained(tmp_path / "network")
    for words in ("network holds a Bayesian neural network", "fastvae.BayesianNetwork.from_pre"):
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="vae holds a variational autoencoder, not a Bayesian"):
        BayesianNetwork.from_pretrained(tmp_path / "vae")
    assert isinstance(fastvae.load_pretrained(tmp_path / "vae"), fastvae.VAE)
    # What was saved before there were two says nothing, and is a VAE.
    config = tmp_path / "vae/config.json"
    spec = json.loads(config.read_text())
    assert spec.pop("model") == "vae"
    config.write_text(json.dumps(spec))
    assert isinstance(fastvae.load_pretrained(tmp_path / "vae"), fastvae.VAE)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    network = make_network()
    network.save_pretrained(tmp_path)
    config, spec = tmp_path / "config.json", network.spec()
    for changed, message in [
        ({k: v for k, v in spec.items() if k != "dataset_size"}, "lacks dataset_size"),
        ({**spec, "model": "diffusion"}, "'diffusion'; there are: vae, bayesian-network"),
        ({**spec, "hidden": [7, 5]}, "weights of another model"),
        ({**spec, "likelihood": {"name": "ordinal"}}, "no label-likelihood is called 'ordinal'"),
    ]:
        config.write_text(json.dumps(changed))
        with pytest.raises(UserError, match=message):
            fastvae.load_pretrained(tmp_path)
    config.write_text("{")
    with pytest.raises(UserError, match=r"config\.json of .* is damaged"):
        fastvae.load_pretrained(tmp_path)
    with pytest.raises(UserError, match="there is no folder"):
        fastvae.load_pretrained(tmp_path / "nowhere")


# Runs by the command


OF_LABELS = ["train", "--target", "labels", "--likelihood", "bernoulli", "--latent-dim", "20"]
SMALL = ["--hidden", "30", "--learning-rate", "0.03", "--schedule", "constant", "--compile", "off"]


def run(output: Path, *flags: object) -> Path:
    main([*OF_LABELS, *SMALL, *map(str, flags), "--output", str(output)])
    return output


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("network") / "run"
    return run(folder, "--data", "digits", "--batch-size", 64, "--max-steps", 400)


def test_a_run_on_classes(digits_run: Path) -> None:
    found = results(digits_run)
    assert found["predictions"]["weight_draws"] == 50
    assert found["predictions"]["accuracy"] > 0.85  # 0.1 by chance
    assert -0.8 < found["predictions"]["log_likelihood"] < 0  # −2.3 by chance
    assert 0 < found["predictions"]["expected_calibration_error"] < 0.5
    assert found["heldout"]["elbo"] == -(found["heldout"]["nll"] + found["heldout"]["kl"])
    assert "bits_per_dim" not in found["heldout"]
    lines = metrics(digits_run)
    assert lines[-1]["elbo"] > lines[0]["elbo"]
    for name in ("calibration.png", "curves.png"):
        with Image.open(digits_run / name) as image:
            assert min(image.size) > 200
    assert not (digits_run / "samples.png").exists()
    # The same figures again from what was saved.
    network = fastvae.load_pretrained(digits_run)
    assert isinstance(network, BayesianNetwork)
    _, heldout = load_data(DataConfig(data="digits"), 0)
    assert evaluate(network, heldout, seed=0).named() == found["heldout"]
    assert heldout.labels is not None
    right = network.predict(heldout.images, num_samples=50).argmax(1) == heldout.labels
    assert right.double().mean().item() == found["predictions"]["accuracy"]
    log_p = network.log_predictive(heldout.images, heldout.labels, num_samples=50)
    assert log_p.mean().item() == pytest.approx(found["predictions"]["log_likelihood"], rel=1e-5)


def test_a_run_on_real_targets(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", "--data", "diabetes", "--batch-size", 64, "--max-steps", 500)
    found = results(folder)["predictions"]
    _, heldout = load_data(DataConfig(data="diabetes"), 0)
    assert heldout.labels is not None
    assert found["rmse"] < 0.9 * heldout.labels.std().item()
    assert 0.8 < found["within_two_std"] <= 1
    assert 0 < found["coverage_error"] < 0.2
    assert (folder / "predictions.png").exists()
    network = fastvae.load_pretrained(folder)
    assert isinstance(network, BayesianNetwork)
    mean, _ = network.predict(heldout.images, num_samples=50)
    rmse = (mean - heldout.labels).double().square().mean().sqrt().item()
    assert rmse == pytest.approx(found["rmse"], rel=1e-5)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    flags = ["--data", "digits", "--batch-size", 64, "--gradient-accumulation-steps", 2]
    flags += ["--ema-decay", 0.9]
    whole = run(tmp_path / "whole", *flags, "--max-steps", 8)
    cut = run(tmp_path / "cut", *flags, "--max-steps", 3)
    main(["train", "--resume", str(cut), "--max-steps", "8"])
    assert_same_tensors(training_state(cut), training_state(whole))
    assert results(cut)["heldout"] == results(whole)["heldout"]
    assert results(cut)["predictions"] == results(whole)["predictions"]


def test_a_class_that_training_has_not_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    for split, classes in (("train", 2), ("test", 3)):
        for i in range(6):
            place = folder / split / f"class{i % classes}"
            place.mkdir(parents=True, exist_ok=True)
            Image.new("L", (4, 4), 40 * i).save(place / f"{i}.png")
    with pytest.raises(SystemExit) as caught:
        run(tmp_path / "run", "--data", folder, "--batch-size", 2, "--max-steps", 1)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert "held out: this network knows the classes 0..1, got 0..2" in said
    assert not (tmp_path / "run").exists()


def test_a_command_that_needs_images_to_draw(
    digits_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["sample", str(digits_run)])
    assert caught.value.code == 2
    assert "holds a Bayesian neural network" in capsys.readouterr().err
