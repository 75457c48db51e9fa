"""A model as a folder: config.json and model.safetensors, never code; from there or the Hub."""

import json
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastvae import checkpoints
from fastvae.errors import FastvaeWarning, UserError

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
LONGEST_MESSAGE = 1000

KINDS = {
    "vae": ("a variational autoencoder", "VAE"),
    "bayesian-network": ("a Bayesian neural network", "BayesianNetwork"),
}
"""What the "model" of config.json may be: in words, and the class that reads it."""

HUB_OPTIONS = ("revision", "cache_dir", "force_download", "local_files_only", "token")

Loaded = TypeVar("Loaded", bound=nn.Module)


class Described(Protocol):
    """A model that can say what it is made of."""

    def spec(self) -> dict[str, Any]:
        """What config.json holds."""

    def state_dict(self) -> dict[str, Any]:
        """What model.safetensors holds."""


def save_model(model: Described, folder: Path) -> None:
    """Write config.json and model.safetensors into an existing folder."""
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    write_model(model.spec(), state, folder)


def write_model(spec: dict[str, Any], state: dict[str, Tensor], folder: Path) -> None:
    """As `save_model`, what the model has said of itself: its tensors are contiguous."""
    (folder / CONFIG_NAME).write_text(json.dumps(spec, indent=2) + "\n")
    save_file(state, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    # safetensors' are for their owner alone, whatever the user's mask.
    (folder / WEIGHTS_NAME).chmod((folder / CONFIG_NAME).stat().st_mode)


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Around a load of `name`, a folder or a name on the Hub: its errors as UserError."""
    # A mistyped path deserves its answer at once, not after a wait for the Hub.
    on_hub = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII)
    if not Path(name).is_dir() and not (on_hub and not Path(name).parent.is_dir()):
        raise UserError(
            f"there is no folder {name} (a name on the Hugging Face Hub has the form "
            "owner/name, and the owner is no folder here)"
        )
    try:
        yield
    except UserError:
        raise
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"the {CONFIG_NAME} of {name} is damaged: {error}") from error
    except OSError as error:  # what huggingface_hub raises is one, too
        where = "" if Path(name).is_dir() else "there is no such folder, and from the Hub "
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{name}: {where}no model could be read: {reason}") from error


def load_model(
    name: str,
    kind: str,
    build: Callable[[dict[str, Any]], Loaded],
    device: str,
    options: dict[str, Any],
) -> Loaded:
    """The model of a folder or Hub name, made by `build` from its spec, on `device`, in eval mode.

    Of `options` those for the Hub are used. Raises UserError where the model is of another kind,
    or its weights are damaged or another model's.
    """
    spec = read_spec(name, options)
    if (found := kind_of(spec)) != kind:
        what, cls = KINDS[found]
        raise UserError(
            f"{name} holds {what}, not {KINDS[kind][0]}: load it by fastvae.{cls}.from_pretrained, "
            "or either by fastvae.load_pretrained"
        )
    weights = _find_file(name, WEIGHTS_NAME, options)
    try:
        # On no device first: what is described must not take memory that the weights do not fill.
        # (Flows cannot be: they count the rows of a mask.)
        with suppress(NotImplementedError), torch.device("meta"):
            _require_shapes(weights, build(spec))
        model = build(spec)
    except (SafetensorError, OSError):
        raise
    except UserError as error:
        raise UserError(_brief(error)) from error
    except Exception as error:  # a description that makes no sense fails in many ways
        raise UserError(
            f"the {CONFIG_NAME} of {name} describes no model that could be built: "
            f"{type(error).__name__}: {_brief(error)}"
        ) from error
    try:
        model.load_state_dict(load_file(weights))
    except SafetensorError as error:
        raise UserError(f"{weights} is damaged: {error}") from error
    except RuntimeError as error:
        raise UserError(f"{weights} holds the weights of another model: {error}") from error
    return model.to(device).eval()


def _brief(error: Exception) -> str:
    """Its message, which may quote a value of any length from a file."""
    said = str(error)
    return said if len(said) <= LONGEST_MESSAGE else f"{said[:LONGEST_MESSAGE]} …"


def _require_shapes(weights: Path, model: nn.Module) -> None:
    """Raise UserError where a file's tensors are not those of `model`, by their headers alone."""
    try:
        with safe_open(weights, "pt") as file:
            stored = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{weights} is damaged: {error}") from error
    wanted = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    different = [
        f"{name}: {stored.get(name, 'missing')} in the file, {wanted.get(name, 'none')} expected"
        for name in sorted(stored.keys() | wanted)
        if stored.get(name) != wanted.get(name)
    ]
    if different:
        more = f", and {len(different) - 3} more" if len(different) > 3 else ""
        raise UserError(
            f"{weights} holds the weights of another model: {'; '.join(different[:3])}{more}"
        )


def read_spec(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """What the config.json of a folder or Hub name holds; of `options` those for the Hub are used.

    Raises UserError for a folder that holds no model.
    """
    file = _find_file(name, CONFIG_NAME, options)
    try:
        spec = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"the {CONFIG_NAME} of {name} is damaged: {error}") from error
    if not isinstance(spec, dict):
        raise UserError(f"the {CONFIG_NAME} of {name} describes no model: {str(spec)[:80]}")
    return spec


def kind_of(spec: dict[str, Any]) -> str:
    """The kind of model that a spec describes. Raises UserError where it is unknown."""
    kind = spec.get("model", "vae")  # which all were before there were others
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(
            f"the {CONFIG_NAME} says the model is a {kind!r}; there are: {', '.join(KINDS)}"
        )
    return kind


def model_folder(folder: Path) -> Path:
    """Where the model of a run's folder lies: its newest checkpoint that is whole (with a warning
    if there are newer ones). Any other folder, a checkpoint too, is its own."""
    if not checkpoints.folders(folder):
        return folder
    found, problems = checkpoints.newest(folder)
    for problem in problems:
        warnings.warn(f"{problem}; reading {found.folder} instead", FastvaeWarning, stacklevel=2)
    return found.folder


def _find_file(name: str, file: str, options: dict[str, Any]) -> Path:
    """Where a model's file lies; fetched first if it is on the Hub."""
    if not (folder := Path(name)).is_dir():
        hub = {key: options[key] for key in HUB_OPTIONS if key in options}
        return Path(hf_hub_download(name, file, **hub))
    folder = model_folder(folder)
    if (folder / file).is_file() and (folder / WEIGHTS_NAME).is_file():
        return folder / file
    raise UserError(
        f"{folder} holds no model: neither {WEIGHTS_NAME} with {CONFIG_NAME} nor checkpoints/"
    )
