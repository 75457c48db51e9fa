"""The pictures of a run: grids of images, pairs, curves."""

import math
from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import make_grid, save_image

from fastvae.errors import UserError

# Small images are enlarged by a whole factor until a tile is at least this wide.
TILE_PIXELS = 48


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """Write images `[N, C, H, W]` (float in [0, 1], clipped) as a PNG grid."""
    images = images.detach().float().cpu().clamp(0, 1)
    scale = max(1, -(-TILE_PIXELS // images.shape[-1]))
    images = images.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    try:
        save_image(make_grid(images, nrow=columns, padding=2, pad_value=0.5), path)
    except (OSError, ValueError) as error:  # a folder, or an ending that is no format
        raise UserError(f"cannot write {path}: {error}") from error


def save_pairs(originals: Tensor, reconstructions: Tensor, path: Path, columns: int = 8) -> None:
    """Write each original `[N, C, H, W]` with its reconstruction to the right of it."""
    pairs = torch.stack([originals.cpu(), reconstructions.cpu()], dim=1).flatten(0, 1)
    save_grid(pairs, path, 2 * columns)


def save_curves(lines: list[dict], names: dict[str, str], path: Path) -> None:
    """Plot the bound, and its two terms, against epochs, from the lines of metrics.jsonl.

    `names` is `evaluation.quantity_names` of the run.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    bound, nll = names["elbo"], names["nll"]
    panels = [
        (bound, "ELBO" if bound == "elbo" else "−(cross-entropy + KL)"),
        (nll, "−log p(x given z)" if nll == "nll" else "cross-entropy"),
        ("kl", "KL(q ‖ p)"),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    for axis, (key, title) in zip(axes, panels, strict=True):
        for prefix, label, style in (("", "training", "-"), ("heldout_", "held out", "o-")):
            points = [(line["epoch"], line[prefix + key]) for line in lines if prefix + key in line]
            if points:
                axis.plot(*zip(*points, strict=True), style, label=label, markersize=3, linewidth=1)
        axis.set(title=title, xlabel="epoch", ylabel="nats per image")
        axis.grid(alpha=0.3)
        _fit_after_start(axis)
    axes[0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _fit_after_start(axis) -> None:  # type: ignore[no-untyped-def]
    """Choose the vertical range by all but the first tenth, whose values dwarf the rest."""
    values = [y for line in axis.lines for y in line.get_ydata()[len(line.get_ydata()) // 10 :]]
    values = [y for y in values if math.isfinite(y)]
    if values:
        low, high = min(values), max(values)
        margin = 0.05 * (high - low) + 1e-3
        axis.set_ylim(low - margin, high + margin)
