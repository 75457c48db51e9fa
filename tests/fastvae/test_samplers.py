"""Samplers recover densities that are known, draw from them, and come back from their files."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import stats
from torch import Tensor

from fastvae.errors import UserError
from fastvae.samplers import (
    FlowSampler,
    GaussianMixtureSampler,
    LatentSampler,
    load_sampler,
    save_sampler,
)

CPU = torch.device("cpu")


# A mixture in three dimensions with strong correlations and one latent of a tiny scale.
WEIGHTS = np.array([0.55, 0.3, 0.15])
MEANS = np.array([[0.0, 0.0, 0.0], [6.0, -2.0, 2e-3], [-5.0, 4.0, -1e-3]])
FACTORS = np.array(
    [
        [[1.0, 0.0, 0.0], [0.9, 0.4, 0.0], [5e-4, 0.0, 1e-3]],
        [[0.5, 0.0, 0.0], [-0.3, 1.2, 0.0], [0.0, -1e-3, 1e-3]],
        [[1.5, 0.0, 0.0], [0.0, 0.7, 0.0], [0.0, 0.0, 5e-4]],
    ]
)
COVARIANCES = FACTORS @ FACTORS.transpose(0, 2, 1)


def true_log_prob(z: Tensor, components: tuple[int, ...] = (0, 1, 2)) -> np.ndarray:
    weights = WEIGHTS[list(components)] / WEIGHTS[list(components)].sum()
    return np.logaddexp.reduce(
        [
            np.log(w) + stats.multivariate_normal(MEANS[k], COVARIANCES[k]).logpdf(z.numpy())
            for w, k in zip(weights, components, strict=True)
        ]
    )


def true_draws(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = np.random.default_rng(seed)
    component = generator.choice(3, count, p=WEIGHTS)
    eps = generator.standard_normal((count, 3, 1))
    z = MEANS[component] + (FACTORS[component] @ eps)[:, :, 0]
    return torch.from_numpy(z), torch.from_numpy(component)


def known_mixture(
    owner: tuple[int, ...] = (0, 0, 0),
    classes: int = 0,
    weights: Tensor | None = None,
    spread: float = 1.0,
) -> GaussianMixtureSampler:
    return GaussianMixtureSampler(
        torch.from_numpy(WEIGHTS) if weights is None else weights,
        torch.from_numpy(spread * MEANS),
        torch.from_numpy(FACTORS),
        torch.tensor(owner),
        classes,
    )


def bent_draws(count: int, seed: int) -> Tensor:
    generator = np.random.default_rng(seed)
    x = generator.standard_normal(count)
    y = 0.5 * x**2 + 0.3 * generator.standard_normal(count)
    return torch.from_numpy(np.stack([x, 10 * y + 100], 1)).float()


def bent_log_prob(z: Tensor) -> np.ndarray:
    x, y = z[:, 0].double().numpy(), (z[:, 1].double().numpy() - 100) / 10
    return stats.norm.logpdf(x) + stats.norm.logpdf(y, 0.5 * x**2, 0.3) - np.log(10)


@pytest.fixture(scope="module")
def bent_flow() -> FlowSampler:
    return FlowSampler.fit(bent_draws(4000, 0), hidden=(32, 32), transforms=2, steps=500)


@pytest.fixture(scope="module")
def class_flow() -> FlowSampler:
    """Class 0 is N(−3, 0.5²), class 1 N(2, 1), in one dimension; one is thrice as frequent."""
    z, labels = two_classes(3000, 0)
    return FlowSampler.fit(z, labels, hidden=(16, 16), transforms=2, steps=400)


CLASS_MEANS, CLASS_STDS = np.array([-3.0, 2.0]), np.array([0.5, 1.0])


def two_classes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = np.random.default_rng(seed)
    labels = (generator.random(count) < 0.25).astype(np.int64)
    z = CLASS_MEANS[labels] + CLASS_STDS[labels] * generator.standard_normal(count)
    return torch.from_numpy(z[:, None]).float(), torch.from_numpy(labels)


# ------------------------------------------------------------------------------- the mixture


def test_the_density_of_a_known_mixture() -> None:
    z = torch.cat([true_draws(301, 0)[0], torch.tensor([[40.0, -30.0, 0.01]])])
    found = known_mixture().log_prob(z)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, true_log_prob(z), rtol=1e-6, atol=1e-5)
    strided = z.float().T.contiguous().T
    np.testing.assert_allclose(
        known_mixture().log_prob(strided), true_log_prob(strided.double()), rtol=1e-5, atol=1e-4
    )


def test_a_known_mixture_given_its_class() -> None:
    z, component = true_draws(200, 1)
    labels = (component == 1).long()
    weights = torch.from_numpy(WEIGHTS) / torch.tensor([0.7, 0.3, 0.7], dtype=torch.float64)
    found = known_mixture((0, 1, 0), 2, weights).log_prob(z, labels)
    by_class = np.stack([true_log_prob(z, (0, 2)), true_log_prob(z, (1,))])
    expected = by_class[labels, np.arange(200)]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-5)


def test_a_known_mixture_is_recovered() -> None:
    sampler = GaussianMixtureSampler.fit(true_draws(20_000, 2)[0].float(), components=3)
    fresh, _ = true_draws(20_000, 3)
    divergence = true_log_prob(fresh) - sampler.log_prob(fresh).numpy()
    assert abs(divergence.mean()) < 0.01
    assert np.abs(divergence).mean() < 0.05
    order = sampler.weights.argsort(descending=True)
    np.testing.assert_allclose(sampler.weights[order], WEIGHTS, atol=0.015)
    scale = np.sqrt(np.diagonal(COVARIANCES, axis1=1, axis2=2))
    np.testing.assert_allclose((sampler.means[order].numpy() - MEANS) / scale, 0, atol=0.1)
    found = sampler.cholesky[order] @ sampler.cholesky[order].mT
    relative = (found.numpy() - COVARIANCES) / (scale[:, :, None] * scale[:, None])
    np.testing.assert_allclose(relative, 0, atol=0.1)


def test_a_mixture_agrees_with_scikit_learn() -> None:
    from sklearn.mixture import GaussianMixture

    z = true_draws(2000, 4)[0]
    sampler = GaussianMixtureSampler.fit(z, components=1, reg_covar=1e-9)
    truth = GaussianMixture(1, reg_covar=0).fit(z.numpy()).score_samples(z.numpy())
    # The likelihood of one Gaussian has one maximum, which does not depend on units.
    np.testing.assert_allclose(sampler.log_prob(z), truth, rtol=1e-4, atol=2e-2)


def test_draws_of_a_mixture_have_its_moments() -> None:
    count = 100_001
    z = known_mixture().sample(count, 7, CPU).double().numpy()
    mean = WEIGHTS @ MEANS
    second = COVARIANCES + MEANS[:, :, None] * MEANS[:, None]
    covariance = np.einsum("k,kij->ij", WEIGHTS, second) - np.outer(mean, mean)
    std = np.sqrt(np.diag(covariance))
    np.testing.assert_allclose((z.mean(0) - mean) / std, 0, atol=4 / count**0.5)
    relative = (np.cov(z.T) - covariance) / np.outer(std, std)
    np.testing.assert_allclose(relative, 0, atol=0.02)
    for d in range(3):

        def cdf(x: np.ndarray, d: int = d) -> np.ndarray:
            scale = np.sqrt(COVARIANCES[:, d, d])
            return stats.norm.cdf(x[:, None], MEANS[:, d], scale) @ WEIGHTS

        assert stats.kstest(z[:, d], cdf).pvalue > 1e-3


def test_component_and_place_within_it_are_independent() -> None:
    z = known_mixture(spread=20).sample(60_000, 11, CPU).double().numpy()
    # The components lie so far apart that the nearest is the one that was drawn.
    component = np.abs(z[:, :1] - 20 * MEANS[:, 0]).argmin(1)
    for k in range(3):
        rows = z[component == k] - 20 * MEANS[k]
        eps = np.linalg.solve(FACTORS[k], rows.T)
        for row in eps[:2]:
            assert stats.kstest(row, "norm").pvalue > 1e-3


@pytest.mark.parametrize(("rows", "components", "expected"), [(4, 10, 1), (13, 10, 3), (13, 2, 2)])
def test_few_rows_make_few_components(rows: int, components: int, expected: int) -> None:
    z = true_draws(rows, 5)[0]
    sampler = GaussianMixtureSampler.fit(z, components=components)
    assert len(sampler.weights) == expected


def test_a_latent_that_never_moves() -> None:
    z = torch.cat([true_draws(500, 6)[0], torch.full((500, 1), 3.25)], 1)
    sampler = GaussianMixtureSampler.fit(z, components=4)
    draws = sampler.sample(1000, 0, CPU)
    assert (draws[:, 3] - 3.25).abs().max() < 1e-4
    assert sampler.log_prob(z).isfinite().all()


# ----------------------------------------------------------------------------------- the flow


def test_a_flow_learns_a_bent_density(bent_flow: FlowSampler) -> None:
    fresh = bent_draws(5000, 1)
    truth = bent_log_prob(fresh).mean()
    gaussian = stats.multivariate_normal(fresh.mean(0), np.cov(fresh.T)).logpdf(fresh).mean()
    assert truth - gaussian > 0.8
    assert -0.02 < truth - bent_flow.log_prob(fresh).mean().item() < 0.15


def test_the_density_of_a_flow_integrates_to_one(bent_flow: FlowSampler) -> None:
    x, y = torch.linspace(-6, 6, 401), torch.linspace(70, 320, 501)
    density = bent_flow.log_prob(torch.cartesian_prod(x, y)).exp().double().view(401, 501)
    total = torch.trapezoid(torch.trapezoid(density, y.double()), x.double())
    assert total.item() == pytest.approx(1, abs=0.005)


def test_draws_of_a_flow_follow_its_density(bent_flow: FlowSampler) -> None:
    z = bent_flow.sample(9001, 3, CPU)
    assert z.shape == (9001, 2)
    assert len(z.unique(dim=0)) == 9001  # more than go through the networks at once
    assert z.dtype == torch.float32
    x = torch.linspace(-6, 6, 401)
    for d, other in ((0, torch.linspace(70, 320, 1001)), (1, torch.linspace(-6, 6, 1001))):
        grid = x if d == 0 else torch.linspace(70, 320, 401)
        pairs = torch.cartesian_prod(grid, other)
        density = bent_flow.log_prob(pairs if d == 0 else pairs.flip(1)).exp().view(401, 1001)
        cdf = torch.cumulative_trapezoid(torch.trapezoid(density, other), grid)
        at = np.interp(z[:, d].numpy(), grid[1:].numpy(), cdf.numpy())
        assert stats.kstest(at, "uniform").statistic < 0.025


@pytest.mark.slow
def test_a_flow_of_each_class(class_flow: FlowSampler) -> None:
    z, labels = two_classes(4000, 1)
    truth = stats.norm.logpdf(z[:, 0].numpy(), CLASS_MEANS[labels], CLASS_STDS[labels])
    assert abs((truth - class_flow.log_prob(z, labels).numpy()).mean()) < 0.05
    for k in range(2):
        draws = class_flow.sample(3000, 5, CPU, torch.full((3000,), k))
        assert draws.mean().item() == pytest.approx(CLASS_MEANS[k], abs=0.15)
        assert draws.std().item() == pytest.approx(CLASS_STDS[k], rel=0.15)


def test_a_fit_is_a_function_of_its_seed() -> None:
    z = bent_draws(200, 0)

    def fit(seed: int) -> Tensor:
        return FlowSampler.fit(z, hidden=(8,), transforms=1, steps=20, seed=seed).log_prob(z)

    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = fit(0)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(fit(0), first)
    assert not torch.equal(fit(1), first)


def test_a_flow_stops_before_it_learns_the_rows_by_heart() -> None:
    z = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    fresh = torch.randn(2000, 4, generator=torch.Generator().manual_seed(1))
    sampler = FlowSampler.fit(z, steps=300)
    # The entropy is 5.7 nats; 300 steps without the stop come to 16.
    assert -sampler.log_prob(fresh).mean() < 8


def test_a_fit_that_diverges_says_so() -> None:
    with pytest.raises(UserError, match="learning_rate"):
        FlowSampler.fit(bent_draws(100, 0), steps=100, learning_rate=1e20)


def test_without_zuko(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bent_flow: FlowSampler
) -> None:
    save_sampler(bent_flow, tmp_path / "flow.safetensors")
    monkeypatch.setitem(sys.modules, "zuko", None)
    with pytest.raises(UserError, match=r"pip install 'fastvae\[flows\]'"):
        FlowSampler.fit(bent_draws(100, 0))
    with pytest.raises(UserError, match=r"pip install 'fastvae\[flows\]'"):
        load_sampler(tmp_path / "flow.safetensors")


# ------------------------------------------------------------------------------- of both kinds


@pytest.fixture(params=["mixture", "flow"])
def sampler(request: pytest.FixtureRequest) -> LatentSampler:
    if request.param == "mixture":
        return known_mixture()
    return request.getfixturevalue("bent_flow")


@pytest.fixture(params=["mixture", "flow"])
def of_classes(request: pytest.FixtureRequest) -> LatentSampler:
    if request.param == "mixture":
        return GaussianMixtureSampler.fit(*two_classes(500, 0), components=2)
    return request.getfixturevalue("class_flow")


def test_a_row_is_a_function_of_seed_and_place(sampler: LatentSampler) -> None:
    torch.manual_seed(0)
    many = sampler.sample(37, 9, "cpu")
    torch.manual_seed(1)
    assert torch.equal(sampler.sample(37, 9, "cpu"), many)
    torch.testing.assert_close(sampler.sample(5, 9, CPU), many[:5], rtol=1e-3, atol=1e-4)
    assert (sampler.sample(37, 10, CPU) - many).abs().amax(1).min() > 1e-6
    assert len(many.unique(dim=0)) == 37
    assert sampler.sample(0, 9, CPU).shape == (0, sampler.latent_dim)


def test_a_row_is_a_function_of_its_own_label(of_classes: LatentSampler) -> None:
    labels = torch.arange(41) % 2
    mixed = of_classes.sample(41, 4, CPU, labels)
    for k in range(2):
        alone = of_classes.sample(41, 4, CPU, torch.full((41,), k))
        torch.testing.assert_close(mixed[k::2], alone[k::2], rtol=1e-3, atol=1e-4)
    assert (mixed[::2] < 0).all()
    # z under the other class is less likely.
    found = of_classes.log_prob(mixed, labels) - of_classes.log_prob(mixed, 1 - labels)
    assert (found > 0).float().mean() > 0.9


def test_a_mixture_of_each_class() -> None:
    z, labels = two_classes(4000, 0)
    sampler = GaussianMixtureSampler.fit(z, labels, components=1)
    for k in range(2):
        rows = z[labels == k][:, 0].double()
        expected = stats.norm.logpdf(z[:, 0].numpy(), rows.mean(), rows.std(correction=0))
        found = sampler.log_prob(z, torch.full((4000,), k))
        np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-2)


def test_it_comes_back_from_its_file(
    sampler: LatentSampler, of_classes: LatentSampler, tmp_path: Path
) -> None:
    for k, saved in enumerate((sampler, of_classes)):
        path = tmp_path / f"{k}.safetensors"
        save_sampler(saved, path)
        loaded = load_sampler(path)
        assert type(loaded) is type(saved)
        assert (loaded.latent_dim, loaded.classes) == (saved.latent_dim, saved.classes)
        labels = torch.arange(9) % 2 if saved.classes else None
        z = saved.sample(9, 0, CPU, labels)
        assert torch.equal(loaded.sample(9, 0, CPU, labels), z)
        assert torch.equal(loaded.log_prob(z, labels), saved.log_prob(z, labels))


def rewrite(change: Callable[[dict, dict], object]) -> Callable[[Path], object]:
    def apply(path: Path) -> None:
        from safetensors import safe_open

        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata())
        change(tensors, metadata)
        save_file(tensors, path, metadata)

    return apply


DAMAGE: dict[str, Callable[[Path], object]] = {
    "absent": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-10]),
    "text": lambda path: path.write_text("a sampler " * 30),
    "no metadata": rewrite(lambda tensors, metadata: metadata.clear()),
    "kind": rewrite(lambda tensors, metadata: metadata.update(kind="oracle")),
    "json": rewrite(lambda tensors, metadata: metadata.update(arguments="{")),
    "list": rewrite(lambda tensors, metadata: metadata.update(arguments="[]")),
    "classes": rewrite(lambda tensors, metadata: metadata.update(arguments='{"classes": 3}')),
    "tensor gone": rewrite(lambda tensors, metadata: tensors.pop(sorted(tensors)[0])),
    "shape": rewrite(lambda tensors, _: tensors.update({k: v[:1] for k, v in tensors.items()})),
    "nan": rewrite(
        lambda tensors, _: [
            t.fill_(float("nan")) for t in tensors.values() if t.is_floating_point()
        ]
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused(sampler: LatentSampler, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "sampler.safetensors"
    save_sampler(sampler, path)
    DAMAGE[damage](path)
    with pytest.raises(UserError, match=r"sampler\.safetensors"):
        load_sampler(path)


def test_a_file_names_its_kind(sampler: LatentSampler, tmp_path: Path) -> None:
    from safetensors import safe_open

    save_sampler(sampler, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["kind"] == sampler.kind
    assert json.loads(metadata["arguments"])["classes"] == 0


def test_an_unwritable_file(sampler: LatentSampler, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing" / "a.safetensors"):
        with pytest.raises(UserError, match="cannot write"):
            save_sampler(sampler, path)


LATENTS = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", [GaussianMixtureSampler, FlowSampler])
@pytest.mark.parametrize(
    ("z", "labels", "message"),
    [
        (LATENTS[:1], None, "N ≥ 2"),
        (LATENTS.long(), None, "floating"),
        (LATENTS.flatten(), None, r"\[N, D\]"),
        (LATENTS / 0, None, "finite"),
        (LATENTS, torch.zeros(40), "int64"),
        (LATENTS, torch.zeros(39, dtype=torch.int64), "int64"),
        (LATENTS, torch.arange(40) % 2 + 1, "these occur"),
        (LATENTS, torch.arange(40) % 2 - 1, "these occur"),
    ],
)
def test_what_cannot_be_fitted(
    kind: type[LatentSampler], z: Tensor, labels: Tensor | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        kind.fit(z, labels)  # type: ignore[attr-defined]


def test_arguments_that_do_not_fit() -> None:
    with pytest.raises(UserError, match="components=0"):
        GaussianMixtureSampler.fit(LATENTS, components=0)
    with pytest.raises(UserError, match="reg_covar"):
        GaussianMixtureSampler.fit(LATENTS, reg_covar=0)
    with pytest.raises(UserError, match="class 1 has 1"):
        GaussianMixtureSampler.fit(LATENTS, (torch.arange(40) == 3).long())
    with pytest.raises(UserError, match="at least 20"):
        FlowSampler.fit(LATENTS[:19])


def test_labels_that_do_not_fit(sampler: LatentSampler, of_classes: LatentSampler) -> None:
    with pytest.raises(UserError, match="takes none"):
        sampler.sample(3, 0, CPU, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(UserError, match="2 classes"):
        of_classes.sample(3, 0, CPU)
    with pytest.raises(UserError, match=r"\(3,\)"):
        of_classes.sample(3, 0, CPU, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(UserError, match=r"\[0, 2\), got 0 to 2"):
        of_classes.sample(3, 0, CPU, torch.arange(3))
    with pytest.raises(UserError, match=r"\(N, "):
        sampler.log_prob(torch.zeros(3, sampler.latent_dim + 1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_draws_the_same(sampler: LatentSampler, of_classes: LatentSampler) -> None:
    for drawn in (sampler, of_classes):
        labels = torch.arange(501) % 2 if drawn.classes else None
        on_cpu = drawn.sample(501, 3, CPU, labels)
        on_gpu = drawn.sample(501, 3, "cuda", None if labels is None else labels.cuda())
        assert on_gpu.is_cuda
        torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-3, atol=1e-3)
        assert drawn.log_prob(on_gpu, None if labels is None else labels.cuda()).is_cuda
        drawn.sample(1, 0, CPU, None if labels is None else labels[:1])
