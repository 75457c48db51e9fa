"""The pictures of a run show what they should."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import Tensor

from fastvae import figures
from fastvae.errors import UserError
from fastvae.evaluation import quantity_names


def read(path: Path) -> torch.Tensor:
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.mode in ("RGB", "RGBA")
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


@pytest.fixture
def charts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list]:
    """The charts that were drawn, to look at what is in them."""
    from matplotlib import pyplot as plt

    shown: list = []
    with monkeypatch.context() as patch:
        patch.setattr(plt, "close", shown.append)
        yield shown
    plt.close("all")


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 50, 70), (1, 1, 1), (3, 8, 5)], ids=str)
def test_a_grid_shows_every_pixel(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    levels = torch.randint(0, 256, (5, *shape), generator=torch.Generator().manual_seed(0))
    figures.save_grid(levels / 255, tmp_path / "grid.png", columns=3)
    scale = max(1, -(-48 // shape[2]))
    height, width = shape[1] * scale + 2, shape[2] * scale + 2
    shown = read(tmp_path / "grid.png")
    assert shown.shape == (3, 2 * height + 2, 3 * width + 2)
    for i in range(5):
        top, left = 2 + i // 3 * height, 2 + i % 3 * width
        tile = shown[:, top : top + height - 2 : scale, left : left + width - 2 : scale]
        assert torch.equal(tile, levels[i].expand(3, -1, -1).to(torch.uint8))


def test_values_outside_are_clipped(tmp_path: Path) -> None:
    figures.save_grid(torch.tensor([-3.0, 7.0]).view(2, 1, 1, 1), tmp_path / "a.png", columns=2)
    shown = read(tmp_path / "a.png")
    assert shown[0, 5, 5] == 0
    assert shown[0, 5, 60] == 255


def test_an_unwritable_picture(tmp_path: Path) -> None:
    for name in ("grid", "grid.xyz", "missing/grid.png"):
        with pytest.raises(UserError, match="cannot write"):
            figures.save_grid(torch.zeros(1, 1, 2, 2), tmp_path / name, columns=1)


def lines(names: dict[str, str], count: int = 40) -> list[dict[str, Any]]:
    found = []
    for i in range(count):
        values = {names["elbo"]: -100 / (i + 1) - 5, names["nll"]: 90 / (i + 1), "kl": 0.1 * i}
        line = {"epoch": i / 4, **values}
        if i % 8 == 0:
            line |= {f"heldout_{key}": value for key, value in values.items()}
        found.append(line)
    return found


@pytest.mark.parametrize(
    ("is_density", "is_bound", "expected"),
    [
        (True, True, ["ELBO", "−log p(x given z)"]),
        (True, False, ["log p(x given z) − KL", "−log p(x given z)"]),
        (False, False, ["−(cross-entropy + KL)", "cross-entropy"]),
    ],
)
def test_curves_are_called_what_they_are(
    tmp_path: Path, is_density: bool, is_bound: bool, expected: list[str], charts: list
) -> None:
    names = quantity_names(is_density, is_bound)
    figures.save_curves(lines(names), names, tmp_path / "curves.png")
    (figure,) = charts
    assert [axis.get_title() for axis in figure.axes] == [*expected, "KL(q ‖ p)"]
    for axis in figure.axes:
        assert [len(line.get_xdata()) for line in axis.lines] == [40, 5]
        assert axis.get_xlabel() == "epoch"
        assert axis.get_ylabel() == "nats per image"
    drawn = figure.axes[0].lines[0]
    assert drawn.get_ydata()[3] == -30.0
    assert drawn.get_xdata()[3] == 0.75
    assert read(tmp_path / "curves.png").float().std() > 5


def test_curves_of_little(tmp_path: Path) -> None:
    names = quantity_names(True, True)
    figures.save_curves(lines(names, 1), names, tmp_path / "one.png")
    broken = [{**line, names["elbo"]: float("nan"), "kl": float("inf")} for line in lines(names)]
    figures.save_curves(broken, names, tmp_path / "broken.png")


# ------------------------------------------------------------------------ walks through latents


def flat(z: Tensor) -> Tensor:
    """A decoder of one latent: a 3 × 5 tile as bright as z0."""
    return z[:, 0].view(-1, 1, 1, 1).expand(-1, 1, 3, 5)


def tiles(shown: Tensor, rows: int, columns: int, size: tuple[int, int], padding: int) -> Tensor:
    """The middle of each tile of a grid, `[rows, columns]`."""
    height, width = size[0] + padding, size[1] + padding
    return shown[0, padding + size[0] // 2 :: height, padding + size[1] // 2 :: width][
        :rows, :columns
    ]


@pytest.mark.parametrize("dim", [2, 3, 17])
def test_the_way_between_two_latents_is_an_arc(dim: int) -> None:
    generator = torch.Generator().manual_seed(dim)
    pairs = torch.randn(4, 2, dim, generator=generator)
    found = figures.interpolate(pairs, 7)
    assert found.shape == (4, 7, dim)
    assert found.dtype == torch.float32
    a, b = pairs.double().numpy().transpose(1, 0, 2)
    lengths = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    angle = np.arccos((a * b).sum(1) / lengths[0] / lengths[1])[:, None]
    for i, t in enumerate(np.linspace(0, 1, 7)):
        expected = (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
        np.testing.assert_allclose(found[:, i], expected, atol=1e-5)
    unit = torch.nn.functional.normalize(pairs, dim=2)
    # On the sphere, and evenly spaced on it.
    way = figures.interpolate(unit, 5)
    torch.testing.assert_close(way.norm(dim=2), torch.ones(4, 5))
    steps = way.diff(dim=1).norm(dim=2)
    torch.testing.assert_close(steps, steps[:, :1].expand(-1, 4))


@pytest.mark.parametrize(
    ("a", "b"),
    [([1.5], [-2.0]), ([0.0, 0.0], [1.0, 2.0]), ([1.0, 1.0], [3.0, 3.0]), ([1.0, 2], [-2, -4])],
)
def test_the_way_through_the_origin_is_straight(a: list[float], b: list[float]) -> None:
    found = figures.interpolate(torch.tensor([[a, b]]), 5)[0]
    np.testing.assert_allclose(found, np.linspace(a, b, 5), atol=1e-6)


def test_interpolations_run_along_rows(tmp_path: Path) -> None:
    pairs = torch.tensor([[[0.0], [1.0]], [[1.0], [0.5]]])
    figures.save_interpolations(flat, pairs, tmp_path / "a.png", steps=3)
    shown = tiles(read(tmp_path / "a.png"), 2, 3, (30, 50), 2)
    assert shown.tolist() == [[0, 128, 255], [255, 191, 128]]


def test_traversals_move_one_latent_each(tmp_path: Path, charts: list) -> None:
    z = torch.tensor([0.5, -1.0, 2.0, 3.0])
    scale = torch.tensor([1.0, 2.0, 0.1, 1.0])
    seen = []

    def decode(z: Tensor) -> Tensor:
        seen.append(z)
        return torch.zeros(len(z), 3, 8, 8)

    kl = torch.tensor([0.5, 3.25, 1.0, 0.001])
    figures.save_traversals(decode, z, scale, kl, tmp_path / "a.png", latents=3, steps=5, span=2)
    (walks,) = seen
    rows = []
    for latent in (1, 2, 0):
        for t in (-2, -1, 0, 1, 2):
            row = z.clone()
            row[latent] = t * scale[latent]
            rows.append(row)
    torch.testing.assert_close(walks, torch.stack(rows))
    (axis,) = charts[0].axes
    assert [label.get_text() for label in axis.get_yticklabels()] == [
        "z1   3.25",
        "z2   1.00",
        "z0   0.50",
    ]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["−2", "−1", "0", "+1", "+2"]


def test_the_manifold_is_even_in_probability(tmp_path: Path) -> None:
    seen = []

    def decode(z: Tensor) -> Tensor:
        seen.append(z)
        share = torch.special.ndtr(z)
        return (share[:, 0] * 0.9 + share[:, 1] * 0.1).view(-1, 1, 1, 1).expand(-1, 3, 4, 7)

    figures.save_manifold(decode, tmp_path / "a.png", side=5)
    at = stats.norm.ppf([0.1, 0.3, 0.5, 0.7, 0.9])
    expected = [[x, y] for y in at[::-1] for x in at]
    np.testing.assert_allclose(seen[0], expected, atol=1e-6)
    shown = read(tmp_path / "a.png")
    assert shown.shape == (3, 5 * 28, 5 * 49)
    found = tiles(shown, 5, 5, (28, 49), 0).double() / 255
    share = np.array([0.1, 0.3, 0.5, 0.7, 0.9])
    # z0 grows to the right, z1 upwards.
    np.testing.assert_allclose(found, 0.9 * share + 0.1 * share[::-1, None], atol=0.003)


def test_classes_are_rows(tmp_path: Path, charts: list) -> None:
    levels = torch.randint(0, 2, (3, 4, 3, 12, 9), generator=torch.Generator().manual_seed(0))
    path = tmp_path / "a.png"
    figures.save_class_grid(levels.float(), path, names=["ankle boot", "coat", "shirt"])
    (axis,) = charts[0].axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["ankle boot", "coat", "shirt"]
    # Every pixel is there, enlarged by a whole factor of 6, wherever the picture begins.
    shown = read(path)
    places = [
        (top, left)
        for top in range(shown.shape[1] - 3 * 74)
        for left in range(shown.shape[2] - 4 * 56)
        if torch.equal(
            shown[:, top + 2 : top + 74 : 6, left + 2 : left + 56 : 6], levels[0, 0] * 255
        )
    ]
    assert places
    for top, left in places[:1]:
        for k in range(3):
            for i in range(4):
                y, x = top + 2 + 74 * k, left + 2 + 56 * i
                tile = shown[:, y : y + 72, x : x + 54].long()
                large = levels[k, i].repeat_interleave(6, 1).repeat_interleave(6, 2) * 255
                assert torch.equal(tile, large)


def test_many_classes_have_no_labels(tmp_path: Path, charts: list) -> None:
    levels = torch.arange(21 * 2).view(21, 2, 1, 1, 1) / 50
    figures.save_class_grid(levels, tmp_path / "a.png")
    assert not charts
    shown = tiles(read(tmp_path / "a.png"), 21, 2, (48, 48), 2)
    torch.testing.assert_close(shown / 255, levels.view(21, 2), atol=0.003, rtol=0)


# --------------------------------------------------------------------------------- the latents


def test_the_kl_of_each_latent(tmp_path: Path, charts: list) -> None:
    kl = torch.tensor([0.004, 2.5, 0.0, 1.25, 0.02])
    figures.save_latent_kl(kl, tmp_path / "a.png")
    (axis,) = charts[0].axes
    bars = sorted((b.get_x(), b.get_height(), b.get_facecolor()) for b in axis.containers[0])
    np.testing.assert_allclose([height for _, height, _ in bars], [2.5, 1.25, 0.02], rtol=1e-6)
    rest = list(axis.containers[1])
    np.testing.assert_allclose([b.get_height() for b in rest], [0.004, 0], rtol=1e-6)
    assert {b.get_facecolor() for b in rest}.isdisjoint({colour for *_, colour in bars})
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1", "3", "4", "0", "2"]
    assert axis.get_title() == "3 of 5 latents active (KL above 0.01 nats), 3.77 nats in all"


@pytest.mark.parametrize("kl", [torch.zeros(3), torch.ones(1), torch.rand(500)], ids=len)
def test_the_kl_of_few_and_many_latents(kl: Tensor, tmp_path: Path) -> None:
    figures.save_latent_kl(kl, tmp_path / "a.png")
    assert read(tmp_path / "a.png").shape == (3, 380, 800)


def points(axis: Any) -> np.ndarray:
    (found,) = axis.collections
    return np.asarray(found.get_offsets())


def test_a_plane_of_two_latents_and_classes(tmp_path: Path, charts: list) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (101,), generator=generator) * 2
    mu = torch.randn(101, 2, generator=generator) + labels[:, None]
    figures.save_latent_plane(mu, labels, tmp_path / "a.png", names=list("abcde"))
    (axis,) = charts[0].axes
    drawn = points(axis)
    # The same points, each in its class's colour, which the legend names.
    order = np.lexsort(drawn.T)
    expected = np.lexsort(mu.numpy().T)
    np.testing.assert_allclose(drawn[order], mu.numpy()[expected])
    handles = axis.get_legend().legend_handles
    texts = [text.get_text() for text in axis.get_legend().get_texts()]
    assert texts == ["a", "c", "e"]
    colours = axis.collections[0].get_facecolors()[order][:, :3]
    legend = [matplotlib.colors.to_rgb(handle.get_color()) for handle in handles]
    assert len(set(legend)) == 3
    np.testing.assert_allclose(colours, [legend[k // 2] for k in labels[expected].tolist()])
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("z0", "z1")


def test_a_plane_of_many_latents_is_their_principal_components(
    tmp_path: Path, charts: list
) -> None:
    from sklearn.decomposition import PCA

    generator = torch.Generator().manual_seed(0)
    mu = torch.randn(12_345, 7, generator=generator) @ torch.randn(7, 7, generator=generator) + 5
    figures.save_latent_plane(mu, None, tmp_path / "a.png")
    (axis,) = charts[0].axes
    pca = PCA(2).fit(mu.numpy())
    expected, drawn = pca.transform(mu.numpy()), points(axis)
    for d in range(2):  # up to the sign, which is free
        sorted_points = np.sort(drawn[:, d])
        flipped = np.sort(-drawn[:, d])
        truth = np.sort(expected[:, d])
        assert min(np.abs(sorted_points - truth).max(), np.abs(flipped - truth).max()) < 1e-3
    shares = [f"{share:.0%}" for share in pca.explained_variance_ratio_]
    assert shares[0] in axis.get_xlabel() and "component 1" in axis.get_xlabel()
    assert shares[1] in axis.get_ylabel() and "component 2" in axis.get_ylabel()
    assert axis.get_legend() is None
    assert axis.collections[0].get_rasterized()
    assert axis.collections[0].get_alpha() < 0.6


@pytest.mark.parametrize("labels", [torch.rand(60), torch.arange(60)], ids=["real", "60 classes"])
def test_a_plane_of_real_labels_has_a_colour_bar(
    labels: Tensor, tmp_path: Path, charts: list
) -> None:
    mu = torch.stack([labels, -labels], 1).float()
    figures.save_latent_plane(mu, labels, tmp_path / "a.png")
    axis, bar = charts[0].axes
    assert bar.get_ylabel() == "label"
    np.testing.assert_allclose(axis.collections[0].get_array(), points(axis)[:, 0], rtol=1e-6)


def test_a_plane_of_one_latent(tmp_path: Path, charts: list) -> None:
    mu = torch.linspace(-1, 1, 41)[:, None]
    figures.save_latent_plane(mu, torch.arange(41) % 20, tmp_path / "a.png")
    (axis,) = charts[0].axes
    np.testing.assert_allclose(np.sort(points(axis)[:, 0]), mu[:, 0], atol=1e-6)
    assert len(axis.get_legend().get_texts()) == 20
    assert len({tuple(colour) for colour in axis.collections[0].get_facecolors()}) == 20


def test_a_plane_of_latents_that_collapsed(tmp_path: Path) -> None:
    figures.save_latent_plane(torch.zeros(9, 5), None, tmp_path / "a.png")
    assert (tmp_path / "a.png").is_file()


# -------------------------------------------------------------------------------- curves, charts


def test_curves_beside_a_reference(tmp_path: Path, charts: list) -> None:
    curves = {"β = 1": [(1.0, -110.0), (2, -100), (4, -99)], "β = 4": [(1.0, -120.0)], "none": []}
    figures.save_comparison(
        curves, tmp_path / "a.png", "epoch", "ELBO, nats", {"Burda et al. 2016": -86.76}
    )
    (axis,) = charts[0].axes
    drawn = {line.get_label(): line for line in axis.lines}
    assert list(drawn["β = 1"].get_xdata()) == [1, 2, 4]
    assert list(drawn["β = 1"].get_ydata()) == [-110, -100, -99]
    assert list(drawn["Burda et al. 2016"].get_ydata()) == [-86.76] * 2
    low, high = axis.get_ylim()
    assert low < -120 and high > -86.76
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("epoch", "ELBO, nats")
    texts = [text.get_text() for text in axis.get_legend().get_texts()]
    assert texts == ["β = 1", "β = 4", "none", "Burda et al. 2016"]


def test_many_curves_have_colours_of_their_own(tmp_path: Path, charts: list) -> None:
    curves = {str(i): [(float(x), float(x * i)) for x in range(40)] for i in range(13)}
    figures.save_comparison(curves, tmp_path / "a.png", "x", "y")
    assert len({line.get_color() for line in charts[0].axes[0].lines}) == 13


def dots(axis: Any) -> dict[float, float]:
    """Row → place of each dot and arrow."""
    found = {}
    for line in axis.lines:
        if line.get_marker() in ("o", "<", ">"):
            found[float(line.get_ydata()[0])] = float(line.get_xdata()[0])
    return found


def test_bounds_and_their_gaps(tmp_path: Path, charts: list) -> None:
    names = ["ELBO", "k = 50", "k = 5000", "AIS", "prior average"]
    values = [-101.23, -96.8, -95.9, -95.2, -240.1]
    errors = [0.12, None, 0.12, 2.5, float("nan")]
    figures.save_bounds(names, values, errors, tmp_path / "a.png")
    (axis,) = charts[0].axes
    assert [label.get_text() for label in axis.get_yticklabels()] == names
    bottom, top = axis.get_ylim()
    assert bottom > top  # the first at the top
    found, (left, right) = dots(axis), axis.get_xlim()
    assert [found[row] for row in range(4)] == values[:4]
    # What lies far off is an arrow at the edge, with its number; error bars fit.
    assert left < found[4] < -101.23 - 0.12
    assert left > -110 and right > -95.2 + 2.5
    assert [text.get_text() for text in axis.texts] == [
        "−101.23 ± 0.12",
        "−96.80",
        "−95.90 ± 0.12",
        "−95.20 ± 2.50",
        "−240.10",
    ]
    ends = [bars[2][0].get_segments()[0][:, 0] for bars in axis.containers if bars.has_xerr]
    np.testing.assert_allclose(ends, [[-101.35, -101.11], [-96.02, -95.78], [-97.7, -92.7]])


@pytest.mark.parametrize(
    "values", [[], [-3.0], [1.0, 1.0], [float("nan")], [float("-inf"), -5.0, -6.0]], ids=str
)
def test_bounds_of_little(values: list[float], tmp_path: Path) -> None:
    names, errors = [str(i) for i in range(len(values))], [0.0] * len(values)
    figures.save_bounds(names, values, errors, tmp_path / "a.png")
    assert (tmp_path / "a.png").is_file()


# ---------------------------------------------------------------------------------- predictions


def test_calibration_agrees_with_torchmetrics(tmp_path: Path, charts: list) -> None:
    from torchmetrics.functional.classification import multiclass_calibration_error

    generator = torch.Generator().manual_seed(0)
    probs = (torch.randn(3001, 4, generator=generator) * 1.5).softmax(1)
    labels = torch.randint(0, 4, (3001,), generator=generator)
    confidence, guess = probs.max(1)
    right = (guess == labels).double()
    which = (confidence * 10).floor().long()
    counts = torch.bincount(which, minlength=10)
    # Bins without predictions hold NaN, as a mean over none does.
    accuracy = torch.bincount(which, right, minlength=10) / counts
    mean = torch.bincount(which, confidence.double(), minlength=10) / counts
    assert counts[0] == 0 and accuracy[0].isnan()
    figures.save_calibration(mean, accuracy, counts, tmp_path / "a.png")
    error = multiclass_calibration_error(probs, labels, num_classes=4, n_bins=10)
    upper, lower = charts[0].axes
    assert upper.get_title() == f"expected calibration error {error:.4f}, 3,001 predictions"
    filled = counts > 0
    bars, gaps = upper.containers
    np.testing.assert_allclose([bar.get_height() for bar in bars], accuracy[filled])
    np.testing.assert_allclose([bar.get_x() for bar in bars], torch.arange(10)[filled] / 10)
    ends = [bar.get_y() + bar.get_height() for bar in gaps]
    np.testing.assert_allclose(ends, mean[filled])
    assert [bar.get_height() for bar in lower.containers[0]] == counts[filled].tolist()


def test_calibration_of_nothing(tmp_path: Path) -> None:
    nothing = torch.full((5,), float("nan"))
    figures.save_calibration(nothing, nothing, torch.zeros(5), tmp_path / "a.png")
    assert (tmp_path / "a.png").is_file()


def test_predictions_against_the_truth(tmp_path: Path, charts: list) -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(1203, generator=generator) * 4 + 30
    std = torch.rand(1203, generator=generator) + 0.5
    mean = y + std * torch.randn(1203, generator=generator)
    figures.save_predictions(y, mean, std, tmp_path / "a.png", name="age", bars=50)
    (axis,) = charts[0].axes
    off = (mean - y).double().numpy()
    within = (np.abs(off) <= 2 * std.numpy()).mean()
    assert axis.get_title() == (
        f"RMSE {np.sqrt((off**2).mean()):.4g}, {within:.1%} within ± 2 standard deviations, "
        "N = 1,203"
    )
    assert 0.93 < within < 0.98
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("true age", "predicted age")
    bars, scatter = axis.collections
    np.testing.assert_allclose(scatter.get_offsets(), torch.stack([y, mean], 1))
    assert len(bars.get_segments()) == 50
    place = {round(float(x), 5): i for i, x in enumerate(y)}
    for (x, low), (_, high) in bars.get_segments():
        i = place[round(float(x), 5)]
        assert low == pytest.approx(float(mean[i] - 2 * std[i]), abs=1e-4)
        assert high == pytest.approx(float(mean[i] + 2 * std[i]), abs=1e-4)


# ------------------------------------------------------------------------------ where it cannot


ONE = torch.ones(1)
WRITERS: dict[str, Callable[[Path], None]] = {
    "interpolations": lambda path: figures.save_interpolations(flat, torch.ones(1, 2, 1), path),
    "traversals": lambda path: figures.save_traversals(flat, ONE, ONE, ONE, path),
    "manifold": lambda path: figures.save_manifold(flat, path, 2),
    "class grid": lambda path: figures.save_class_grid(torch.zeros(2, 3, 1, 4, 4), path),
    "latent kl": lambda path: figures.save_latent_kl(ONE, path),
    "latent plane": lambda path: figures.save_latent_plane(torch.zeros(3, 2), None, path),
    "curves": lambda path: figures.save_curves([], quantity_names(True, True), path),
    "comparison": lambda path: figures.save_comparison({"a": [(0.0, 1.0)]}, path, "x", "y"),
    "bounds": lambda path: figures.save_bounds(["a"], [1.0], [None], path),
    "calibration": lambda path: figures.save_calibration(ONE, ONE, ONE, path),
    "predictions": lambda path: figures.save_predictions(ONE, ONE, ONE, path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_no_picture_can_be_written(name: str, tmp_path: Path) -> None:
    from matplotlib import pyplot as plt

    for path in ("missing/a.png", "a.xyz", "a"):
        with pytest.raises(UserError, match="cannot write"):
            WRITERS[name](tmp_path / path)
    assert not plt.get_fignums()
    assert not list(tmp_path.iterdir())
