"""Scores of images, beside formulas written out and SciPy."""

import math
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import torch
from fastvae_kernels import normal, uniform
from safetensors.torch import save_file
from torch import Tensor

from fastvae.errors import UserError
from fastvae.estimators import (
    Features,
    ReconstructionMetrics,
    frechet_distance,
    inception_features,
)


def pair(count: int, shape: tuple[int, int, int], noise: float = 0.1) -> tuple[Tensor, Tensor]:
    x = uniform((count, *shape), 0)
    return x, (x + noise * normal((count, *shape), 1)).clamp(0, 1)


def ssim_of_wang(x: np.ndarray, y: np.ndarray, radius: int, sigma: float) -> float:
    """Equation 13 of Wang et al. 2004 on one channel, float64, windows inside the image."""

    def mean(image: np.ndarray) -> np.ndarray:
        filtered = scipy.ndimage.gaussian_filter(image, sigma, radius=radius)
        return filtered[radius:-radius, radius:-radius]

    c1, c2 = 0.01**2, 0.03**2
    mx, my = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    score = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return float(score.mean())


@pytest.mark.parametrize(
    ("shape", "window"),
    [((3, 16, 13), 11), ((1, 11, 28), 11), ((1, 8, 8), 7), ((2, 5, 30), 5), ((1, 4, 4), 3)],
)
def test_beside_the_formulas(shape: tuple[int, int, int], window: int) -> None:
    x, y = pair(7, shape)
    metrics = ReconstructionMetrics(shape)
    for rows in (slice(0, 3), slice(3, 3), slice(3, 7)):
        metrics.update(x[rows], y[rows])
    found = metrics.compute()
    mse = (x.double() - y.double()).square().flatten(1).mean(1)
    assert found.images == 7
    assert found.mse == pytest.approx(mse.mean().item(), rel=1e-6)
    assert found.psnr == pytest.approx((-10 * mse.log10()).mean().item(), rel=1e-6)
    radius = window // 2
    planes = [images.double().flatten(0, 1).numpy() for images in (x, y)]
    ssim = [ssim_of_wang(a, b, radius, 0.3 * radius) for a, b in zip(*planes, strict=True)]
    assert found.ssim_window == window
    assert found.ssim == pytest.approx(np.mean(ssim), abs=1e-5)
    assert 0.3 < found.ssim < 0.999


def test_ranks_are_joined_by_adding() -> None:
    shape = (1, 12, 12)
    x, y = pair(9, shape)
    whole, first, second, none = (ReconstructionMetrics(shape) for _ in range(4))
    whole.update(x, y)
    first.update(x[:2], y[:2])
    second.update(x[2:], y[2:])
    none.totals = first.totals + second.totals + none.totals
    assert none.compute() == pytest.approx(whole.compute(), rel=1e-6)


def test_stored_pixels_and_values_out_of_range() -> None:
    stored = (uniform((4, 1, 12, 12), 2) * 256).to(torch.uint8)
    metrics = ReconstructionMetrics((1, 12, 12))
    metrics.update(stored, stored / 255)
    found = metrics.compute()
    assert (found.mse, found.psnr, found.ssim) == pytest.approx((0, 100, 1), abs=1e-6)
    black = ReconstructionMetrics((1, 12, 12))
    black.update(torch.zeros(1, 1, 12, 12), torch.full((1, 1, 12, 12), -3.0))
    assert black.compute().mse == 0


def test_tiny_images_have_no_ssim() -> None:
    x, y = pair(3, (3, 2, 9))
    metrics = ReconstructionMetrics((3, 2, 9))
    metrics.update(x, y)
    assert metrics.compute().ssim_window == 0
    assert math.isnan(metrics.compute().ssim)
    assert metrics.compute().mse > 0


def test_refuses_what_does_not_fit() -> None:
    metrics = ReconstructionMetrics((1, 12, 12))
    with pytest.raises(UserError, match="no images"):
        metrics.compute()
    with pytest.raises(UserError, match=r"originals must be \[B, 1, 12, 12\]"):
        metrics.update(torch.zeros(2, 12, 12), torch.zeros(2, 12, 12))
    with pytest.raises(UserError, match=r"reconstructions must be .* got \(1, 1, 12, 12\)"):
        metrics.update(torch.zeros(2, 1, 12, 12), torch.zeros(1, 1, 12, 12))


@pytest.mark.parametrize(("rows_a", "rows_b", "columns"), [(200, 150, 9), (6, 8, 17), (50, 50, 1)])
def test_frechet_beside_scipy(rows_a: int, rows_b: int, columns: int) -> None:
    mixing = normal((columns, columns), 3)
    a = normal((rows_a, columns), 4)
    b = normal((rows_b, columns), 5) @ mixing + 0.5
    found = frechet_distance(a, b, name="numbers")
    cov_a, cov_b = (np.cov(f.double().numpy(), rowvar=False).reshape(columns, -1) for f in (a, b))
    # SciPy's root of a singular product is only good to about 1e-6.
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    mean = (a.double().mean(0) - b.double().mean(0)).square().sum().item()
    expected = mean + np.trace(cov_a) + np.trace(cov_b) - 2 * np.trace(root)
    assert found.distance == pytest.approx(expected, rel=1e-5)
    assert found.features == "numbers"
    assert found.images == (rows_a, rows_b)
    assert frechet_distance(b, a, name="").distance == pytest.approx(found.distance, rel=1e-9)


def test_frechet_of_known_gaussians() -> None:
    """Commuting covariances: Σ (σ_a − σ_b)² + ‖μ_a − μ_b‖²; and 0 between a set and itself."""
    a = normal((500, 4), 6).double()
    a = (a - a.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(a.T))).T
    scale = torch.tensor([1.0, 2.0, 0.0, 5.0])
    found = frechet_distance(a, a * scale + 3, name="").distance
    assert found == pytest.approx((0 + 1 + 1 + 16) + 4 * 9, rel=1e-9)
    assert frechet_distance(a, a, name="").distance == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a[:3], a[:3], name="").distance == pytest.approx(0, abs=1e-9)


def test_frechet_refuses() -> None:
    for a, b in (((5, 3), (5, 2)), ((1, 3), (5, 3)), ((5, 3, 1), (5, 3, 1))):
        with pytest.raises(UserError, match="at least two images"):
            frechet_distance(torch.zeros(a), torch.zeros(b), name="")


def test_no_weights_no_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    reason = inception_features()
    assert isinstance(reason, str)
    assert str(tmp_path / "checkpoints" / "inception_v3_google-0cc3c7bd.safetensors") in reason
    assert not list(tmp_path.iterdir())  # nothing was downloaded
    wrong = tmp_path / "wrong.safetensors"
    save_file({"a": torch.zeros(3)}, wrong)
    with pytest.raises(UserError, match=r"wrong\.safetensors does not hold"):
        inception_features(wrong)
    torch.save({"a": torch.zeros(3)}, wrong)  # a pickle
    with pytest.raises(UserError, match=r"wrong\.safetensors does not hold"):
        inception_features(wrong)


def test_inception_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models import inception_v3
    from torchvision.transforms.v2.functional import normalize

    torch.manual_seed(0)
    network = inception_v3(init_weights=False, transform_input=True).eval()
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    save_file(network.state_dict(), checkpoints / "inception_v3_google-0cc3c7bd.safetensors")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    features = inception_features()
    assert isinstance(features, Features)
    assert "inception_v3_google-0cc3c7bd.safetensors (SHA-256" in features.name
    assert "not comparable" in features.name
    grey = (uniform((2, 1, 299, 299), 7) * 256).to(torch.uint8)
    found = features.extract(grey)
    assert found.shape == (2, 2048)
    # torchvision's own road: ImageNet's normalisation, undone inside by transform_input.
    network.fc = torch.nn.Identity()
    x = normalize(
        grey.expand(-1, 3, -1, -1) / 255, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]
    )
    with torch.no_grad():
        expected = network(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * expected.std().item())
    assert features.extract(torch.rand(1, 3, 9, 14)).shape == (1, 2048)
    with pytest.raises(UserError, match="1 or 3"):
        features.extract(torch.rand(1, 2, 9, 14))
