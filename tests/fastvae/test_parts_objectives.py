"""What is maximised: β, and its warm-up as a function of the samples met."""

import torch

from fastvae import BetaELBO, Terms

TERMS = Terms(nll=torch.tensor([10.0, 20.0, 30.0]), kl=torch.tensor([1.0, 2.0, 4.0]))


def test_the_bound_is_never_weighted() -> None:
    assert TERMS.elbo.tolist() == [-11.0, -22.0, -34.0]


def test_beta() -> None:
    position = torch.tensor([0, 5, 10**12])
    assert BetaELBO()(TERMS, position).tolist() == [11.0, 22.0, 34.0]
    assert BetaELBO(4.0)(TERMS, position).tolist() == [14.0, 28.0, 46.0]
    assert BetaELBO(0.0)(TERMS, position).tolist() == [10.0, 20.0, 30.0]


def test_warm_up_is_linear_in_the_samples_met() -> None:
    position = torch.tensor([0, 250, 500, 999, 1000, 5000, 2**40])
    weight = BetaELBO(2.0, warmup_samples=1000).kl_weight(position)
    torch.testing.assert_close(weight, torch.tensor([0.0, 0.5, 1.0, 1.998, 2.0, 2.0, 2.0]))
    loss = BetaELBO(2.0, warmup_samples=1000)(TERMS, torch.tensor([0, 250, 1000]))
    torch.testing.assert_close(loss, torch.tensor([10.0, 21.0, 38.0]))
