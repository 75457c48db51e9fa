"""What a checkpoint holds of a training run, and how it comes back."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastvae import checkpoints
from fastvae.errors import UserError
from fastvae.models import Model
from fastvae.saving import WEIGHTS_NAME, write_model

Contents = TypeVar("Contents")


@dataclass(frozen=True)
class Snapshot:
    """A run at one step, copied: training may go on while it is written."""

    step: int
    spec: dict[str, Any]
    weights: dict[str, Tensor]
    """Of the model to use: the averaged ones where there are any."""
    training: dict[str, Tensor]
    state: dict[str, Any]
    heldout: float | None
    copied: torch.cuda.Event | None
    """When the copies are made; None on a CPU, where they are."""

    @classmethod
    def of(
        cls,
        *,
        model: Model,
        trained: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: dict[str, Any],
        heldout: float | None,
    ) -> "Snapshot":
        """`model` is the one to use (averaged weights, or `trained` itself), `trained` the module
        whose parameters the optimizer updates, `state` the counters, as JSON values, `step` among
        them. The copies are made on the device, for which the host does not wait."""
        weights = {name: _copied(value) for name, value in model.state_dict().items()}
        training = {name: _copied(x) for name, x in _training_tensors(trained, optimizer).items()}
        copied = None
        if next(trained.parameters()).is_cuda:
            copied = torch.cuda.Event()
            copied.record()
        return cls(state["step"], model.spec(), weights, training, state, heldout, copied)

    def write(self, run: Path) -> Path:
        """Commit it to `run/checkpoints`, on any thread. Raises OSError."""
        weights, training = self._on_host(self.weights), self._on_host(self.training)

        def fill(folder: Path) -> None:
            write_model(self.spec, weights, folder)
            save_file(training, folder / checkpoints.TRAINING_NAME)
            text = json.dumps(self.state, indent=2) + "\n"
            (folder / checkpoints.STATE_NAME).write_text(text)

        return checkpoints.commit(run, self.step, fill, heldout=self.heldout)

    def _on_host(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.copied is None:
            return tensors
        # The copy to the host does not queue behind training: it goes through a stream of another
        # priority. One of the same may be training's, since PyTorch hands out 32 in turn.
        device = next(iter(tensors.values())).device
        stream = torch.cuda.Stream(device, priority=-1)
        with torch.cuda.device(device), torch.cuda.stream(stream):
            self.copied.synchronize()
            return {name: x.to("cpu") for name, x in tensors.items()}


def load_checkpoint(
    folder: Path, *, model: Model, trained: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Put the weights and the optimizer's state of a verified checkpoint in place; return the
    counters.

    Raises UserError where it is of another model or cannot be read.
    """
    state = _read(folder / checkpoints.STATE_NAME, lambda file: json.loads(file.read_text()))
    if not isinstance(state, dict):
        raise UserError(f"{folder / checkpoints.STATE_NAME} holds no counters of a run")
    tensors = _read(folder / checkpoints.TRAINING_NAME, load_file)
    weights = _read(folder / WEIGHTS_NAME, load_file)
    try:
        model.load_state_dict(weights)
        _restore(trained, optimizer, tensors)
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"the checkpoint {folder} is of another model: {error}") from error
    return state


def _read(file: Path, read: Callable[[Path], Contents]) -> Contents:
    try:
        return read(file)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        # JSON's and Unicode's errors are ValueErrors.
        raise UserError(f"the checkpoint is damaged, {file} cannot be read: {error}") from error


def _copied(x: Tensor) -> Tensor:
    return x.detach().clone(memory_format=torch.contiguous_format)


def _training_tensors(trained: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and buffers as `weight/NAME` and the optimizer's state as `optimizer.KEY/NAME`."""
    tensors = {f"weight/{name}": value for name, value in trained.state_dict().items()}
    for name, parameter in trained.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}/{name}"] = value
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
