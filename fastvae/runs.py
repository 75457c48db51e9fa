"""A run's folder: where things lie in it, and how they come back."""

import contextlib
import json
import platform
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import fastvae_kernels
import torch

from fastvae import noise
from fastvae.config import Config, from_json
from fastvae.data import DataConfig, ImageSet
from fastvae.errors import UserError
from fastvae.models import Model, load_pretrained
from fastvae.precision import use_matmul_precision
from fastvae.threads import waiting
from fastvae.vae import VAE

CONFIG, METRICS, RESULTS = "config.json", "metrics.jsonl", "results.json"
SAMPLES, RECONSTRUCTIONS, CURVES = "samples.png", "reconstructions.png", "curves.png"
CALIBRATION, PREDICTIONS = "calibration.png", "predictions.png"
PICTURES = (SAMPLES, RECONSTRUCTIONS, CALIBRATION, PREDICTIONS, CURVES)

_PACKAGES = ("fastvae", "torch", "torchvision", "triton", "accelerate", "numpy")


def refuse_other_run(folder: Path | None) -> None:
    """Raise UserError where `folder` already holds a run."""
    if folder is not None and (folder / CONFIG).exists():
        raise UserError(
            f"{folder} already holds a run: continue it with --resume {folder}, "
            "or choose another --output"
        )


def new_run_folder(config: Config, name: str) -> Path:
    """Make the folder of a fresh run: `config.output`, or the first free of runs/name, name-2, …

    Raises UserError where `config.output` already holds a run.
    """
    refuse_other_run(config.output)
    folder, number = config.output or Path("runs") / name, 1
    while True:
        try:
            # Who makes a numbered folder has it, also among runs that start at the same time.
            folder.mkdir(parents=True, exist_ok=config.output is not None)
            return folder
        except FileExistsError as error:
            if config.output is not None:
                raise UserError(f"--output {folder} is a file, not a folder") from error
            number += 1
            folder = Path("runs") / f"{name}-{number}"
        except OSError as error:
            raise UserError(f"cannot make the run's folder {folder}: {error}") from error


def read_config(run: Path) -> Config:
    """The configuration saved in a run's folder. Raises UserError where there is none."""
    path = run / CONFIG
    if not path.is_file():
        raise UserError(f"{run} is no run's folder: it has no {CONFIG}")
    text = path.read_text(errors="replace")
    saved: Any = None
    with contextlib.suppress(ValueError, RecursionError):  # which from_json explains
        saved = json.loads(text)
    if isinstance(saved, dict) and "image_shape" in saved:  # what save_pretrained writes
        raise UserError(
            f"{run} holds a saved model, not the run that it was trained in, which knows its "
            "data: name the run's folder"
        )
    return from_json(text, str(path))


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl. Raises UserError where one is none."""
    path = run / METRICS
    try:
        return [json.loads(line) for line in path.read_bytes().splitlines()]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def load_model(run: Path, device: str = "auto") -> Model:
    """The run's model, ready to use. `device` "auto" is a GPU if there is one."""
    return load_pretrained(run, map_location=_ready(device))


def load_vae(run: Path, device: str = "auto") -> VAE:
    """The same, where only a VAE will do."""
    return VAE.from_pretrained(run, map_location=_ready(device))


def _ready(device: str) -> str:
    """The device that is meant, made ready. Raises UserError where it cannot be used."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {device} cannot be used here: {reason}") from error
    use_matmul_precision("auto", torch.device(device))
    return device


def data_like(run: Path) -> DataConfig:
    """How to read other images so that the run's model can take them: its size and channels."""
    config = read_config(run)
    channels, height, width = load_pretrained(run).image_shape
    return replace(config.data, image_size=(height, width), channels=1 if channels == 1 else 3)


def prepare(images: ImageSet, config: Config) -> ImageSet:
    """Apply what the run fixed once for each image: static binarisation."""
    if config.model.binarization != "static":
        return images
    if not isinstance(images.images, torch.Tensor):
        raise UserError(
            f"--binarize static draws all pixels once, and those of {images.name} do not fit into "
            "the --data-budget: raise it, or take --binarize dynamic"
        )
    seed = noise.derived_seed("static binarisation", config.seed, images.name)
    drawn = (fastvae_kernels.binarize(images.images, seed) * 255).to(torch.uint8)
    return replace(images, images=drawn)


def versions() -> dict[str, str]:
    """Of Python and of the packages that compute."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def environment(device: torch.device, processes: int) -> dict[str, Any]:
    """Versions and hardware, for results that can be placed."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    hardware = {"device": device.type, "name": name, "processes": processes}
    if device.type == "cpu":
        hardware["threads"] = torch.get_num_threads()
        hardware["threads_wait"] = waiting()
    return {"versions": versions(), "hardware": hardware}


def cpu_name() -> str:
    """What the processor calls itself."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
