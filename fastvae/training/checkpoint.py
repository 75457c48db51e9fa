"""Checkpoints: safetensors and JSON only, complete or absent.

A checkpoint is a folder: `model.safetensors` and `config.json` (what `load_pretrained` reads;
the averaged weights where there are any), `training.safetensors` (the weights in training and the
optimizer's state, by parameter name) and `state.json` (the counters). It is written beside its
place and moved there by renaming, so that a crash leaves the previous one.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastvae.errors import UserError
from fastvae.models import Model
from fastvae.saving import WEIGHTS_NAME, save_model

Contents = TypeVar("Contents")

FOLDER = "checkpoint"
TRAINING_NAME = "training.safetensors"
STATE_NAME = "state.json"
FORMAT = 1


def save_checkpoint(
    run: Path,
    *,
    model: Model,
    trained: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
) -> None:
    """Write `run/checkpoint`, replacing the one before.

    `model` is the one to use (averaged weights, or `trained` itself), `trained` the module whose
    parameters the optimizer updates, `state` the counters, as JSON values.
    """
    target, fresh, previous = run / FOLDER, run / f".{FOLDER}.new", run / f".{FOLDER}.old"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    save_model(model, fresh)
    save_file(_training_tensors(trained, optimizer), fresh / TRAINING_NAME)
    (fresh / STATE_NAME).write_text(json.dumps({"format": FORMAT, **state}, indent=2) + "\n")
    for file in fresh.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    if target.exists():
        shutil.rmtree(previous, ignore_errors=True)
        target.rename(previous)
    fresh.rename(target)
    shutil.rmtree(previous, ignore_errors=True)


def load_checkpoint(
    run: Path, *, model: Model, trained: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Put the weights and the optimizer's state of `run/checkpoint` in place; return the counters.

    Raises UserError where there is no checkpoint, or one that is damaged or of another model.
    """
    folder = run / FOLDER
    if not folder.is_dir():
        # A crash between the two renames leaves the previous one under its waiting name.
        folder = run / f".{FOLDER}.old"
    if not (folder / STATE_NAME).is_file():
        raise UserError(f"{run} has no checkpoint to resume from; start it without --resume")
    state = _read(folder / STATE_NAME, lambda file: json.loads(file.read_text()))
    tensors = _read(folder / TRAINING_NAME, load_file)
    weights = _read(folder / WEIGHTS_NAME, load_file)
    if state.get("format") != FORMAT:
        raise UserError(
            f"the checkpoint {folder} has format {state.get('format')}, this version reads {FORMAT}"
        )
    try:
        model.load_state_dict(weights)
        _restore(trained, optimizer, tensors)
    except (KeyError, RuntimeError) as error:
        raise UserError(f"the checkpoint {folder} is of another model: {error}") from error
    return state


def _read(file: Path, read: Callable[[Path], Contents]) -> Contents:
    try:
        return read(file)
    except (SafetensorError, OSError, ValueError) as error:  # JSON's and Unicode's are ValueErrors
        raise UserError(f"the checkpoint is damaged, {file} cannot be read: {error}") from error


def _training_tensors(trained: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and buffers as `weight/NAME` and the optimizer's state as `optimizer.KEY/NAME`."""
    tensors: dict[str, Tensor] = {}
    for name, value in trained.state_dict().items():
        tensors[f"weight/{name}"] = value.detach().contiguous()
    for name, parameter in trained.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}/{name}"] = value.detach().contiguous()
    return tensors


def _restore(
    trained: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    parameters = dict(trained.named_parameters())
    names = {name: i for i, name in enumerate(parameters)}
    state: dict[int, dict[str, Tensor]] = {}
    weights: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        kind, name = key.split("/", 1)
        if kind == "weight":
            weights[name] = tensor
        elif kind.startswith("optimizer."):
            if tensor.shape == parameters[name].shape:
                # A fused optimizer reads it in the memory format of the parameter.
                tensor = torch.empty_like(parameters[name], dtype=tensor.dtype).copy_(tensor)
            state.setdefault(names[name], {})[kind.removeprefix("optimizer.")] = tensor.detach()
    trained.load_state_dict(weights)
    # load_state_dict puts each tensor on its parameter's device (and Adam's step where it belongs).
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
