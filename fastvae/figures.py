"""The pictures of a run: grids of images, walks through the latents, curves, charts.

All take tensors of any device. Those that decode take `decode`, which maps z `[N, D]` float32, on
the device of the latents given, to images `[N, C, H, W]` in [0, 1]; it is called once. Each writes
one file, in the format that its ending names, and raises UserError where it cannot be written.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from fastvae_kernels import uniform
from torch import Tensor

from fastvae.errors import UserError

Decode = Callable[[Tensor], Tensor]

# Small images are enlarged by a whole factor until a tile is at least this wide.
TILE_PIXELS = 48

# Charts are 800 pixels wide: this many inches at this resolution.
WIDTH, DPI = 8.0, 100

# Size and opacity of points in a scatter of at most so many.
_POINTS = ((1000, 22, 0.8), (5000, 12, 0.7), (20_000, 5, 0.5), (math.inf, 3, 0.25))

# What the quantities of metrics.jsonl are called over a chart.
_TITLES = {
    "elbo": "ELBO",
    "nll": "−log p(x given z)",
    "reconstruction_objective": "log p(x given z) − KL",
    "reconstruction_nll": "−log p(x given z)",
    "cross_entropy_objective": "−(cross-entropy + KL)",
    "cross_entropy": "cross-entropy",
    "kl": "KL(q ‖ p)",
}

BLUE, ORANGE, GREY = "tab:blue", "tab:orange", "0.72"


# ------------------------------------------------------------------------------ grids of images


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """Write images `[N, C, H, W]` (float in [0, 1], clipped) as a PNG grid."""
    _write_image(_grid(_enlarged(images), nrow=columns, padding=2, pad_value=0.5), path)


def save_pairs(originals: Tensor, reconstructions: Tensor, path: Path, columns: int = 8) -> None:
    """Write each original `[N, C, H, W]` with its reconstruction to the right of it."""
    pairs = torch.stack([originals.cpu(), reconstructions.cpu()], dim=1).flatten(0, 1)
    save_grid(pairs, path, 2 * columns)


def save_class_grid(images: Tensor, path: Path, names: Sequence[str] | None = None) -> None:
    """Write images `[K, n, C, H, W]`, one class a row.

    Rows are labelled with `names` (0 … K−1 unless given) up to 20 classes; above, not at all.
    """
    classes, count = images.shape[:2]
    if classes > 20:
        save_grid(images.flatten(0, 1), path, columns=count)
    else:
        _save_rows(images, path, list(names or map(str, range(classes))))


# ------------------------------------------------------------------------ walks through latents


def interpolate(pairs: Tensor, steps: int) -> Tensor:
    """Points on the way from `pairs[:, 0]` to `pairs[:, 1]`: `[P, 2, D]` → `[P, steps, D]`.

    Spherical (White 2016, arXiv:1609.04468): z = (sin((1−t)Ω) a + sin(tΩ) b) / sin Ω with Ω the
    angle between a and b. In many dimensions the mass of a standard normal lies near a sphere of
    radius √D, which a straight line leaves for a region that holds none. Where a and b lie on one
    line through the origin (always if D = 1) the way is straight.
    """
    start, end = pairs[:, :1].double(), pairs[:, 1:].double()
    t = torch.linspace(0, 1, steps, dtype=torch.float64, device=pairs.device)[:, None]
    angle = torch.acos(torch.cosine_similarity(start, end, dim=2).clamp(-1, 1))[..., None]
    curved = (((1 - t) * angle).sin() * start + (t * angle).sin() * end) / angle.sin()
    straight = (1 - t) * start + t * end
    is_curved = (angle.sin() > 1e-4) & (start.norm(dim=2, keepdim=True) > 0)
    is_curved &= end.norm(dim=2, keepdim=True) > 0
    return torch.where(is_curved, curved, straight).to(pairs.dtype)


@torch.no_grad()
def save_interpolations(decode: Decode, z_pairs: Tensor, path: Path, steps: int = 11) -> None:
    """Decode the way (`interpolate`) between the two z of each pair `[P, 2, D]`: a row each."""
    z = interpolate(z_pairs, steps)
    save_grid(decode(z.flatten(0, 1)), path, columns=steps)


@torch.no_grad()
def save_traversals(
    decode: Decode,
    z: Tensor,
    scale: Tensor,
    kl: Tensor,
    path: Path,
    *,
    latents: int = 12,
    steps: int = 9,
    span: float = 3.0,
) -> None:
    """Write one row for each of the latents that carry most, with all others held at z `[D]`.

    Args:
        scale: `[D]`, the step of each latent: its standard deviation over the data, or 1.
        kl: `[D]` nats, the mean KL divergence of each latent, by which they are ranked.
        latents, steps: at most so many rows, and so many images in each.
        span: a row goes from −span · scale to +span · scale (as Higgins et al. 2017 do).
    """
    order = kl.argsort(descending=True)[:latents]
    t = torch.linspace(-span, span, steps, device=z.device)
    walks = z.expand(len(order), steps, -1).clone()
    for row, latent in enumerate(order.tolist()):
        walks[row, :, latent] = t * scale[latent]
    images = decode(walks.flatten(0, 1)).unflatten(0, (len(order), steps))
    rows = [f"z{latent}   {kl[latent]:.2f}" for latent in order.tolist()]
    columns = [f"{value:+.3g}".replace("-", "−") if value else "0" for value in t.tolist()]
    _save_rows(images, path, rows, columns, "latent and its KL in nats; its value in units of σ")


@torch.no_grad()
def save_manifold(decode: Decode, path: Path, side: int = 20) -> None:
    """Write what a decoder of two latents makes of the plane, as `side` × `side` images.

    As in Kingma & Welling 2014, figure 4: the coordinates are evenly spaced in probability (at
    the middles of `side` equal shares) and mapped through the inverse normal CDF. z0 grows to the
    right, z1 upwards. `decode` is given float32 on the CPU.
    """
    share = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    at = torch.special.ndtri(share).float()
    z = torch.stack([at.expand(side, side), at.flip(0)[:, None].expand(side, side)], dim=2)
    _write_image(_grid(_enlarged(decode(z.flatten(0, 1))), nrow=side, padding=0), path)


# --------------------------------------------------------------------------------- the latents


def save_latent_kl(kl: Tensor, path: Path, active: float = 0.01) -> None:
    """Chart the mean KL divergence of each latent, `[D]` nats, sorted.

    A latent counts as active above `active` nats; the others lie on a grey ground.
    """
    order = kl.argsort(descending=True).tolist()
    values = kl.detach().cpu().double()[order].numpy()
    count = int((values > active).sum())
    figure, axis = _chart(3.8)
    axis.bar(range(count), values[:count], color=BLUE, width=0.8)
    if count < len(order):
        axis.axvspan(count - 0.5, len(order) - 0.5, color="0.93")
        axis.bar(range(count, len(order)), values[count:], color=GREY, width=0.8)
    axis.set_title(
        f"{count} of {len(order)} latents active (KL above {active:g} nats), "
        f"{values.sum():.2f} nats in all"
    )
    axis.set(ylabel="KL, nats per image", xlim=(-0.7, len(order) - 0.3))
    if len(order) <= 40:
        axis.set_xticks(range(len(order)), list(map(str, order)), fontsize=9)
        axis.set_xlabel("latent")
    else:
        axis.set_xlabel("latents, sorted")
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    _save_chart(figure, path)


def save_latent_plane(
    mu: Tensor, labels: Tensor | None, path: Path, names: Sequence[str] | None = None
) -> None:
    """Scatter the posterior means `[N, D]`, coloured by labels `[N]` if any.

    Two latents are shown as they are, more by their first two principal components, one over
    random heights. Integer labels of at most 20 values are classes, with a legend (`names[k]` for
    class k, if given); others are values, with a colour bar.
    """
    from matplotlib import colormaps
    from matplotlib.lines import Line2D

    at, (xlabel, ylabel) = _plane(mu.detach().double().cpu())
    # In random order, so that no class covers those before it.
    order = uniform((len(at),), 0).argsort()
    points = at[order].T.numpy()
    # Many points are small and faint, so that density shows.
    size, alpha = next(look for most, *look in _POINTS if len(at) <= most)
    style: dict[str, Any] = {"s": size, "alpha": alpha, "linewidths": 0, "rasterized": True}
    figure, axis = _chart(6.4)
    if labels is None:
        axis.scatter(*points, color=BLUE, **style)
    else:
        labels = labels.detach().cpu()[order]
        classes = [] if labels.is_floating_point() else labels.unique().tolist()
        if 0 < len(classes) <= 20:
            palette = colormaps["tab10" if len(classes) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
            colour = {label: palette[i] for i, label in enumerate(classes)}
            axis.scatter(*points, c=[colour[label] for label in labels.tolist()], **style)
            handles = [
                Line2D([], [], marker="o", linestyle="", color=colour[label], markersize=7)
                for label in classes
            ]
            texts = [names[label] if names else str(label) for label in classes]
            axis.legend(handles, texts, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        else:
            shown = axis.scatter(*points, c=labels.double().numpy(), cmap="viridis", **style)
            figure.colorbar(shown, ax=axis, label="label").solids.set_alpha(1)  # type: ignore[union-attr]
    axis.set(xlabel=xlabel, ylabel=ylabel)
    if mu.shape[1] == 1:
        axis.set_yticks([])
    else:
        axis.set_aspect("equal", adjustable="datalim")
    axis.grid(alpha=0.3)
    axis.set_axisbelow(True)
    _save_chart(figure, path)


def _plane(mu: Tensor) -> tuple[Tensor, tuple[str, str]]:
    """Coordinates `[N, 2]` and what they are called."""
    if mu.shape[1] == 1:
        heights = uniform((len(mu), 1), 0, offset=len(mu)).double()
        return torch.cat([mu, heights], 1), ("z0", "(random height)")
    if mu.shape[1] == 2:
        return mu, ("z0", "z1")
    centred = mu - mu.mean(0)
    variances, directions = torch.linalg.eigh(centred.T @ centred)  # ascending
    shares = variances.clamp_min(0) / variances.clamp_min(0).sum().clamp_min(1e-300)
    names = [
        f"principal component {i} of the latents ({shares[-i]:.0%} of variance)" for i in (1, 2)
    ]
    return centred @ directions[:, [-1, -2]], (names[0], names[1])


# -------------------------------------------------------------------------------- curves, charts


def save_curves(
    lines: list[dict], names: dict[str, str], path: Path, modelled: str = "x given z"
) -> None:
    """Plot the bound, and its two terms, against epochs, from the lines of metrics.jsonl.

    `names` is `evaluation.quantity_names` of the run, `modelled` what its nll is a density of.
    """
    figure, axes = _pyplot().subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    for axis, key in zip(axes, (names["elbo"], names["nll"], "kl"), strict=True):
        for prefix, label, style in (("", "training", "-"), ("heldout_", "held out", "o-")):
            # There is no value where all steps of a line were skipped.
            values = ((line["epoch"], line.get(prefix + key)) for line in lines)
            points = [(epoch, value) for epoch, value in values if value is not None]
            if points:
                axis.plot(*zip(*points, strict=True), style, label=label, markersize=3, linewidth=1)
        title = _TITLES.get(key, key).replace("x given z", modelled)
        axis.set(title=title, xlabel="epoch", ylabel="nats per image")
        axis.grid(alpha=0.3)
        _fit_after_start(axis)
    if axes[0].lines:
        axes[0].legend()
    _save_chart(figure, path)


def _fit_after_start(axis) -> None:  # type: ignore[no-untyped-def]
    """Choose the vertical range by all but the first tenth, whose values dwarf the rest."""
    values = [y for line in axis.lines for y in line.get_ydata()[len(line.get_ydata()) // 10 :]]
    values = [y for y in values if math.isfinite(y)]
    if values:
        low, high = min(values), max(values)
        margin = 0.05 * (high - low) + 1e-3
        axis.set_ylim(low - margin, high + margin)


def save_comparison(
    curves: dict[str, list[tuple[float, float]]],
    path: Path,
    xlabel: str,
    ylabel: str,
    references: dict[str, float] | None = None,
) -> None:
    """Chart named curves of (x, y) points together, with `references` as horizontal lines.

    A reference is a published number: its name says whose. As in `save_curves`, the first tenth of
    the points of a curve may lie outside.
    """
    from matplotlib import colormaps

    figure, axis = _chart(4.6)
    palette = colormaps["tab10" if len(curves) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    for i, (name, points) in enumerate(curves.items()):
        style: dict[str, Any] = {"marker": "o", "markersize": 4} if len(points) <= 30 else {}
        x, y = zip(*points, strict=True) if points else ((), ())
        axis.plot(x, y, color=palette[i % len(palette)], linewidth=1.5, label=name, **style)
    for i, (name, value) in enumerate((references or {}).items()):
        dashes = ("--", ":", "-.")[i % 3]
        axis.axhline(value, color="0.25", linestyle=dashes, linewidth=1.2, label=name)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.locator_params(axis="x", steps=[1, 2, 5, 10])
    axis.grid(alpha=0.3)
    _fit_after_start(axis)
    if len(curves) + len(references or {}) > 6:
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    elif curves or references:
        axis.legend()
    _save_chart(figure, path)


def save_bounds(
    names: Sequence[str],
    values: Sequence[float],
    errors: Sequence[float | None],
    path: Path,
    xlabel: str = "log p(x), nats per image",
) -> None:
    """Chart estimates of one quantity as dots with error bars, the first name at the top.

    Args:
        names: for instance ELBO, importance-weighted with k = 50, annealed importance sampling.
        values: on one scale, so that gaps between bounds can be read off.
        errors: the standard error of each; None where it is not known.

    A value so far off that the others would shrink to one dot is shown as an arrow at the edge.
    """
    errors = [None if error is None or not math.isfinite(error) else error for error in errors]
    figure, axis = _chart(1.3 + 0.42 * len(names))
    low, high = _without_outlier([value for value in values if math.isfinite(value)])
    ends = [
        value + sign * (error or 0)
        for value, error in zip(values, errors, strict=True)
        for sign in (-1, 1)
        if low <= value <= high
    ]
    margin = 0.06 * (max(ends) - min(ends)) if len(set(ends)) > 1 else 1.0
    left, right = min(ends, default=0) - margin, max(ends, default=0) + margin
    for row, (value, error) in enumerate(zip(values, errors, strict=True)):
        if low <= value <= high:
            axis.errorbar(value, row, xerr=error, fmt="o", color=BLUE, capsize=4, markersize=7)
        elif value < low:
            axis.plot(left + margin / 2, row, "<", color=ORANGE, markersize=9)
        elif value > high:
            axis.plot(right - margin / 2, row, ">", color=ORANGE, markersize=9)
        text = f"{value:.2f}".replace("-", "−") + ("" if error is None else f" ± {error:.2f}")
        axis.annotate(text, (1.02, row), xycoords=("axes fraction", "data"), va="center")
    axis.set_yticks(range(len(names)), list(names))
    axis.set(xlabel=xlabel, xlim=(left, right), ylim=(max(len(names), 1) - 0.5, -0.5))
    axis.grid(alpha=0.3)
    axis.set_axisbelow(True)
    _save_chart(figure, path)


def _without_outlier(values: list[float]) -> tuple[float, float]:
    """The range to show: without one extreme value that is four times as wide as the rest."""
    ordered = sorted(values) or [0.0]
    low, high = ordered[0], ordered[-1]
    if len(ordered) >= 4:
        if ordered[1] - low > 4 * (high - ordered[1]):
            low = ordered[1]
        elif high - ordered[-2] > 4 * (ordered[-2] - low):
            high = ordered[-2]
    return low, high


# ---------------------------------------------------------------------------------- predictions


def save_calibration(confidence: Tensor, accuracy: Tensor, counts: Tensor, path: Path) -> None:
    """Draw a reliability diagram (Guo et al. 2017, arXiv:1706.04599) of M bins of equal width.

    Args:
        confidence: `[M]`, the mean confidence of the predictions in bin m, [m/M, (m+1)/M].
        accuracy: `[M]`, the share of them that is right.
        counts: `[M]`, how many there are; bins without any are left out, whatever they hold.

    The title gives the expected calibration error, Σ counts |accuracy − confidence| / Σ counts.
    """
    bins = len(counts)
    filled = counts.cpu() > 0
    middles = (torch.arange(bins, dtype=torch.float64) + 0.5) / bins
    x, n, conf, acc = (
        t.detach().cpu().double()[filled].numpy() for t in (middles, counts, confidence, accuracy)
    )
    error = (abs(acc - conf) * n).sum() / max(n.sum(), 1)
    figure, (axis, below) = _pyplot().subplots(
        2, 1, figsize=(5.6, 6.6), sharex=True, height_ratios=(4, 1), layout="constrained"
    )
    axis.bar(x, acc, 1 / bins, color=BLUE, edgecolor="white", label="accuracy")
    axis.bar(
        x,
        conf - acc,
        1 / bins,
        bottom=acc,
        color="none",
        edgecolor=ORANGE,
        hatch="///",
        label="gap to the confidence",
    )
    axis.plot([0, 1], [0, 1], "--", color="0.25", linewidth=1, label="calibrated")
    axis.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
    axis.set_title(f"expected calibration error {error:.4f}, {int(n.sum()):,} predictions")
    axis.legend(loc="upper left")
    below.bar(x, n, 1 / bins, color=GREY, edgecolor="white")
    below.set_yscale("log")
    below.set(xlabel="confidence", ylabel="count", ylim=(0.5, None))
    for each in (axis, below):
        each.grid(alpha=0.3)
        each.set_axisbelow(True)
    _save_chart(figure, path)


def save_predictions(
    y: Tensor, mean: Tensor, std: Tensor, path: Path, name: str = "target", bars: int = 500
) -> None:
    """Chart predictions `mean ± 2 std` against what is true, `y`, each `[N]`.

    All points are drawn, error bars for at most `bars` of them, evenly spread. The title gives the
    root mean square error and the share of targets within two standard deviations (95.4 % for a
    Gaussian that is right).
    """
    true, predicted, spread = (t.detach().cpu().double().numpy() for t in (y, mean, std))
    some = torch.linspace(0, len(y) - 1, min(bars, len(y))).round().long().numpy()
    figure, axis = _chart(6.4)
    faint = 0.35 if len(some) <= 100 else 0.15
    axis.errorbar(
        true[some],
        predicted[some],
        2 * spread[some],
        fmt="none",
        ecolor=BLUE,
        alpha=faint,
        elinewidth=1,
        label="± 2 standard deviations",
    )
    size, alpha = next(look for most, *look in _POINTS if len(y) <= most)
    axis.scatter(
        true,
        predicted,
        s=size,
        alpha=alpha,
        color=BLUE,
        linewidths=0,
        rasterized=True,
        label="mean",
    )
    ends = [min(true.min(), predicted.min()), max(true.max(), predicted.max())]
    axis.plot(ends, ends, "--", color="0.25", linewidth=1, label="exact")
    off = abs(true - predicted)
    rmse, within = (off**2).mean() ** 0.5, (off <= 2 * spread).mean()
    axis.set_title(f"RMSE {rmse:.4g}, {within:.1%} within ± 2 standard deviations, N = {len(y):,}")
    axis.set(xlabel=f"true {name}", ylabel=f"predicted {name}")
    for handle in axis.legend(loc="upper left").legend_handles:
        handle.set_alpha(1)
    axis.grid(alpha=0.3)
    axis.set_axisbelow(True)
    _save_chart(figure, path)


# ------------------------------------------------------------------------------------- common


def _enlarged(images: Tensor) -> Tensor:
    """Float images in [0, 1] on the CPU, with tiles of at least TILE_PIXELS."""
    images = images.detach().float().cpu().clamp(0, 1)
    scale = max(1, -(-TILE_PIXELS // images.shape[-1]))
    return images.repeat_interleave(scale, -1).repeat_interleave(scale, -2)


def _write_image(image: Tensor, path: Path) -> None:
    try:
        _torchvision_utils().save_image(image, path)
    except (OSError, ValueError) as error:  # a folder, or an ending that is no format
        raise UserError(f"cannot write {path}: {error}") from error


def _save_rows(
    images: Tensor,
    path: Path,
    rows: list[str],
    columns: list[str] | None = None,
    title: str = "",
) -> None:
    """Write images `[R, n, C, H, W]` as a grid with a label at each row, and above each column."""
    tiles = _enlarged(images.flatten(0, 1))
    grid = _grid(tiles, nrow=images.shape[1], padding=2, pad_value=1.0)
    height, width = tiles.shape[-2] + 2, tiles.shape[-1] + 2
    # The image fills its figure exactly, so that no pixel is resampled; labels lie outside.
    figure = _pyplot().figure(figsize=(grid.shape[2] / DPI, grid.shape[1] / DPI))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest", aspect="auto")
    font = 10 * max(1, grid.shape[2] / (WIDTH * DPI))
    at = [1 + (i + 0.5) * height for i in range(len(rows))]
    axis.set_yticks(at, rows, fontsize=font)
    at = [1 + (i + 0.5) * width for i in range(len(columns or []))]
    axis.set_xticks(at, columns or [], fontsize=0.9 * font)
    axis.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axis.set_title(title, fontsize=font)
    axis.spines[:].set_visible(False)
    _save_chart(figure, path, bbox_inches="tight", pad_inches=0.1)


def _chart(height: float) -> tuple[Any, Any]:
    """A figure of one chart, and its axis."""
    return _pyplot().subplots(figsize=(WIDTH, height), layout="constrained")


def _save_chart(figure: Any, path: Path, **options: Any) -> None:
    try:
        if not Path(path).suffix:  # matplotlib would write another file
            raise ValueError("its name has no ending that is a format, such as .png")
        figure.savefig(path, dpi=DPI, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {path}: {error}") from error
    finally:
        _pyplot().close(figure)


def _pyplot() -> Any:
    """matplotlib's pyplot, imported late since it is slow to, and made to draw without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _torchvision_utils() -> Any:
    """Imported late: torchvision brings half of PyTorch's compiler along, seconds of import."""
    import torchvision.utils

    return torchvision.utils


def _grid(images: Tensor, **settings: Any) -> Tensor:
    return _torchvision_utils().make_grid(images, **settings)
