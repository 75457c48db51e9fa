"""One run as one typed value: every setting, its default, and what is allowed.

Settings are checked where they are made; the message names the value and the remedy.
"""

import json
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from fastvae.combinations import why_impossible
from fastvae.data.config import DataConfig
from fastvae.errors import UserError
from fastvae.parts.networks import ACTIVATIONS
from fastvae.precision import MatmulPrecision


def _require(condition: bool, flag: str, allowed: str, given: object) -> None:
    if not condition:
        raise UserError(f"--{flag} must be {allowed}, got {given}")


@dataclass(frozen=True)
class ModelConfig:
    """Which parts the model is made of."""

    target: Literal["images", "labels"] = "images"
    """What is modelled: p(x), by a VAE, or p(y given x), by a network with random weights."""
    network: Literal["mlp", "conv"] = "mlp"
    """Fully connected, or convolutions that halve the image at each layer."""
    hidden: tuple[int, ...] = (400, 400)
    """Sizes of the hidden layers, from the image to the latents; the decoder mirrors them."""
    widths: tuple[int, ...] = (32, 64)
    """Channels of the convolutions, from the image to the latents (conv only)."""
    pooling: bool = False
    """Halve and double by pooling and repetition of pixels, not by strides (conv only)."""
    activation: Literal["relu", "silu", "gelu", "tanh"] = "relu"
    """Nonlinearity after each hidden layer."""
    latent_dim: int = 20
    """Number of latents."""
    conditional: bool = False
    """Condition encoder and decoder on the labels: q(z given x, y) and p(x given z, y)."""
    inference: Literal["encoder", "table"] = "encoder"
    """Who answers q(z given x): a network, or a table of parameters for each training image
    (non-amortised inference; unseen images get theirs by --refine-steps of optimisation)."""
    refine_steps: int = 0
    """Steps of optimisation that improve each image's answer, in training and evaluation
    (semi-amortised inference); with a table, those that unseen images get (0: 500)."""
    refine_rate: float = 0.05
    """Length of those steps, in units of the latents."""
    posterior: Literal["diagonal-gaussian", "deterministic", "inverse-autoregressive"] = (
        "diagonal-gaussian"
    )
    """q(z given x); deterministic is a plain autoencoder, inverse-autoregressive a flow."""
    posterior_scale: Literal["logvar", "softplus"] = "logvar"
    """What the encoder gives for σ: log σ², or σ before a softplus (diagonal-gaussian only)."""
    flow_layers: int = 2
    """Transformations of the inverse-autoregressive posterior."""
    prior: Literal["standard-normal", "class-normal", "mixture", "vamp", "none"] = "standard-normal"
    """p(z): N(0, I); a learned Gaussian for each class; a learned mixture; the encoder's answers to
    learned pseudo-inputs; or none (deterministic only: nothing to sample from)."""
    prior_components: int = 50
    """Components of a mixture or vamp prior."""
    likelihood: Literal["bernoulli", "gaussian", "categorical", "logistic-mixture"] = "bernoulli"
    """p(x given z): binary pixels; Gaussian pixels on [0, 1]; a choice among integer levels; or a
    mixture of discretised logistics (8-bit grey or colour)."""
    binarize: Literal["auto", "dynamic", "static", "none"] = "auto"
    """How grey pixels become binary for a Bernoulli likelihood: fresh draws each time an image is
    met, one draw for the whole run, or not at all (what is then reported is a cross-entropy and
    no ELBO). auto: dynamic for bernoulli, none for the others."""
    variance: Literal["learned", "optimal", "predicted"] | float = "learned"
    """σ² of the gaussian likelihood: a number, learned with the weights, the optimum for each
    batch, or predicted by the decoder for each pixel."""
    min_std: float = 0.05
    """What σ stays above with --variance predicted, on the [0, 1] scale of the pixels: without a
    floor, a pixel that never changes would let the density grow without end."""
    levels: int = 256
    """Steps into which a categorical likelihood cuts the 8-bit pixels."""
    mixtures: int = 5
    """Components of the logistic-mixture likelihood."""
    weight_std: float = 4.0
    """σ of the prior of the weights (--target labels only): N(0, σ²/inputs of the layer)."""

    def __post_init__(self) -> None:
        _require(self.latent_dim >= 1, "latent-dim", "at least 1", self.latent_dim)
        _require(all(h >= 1 for h in self.hidden), "hidden", "positive sizes", self.hidden)
        _require(all(w >= 1 for w in self.widths), "widths", "positive sizes", self.widths)
        _require(
            self.network != "conv" or len(self.widths) > 0, "widths", "one or more sizes", "none"
        )
        _require(
            isinstance(self.variance, str) or 0 < self.variance < float("inf"),
            "variance",
            "learned, optimal, predicted or a positive number",
            self.variance,
        )
        _require(
            self.activation in ACTIVATIONS, "activation", ", ".join(ACTIVATIONS), self.activation
        )
        _require(
            self.likelihood == "bernoulli" or self.binarize in ("auto", "none"),
            "binarize",
            f"auto or none with --likelihood {self.likelihood} (its pixels are not binary)",
            self.binarize,
        )
        _require(self.refine_steps >= 0, "refine-steps", "0 or more", self.refine_steps)
        _require(0 < self.refine_rate < float("inf"), "refine-rate", "positive", self.refine_rate)
        _require(self.flow_layers >= 1, "flow-layers", "at least 1", self.flow_layers)
        _require(
            self.prior_components >= 1, "prior-components", "at least 1", self.prior_components
        )
        _require(0 < self.min_std < float("inf"), "min-std", "positive", self.min_std)
        _require(2 <= self.levels <= 256, "levels", "in 2..256", self.levels)
        _require(self.mixtures >= 1, "mixtures", "at least 1", self.mixtures)
        _require(0 < self.weight_std < float("inf"), "weight-std", "positive", self.weight_std)

    @property
    def binarization(self) -> Literal["dynamic", "static", "none"]:
        """`binarize` with auto decided."""
        if self.binarize != "auto":
            return self.binarize
        return "dynamic" if self.likelihood == "bernoulli" else "none"


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is maximised."""

    objective: Literal["elbo", "importance-weighted", "total-correlation", "mmd"] = "elbo"
    """The ELBO and its weighted relatives, importance-weighted bounds, the KL in its three parts
    (β-TCVAE), or a match of z to the prior by MMD (InfoVAE, WAE)."""
    num_samples: int = 1
    """S, draws of z for each image: averaged over, or weighted by an importance-weighted bound."""
    beta: float = 1.0
    """Weight of the KL term in the loss; 1 is the ELBO."""
    kl_warmup_epochs: float = 0.0
    """Epochs over which the weight of the KL term rises linearly from 0 to --beta."""
    kl_cycle_epochs: float = 0.0
    """Begin the warm-up again after so many epochs, and again (0: never)."""
    free_bits: float = 0.0
    """Nats that each latent may cost for nothing."""
    capacity: float = 0.0
    """Pull the KL to so many nats, with --beta as the force (0: off)."""
    capacity_epochs: float = 0.0
    """Epochs over which --capacity rises linearly from 0."""
    groups: int = 1
    """Cut the S draws into so many importance-weighted means (MIWAE)."""
    elbo_share: float = 0.0
    """Share of the ELBO in an importance-weighted objective, the rest is the bound's (CIWAE)."""
    gradient: Literal["reparameterized", "doubly-reparameterized"] = "reparameterized"
    """How an importance-weighted bound moves the encoder; doubly-reparameterized (DReG) has the
    same mean with less noise."""
    decoder_draws: Literal["group", "all"] = "group"
    """all: the decoder follows one mean over all S draws, the encoder the groups' (PIWAE)."""
    mutual_information_weight: float = 1.0
    """Weight of I(x; z) in total-correlation."""
    total_correlation_weight: float = 6.0
    """Weight of the total correlation of z."""
    dimension_weight: float = 1.0
    """Weight of the KL of each latent's own distribution in total-correlation."""
    mmd_weight: float = 10.0
    """Weight of the MMD between z and the prior's draws."""

    def __post_init__(self) -> None:
        for name in (
            "beta",
            "kl_warmup_epochs",
            "kl_cycle_epochs",
            "free_bits",
            "capacity",
            "capacity_epochs",
            "mutual_information_weight",
            "total_correlation_weight",
            "dimension_weight",
            "mmd_weight",
        ):
            value = getattr(self, name)
            _require(0 <= value < float("inf"), name.replace("_", "-"), "0 or more", value)
        _require(self.num_samples >= 1, "num-samples", "at least 1", self.num_samples)
        _require(
            self.groups >= 1 and self.num_samples % self.groups == 0,
            "groups",
            f"a divisor of --num-samples {self.num_samples}",
            self.groups,
        )
        _require(0 <= self.elbo_share <= 1, "elbo-share", "in [0, 1]", self.elbo_share)


@dataclass(frozen=True)
class OptimizerConfig:
    """How it is maximised. The learning rate is a function of the step alone."""

    optimizer: Literal["adam", "adamw", "muon"] = "adam"
    """Adam; Adam with decoupled weight decay; or Muon: orthogonalised momentum for the weights of
    layers, adamw for the rest."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Weight decay (decoupled with adamw and muon, an L2 penalty with adam)."""
    schedule: Literal["constant", "cosine", "step", "stages"] = "constant"
    """After warm-up: constant; half a cosine down to 0 at the last step; steps down; or 8 stages,
    each 3 times as long as the one before, the first of one epoch, down to a tenth (Burda et al.
    2016)."""
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
    beta1: float = 0.9
    """Adam's decay of the mean of gradients."""
    beta2: float = 0.999
    """Adam's decay of the mean of their squares."""
    epsilon: float = 1e-8
    """What Adam adds to the root of that."""
    momentum: float = 0.95
    """Muon's decay of the mean of gradients."""

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
        _require(0 <= self.beta1 < 1, "beta1", "in [0, 1)", self.beta1)
        _require(0 <= self.beta2 < 1, "beta2", "in [0, 1)", self.beta2)
        _require(0 < self.epsilon < float("inf"), "epsilon", "positive", self.epsilon)
        _require(0 <= self.momentum < 1, "momentum", "in [0, 1)", self.momentum)


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
    matmul_precision: MatmulPrecision = "auto"
    """Of float32 matrix products, as torch.set_float32_matmul_precision has it. auto: the fastest
    that is as exact as float32 here (high and medium let a GPU round factors to TF32 or less)."""
    seed: int = 0
    """The run is a function of this: weights, order of the data, every noise value."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile the training step. auto: if there is a compiler and the run is long enough."""
    steps_per_launch: int | None = None
    """On a GPU, steps that are launched at once, as one CUDA graph. None: about 2 ms of work."""
    log_every: int = 50
    """Steps between two lines of metrics.jsonl."""
    eval_every: float = 1.0
    """Epochs between two evaluations on held-out images."""
    checkpoint_every: float = 1.0
    """Epochs between two checkpoints; there is always one at the start and at the end."""
    checkpoint_minutes: float | None = None
    """Minutes between two checkpoints, in place of --checkpoint-every: for epochs of hours, or of
    less than a second."""
    keep: int = 2
    """So many of the newest checkpoints stay, besides the best by the held-out bound."""
    max_bad_steps: int = 20
    """Steps with a loss or gradient that is not finite are skipped; stop after so many in a row."""
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Send the metrics to a tracker as well (installed by the extra of the same name)."""

    def __post_init__(self) -> None:
        _require(0 < self.epochs <= 1e9, "epochs", "positive, at most 1e9", self.epochs)
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
        _require(
            self.steps_per_launch is None or 1 <= self.steps_per_launch <= 64,
            "steps-per-launch",
            "in 1..64",
            self.steps_per_launch,
        )
        _require(self.log_every >= 1, "log-every", "at least 1", self.log_every)
        _require(self.eval_every > 0, "eval-every", "positive", self.eval_every)
        _require(self.checkpoint_every > 0, "checkpoint-every", "positive", self.checkpoint_every)
        minutes = self.checkpoint_minutes
        _require(
            minutes is None or 0 < minutes < float("inf"), "checkpoint-minutes", "positive", minutes
        )
        _require(self.keep >= 1, "keep", "at least 1", self.keep)
        _require(self.max_bad_steps >= 1, "max-bad-steps", "at least 1", self.max_bad_steps)
        if reason := why_impossible(self):
            raise UserError(reason)

    def to_json(self) -> str:
        """The whole configuration, as `from_json` and `--config` read it."""
        return json.dumps(asdict(self), indent=2, default=str) + "\n"


for _settings in (DataConfig, ModelConfig, ObjectiveConfig, OptimizerConfig, Config):
    _settings.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[union-attr]


def from_json(text: str, source: str) -> Config:
    """Read a configuration. Fields left out take their defaults.

    Raises UserError naming `source` and every unknown field or value that is not allowed.
    """
    from pydantic import ValidationError  # only where a file is read

    try:
        json.loads(text)  # names the place of a mistake better
        return _reader().validate_json(text, strict=True)
    except (json.JSONDecodeError, RecursionError) as error:
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


@cache
def _reader() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(Config)


def differences(a: Config, b: Config) -> dict[str, tuple[Any, Any]]:
    """The settings in which two configurations differ: {"model.latent_dim": (20, 32), …}."""
    flat_a, flat_b = flat(asdict(a)), flat(asdict(b))
    return {key: (flat_a[key], flat_b[key]) for key in flat_a if flat_a[key] != flat_b[key]}


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model": {"latent_dim": 20}} → {"model.latent_dim": 20}"""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found
