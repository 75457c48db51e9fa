"""Linear probes on latents of which it is known what a linear model can read."""

import math

import pytest
import torch
from fastvae_kernels import normal
from torch import Tensor

from fastvae.errors import UserError
from fastvae.estimators import linear_probe


def blobs(images: int, seed: int, apart: float = 2.0) -> tuple[Tensor, Tensor]:
    """Two classes, N(∓apart / 2, 1) in the first of three latents on unlike scales."""
    labels = torch.arange(images) % 2
    mu = normal((images, 3), seed)
    mu[:, 0] += apart * (labels - 0.5)
    return mu * torch.tensor([1e-3, 1.0, 1e3]) + 7, labels


def test_two_gaussians_reach_the_best_accuracy_there_is() -> None:
    found = linear_probe(*blobs(4001, 0), *blobs(8001, 1))
    best = 0.5 * (1 + math.erf(1 / math.sqrt(2)))  # Φ(apart / 2) = 0.841
    assert found.score == pytest.approx(best, abs=0.02)
    assert (found.metric, found.train_images, found.held_out_images) == ("accuracy", 4001, 8001)
    assert found.converged


def test_many_classes_and_a_constant_latent() -> None:
    centres = torch.tensor([[0.0, 9], [9, 0], [9, 9], [0, 0]])
    labels = torch.arange(403) % 4 + 3
    mu = torch.cat([centres[labels - 3] + normal((403, 2), 2), torch.full((403, 1), 5.0)], 1)
    found = linear_probe(mu[:200], labels[:200], mu[200:], labels[200:])
    assert found.score > 0.99
    shuffled = labels[torch.randperm(403, generator=torch.Generator().manual_seed(0))]
    assert linear_probe(mu[:200], shuffled[:200], mu[200:], shuffled[200:]).score < 0.4


def test_real_targets() -> None:
    mu = normal((3000, 4), 3)
    target = mu @ torch.tensor([1.0, -2.0, 0.0, 2.0]) + 3 * normal((3000,), 4) + 10
    found = linear_probe(mu[:2000], target[:2000], mu[2000:], target[2000:])
    assert found.metric == "r2"
    assert found.score == pytest.approx(9 / (9 + 9), abs=0.04)  # explained over total variance
    assert found.converged


def test_a_bounded_choice_of_training_images_is_repeatable() -> None:
    mu, labels = blobs(3000, 5)
    order = labels.argsort()  # sorted by class: the first 100 would hold one class
    arguments = (mu[order], labels[order], *blobs(1000, 6))
    first, second = (linear_probe(*arguments, max_train=100) for _ in range(2))
    assert first == second
    assert first.train_images == 100
    assert first.score > 0.7
    assert linear_probe(*arguments, max_train=100, seed=1) != first


def test_says_when_it_did_not_converge(recwarn: pytest.WarningsRecorder) -> None:
    assert not linear_probe(*blobs(300, 7), *blobs(50, 8), max_iterations=1).converged
    assert not recwarn


def test_refuses() -> None:
    (mu, labels), held_out = blobs(30, 9), blobs(20, 10)
    with pytest.raises(UserError, match="two classes"):
        linear_probe(mu, labels * 0, *held_out)
    with pytest.raises(UserError, match=r"the training images need .* \(29,\)"):
        linear_probe(mu, labels[1:], *held_out)
    with pytest.raises(UserError, match="the training images need"):
        linear_probe(mu[:, :2], labels, *held_out)
    with pytest.raises(UserError, match="held-out images are not all finite"):
        linear_probe(mu, labels, held_out[0] / 0, held_out[1])
    with pytest.raises(UserError, match="both real"):
        linear_probe(mu, labels, held_out[0], held_out[1].float())
