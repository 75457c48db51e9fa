"""Every combination of parts that goes together: shapes, labels, gradients, files, training."""

import itertools
import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from running import metrics, results, train
from small_models import grey_images, make_vae, rough

from fastvae import (
    VAE,
    Batch,
    Bernoulli,
    Categorical,
    ClassNormal,
    Deterministic,
    DiagonalGaussian,
    Gaussian,
    GaussianMixture,
    GaussianOptimal,
    GaussianPerPixel,
    InverseAutoregressive,
    LogisticMixture,
    MLPDecoder,
    NoPrior,
    Refinement,
    StandardNormal,
    Table,
    VampPrior,
    build_vae,
)
from fastvae.errors import UserError
from fastvae.noise import OBSERVE, REFINE
from fastvae.parts.likelihoods import quantize

SHAPE, LATENTS, CLASSES = (1, 4, 3), 3, 4
POSTERIORS: dict[str, Callable[[], Any]] = {
    "gaussian": DiagonalGaussian,
    "softplus": lambda: DiagonalGaussian("softplus"),
    "deterministic": Deterministic,
    "flow": lambda: InverseAutoregressive(LATENTS, hidden=(8,)),
}
PRIORS: dict[str, Callable[[], Any]] = {
    "normal": lambda: StandardNormal(LATENTS),
    "class-normal": lambda: ClassNormal(LATENTS, CLASSES),
    "mixture": lambda: GaussianMixture(LATENTS, 2),
    "vamp": lambda: VampPrior(SHAPE, 5),
    "none": NoPrior,
}
LIKELIHOODS: dict[str, Callable[[], Any]] = {
    "bernoulli": Bernoulli,
    "cross-entropy": lambda: Bernoulli("none"),
    "gaussian": Gaussian,
    "per-pixel": GaussianPerPixel,
    "optimal": GaussianOptimal,
    "categorical": lambda: Categorical(6),
    "logistic-mixture": lambda: LogisticMixture(2),
}


def allowed(posterior: str, prior: str, conditional: bool) -> bool:
    if prior == "none":
        return posterior == "deterministic"
    if prior == "class-normal":
        return conditional
    return not (prior == "vamp" and (conditional or posterior == "flow"))


MODELS = [
    (posterior, prior, conditional)
    for posterior, prior, conditional in itertools.product(POSTERIORS, PRIORS, (False, True))
    if allowed(posterior, prior, conditional)
]
KINDS = [(*model, likelihood) for model in MODELS for likelihood in ("bernoulli", "gaussian")]
KINDS += [
    ("gaussian", "normal", c, likelihood) for c in (False, True) for likelihood in LIKELIHOODS
]
EVERY = pytest.mark.parametrize(
    ("posterior", "prior", "conditional", "likelihood"), sorted(set(KINDS), key=str)
)


def family(
    posterior: str = "gaussian",
    prior: str = "normal",
    conditional: bool = False,
    likelihood: str = "gaussian",
    **parts: Any,
) -> VAE:
    torch.manual_seed(0)
    return make_vae(
        "mlp",
        SHAPE,
        LIKELIHOODS[likelihood](),
        LATENTS,
        posterior=POSTERIORS[posterior](),
        prior=PRIORS[prior](),
        num_classes=CLASSES if conditional else 0,
        **parts,
    )


def batch(count: int = 5, conditional: bool = True) -> Batch:
    labels = (torch.arange(count) * 3) % CLASSES if conditional else None
    return Batch(grey_images(count, SHAPE), labels)


# Every combination


@EVERY
def test_shapes(posterior: str, prior: str, conditional: bool, likelihood: str) -> None:
    vae, given = family(posterior, prior, conditional, likelihood).eval(), batch()
    labels = given.labels if conditional else None
    samples = 1 if posterior == "deterministic" else 3
    terms = vae(given, 7, 2, samples)
    assert terms.nll.shape == (samples, 5)
    assert terms.kl.shape == terms.elbo.shape == (5,)
    assert terms.z.shape == (samples, 5, LATENTS)
    for value in (terms.nll, terms.kl, terms.elbo):
        assert value.dtype == torch.float32 and value.isfinite().all()
    assert torch.equal(terms.elbo, -(terms.nll.mean(0) + terms.kl))
    q = vae.encode(given.x, labels)
    assert q.mu.shape == q.logvar.shape == (5, LATENTS)
    shown = vae.reconstruct(given.x, labels)
    assert shown.shape == vae.decode(q.mu, labels).shape == (5, *SHAPE)
    assert torch.equal(shown, vae.decode(q.mu, labels))
    assert vae.elbo(given).shape == (5,)
    if prior == "none":
        with pytest.raises(UserError, match=r"no prior to draw z from.*--sampler mixture"):
            vae.sample(3, seed=0)
        return
    for noise in (False, True):
        drawn = vae.sample(6, seed=0, noise=noise)
        assert drawn.shape == (6, *SHAPE) and drawn.dtype == torch.float32
        torch.testing.assert_close(vae.sample(6, seed=0, noise=noise), drawn)
        if conditional:
            own = vae.sample(6, seed=0, noise=noise, labels=torch.arange(6) % CLASSES)
            assert torch.equal(own, drawn)
        # A draw does not depend on how many are drawn.
        torch.testing.assert_close(vae.sample(2, seed=0, noise=noise), drawn[:2])


@EVERY
def test_gradients_reach_every_parameter(
    posterior: str, prior: str, conditional: bool, likelihood: str
) -> None:
    vae = family(posterior, prior, conditional, likelihood)
    terms = vae(batch(), 7)
    (terms.nll.mean(0) + terms.kl).mean().backward()
    # Without a KL, a prior is not met.
    unmet = {"prior"} if posterior == "deterministic" else set()
    for name, parameter in vae.named_parameters():
        if name.split(".")[0] in unmet:
            assert parameter.grad is None, name
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # The masked networks of a flow begin as the identity: its last layer alone learns first.
        if "layers" not in name:
            assert parameter.grad.abs().max() > 0, name


@EVERY
def test_saved_and_loaded(
    posterior: str, prior: str, conditional: bool, likelihood: str, tmp_path: Path
) -> None:
    refinement = None if posterior == "deterministic" else Refinement(2, 0.03)
    vae = family(posterior, prior, conditional, likelihood, refinement=refinement).eval()
    vae.save_pretrained(tmp_path)
    loaded = VAE.from_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert loaded.spec() == vae.spec()
    assert written == json.loads(json.dumps(vae.spec()))
    assert loaded.refinement == refinement
    assert loaded.num_classes == (CLASSES if conditional else 0)
    for kind in ("posterior", "prior", "likelihood"):
        assert type(getattr(loaded, kind)) is type(getattr(vae, kind))
    assert torch.equal(loaded.elbo(batch(), seed=3), vae.elbo(batch(), seed=3))
    assert build_vae(written).spec() == vae.spec()


# Several draws of z


@pytest.mark.parametrize("posterior", ["gaussian", "softplus", "flow"])
@pytest.mark.parametrize("conditional", [False, True])
def test_several_draws(posterior: str, conditional: bool) -> None:
    vae = rough(family(posterior, "normal", conditional, "bernoulli"))
    one, many = vae(batch(), 7, 40), vae(batch(), 7, 40, num_samples=4)
    torch.testing.assert_close(many.z[0], one.z[0])
    torch.testing.assert_close(many.nll[0], one.nll[0])
    for s in range(4):  # each draw's nll is that of its own z, and of its row's image and class
        x = vae.likelihood.observe(batch().x, 7 ^ OBSERVE, 40)
        parameters = vae.parameters_of(many.z[s], vae.condition(batch().labels))
        torch.testing.assert_close(vae.likelihood.nll(parameters, x, "auto"), many.nll[s])
    assert len({tuple(z.flatten().tolist()) for z in many.z}) == 4
    if posterior != "flow":  # whose KL is measured by the draws
        torch.testing.assert_close(many.kl, one.kl)
    with pytest.raises(UserError, match="one z for each image, asked for 2"):
        family("deterministic")(batch(), 7, num_samples=2)


@pytest.mark.parametrize("prior", ["normal", "class-normal", "mixture", "vamp"])
def test_the_kl_against_many_draws(prior: str) -> None:
    """E_q[log q − log p], by torch.distributions."""
    conditional = prior == "class-normal"
    vae = rough(family("gaussian", prior, conditional))
    if prior == "class-normal":
        with torch.no_grad():
            vae.prior.mu.normal_()
            vae.prior.logvar.normal_()
    terms = vae(batch(), 3, num_samples=20_000)
    q = vae.encode(batch().x, batch().labels)
    z = terms.z.detach().double()
    log_q = torch.distributions.Normal(q.mu.double(), q.std.double()).log_prob(z).sum(-1)
    p = vae.prior_of(vae.condition(batch().labels))
    if prior in ("mixture", "vamp"):
        components = torch.distributions.Independent(
            torch.distributions.Normal(p.mu.double(), (p.logvar.double() / 2).exp()), 1
        )
        weights = torch.distributions.Categorical(logits=p.log_weights.double())
        log_p = torch.distributions.MixtureSameFamily(weights, components).log_prob(z)
    else:
        mu = p.mu.double() if conditional else torch.zeros(LATENTS).double()
        std = (p.logvar.double() / 2).exp() if conditional else torch.ones(LATENTS).double()
        log_p = torch.distributions.Normal(mu, std).log_prob(z).sum(-1)
    difference = (log_q - log_p).detach()
    error = difference.std(0) / math.sqrt(20_000)
    assert ((difference.mean(0) - terms.kl).abs() < 5 * error + 1e-4).all()


# Labels


@pytest.mark.parametrize("prior", ["normal", "class-normal", "mixture"])
def test_labels_matter_row_by_row(prior: str) -> None:
    vae = rough(family("gaussian", prior, conditional=True)).eval()
    if prior == "class-normal":
        with torch.no_grad():
            vae.prior.mu.normal_()
    x, labels = grey_images(5, SHAPE), torch.tensor([0, 1, 2, 3, 0])
    changed = labels.clone()
    changed[2] = 0
    differs = vae.elbo(Batch(x, labels)) != vae.elbo(Batch(x, changed))
    assert differs.tolist() == [False, False, True, False, False]
    moved = (vae.encode(x, labels).mu - vae.encode(x, changed).mu).abs().amax(1) > 1e-4
    assert moved.tolist() == [False, False, True, False, False]
    z = torch.randn(5, LATENTS)
    moved = (vae.decode(z, labels) - vae.decode(z, changed)).abs().flatten(1).amax(1) > 1e-4
    assert moved.tolist() == [False, False, True, False, False]


def test_classes_are_taken_in_turn_unless_told() -> None:
    vae = rough(family("gaussian", "class-normal", conditional=True))
    given = vae.sample(6, seed=1, labels=torch.tensor([0, 1, 2, 3, 0, 1]))
    assert torch.equal(vae.sample(6, seed=1), given)
    assert not torch.equal(vae.sample(6, seed=1, labels=torch.zeros(6, dtype=torch.int64)), given)
    with pytest.raises(UserError, match=r"sample\(6\) takes 6 labels, got 2"):
        vae.sample(6, labels=torch.tensor([0, 1]))


def test_labels_that_are_missing_or_no_classes() -> None:
    vae, x, z = family(conditional=True), grey_images(2, SHAPE), torch.zeros(2, LATENTS)
    missing = "conditional on 4 classes: it needs the labels"
    for use in (lambda: vae(x, 0), lambda: vae.elbo(x), lambda: vae.encode(x)):
        with pytest.raises(UserError, match=missing):
            use()
    for use in (lambda: vae.decode(z), lambda: vae.reconstruct(x)):
        with pytest.raises(UserError, match=missing):
            use()
    for wrong in ([0, 4], [-1, 2]):
        labels = torch.tensor(wrong)
        message = rf"labels lie in 0\.\.3 for this model, got {wrong[0]}\.\.{wrong[1]}"
        for use in (
            lambda: vae.encode(x, labels),  # noqa: B023
            lambda: vae.decode(z, labels),  # noqa: B023
            lambda: vae.reconstruct(x, labels),  # noqa: B023
            lambda: vae.sample(2, labels=labels),  # noqa: B023
            lambda: vae.check_labels(labels),  # noqa: B023
        ):
            with pytest.raises(UserError, match=message):
                use()


def test_an_unconditional_model_does_not_read_labels() -> None:
    vae = family()
    assert torch.equal(vae.elbo(batch()), vae.elbo(batch().x))
    assert vae.encode(batch().x, batch().labels).mu.shape == (5, LATENTS)


# Refinement and tables


def test_refinement_lowers_the_loss_of_each_image() -> None:
    vae = rough(family("gaussian", "normal", likelihood="bernoulli", refinement=Refinement(60)))
    found = vae.infer(batch(), 3)
    before = vae.terms(found.start, found.x, None, 9, 0, 400)
    after = vae.terms(found.statistics, found.x, None, 9, 0, 400)
    assert (after.elbo > before.elbo).all()
    assert (after.elbo - before.elbo).mean() > 0.3
    assert not found.statistics.requires_grad


def test_refined_rows_do_not_know_of_each_other() -> None:
    vae = rough(family(refinement=Refinement(5)))
    whole = vae.infer(batch(), 3, 10).statistics
    part = vae.infer(Batch(batch().x[2:]), 3, 12).statistics
    torch.testing.assert_close(part, whole[2:], rtol=1e-4, atol=1e-5)


def test_the_encoder_learns_where_the_search_began() -> None:
    """The gradient of the loss at the encoder's answer (Krishnan et al. 2018), on its weights."""
    vae = rough(family(refinement=Refinement(4)))
    (-vae(batch(), 3).elbo.sum()).backward()
    found = vae.encoder.head.bias.grad.clone()
    plain = rough(family())
    inferred = plain.infer(batch(), 3)
    start = inferred.start.detach().requires_grad_()
    # The first step's draw is that of the refinement's own stream.
    (-plain.terms(start, inferred.x, None, 3 ^ REFINE ^ 0, 0).elbo).sum().backward()
    torch.testing.assert_close(found, start.grad.sum(0), rtol=1e-4, atol=1e-4)
    assert vae.decoder.head.bias.grad.abs().max() > 0


def table_vae(rows: int = 7, **parts: Any) -> VAE:
    return VAE(
        Table(rows, 2 * LATENTS),
        MLPDecoder(SHAPE, LATENTS, hidden=(8,)),
        Gaussian(0.1),
        image_shape=SHAPE,
        latent_dim=LATENTS,
        **parts,
    )


def test_a_table_answers_its_own_images_and_searches_for_others() -> None:
    torch.manual_seed(0)
    vae = table_vae(refinement=Refinement(30))
    with torch.no_grad():
        vae.encoder.statistics.weight.normal_()
    x, index = grey_images(3, SHAPE), torch.tensor([4, 0, 6])
    q = vae.encode(x, indices=index)
    assert torch.equal(q.mu, vae.encoder.statistics.weight[index, :LATENTS])
    terms = vae(Batch(x, None, index), 3)
    (-terms.elbo.sum()).backward()
    rows = vae.encoder.statistics.weight.grad.abs().sum(1) > 0
    assert rows.tolist() == [True, False, False, False, True, False, True]
    unseen = vae.encode(x)
    assert unseen.mu.abs().max() > 0.05
    start = vae.terms(torch.zeros(3, 2 * LATENTS), x / 255, None, 1, 0, 500).elbo
    found = vae.terms(torch.cat(unseen, 1), x / 255, None, 1, 0, 500).elbo
    assert (found > start).all()
    assert vae.reconstruct(x).shape == x.shape


def test_a_table_is_saved_and_loaded(tmp_path: Path) -> None:
    vae = table_vae(refinement=Refinement(3))
    with torch.no_grad():
        vae.encoder.statistics.weight.normal_()
    vae.save_pretrained(tmp_path)
    loaded = VAE.from_pretrained(tmp_path)
    assert loaded.refinement == Refinement(3)
    assert torch.equal(loaded.encoder.statistics.weight, vae.encoder.statistics.weight)


# Combinations that are refused


def test_what_does_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a table has no answer for unseen images"):
        table_vae()
    with pytest.raises(UserError, match="ClassNormal is a prior for each class"):
        family("gaussian", "class-normal")
    with pytest.raises(UserError, match="no prior to measure a KL from"):
        family("gaussian", "none")(batch(), 0)
    vae = family()
    for kind, wrong in (("posterior", "cauchy"), ("prior", "uniform"), ("likelihood", "poisson")):
        spec = vae.spec()
        spec[kind] = {"name": wrong}
        with pytest.raises(UserError, match=f"no {kind} is called '{wrong}'; there are: "):
            build_vae(spec)
    with pytest.raises(UserError, match=r"encoder returned \(5, 6\); Inverse.* needs \(5, 9\)"):
        VAE(
            vae.encoder,
            vae.decoder,
            Gaussian(),
            image_shape=SHAPE,
            latent_dim=LATENTS,
            posterior=POSTERIORS["flow"](),
        )(batch(), 0)
    with pytest.raises(UserError, match=r"decoder returned .* GaussianPerPixel .* \(5, 2, 4, 3\)"):
        VAE(vae.encoder, vae.decoder, GaussianPerPixel(), image_shape=SHAPE, latent_dim=LATENTS)(
            batch(), 0
        )


# Likelihoods as the model uses them


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_samples_with_noise_scatter_around_the_mean(likelihood: str) -> None:
    """Many images from one z: their average is E[x | z]."""
    vae = family(likelihood=likelihood).eval()
    z = torch.randn(1, LATENTS).expand(4000, LATENTS)
    mean = vae.sample_given(z[:1], seed=0)[0]
    noisy = vae.sample_given(z, seed=0, noise=True)
    assert noisy.std(0).min() > 0.01
    error = noisy.std(0) / math.sqrt(4000)
    # A logistic mixture clips each component's mean: far off where the components are this wide.
    slack = 0.2 if likelihood == "logistic-mixture" else 1e-4
    assert ((noisy.mean(0) - mean).abs() < 5 * error + slack).all()
    if likelihood == "categorical":
        assert torch.equal(quantize(noisy, 6), noisy)


# Trainings


FLAGS = [
    "",
    "--likelihood bernoulli",
    "--likelihood bernoulli --binarize static",
    "--likelihood bernoulli --binarize none",
    "--network conv --widths 4 8",
    "--network conv --widths 4 8 --pooling --activation silu",
    "--variance optimal",
    "--variance predicted --min-std 0.1",
    "--variance 0.098",
    "--likelihood categorical --levels 16",
    "--likelihood logistic-mixture --mixtures 2",
    "--posterior-scale softplus --latent-dim 2",
    "--posterior deterministic --prior none",
    "--posterior deterministic --objective mmd --mmd-weight 500 --beta 0",
    "--posterior inverse-autoregressive --flow-layers 2",
    "--prior mixture --prior-components 7",
    "--prior vamp --prior-components 7",
    "--conditional",
    "--conditional --prior class-normal",
    "--inference table --refine-steps 4",
    "--refine-steps 3 --refine-rate 0.1",
    "--num-samples 3",
    "--objective importance-weighted --num-samples 4 --gradient doubly-reparameterized",
    "--objective importance-weighted --num-samples 4 --groups 2 --decoder-draws all",
    "--objective total-correlation",
    "--beta 4 --free-bits 0.1 --kl-warmup-epochs 0.5",
    "--capacity 5 --capacity-epochs 0.5",
]
COMPILED = [
    "--posterior inverse-autoregressive --prior mixture",
    "--conditional --prior class-normal --likelihood categorical --levels 16",
    "--objective importance-weighted --num-samples 4 --prior vamp --prior-components 7",
]


def trained_well(flags: str, *more: str, output: Path) -> VAE:
    """The model of a run of 40 steps, whose loss has fallen."""
    steps = ("--max-steps", "40", "--log-every", "5", "--eval-every", "100")
    run = train(*steps, *shlex.split(flags), *more, output=output)
    lines = metrics(run)
    losses = [line["loss"] for line in lines]
    assert all(map(math.isfinite, losses))
    if "warmup" not in flags and "capacity" not in flags:
        assert min(losses[-2:]) < losses[0]
    heldout = results(run)["heldout"]
    assert all(value is None or math.isfinite(value) for value in heldout.values())
    return VAE.from_pretrained(run)


@pytest.mark.parametrize("flags", FLAGS)
def test_trained_by_the_command(flags: str, tmp_path: Path) -> None:
    vae = trained_well(flags, output=tmp_path / "run")
    assert vae.image_shape == (1, 8, 8)
    assert (vae.num_classes == 10) == ("--conditional" in flags)
    assert (vae.refinement is not None) == ("--refine" in flags)
    assert (tmp_path / "run/samples.png").exists() == vae.prior.is_distribution


@pytest.mark.slow
@pytest.mark.parametrize("flags", COMPILED)
def test_compiled_as_eager(flags: str, tmp_path: Path) -> None:
    trained_well(flags, output=tmp_path / "eager")
    trained_well(flags, "--compile", "on", output=tmp_path / "compiled")
    pairs = zip(metrics(tmp_path / "eager"), metrics(tmp_path / "compiled"), strict=True)
    for a, b in pairs:
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


def test_weights_of_two_trainings_alike(tmp_path: Path) -> None:
    """The same seed gives the same model, of every random part."""
    flags = "--conditional --prior mixture --likelihood bernoulli --num-samples 2"
    a, b = (trained_well(flags, output=tmp_path / name).state_dict() for name in ("a", "b"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
