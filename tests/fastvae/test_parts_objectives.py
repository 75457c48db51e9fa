"""What is maximised: weighted ELBOs, importance-weighted bounds, and what looks at a batch."""

import math
from typing import Any

import pytest
import torch
from small_models import grey_images, make_vae, rough
from torch import Tensor, distributions

from fastvae import (
    ELBO,
    MMD,
    Batch,
    Gaussian,
    GaussianMixture,
    ImportanceWeighted,
    InverseAutoregressive,
    LatentGaussian,
    StandardNormal,
    Terms,
    TotalCorrelation,
)
from fastvae.errors import UserError
from fastvae.noise import MATCH, stream
from fastvae.training.step import TrainingStep

SEED = torch.tensor(0)
START = torch.zeros(3, dtype=torch.int64)
TERMS = Terms(
    nll=torch.tensor([[9.0, 20.0, 31.0], [11.0, 20.0, 29.0]]), kl=torch.tensor([1.0, 2.0, 4.0])
)


# The ELBO and its weights


def test_the_bound_is_never_weighted() -> None:
    assert TERMS.elbo.tolist() == [-11.0, -22.0, -34.0]


def test_beta() -> None:
    position = torch.tensor([0, 5, 10**12])
    assert ELBO()(TERMS, position, SEED).tolist() == [11.0, 22.0, 34.0]
    assert ELBO(4.0)(TERMS, position, SEED).tolist() == [14.0, 28.0, 46.0]
    assert ELBO(0.0)(TERMS, position, SEED).tolist() == [10.0, 20.0, 30.0]


def test_warm_up_is_linear_in_the_samples_met() -> None:
    position = torch.tensor([0, 250, 500, 999, 1000, 5000, 2**40])
    weight = ELBO(2.0, warmup_samples=1000).kl_weight(position)
    torch.testing.assert_close(weight, torch.tensor([0.0, 0.5, 1.0, 1.998, 2.0, 2.0, 2.0]))
    loss = ELBO(2.0, warmup_samples=1000)(TERMS, torch.tensor([0, 250, 1000]), SEED)
    torch.testing.assert_close(loss, torch.tensor([10.0, 21.0, 38.0]))


def test_warm_up_in_cycles() -> None:
    position = torch.tensor([0, 50, 100, 399, 400, 450, 500, 799, 800, 850, 4 * 10**9 + 50])
    weight = ELBO(2.0, warmup_samples=100, cycle_samples=400).kl_weight(position)
    expected = torch.tensor([0.0, 1.0, 2.0, 2.0, 0.0, 1.0, 2.0, 2.0, 0.0, 1.0, 1.0])
    torch.testing.assert_close(weight, expected)


def gaussian_terms() -> Terms:
    """Latents that cost 0, ½, 2 and 0, 4½, 0 nats."""
    q = LatentGaussian(torch.tensor([[0.0, 1.0, 2.0], [0.0, -3.0, 0.0]]), torch.zeros(2, 3))
    z = torch.zeros(1, 2, 3)
    return Terms(torch.tensor([[10.0, 20.0]]), torch.tensor([2.5, 4.5]), z, q, StandardNormal(3))


def test_free_bits() -> None:
    terms, position = gaussian_terms(), START[:2]
    assert ELBO(free_bits=1.0)(terms, position, SEED).tolist() == [14.0, 26.5]
    assert ELBO(2.0, free_bits=0.25)(terms, position, SEED).tolist() == [15.5, 30.0]
    assert ELBO(free_bits=1e-9)(terms, position, SEED).tolist() == pytest.approx([12.5, 24.5])


def test_free_bits_stop_the_gradient_below_them() -> None:
    terms = gaussian_terms()
    mu = terms.q.mu.requires_grad_()  # type: ignore[union-attr]
    ELBO(free_bits=1.0)(terms, START[:2], SEED).sum().backward()
    assert mu.grad.tolist() == [[0.0, 0.0, 2.0], [0.0, -3.0, 0.0]]  # type: ignore[union-attr]


def test_free_bits_need_a_gaussian_and_a_prior_that_factorises() -> None:
    objective = ELBO(free_bits=1.0)
    x = grey_images(2, (1, 8, 8))
    for part, message in (
        ({"posterior": InverseAutoregressive(5)}, "a diagonal Gaussian posterior"),
        ({"prior": GaussianMixture(5)}, "--prior standard-normal or class-normal"),
    ):
        terms = make_vae(**part)(x, 0)
        with pytest.raises(UserError, match=message):
            objective(terms, START[:2], SEED)


def test_capacity() -> None:
    """β |kl − C|, C rising to 3 over 100 samples; kl is 1, 2 and 4."""
    objective = ELBO(10.0, capacity=3.0, capacity_samples=100)
    assert objective(TERMS, START, SEED).tolist() == [20.0, 40.0, 70.0]
    assert objective(TERMS, START + 50, SEED).tolist() == [15.0, 25.0, 55.0]
    assert objective(TERMS, START + 10**9, SEED).tolist() == [30.0, 30.0, 40.0]
    assert ELBO(10.0, capacity=3.0)(TERMS, START, SEED).tolist() == [30.0, 30.0, 40.0]


# Importance-weighted bounds


def latent_terms(samples: int, rows: int, seed: int = 0, dim: int = 2) -> dict[str, Any]:
    """A linear decoder w z of x, with N(0, 0.5) around it; each row with parameters of its own, so
    that each has gradients of its own."""
    generator = torch.Generator().manual_seed(seed)
    leaves = {
        "mu": torch.full((rows, dim), 0.4),
        "logvar": torch.full((rows, dim), -0.6),
        "w": torch.linspace(0.5, 1.5, dim).expand(rows, dim).clone(),
    }
    for leaf in leaves.values():
        leaf.requires_grad_()
    q = LatentGaussian(leaves["mu"], leaves["logvar"])
    z = q.mu + q.std * torch.randn(samples, rows, dim, generator=generator)
    error = 1.3 - (leaves["w"] * z).sum(-1)
    nll = error.square() + 0.5 * math.log(math.pi)
    p = StandardNormal(dim)
    return {"terms": Terms(nll, (q.log_prob(z) - p.log_prob(z)).mean(0), z, q, p), **leaves}


def gradients(objective: Any, samples: int, rows: int, seed: int = 0) -> dict[str, Tensor]:
    """The loss, and each row's gradient for encoder (mu, logvar) and decoder (w)."""
    case = latent_terms(samples, rows, seed)
    loss = objective(case["terms"], torch.zeros(rows, dtype=torch.int64), SEED)
    loss.sum().backward()
    of_leaves = {name: case[name].grad for name in ("mu", "logvar", "w")}
    return {"loss": loss.detach(), **of_leaves}


def exact_log_weights(terms: Terms) -> Tensor:
    """`[S, B]` in float64, by torch.distributions."""
    q: Any = terms.q
    z = terms.z.double()  # type: ignore[union-attr]
    log_q = distributions.Normal(q.mu.double(), (0.5 * q.logvar.double()).exp()).log_prob(z)
    log_p = distributions.Normal(0.0, 1.0).log_prob(z)
    return (log_p - log_q).sum(-1) - terms.nll.double()


def log_mean_exp(log_weights: Tensor) -> Tensor:
    return (log_weights.exp().sum(0) / len(log_weights)).log()


def test_importance_weighted_values() -> None:
    """IWAE, MIWAE with M groups, and CIWAE's mix, in float64."""
    terms = latent_terms(6, 5)["terms"]
    log_w = exact_log_weights(terms)
    iwae = log_mean_exp(log_w)
    miwae = (log_mean_exp(log_w[:2]) + log_mean_exp(log_w[2:4]) + log_mean_exp(log_w[4:])) / 3
    expected = {
        (1, 0.0): iwae,
        (3, 0.0): miwae,
        (6, 0.0): log_w.mean(0),
        (1, 0.3): 0.3 * log_w.mean(0) + 0.7 * iwae,
        (3, 1.0): log_w.mean(0),
    }
    for (groups, share), bound in expected.items():
        for doubly in (False, True):
            objective = ImportanceWeighted(6, groups, share, doubly)
            loss = objective(terms, torch.zeros(5, dtype=torch.int64), SEED)
            torch.testing.assert_close(-loss.double(), bound, rtol=1e-5, atol=1e-5)
    assert (miwae < iwae).all()
    assert (log_w.mean(0) < miwae).all()


def test_log_weights_of_any_size() -> None:
    log_weights = torch.tensor([[-3000.0, 800.0], [-2000.0, 801.0]])
    bound = ImportanceWeighted(2).bound(log_weights, 1)
    expected = [-2000 - math.log(2), 801 + math.log1p(math.exp(-1)) - math.log(2)]
    assert bound.tolist() == pytest.approx(expected)


def test_one_draw_is_the_elbo() -> None:
    """With the KL measured by the draw: equal to the ELBO of a posterior without closed form, and
    to any on average."""
    flow = make_vae(posterior=InverseAutoregressive(5), likelihood=Gaussian())
    x = grey_images(6, (1, 8, 8))
    terms = rough(flow)(x, 3)
    loss = ImportanceWeighted(1)(terms, torch.zeros(6, dtype=torch.int64), SEED)
    torch.testing.assert_close(loss, -terms.elbo)

    vae, rows = rough(make_vae(likelihood=Gaussian())), 20000
    terms = vae(x[:1].expand(rows, -1, -1, -1), 3)
    loss = ImportanceWeighted(1)(terms, torch.zeros(rows, dtype=torch.int64), SEED).double()
    error = (loss + terms.elbo).std() / math.sqrt(rows)
    assert abs((loss + terms.elbo).mean()) < 5 * error


def test_the_plain_gradient_is_that_of_the_bound() -> None:
    """IWAE's and MIWAE's, against autograd through float64."""
    for groups, share in ((1, 0.0), (2, 0.0), (2, 0.4)):
        found = gradients(ImportanceWeighted(4, groups, share), 4, 5)
        case = latent_terms(4, 5)
        log_w = case["terms"].log_weights()
        halves = [log_mean_exp(part) for part in log_w.chunk(groups)]
        bound = share * log_w.mean(0) + (1 - share) * sum(halves) / groups
        (-bound).sum().backward()
        for name in ("mu", "logvar", "w"):
            torch.testing.assert_close(found[name], case[name].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 3])
def test_doubly_reparameterized_gradients(groups: int) -> None:
    """Those of the decoder are equal; those of the encoder have the same mean with less spread."""
    rows, samples = 60000, 6
    plain = gradients(ImportanceWeighted(samples, groups), samples, rows)
    doubly = gradients(
        ImportanceWeighted(samples, groups, doubly_reparameterized=True), samples, rows
    )
    torch.testing.assert_close(doubly["loss"], plain["loss"])
    torch.testing.assert_close(doubly["w"], plain["w"], rtol=1e-4, atol=1e-5)
    for name in ("mu", "logvar"):
        a, b = plain[name].double(), doubly[name].double()
        error = (a - b).std(0) / math.sqrt(rows)
        assert ((a - b).mean(0).abs() < 5 * error).all()
        assert (error < 0.1 * b.mean(0).abs()).all()  # so that another mean would show
        assert (b.var(0) < 0.7 * a.var(0)).all()


def test_doubly_reparameterized_gradients_by_hand() -> None:
    """Tucker et al. 2019, equation 8: Σ w̃² ∂log w/∂z ∂z/∂φ."""
    found = gradients(ImportanceWeighted(5, doubly_reparameterized=True), 5, 4)
    case = latent_terms(5, 4)
    terms = case["terms"]
    log_w = terms.log_weights(path_only=True)
    (of_z,) = torch.autograd.grad(log_w.sum(), terms.z, retain_graph=True)
    weights = log_w.detach().double().softmax(0).float().unsqueeze(-1)
    for name in ("mu", "logvar"):
        (expected,) = torch.autograd.grad(
            terms.z, case[name], -weights.square() * of_z, retain_graph=True
        )
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)


def test_partially_importance_weighted_gradients() -> None:
    """PIWAE: the decoder's are IWAE's with all draws, the encoder's DReG's of the groups."""
    for share in (0.0, 0.3):
        both = gradients(ImportanceWeighted(6, 3, share, decoder_all=True), 6, 50)
        iwae = gradients(ImportanceWeighted(6, 1, share), 6, 50)
        miwae = gradients(ImportanceWeighted(6, 3, share, doubly_reparameterized=True), 6, 50)
        torch.testing.assert_close(both["w"], iwae["w"], rtol=1e-4, atol=1e-6)
        for name in ("mu", "logvar"):
            torch.testing.assert_close(both[name], miwae[name], rtol=1e-3, atol=1e-6)
            assert not torch.allclose(both[name], iwae[name], rtol=1e-2)
        torch.testing.assert_close(both["loss"], iwae["loss"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_group_that_the_decoder_ignores_leaves_gradients_finite(dtype: torch.dtype) -> None:
    mu = torch.zeros(1, 2, dtype=dtype, requires_grad=True)
    q = LatentGaussian(mu, torch.zeros(1, 2, dtype=dtype))
    z = mu + torch.tensor([[[0.5, 1.0]], [[-1.0, 0.2]]], dtype=dtype)
    nll = z.float().square().sum(-1) + torch.tensor([[0.0], [3000.0]])
    terms = Terms(nll, torch.zeros(1), z, q, StandardNormal(2))
    ImportanceWeighted(2, 2, decoder_all=True)(terms, START[:1], SEED).sum().backward()
    assert mu.grad is not None
    assert mu.grad.isfinite().all()
    assert mu.grad.abs().min() > 0


@pytest.mark.parametrize(
    "objective",
    [
        ImportanceWeighted(4, doubly_reparameterized=True),
        ImportanceWeighted(4, 2, 0.2, decoder_all=True),
    ],
    ids=["DReG", "PIWAE"],
)
def test_the_change_of_the_encoders_gradient_survives_compilation(objective: Any) -> None:
    """As one graph, for the compiler's front end; and it is a change."""
    step = TrainingStep(rough(make_vae(latent_dim=3)), objective, 0)
    plain = TrainingStep(step.model, ImportanceWeighted(4), 0)
    batch, position = Batch(grey_images(6, (1, 8, 8))), torch.tensor(3)

    def found(compute: Any) -> list[Tensor]:
        step.zero_grad()
        loss, _ = compute(batch, position)
        loss.backward()
        return [loss, *(p.grad.clone() for p in step.parameters() if p.grad is not None)]

    one = torch.compile(step, fullgraph=True, dynamic=False, backend="aot_eager")
    eager, compiled, unchanged = found(step), found(one), found(plain)
    assert len(eager) == len(compiled) == 1 + len(list(step.parameters()))
    for a, b in zip(eager, compiled, strict=True):
        assert (a - b).norm() < 1e-5 * a.norm()
    assert not torch.allclose(eager[1], unchanged[1], rtol=0.01)


def test_a_flow_has_no_path_of_its_own() -> None:
    terms = make_vae(posterior=InverseAutoregressive(5))(grey_images(3, (1, 8, 8)), 0, 0, 4)
    assert ImportanceWeighted(4)(terms, START, SEED).shape == (3,)
    with pytest.raises(UserError, match="need --posterior diagonal-gaussian"):
        ImportanceWeighted(4, doubly_reparameterized=True)(terms, START, SEED)


def test_impossible_groups_and_shares() -> None:
    with pytest.raises(UserError, match="divide evenly among the groups, got 5 and 2"):
        ImportanceWeighted(5, 2)
    with pytest.raises(UserError, match=r"lies in \[0, 1\], got 1.5"):
        ImportanceWeighted(5, elbo_share=1.5)


# The KL in three parts


def batch_terms(rows: int = 7, dim: int = 3) -> Terms:
    torch.manual_seed(8)
    q = LatentGaussian(torch.randn(rows, dim), torch.randn(rows, dim))
    z = (q.mu + q.std * torch.randn(rows, dim)).unsqueeze(0)
    return Terms(100 * torch.rand(1, rows), torch.rand(rows), z, q, StandardNormal(dim))


def test_the_three_parts_are_the_divergence() -> None:
    terms = batch_terms()
    z, q = terms.z[0], terms.q  # type: ignore[index]
    loss = TotalCorrelation(500, 1.0, 1.0, 1.0)(terms, START, SEED)
    expected = terms.nll[0] + q.log_prob(z) - StandardNormal(3).log_prob(z)  # type: ignore[union-attr]
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_each_part_by_a_double_loop() -> None:
    """Chen et al. 2018, equation S3, in float64."""
    terms, size = batch_terms(), 500
    q: Any = terms.q
    mu, std = q.mu.double(), (0.5 * q.logvar.double()).exp()
    z = terms.z[0].double()  # type: ignore[index]
    rows, dim = z.shape
    parts = torch.zeros(rows, 3, dtype=torch.float64)
    normal = distributions.Normal
    for i in range(rows):
        joint = torch.zeros(rows, dtype=torch.float64)
        each = torch.zeros(rows, dim, dtype=torch.float64)
        for j in range(rows):
            each[j] = normal(mu[j], std[j]).log_prob(z[i]).exp()
            joint[j] = each[j].prod()
        log_q_z = (joint.sum() / (rows * size)).log()
        log_q_each = (each.sum(0) / (rows * size)).log().sum()
        given_x = normal(mu[i], std[i]).log_prob(z[i]).sum()
        log_p = normal(0.0, 1.0).log_prob(z[i]).sum()
        parts[i] = torch.stack([given_x - log_q_z, log_q_z - log_q_each, log_q_each - log_p])
    for weights in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.5, 6.0, 2.0)):
        found = TotalCorrelation(size, *weights)(terms, START, SEED) - terms.nll[0]
        expected = parts @ torch.tensor(weights).double()
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_total_correlation_needs_a_gaussian() -> None:
    terms = make_vae(posterior=InverseAutoregressive(5))(grey_images(3, (1, 8, 8)), 0)
    with pytest.raises(UserError, match="a diagonal Gaussian posterior"):
        TotalCorrelation(500)(terms, START, SEED)


# The MMD


def naive_mmd(a: Tensor, b: Tensor) -> float:
    """Gretton et al. 2012, equation 3, with a sum of inverse multiquadrics."""
    n, dim = a.shape

    def likeness(x: Tensor, y: Tensor) -> float:
        distance = float((x - y).square().sum())
        sizes = [2 * dim * s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10)]
        return sum(c / (c + distance) for c in sizes)

    total = 0.0
    for i in range(n):
        for j in range(n):
            if i != j:
                total += (likeness(a[i], a[j]) + likeness(b[i], b[j])) / (n * (n - 1))
            total -= 2 * likeness(a[i], b[j]) / n**2
    return total


def test_mmd_by_a_double_loop() -> None:
    a, b = torch.randn(2, 9, 3, dtype=torch.float64)
    assert MMD().mmd(a, b + 1).item() == pytest.approx(naive_mmd(a, b + 1), rel=1e-10)
    found = MMD().mmd(a.float(), b.float()).item()
    assert found == pytest.approx(naive_mmd(a, b), rel=1e-4, abs=1e-5)
    # Far from the origin and close to each other: no distance by a difference of squares.
    near = torch.tensor([[1e4, 0.0], [1e4 + 0.01, 0.0]])
    assert MMD().mmd(near, near.flip(0)).item() == pytest.approx(naive_mmd(near, near), abs=1e-5)


def test_mmd_is_zero_on_average_within_one_distribution_and_positive_between_two() -> None:
    generator = torch.Generator().manual_seed(0)
    same, apart = [], []
    for _ in range(400):
        a, b = torch.randn(2, 20, 3, generator=generator)
        same.append(MMD().mmd(a, b))
        apart.append(MMD().mmd(a, 1.5 * b))
    found = torch.stack(same)
    error = found.std() / 20
    assert abs(found.mean()) < 4 * error
    assert found.min() < 0
    assert torch.stack(apart).mean() > 20 * error
    assert MMD().mmd(a, b + 2) > 1


def test_gradient_of_the_mmd() -> None:
    a, b = torch.randn(2, 5, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(MMD().mmd, (a.requires_grad_(), b.requires_grad_()))


def test_mmd_of_a_batch_with_the_prior() -> None:
    terms, seed = batch_terms(), torch.tensor(77)
    position = torch.arange(300, 307)
    drawn = StandardNormal(3).sample(7, stream(77, MATCH), torch.device("cpu"), offset=300)
    apart = naive_mmd(terms.z[0], drawn)  # type: ignore[index]
    for weight, beta in ((10.0, 1.0), (3.0, 0.0)):
        loss = MMD(weight, beta)(terms, position, seed)
        expected = terms.nll[0] + beta * terms.kl + weight * apart
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)


def test_mmd_of_one_image() -> None:
    with pytest.raises(UserError, match="at least 2 images"):
        MMD().mmd(torch.zeros(1, 3), torch.zeros(1, 3))


def test_which_losses_depend_on_their_neighbours() -> None:
    found = [ELBO(), ImportanceWeighted(), TotalCorrelation(5), MMD()]
    assert [objective.couples_rows for objective in found] == [False, False, True, True]
