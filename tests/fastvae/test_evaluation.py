"""Figures on held-out images: every image once, the same for the same model."""

import math
from dataclasses import replace

import pytest
import torch
from small_models import grey_set, make_vae, rough

from fastvae import Bernoulli, Deterministic, Gaussian, NoPrior
from fastvae.evaluation import BrokenOff, Evaluation, Evaluator, evaluate, quantity_names
from fastvae.noise import derived_seed

SHAPE = (3, 5, 4)


@pytest.mark.parametrize("batch_size", [1, 7, 23, 500])
def test_a_mean_over_images_whatever_the_batches(batch_size: int) -> None:
    vae, images = rough(make_vae("mlp", SHAPE)), grey_set(23, SHAPE)
    found = evaluate(vae, images, seed=4, batch_size=batch_size)
    terms = vae(images.images, derived_seed("evaluation", 4), 0)
    assert found.images == 23
    assert found.nll == pytest.approx(terms.nll.double().mean().item(), rel=1e-6)
    assert found.kl == pytest.approx(terms.kl.double().mean().item(), rel=1e-6)
    assert found.elbo == -(found.nll + found.kl)


@pytest.mark.parametrize("labelled", [False, True])
def test_again_and_again(labelled: bool) -> None:
    """One evaluator follows the weights of its model, and ends where it is told to."""
    images = grey_set(23, SHAPE)
    if labelled:
        images = replace(images, labels=torch.arange(23) % 3)
    vae = rough(make_vae("mlp", SHAPE, num_classes=3 if labelled else 0))
    evaluator = Evaluator(vae, images, seed=4, batch_size=6)
    first = evaluator()
    assert evaluator() == first == evaluate(vae, images, seed=4, batch_size=6)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.mul_(1.1)
    assert evaluator() == evaluate(vae, images, seed=4, batch_size=6) != first
    asked = iter([False, False, True])
    with pytest.raises(BrokenOff):
        evaluator(until=lambda: next(asked))
    assert evaluator() == evaluate(vae, images, seed=4, batch_size=6)


@pytest.mark.slow
def test_compiled_figures_agree() -> None:
    vae, images = rough(make_vae("mlp", SHAPE)), grey_set(23, SHAPE)
    plain = evaluate(vae, images, seed=4, batch_size=6)
    compiled = Evaluator(vae, images, seed=4, batch_size=6, compiled=True)
    for found in (compiled(), compiled()):
        assert found.nll == pytest.approx(plain.nll, rel=1e-5)
        assert found.kl == pytest.approx(plain.kl, rel=1e-5)


def test_what_cannot_be_compiled_is_evaluated_all_the_same(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Looking(torch.nn.Module):
        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return decoder(z) * (1.0 if z[0, 0].item() < 100 else 2.0)

    vae, images = rough(make_vae("mlp", SHAPE)), grey_set(23, SHAPE)
    decoder = vae.decoder
    vae.decoder = Looking()
    evaluator = Evaluator(vae, images, seed=4, batch_size=6, compiled=True)
    assert evaluator() == evaluator() == evaluate(vae, images, seed=4, batch_size=6)
    (told,) = [record.getMessage() for record in caplog.records if "compiled" in record.msg]
    assert told.startswith("evaluations are not compiled: ") and "\n" not in told


def test_large_images_come_in_small_batches() -> None:
    """A batch of 500 photographs would not fit where training does."""
    vae = make_vae("mlp", (3, 512, 512))
    evaluator = Evaluator(vae, grey_set(7, (3, 512, 512)), seed=0)
    assert (evaluator.batches, evaluator.rows) == (2, 4)
    assert evaluator().images == 7


def test_units() -> None:
    images = grey_set(8, SHAPE)
    found = evaluate(rough(make_vae("mlp", SHAPE)), images, seed=0)
    assert found.bits_per_dim == pytest.approx(-found.elbo / math.log(2) / 60)
    found = evaluate(rough(make_vae("mlp", SHAPE, Gaussian())), images, seed=0)
    assert found.bits_per_dim == pytest.approx(8 - found.elbo / math.log(2) / 60)


def test_the_model_stays_in_its_mode_and_has_no_gradients() -> None:
    vae = make_vae("mlp", SHAPE)
    for training in (True, False):
        vae.train(training)
        evaluate(vae, grey_set(3, SHAPE), seed=0)
        assert vae.training == training
    assert all(parameter.grad is None for parameter in vae.parameters())


def test_names() -> None:
    density = evaluate(make_vae("mlp", SHAPE), grey_set(3, SHAPE), seed=0)
    assert list(density.named()) == ["elbo", "nll", "kl", "images", "bits_per_dim"]
    none = Bernoulli("none")
    entropy = evaluate(make_vae("mlp", SHAPE, none), grey_set(3, SHAPE), seed=0)
    assert entropy.bits_per_dim is None
    assert not entropy.is_density
    assert list(entropy.named()) == ["cross_entropy_objective", "cross_entropy", "kl", "images"]
    point = evaluate(
        make_vae("mlp", SHAPE, Gaussian(), posterior=Deterministic(), prior=NoPrior()),
        grey_set(3, SHAPE),
        seed=0,
    )
    assert point.bits_per_dim is None
    assert list(point.named()) == ["reconstruction_objective", "reconstruction_nll", "kl", "images"]
    for is_density, is_bound in [(True, True), (True, False), (False, False)]:
        assert set(quantity_names(is_density, is_bound)) == {"elbo", "nll"}
    assert Evaluation(1, 2.0, 3.0, None, True, True).elbo == -5.0
