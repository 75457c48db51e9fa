"""What can be done with a trained run: sample, reconstruct, encode, evaluate, score."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from tyro.conf import OmitArgPrefixes, Positional, arg

from fastvae import evaluation, figures, runs, samplers_of_runs, scores
from fastvae import noise as noise_streams
from fastvae.assessment import Effort, assess
from fastvae.bayes import BayesianNetwork
from fastvae.data import ImageSet, load_all, load_data, read_images
from fastvae.errors import UserError
from fastvae.parts.networks import pixels
from fastvae.predictions import assess_predictions
from fastvae.ranks import Share
from fastvae.vae import VAE

BATCH = 500
DEFAULT_EFFORT = Effort()

Run = Annotated[Path, Positional, arg(metavar="RUN")]


@torch.no_grad()
def sample(
    run: Run,
    n: Annotated[int, arg(aliases=("-n",))] = 64,
    output: Annotated[Path | None, arg(aliases=("-o",))] = None,
    seed: int = 0,
    labels: tuple[int, ...] = (),
    sampler: Literal["prior", "mixture", "flow"] = "prior",
    noise: bool = False,
    device: str = "auto",
) -> None:
    """Draw images from a trained model and write them as one PNG grid.

    Args:
        run: The folder of a run, or any folder or Hub name with a saved model.
        n: How many images.
        output: The PNG to write (default: RUN/samples-SEED.png).
        seed: Image i is a function of this and of i.
        labels: Classes to draw, one row of the grid each (conditional models only; default: all).
        sampler: Where z comes from: the model's prior, or a mixture of Gaussians or a flow that is
            fitted once to the latents of the run's training images and kept in the run.
        noise: Draw the pixels too, instead of showing their means.
        device: auto, cpu, cuda, cuda:1, …
    """
    vae = runs.load_vae(run, device)
    name = f"samples-{seed}.png" if sampler == "prior" else f"{sampler}-{seed}.png"
    # A model of the Hub has no folder here, and must not seem to have one the next time.
    path = output or (run / name if run.is_dir() else Path(name))
    _make_parent(path)
    if n < 1:
        raise UserError(f"-n draws at least one image, got {n}")
    if labels:
        _require_classes(vae)
    columns = _columns(n)
    classes = None
    if vae.num_classes:
        rows = torch.tensor(labels) if labels else torch.arange(vae.num_classes)
        columns = max(1, n // len(rows))
        classes = rows.repeat_interleave(columns)
        n = len(classes)
    if sampler == "prior":
        images = vae.sample(n, seed=seed, labels=classes, noise=noise)
    else:
        fitted = samplers_of_runs.fitted(run, vae, sampler)
        where = next(vae.parameters()).device
        classes = None if classes is None else classes.to(where)
        of_z = int(noise_streams.stream(seed, noise_streams.PRIOR))
        z = fitted.sample(n, of_z, where, classes)
        images = vae.sample_given(z, seed=seed, labels=classes, noise=noise)
    if classes is None:
        figures.save_grid(images, path, columns=columns)
    else:
        names = [str(k) for k in rows.tolist()]
        figures.save_class_grid(images.unflatten(0, (-1, columns)), path, names)
    print(path)


@torch.no_grad()
def reconstruct(
    run: Run,
    images: Annotated[tuple[Path, ...], Positional, arg(metavar="IMAGES...")],
    output: Annotated[Path | None, arg(aliases=("-o",))] = None,
    labels: tuple[int, ...] = (),
    device: str = "auto",
) -> None:
    """Reconstruct image files and write each beside its original, as one PNG grid.

    Args:
        run: The folder of a run.
        images: Image files, or folders of them; resized to the model's size.
        output: The PNG to write (default: RUN/reconstructed.png).
        labels: The class of each image, or one for all (conditional models only).
        device: auto, cpu, cuda, cuda:1, …
    """
    vae = runs.load_vae(run, device)
    given = read_images(images, runs.data_like(run))
    if labels:
        _require_classes(vae)
        if len(labels) not in (1, len(given)):
            raise UserError(f"--labels takes 1 or {len(given)} classes here, got {len(labels)}")
        given = replace(given, labels=torch.tensor(labels).expand(len(given)))
    parts = [vae.reconstruct(*batch).cpu() for batch in _batches(vae, given)]
    path = output or run / "reconstructed.png"
    _make_parent(path)
    originals = pixels(given.tensor)
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
    [N] (int64 classes or float32 targets), where the data has labels.

    Args:
        run: The folder of a run.
        data: Anything that --data of train takes, or one image file.
        output: The file to write.
        data_dir: Where mnist, fashion-mnist or cifar10 lie (default: as in the run).
        device: auto, cpu, cuda, cuda:1, …
    """
    vae = runs.load_vae(run, device)
    config = runs.data_like(run)
    given = load_all(data, replace(config, data_dir=data_dir or config.data_dir))
    found = [vae.encode(*batch) for batch in _batches(vae, given)]
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
    effort: Annotated[Effort, OmitArgPrefixes] = DEFAULT_EFFORT,
    data: str | None = None,
    data_dir: Path | None = None,
    limit: int | None = None,
    output: Annotated[Path | None, arg(aliases=("-o",))] = None,
    device: str = "auto",
) -> None:
    """Measure a trained model on held-out images, and draw what it has learned.

    Writes evaluation.json and a folder of figures, with the scores of each image (scores.parquet,
    the columns of `fastvae score`). Run by accelerate launch (or torchrun) on several processes,
    they share the images.

    Args:
        run: The folder of a run.
        effort: How much work to do.
        data: Another source than the run's own, evaluated whole (anything --data of train takes).
        data_dir: Where mnist, fashion-mnist or cifar10 lie (default: as in the run).
        limit: Use the first so many images only.
        output: The JSON to write (default: RUN/evaluation.json); figures go to a folder beside it.
        device: auto, cpu, cuda, cuda:1, …
    """
    path = output or run / "evaluation.json"
    if path.suffix != ".json":
        raise UserError(f"-o ends in .json, got {path}")
    accelerator = _processes()
    device = str(accelerator.device) if accelerator else device
    model = runs.load_model(run, device)
    train_set, heldout = _evaluation_data(run, data, data_dir, limit)
    share = Share(len(heldout), accelerator)
    folder = path.with_suffix("")
    if share.is_main:
        _make_parent(path)
        _make_parent(folder / "any.png")
    seed = runs.read_config(run).seed
    values: dict[str, Any] = {"run": str(run)}
    if isinstance(model, VAE):

        def keep(found: scores.Scores) -> None:
            _write_table(_score_columns(model, heldout, found), folder / "scores.parquet")

        values |= assess(
            model, heldout, train_set, effort, seed=seed, folder=folder, keep=keep, share=share
        )
    else:
        values |= _predictions(model, heldout, effort, seed, folder, share)
    if not share.is_main:
        return
    with _writing(path):
        path.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n")
    for line in _readable(values):
        print(line)
    print(f"{path}, figures in {folder}/")


def score(
    run: Run,
    data: Annotated[str, Positional, arg(metavar="DATA")],
    output: Annotated[Path, arg(aliases=("-o",))],
    iw_samples: int = 100,
    memory_mb: int = 1024,
    data_dir: Path | None = None,
    device: str = "auto",
) -> None:
    """Write the ELBO and the importance-weighted NLL of each image: low likelihood, odd image.

    Columns: row, elbo, nll, kl, iw_nll and its standard error over the draws, in nats, and label
    where the data has labels.

    Args:
        run: The folder of a run.
        data: Anything that --data of train takes, or one image file.
        output: The file to write: .parquet or .csv.
        iw_samples: Draws of z for each image.
        memory_mb: Memory that images × draws may take at once.
        data_dir: Where mnist, fashion-mnist or cifar10 lie (default: as in the run).
        device: auto, cpu, cuda, cuda:1, …
    """
    if output.suffix not in (".parquet", ".csv"):
        raise UserError(f"-o ends in .parquet or .csv, got {output}")
    effort = Effort(iw_samples=iw_samples, memory_mb=memory_mb)
    accelerator = _processes()
    vae = runs.load_vae(run, str(accelerator.device) if accelerator else device)
    _, images = _evaluation_data(run, data, data_dir, None)
    share = Share(len(images), accelerator)
    if share.is_main:
        _make_parent(output)
    found = scores.score(
        vae,
        images,
        seed=scores.scoring_seed(runs.read_config(run).seed),
        samples=effort.iw_samples,
        memory_bytes=effort.memory_mb * 2**20,
        share=share,
    )
    if not share.is_main:
        return
    columns = _score_columns(vae, images, found)
    _write_table(columns, output)
    print(f"{output}: {len(images)} rows, {', '.join(columns)}")


def _score_columns(vae: VAE, images: ImageSet, found: scores.Scores) -> dict[str, torch.Tensor]:
    """A row for each image."""
    names = evaluation.quantity_names(vae.likelihood.is_density, vae.is_bound)
    columns = {
        "row": torch.arange(len(images)),
        names["elbo"]: found.elbo,
        names["nll"]: found.nll,
        "kl": found.kl,
    }
    if found.log_marginal is not None and found.log_marginal_error is not None:
        columns |= {"iw_nll": -found.log_marginal, "iw_standard_error": found.log_marginal_error}
    if images.labels is not None:
        columns["label"] = images.labels
    return columns


def _predictions(
    network: BayesianNetwork,
    heldout: ImageSet,
    effort: Effort,
    seed: int,
    folder: Path,
    share: Share,
) -> dict[str, Any]:
    """What `assess` is for a VAE."""
    if effort != DEFAULT_EFFORT:
        raise UserError(
            "--iw-samples, --annealed-…, --prior-samples and --memory-mb are a VAE's: the model of "
            "this run predicts labels"
        )
    network.check_labels(heldout.labels)
    found = evaluation.evaluate(network, heldout, seed=seed, accelerator=share.accelerator)
    result = {"data": heldout.name, **found.named()}
    if share.is_main:
        result["predictions"] = assess_predictions(network, heldout, seed=seed, folder=folder)
    return result


def _evaluation_data(
    run: Path, data: str | None, data_dir: Path | None, limit: int | None
) -> tuple[ImageSet | None, ImageSet]:
    """The run's own training and held-out images, or all of another source."""
    config = runs.read_config(run)
    train_set = None
    if data is None:
        data_config = replace(config.data, data_dir=data_dir or config.data.data_dir)
        train_set, images = load_data(data_config, config.seed)
        train_set = runs.prepare(train_set, config)
    else:
        like = runs.data_like(run)
        images = load_all(data, replace(like, data_dir=data_dir or like.data_dir))
    images = runs.prepare(images, config)
    if limit is not None and limit < 1:
        raise UserError(f"--limit must be at least 1, got {limit}")
    return train_set, images if limit is None else images.select(slice(limit))


def _processes() -> Accelerator | None:
    """The processes of a launch, or None where there is one."""
    return Accelerator() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None


def _readable(values: dict[str, Any], indent: int = 0) -> list[str]:
    """The numbers for a person: one a line, sections indented, long lists left to the file."""
    lines = []
    for key, value in values.items():
        name = " " * indent + key.replace("_", " ")
        if isinstance(value, dict):
            lines += [name, *_readable(value, indent + 2)]
        elif isinstance(value, float):
            lines.append(f"{name:<36} {value:.4f}")
        elif not isinstance(value, list):
            lines.append(f"{name:<36} {value}")
    return lines


def _write_table(columns: dict[str, torch.Tensor], path: Path) -> None:
    import pyarrow
    from pyarrow import csv, parquet

    table = pyarrow.table({name: values.numpy() for name, values in columns.items()})
    with _writing(path):
        if path.suffix == ".csv":
            csv.write_csv(table, path)
        else:
            parquet.write_table(table, path)


def _require_classes(vae: VAE) -> None:
    if not vae.num_classes:
        raise UserError("--labels: this model is not conditional, it has no classes to choose from")


def _batches(vae: VAE, images: ImageSet) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Images on the model's device, with the labels if it is conditional."""
    device = next(vae.parameters()).device
    for start in range(0, len(images), BATCH):
        batch = images.select(slice(start, start + BATCH)).to(device)
        yield batch.tensor, batch.labels if vae.num_classes else None


def _columns(n: int) -> int:
    """Columns of a grid that is about square."""
    return max(1, round(n**0.5))


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error


def _make_parent(path: Path) -> None:
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder; name a file in it")
