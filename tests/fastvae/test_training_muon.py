"""Muon against exact singular vectors, PyTorch's Adam, and a problem that it must solve."""

from pathlib import Path

import pytest
import torch
from running import assert_same_tensors, metrics, resume, train, training_state, weights
from torch import nn

from fastvae.training.muon import Muon, layer_weights, orthogonalized


@pytest.mark.parametrize("shape", [(7, 7), (5, 63), (63, 5), (1, 9), (9, 1), (200, 784)])
def test_orthogonalized_keeps_the_singular_vectors(shape: tuple[int, int]) -> None:
    """U f(S) Vᵀ, with f the known polynomial five times over: all from a float64 SVD."""
    G = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-4
    U, S, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    s = S / S.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    found = orthogonalized(G)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), U @ s.diag() @ Vh, rtol=1e-3, atol=1e-4)
    assert s.min() > 0.6 and s.max() < 1.3


def test_orthogonalized_of_nothing_is_nothing() -> None:
    assert orthogonalized(torch.zeros(3, 5)).abs().max() == 0
    strided = torch.randn(9, 8)[::2, 1::3]
    torch.testing.assert_close(orthogonalized(strided), orthogonalized(strided.contiguous()))


def test_one_direction_is_one_direction() -> None:
    """Of rank 1, however small its other singular values are rounded to."""
    u, v = torch.tensor([3.0, 4.0]) / 5, torch.tensor([1.0, 2.0, 2.0]) / 3
    s = 1.0
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    found = orthogonalized(torch.outer(u, v) * 7)
    torch.testing.assert_close(found, torch.outer(u, v) * s, rtol=1e-4, atol=1e-5)


def test_the_rest_is_adams() -> None:
    """A convolution's and a linear layer's biases, and a parameter of no layer."""
    settings = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.2}
    start = torch.randn(3, 4)
    one, other = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    ours, theirs = Muon([one], [], **settings), torch.optim.AdamW([other], **settings)
    for step in range(5):
        gradient = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
        for p, optimizer in ((one, ours), (other, theirs)):
            p.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_two_steps_by_hand() -> None:
    """Nesterov's momentum, the scale 0.2·√max(m, n), decoupled decay; a convolution is flat."""
    layer = nn.Conv2d(3, 5, 2, bias=False)
    assert layer_weights(nn.Sequential(layer, nn.PReLU(), nn.LayerNorm(4))) == [layer.weight]
    expected = layer.weight.detach().double()
    optimizer = Muon(layer.parameters(), [layer.weight], lr=0.1, momentum=0.7, weight_decay=0.5)
    kept = torch.zeros_like(expected)
    for step in range(2):
        gradient = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(step))
        layer.weight.grad = gradient
        optimizer.step()
        kept = 0.7 * kept + 0.3 * gradient.double()
        ahead = 0.3 * gradient.double() + 0.7 * kept
        direction = orthogonalized(ahead.flatten(1).float()).double().view_as(expected)
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * 0.2 * 12**0.5 * direction
    torch.testing.assert_close(layer.weight.detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_the_rate_may_be_a_tensor() -> None:
    found = []
    for lr in (0.1, torch.tensor(0.1)):
        torch.manual_seed(0)
        layer = nn.Linear(6, 4)
        optimizer = Muon(layer.parameters(), [layer.weight], lr=lr)
        layer(torch.ones(2, 6)).square().sum().backward()
        optimizer.step()
        found.append(layer.weight.detach())
    torch.testing.assert_close(*found)


def test_an_ill_conditioned_regression() -> None:
    """Inputs whose scales differ a thousandfold: what it is for. Adam, as long, stays behind."""
    torch.manual_seed(0)
    scales = torch.logspace(0, -3, 16)
    rotation = torch.linalg.qr(torch.randn(16, 16))[0]
    x = torch.randn(512, 16) * scales @ rotation
    truth = torch.randn(8, 16)
    losses = {}
    for name in ("muon", "adam"):
        weight = nn.Parameter(torch.zeros(8, 16))
        optimizer = (
            Muon([weight], [weight], lr=0.1) if name == "muon" else torch.optim.Adam([weight], 0.1)
        )
        for step in range(300):
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * (1 - step / 300)
            loss = (x @ (weight - truth).T).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[name] = loss.item()
    assert losses["muon"] < 0.2 * losses["adam"]


def test_a_run_and_its_continuation(tmp_path: Path) -> None:
    """The flags reach it, every weight has its state, and a resumed run is the same to the bit."""
    flags = ["--optimizer", "muon", "--learning-rate", 5e-3, "--schedule", "constant"]
    whole = train(*flags, output=tmp_path / "whole")
    state = training_state(whole)
    names = {name.split("/", 1)[1] for name in state if name.startswith("weight/")}
    buffers = {n.split("/", 1)[1] for n in state if n.startswith("optimizer.momentum_buffer/")}
    assert buffers == {name for name in names if name.endswith(("0.weight", "head.weight"))}
    averaged = {n.split("/", 1)[1] for n in state if n.startswith("optimizer.exp_avg/")}
    assert averaged == names - buffers
    assert metrics(whole)[-1]["loss"] < metrics(whole)[0]["loss"]
    half = train(*flags, "--max-steps", 30, output=tmp_path / "half")
    resume(half, "--max-steps", 60)
    assert_same_tensors(weights(half), weights(whole))
    assert_same_tensors(training_state(half), state)
