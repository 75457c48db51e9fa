"""What can be done with a trained run: sample, reconstruct, encode, evaluate."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
from safetensors.torch import save_file
from tyro.conf import Positional, arg

from fastvae import evaluation, figures, runs
from fastvae.data import ImageSet, load_all, load_data, read_images
from fastvae.errors import UserError
from fastvae.parts.networks import pixels
from fastvae.vae import VAE

BATCH = 500

Run = Annotated[Path, Positional, arg(metavar="RUN")]


@torch.no_grad()
def sample(
    run: Run,
    n: Annotated[int, arg(aliases=("-n",))] = 64,
    output: Annotated[Path | None, arg(aliases=("-o",))] = None,
    seed: int = 0,
    noise: bool = False,
    device: str = "auto",
) -> None:
    """Draw images from a trained model and write them as one PNG grid.

    Args:
        run: The folder of a run, or any folder or Hub name with a saved model.
        n: How many images.
        output: The PNG to write (default: RUN/samples-SEED.png).
        seed: Image i is a function of this and of i.
        noise: Draw the pixels too, instead of showing their means.
        device: auto, cpu, cuda, cuda:1, …
    """
    vae = runs.load_model(run, device)
    path = output or run / f"samples-{seed}.png"
    _make_parent(path)
    figures.save_grid(vae.sample(n, seed=seed, noise_in_x=noise), path, columns=_columns(n))
    print(path)


@torch.no_grad()
def reconstruct(
    run: Run,
    images: Annotated[tuple[Path, ...], Positional, arg(metavar="IMAGES...")],
    output: Annotated[Path | None, arg(aliases=("-o",))] = None,
    device: str = "auto",
) -> None:
    """Reconstruct image files and write each beside its original, as one PNG grid.

    Args:
        run: The folder of a run.
        images: Image files, or folders of them; resized to the model's size.
        output: The PNG to write (default: RUN/reconstructed.png).
        device: auto, cpu, cuda, cuda:1, …
    """
    vae = runs.load_model(run, device)
    given = read_images(images, runs.data_like(run))
    parts = [vae.reconstruct(x).cpu() for x in _batches(vae, given)]
    path = output or run / "reconstructed.png"
    _make_parent(path)
    originals = pixels(given.images)
    figures.save_pairs(originals, torch.cat(parts), path, columns=min(8, len(given)))
    print(path)


@torch.no_grad()
def encode(
    run: Run,
    data: Annotated[str, Positional, arg(metavar="DATA")],
    output: Annotated[Path, arg(aliases=("-o",))] = Path("z.safetensors"),
    data_dir: Path | None = None,
    device: str = "auto",
) -> None:
    """Encode images to the mean and log-variance of their latents, as safetensors.

    The file holds mu and logvar, float32 [N, latent_dim], in the order of the data, and label,
    int64 [N], where the data has labels.

    Args:
        run: The folder of a run.
        data: Anything that --data of train takes, or one image file.
        output: The file to write.
        data_dir: Where mnist, fashion-mnist or cifar10 lie (default: as in the run).
        device: auto, cpu, cuda, cuda:1, …
    """
    vae = runs.load_model(run, device)
    config = runs.data_like(run)
    given = load_all(data, replace(config, data_dir=data_dir or config.data_dir))
    found = [vae.encode(x) for x in _batches(vae, given)]
    tensors = {
        "mu": torch.cat([q.mu.float().cpu() for q in found]),
        "logvar": torch.cat([q.logvar.float().cpu() for q in found]),
    }
    if given.labels is not None:
        tensors["label"] = given.labels
    _make_parent(output)
    save_file(tensors, output)
    print(f"{output}: mu and logvar of {len(given)} images, {vae.latent_dim} latents each")


def evaluate(
    run: Run,
    data: str | None = None,
    data_dir: Path | None = None,
    output: Annotated[Path | None, arg(aliases=("-o",))] = None,
    device: str = "auto",
) -> None:
    """Measure the ELBO, its terms, and bits per dimension on held-out images.

    Args:
        run: The folder of a run.
        data: Another source than the run's own, evaluated whole (anything --data of train takes).
        data_dir: Where mnist, fashion-mnist or cifar10 lie (default: as in the run).
        output: The JSON to write (default: RUN/evaluation.json).
        device: auto, cpu, cuda, cuda:1, …
    """
    vae = runs.load_model(run, device)
    config = runs.read_config(run)
    if data is None:
        data_config = replace(config.data, data_dir=data_dir or config.data.data_dir)
        _, images = load_data(data_config, config.seed)
    else:
        like = runs.data_like(run)
        images = load_all(data, replace(like, data_dir=data_dir or like.data_dir))
    images = runs.prepare(images, config)
    result = evaluation.evaluate(vae, images.images, seed=config.seed)
    values = {"data": images.name, **result.named()}
    path = output or run / "evaluation.json"
    _make_parent(path)
    path.write_text(json.dumps(values, indent=2) + "\n")
    for key, value in values.items():
        print(f"{key:>24}  {value:.4f}" if isinstance(value, float) else f"{key:>24}  {value}")
    print(path)


def _batches(vae: VAE, images: ImageSet) -> list[torch.Tensor]:
    device = next(vae.parameters()).device
    return [batch.to(device) for batch in images.images.split(BATCH)]


def _columns(n: int) -> int:
    """Columns of a grid that is about square."""
    return max(1, round(n**0.5))


def _make_parent(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder; name a file in it")
