"""One run as one typed value: every setting, its default, and what is allowed.

Settings are checked where they are made; the message names the value and the remedy.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastvae.data.config import DataConfig
from fastvae.errors import UserError
from fastvae.parts.networks import ACTIVATIONS


def _require(condition: bool, flag: str, allowed: str, given: object) -> None:
    if not condition:
        raise UserError(f"--{flag} must be {allowed}, got {given}")


@dataclass(frozen=True)
class ModelConfig:
    """Which parts the model is made of."""

    network: Literal["mlp", "conv"] = "mlp"
    """Fully connected, or convolutions that halve the image at each layer."""
    hidden: tuple[int, ...] = (400, 400)
    """Sizes of the hidden layers, from the image to the latents; the decoder mirrors them."""
    widths: tuple[int, ...] = (32, 64)
    """Channels of the convolutions, from the image to the latents (conv only)."""
    activation: Literal["relu", "silu", "gelu", "tanh"] = "relu"
    """Nonlinearity after each hidden layer."""
    latent_dim: int = 20
    """Number of latents."""
    likelihood: Literal["bernoulli", "gaussian"] = "bernoulli"
    """p(x given z): binary pixels, or Gaussian pixels on [0, 1] with one variance for all."""
    binarize: Literal["auto", "dynamic", "static", "none"] = "auto"
    """How grey pixels become binary for a Bernoulli likelihood: fresh draws each time an image is
    met, one draw for the whole run, or not at all (what is then reported is a cross-entropy and
    no ELBO). auto: dynamic for bernoulli, none for gaussian."""
    variance: Literal["learned"] | float = "learned"
    """σ² of the gaussian likelihood: a number, or learned with the weights (gaussian only)."""

    def __post_init__(self) -> None:
        _require(self.latent_dim >= 1, "latent-dim", "at least 1", self.latent_dim)
        _require(all(h >= 1 for h in self.hidden), "hidden", "positive sizes", self.hidden)
        _require(all(w >= 1 for w in self.widths), "widths", "positive sizes", self.widths)
        _require(
            self.network != "conv" or len(self.widths) > 0, "widths", "one or more sizes", "none"
        )
        _require(
            self.variance == "learned" or 0 < self.variance < float("inf"),
            "variance",
            "learned or a positive number",
            self.variance,
        )
        _require(
            self.activation in ACTIVATIONS, "activation", ", ".join(ACTIVATIONS), self.activation
        )
        _require(
            self.likelihood == "bernoulli" or self.binarize in ("auto", "none"),
            "binarize",
            "auto or none with --likelihood gaussian (its pixels are not binary)",
            self.binarize,
        )

    @property
    def binarization(self) -> Literal["dynamic", "static", "none"]:
        """`binarize` with auto decided."""
        if self.binarize != "auto":
            return self.binarize
        return "dynamic" if self.likelihood == "bernoulli" else "none"


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is maximised."""

    beta: float = 1.0
    """Weight of the KL term in the loss; 1 is the ELBO."""
    kl_warmup_epochs: float = 0.0
    """Epochs over which the weight of the KL term rises linearly from 0 to --beta."""

    def __post_init__(self) -> None:
        _require(0 <= self.beta < float("inf"), "beta", "0 or more", self.beta)
        _require(
            0 <= self.kl_warmup_epochs < float("inf"),
            "kl-warmup-epochs",
            "0 or more",
            self.kl_warmup_epochs,
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """How it is maximised. The learning rate is a function of the step alone."""

    optimizer: Literal["adam", "adamw"] = "adam"
    """Adam, or Adam with decoupled weight decay."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Weight decay (decoupled with adamw, an L2 penalty with adam)."""
    schedule: Literal["constant", "cosine", "step"] = "constant"
    """After warm-up: constant, half a cosine down to 0 at the last step, or steps down."""
    lr_warmup_steps: int = 0
    """Steps over which the learning rate rises linearly to its peak."""
    lr_step_epochs: float = 10.0
    """With --schedule step: epochs between two reductions."""
    lr_step_factor: float = 0.5
    """With --schedule step: what each reduction multiplies by."""
    clip_norm: float = 0.0
    """Clip the gradient's norm to this; 0 is off."""
    ema_decay: float = 0.0
    """Keep an exponential moving average of the weights and use it for results; 0 is off."""

    def __post_init__(self) -> None:
        _require(
            0 < self.learning_rate < float("inf"), "learning-rate", "positive", self.learning_rate
        )
        _require(
            0 <= self.weight_decay < float("inf"), "weight-decay", "0 or more", self.weight_decay
        )
        _require(self.lr_warmup_steps >= 0, "lr-warmup-steps", "0 or more", self.lr_warmup_steps)
        _require(self.lr_step_epochs > 0, "lr-step-epochs", "positive", self.lr_step_epochs)
        _require(0 < self.lr_step_factor <= 1, "lr-step-factor", "in (0, 1]", self.lr_step_factor)
        _require(self.clip_norm >= 0, "clip-norm", "0 (off) or more", self.clip_norm)
        _require(0 <= self.ema_decay < 1, "ema-decay", "in [0, 1); 0 is off", self.ema_decay)


@dataclass(frozen=True)
class Config:
    """Every setting of a run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    output: Path | None = None
    """The run's folder. None: runs/ and the preset's name, with a number if that is taken."""
    epochs: float = 10.0
    """How often to go through the training images."""
    max_steps: int | None = None
    """Stop after this many steps, if that is earlier."""
    batch_size: int = 128
    """Images in one step, over all processes and accumulated gradients together."""
    gradient_accumulation_steps: int = 1
    """Split each process's share of a batch into this many parts, to save memory."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """auto: what `accelerate launch --mixed_precision` says."""
    seed: int = 0
    """The run is a function of this: weights, order of the data, every noise value."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile the training step. auto: if there is a compiler and the run is long enough."""
    log_every: int = 50
    """Steps between two lines of metrics.jsonl."""
    eval_every: float = 1.0
    """Epochs between two evaluations on held-out images."""
    checkpoint_every: float = 1.0
    """Epochs between two checkpoints; there is always one at the end."""
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Send the metrics to a tracker as well (installed by the extra of the same name)."""

    def __post_init__(self) -> None:
        _require(0 < self.epochs < float("inf"), "epochs", "positive", self.epochs)
        _require(
            self.max_steps is None or self.max_steps > 0, "max-steps", "positive", self.max_steps
        )
        _require(self.batch_size >= 1, "batch-size", "at least 1", self.batch_size)
        _require(
            self.gradient_accumulation_steps >= 1,
            "gradient-accumulation-steps",
            "at least 1",
            self.gradient_accumulation_steps,
        )
        _require(0 <= self.seed < 2**63, "seed", "in [0, 2^63)", self.seed)
        _require(self.log_every >= 1, "log-every", "at least 1", self.log_every)
        _require(self.eval_every > 0, "eval-every", "positive", self.eval_every)
        _require(self.checkpoint_every > 0, "checkpoint-every", "positive", self.checkpoint_every)

    def to_json(self) -> str:
        """The whole configuration, as `from_json` and `--config` read it."""
        return json.dumps(asdict(self), indent=2, default=str) + "\n"


for _settings in (DataConfig, ModelConfig, ObjectiveConfig, OptimizerConfig, Config):
    _settings.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[union-attr]


def from_json(text: str, source: str) -> Config:
    """Read a configuration. Fields left out take their defaults.

    Raises UserError naming `source` and every unknown field or value that is not allowed.
    """
    from pydantic import TypeAdapter, ValidationError  # only where a file is read

    try:
        json.loads(text)  # names the place of a mistake better
        return TypeAdapter(Config).validate_json(text, strict=True)
    except json.JSONDecodeError as error:
        raise UserError(f"{source} is not JSON: {error}") from error
    except ValidationError as error:
        problems = [
            f"  {'.'.join(map(str, e['loc'])) or 'configuration'}: {e['msg']}"
            + ("" if e["type"] == "value_error" else f" (got {e['input']!r})")
            for e in error.errors()
        ]
        raise UserError(
            "\n".join([f"{source} is no configuration of a run:", *problems])
        ) from error


def differences(a: Config, b: Config) -> dict[str, tuple[Any, Any]]:
    """The settings in which two configurations differ: {"model.latent_dim": (20, 32), …}."""
    flat_a, flat_b = _flatten(asdict(a)), _flatten(asdict(b))
    return {key: (flat_a[key], flat_b[key]) for key in flat_a if flat_a[key] != flat_b[key]}


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
