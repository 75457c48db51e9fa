"""Which settings do not go together, and why: a table of rules, read before any work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastvae.config import Config, ModelConfig, ObjectiveConfig

# Settings that only some choice reads: {setting: (choice, values that read it)}.
_MODEL_OWNERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "posterior_scale": ("posterior", ("diagonal-gaussian",)),
    "flow_layers": ("posterior", ("inverse-autoregressive",)),
    "prior_components": ("prior", ("mixture", "vamp")),
    "variance": ("likelihood", ("gaussian",)),
    "min_std": ("variance", ("predicted",)),
    "levels": ("likelihood", ("categorical",)),
    "mixtures": ("likelihood", ("logistic-mixture",)),
    "widths": ("network", ("conv",)),
    "pooling": ("network", ("conv",)),
    "weight_std": ("target", ("labels",)),
}
_OBJECTIVE_OWNERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "num_samples": ("objective", ("elbo", "importance-weighted", "mmd")),
    "beta": ("objective", ("elbo", "mmd")),
    "kl_warmup_epochs": ("objective", ("elbo",)),
    "kl_cycle_epochs": ("objective", ("elbo",)),
    "free_bits": ("objective", ("elbo",)),
    "capacity": ("objective", ("elbo",)),
    "capacity_epochs": ("objective", ("elbo",)),
    "groups": ("objective", ("importance-weighted",)),
    "elbo_share": ("objective", ("importance-weighted",)),
    "gradient": ("objective", ("importance-weighted",)),
    "decoder_draws": ("objective", ("importance-weighted",)),
    "mutual_information_weight": ("objective", ("total-correlation",)),
    "total_correlation_weight": ("objective", ("total-correlation",)),
    "dimension_weight": ("objective", ("total-correlation",)),
    "mmd_weight": ("objective", ("mmd",)),
}
_OPTIMIZER_OWNERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "lr_step_epochs": ("schedule", ("step",)),
    "lr_step_factor": ("schedule", ("step",)),
    "momentum": ("optimizer", ("muon",)),
}
# What a network with random weights has in common with a VAE; the rest has no meaning for it.
_OF_LABELS = {"target", "network", "hidden", "activation", "weight_std"}
_OBJECTIVE_OF_LABELS = {"objective", "num_samples", "beta", "kl_warmup_epochs", "kl_cycle_epochs"}

Rule = tuple[Callable[["ModelConfig", "ObjectiveConfig", "Config"], bool], str]


def _deterministic(m: ModelConfig) -> bool:
    return m.posterior == "deterministic"


def _semi_amortised(m: ModelConfig) -> bool:
    return m.inference == "encoder" and m.refine_steps > 0


_RULES: list[Rule] = [
    (
        lambda m, o, c: _deterministic(m) and o.objective in ("importance-weighted",),
        "--posterior deterministic has no density to weigh draws by: "
        "--objective importance-weighted needs a posterior that is a distribution",
    ),
    (
        lambda m, o, c: _deterministic(m) and o.objective == "total-correlation",
        "--posterior deterministic has no KL to take apart: "
        "--objective total-correlation needs --posterior diagonal-gaussian",
    ),
    (
        lambda m, o, c: (
            _deterministic(m)
            and (o.beta not in (0, 1) or bool(o.free_bits or o.capacity or o.kl_warmup_epochs))
        ),
        "--posterior deterministic has no KL: --beta, --free-bits, --capacity and "
        "--kl-warmup-epochs would do nothing",
    ),
    (
        lambda m, o, c: _deterministic(m) and o.num_samples > 1,
        "--posterior deterministic has one z for each image: --num-samples must be 1",
    ),
    (
        lambda m, o, c: (
            _deterministic(m)
            and m.prior in ("class-normal", "mixture", "vamp")
            and o.objective != "mmd"
        ),
        "--posterior deterministic has no KL from which a prior could learn: "
        "use --prior none, or --prior standard-normal with --objective mmd",
    ),
    (
        lambda m, o, c: _deterministic(m) and m.prior == "mixture" and o.objective == "mmd",
        "--prior mixture learns its weights from the KL, which --posterior deterministic has not: "
        "use --prior standard-normal, class-normal or vamp",
    ),
    (
        lambda m, o, c: m.prior == "none" and not (_deterministic(m) and o.objective == "elbo"),
        "--prior none goes with --posterior deterministic and --objective elbo alone: "
        "all else compares z with a prior",
    ),
    (
        lambda m, o, c: m.prior == "class-normal" and not m.conditional,
        "--prior class-normal is a prior for each label: add --conditional",
    ),
    (
        lambda m, o, c: m.prior == "vamp" and m.conditional,
        "--prior vamp asks the encoder about inputs that have no label: "
        "with --conditional use --prior class-normal or mixture",
    ),
    (
        lambda m, o, c: m.prior == "vamp" and m.inference == "table",
        "--prior vamp asks the encoder about inputs of its own, and a table has no answer to them: "
        "with --inference table use another prior",
    ),
    (
        lambda m, o, c: m.prior == "vamp" and m.posterior == "inverse-autoregressive",
        "--prior vamp mixes Gaussian answers of the encoder, and the flow's are not Gaussian: "
        "with --posterior inverse-autoregressive use --prior standard-normal or mixture",
    ),
    (
        lambda m, o, c: m.inference == "table" and c.data.flip,
        "--flip shows an image in two ways, and --inference table keeps one answer for it: leave "
        "--flip out",
    ),
    (
        lambda m, o, c: m.inference == "table" and o.objective == "total-correlation",
        "--objective total-correlation compares images of one batch as the encoder sees them; "
        "with --inference table it is not supported: use --objective elbo",
    ),
    (
        lambda m, o, c: bool(o.free_bits) and m.prior in ("mixture", "vamp"),
        "--free-bits needs the KL of each latent, which exists only under a prior that factorises: "
        "use --prior standard-normal or class-normal",
    ),
    (
        lambda m, o, c: (
            m.posterior == "inverse-autoregressive"
            and bool(o.free_bits or o.objective == "total-correlation")
        ),
        "--posterior inverse-autoregressive has no KL for each latent: "
        "--free-bits and --objective total-correlation need --posterior diagonal-gaussian",
    ),
    (
        lambda m, o, c: (
            m.posterior == "inverse-autoregressive"
            and (o.gradient == "doubly-reparameterized" or o.decoder_draws == "all")
        ),
        "--gradient doubly-reparameterized and --decoder-draws all need log q(z) as a function of "
        "z, which an inverse autoregressive flow knows at its own draws only: "
        "use --posterior diagonal-gaussian",
    ),
    (
        lambda m, o, c: o.objective == "total-correlation" and m.prior != "standard-normal",
        "--objective total-correlation is written for --prior standard-normal",
    ),
    (
        lambda m, o, c: (
            o.objective == "importance-weighted"
            and m.likelihood == "bernoulli"
            and m.binarization == "none"
        ),
        "--objective importance-weighted weighs by a density, and --binarize none gives a "
        "cross-entropy: use --binarize dynamic or static",
    ),
    (
        lambda m, o, c: (
            o.objective == "importance-weighted" and o.decoder_draws == "all" and o.groups == 1
        ),
        "--decoder-draws all differs from group only where there are several: add --groups",
    ),
    (
        lambda m, o, c: (
            c.gradient_accumulation_steps > 1
            and (o.objective in ("total-correlation", "mmd") or m.variance == "optimal")
        ),
        "--objective total-correlation and mmd and --variance optimal look at a whole batch at "
        "once: --gradient-accumulation-steps must be 1",
    ),
    (
        lambda m, o, c: o.objective in ("total-correlation", "mmd") and c.batch_size < 2,
        "--objective total-correlation and mmd compare the images of a batch: "
        "--batch-size must be at least 2",
    ),
    (
        lambda m, o, c: _semi_amortised(m) and c.compile == "on",
        "--refine-steps differentiates inside the forward pass, which torch.compile cannot: "
        "leave out --compile on",
    ),
    (
        lambda m, o, c: _semi_amortised(m) and m.variance == "optimal",
        "--variance optimal looks at a whole batch, and --refine-steps goes image by image: "
        "use --variance learned",
    ),
    (
        lambda m, o, c: (
            "refine_rate" in _changed(m) and m.inference == "encoder" and m.refine_steps == 0
        ),
        "--refine-rate is the length of steps that are not taken: add --refine-steps",
    ),
    (
        lambda m, o, c: o.objective == "elbo" and o.kl_cycle_epochs > 0 and o.kl_warmup_epochs == 0,
        "--kl-cycle-epochs begins the warm-up again, and there is none: add --kl-warmup-epochs",
    ),
    (
        lambda m, o, c: o.objective == "elbo" and o.capacity_epochs > 0 and o.capacity == 0,
        "--capacity-epochs is how long --capacity rises, and there is none: add --capacity",
    ),
]


def why_impossible(config: Config) -> str | None:
    """The first reason why these settings do not go together, or None."""
    model, objective = config.model, config.objective
    if model.target == "labels":
        if objective.objective != "elbo":
            return (
                f"--target labels maximises an ELBO: --objective {objective.objective} is a VAE's"
            )
        if config.optimizer.weight_decay:
            return (
                "--target labels has a prior of its weights already, which --weight-decay would "
                "change: set it by --weight-std"
            )
        if config.optimizer.optimizer == "muon":
            return (
                "--optimizer muon is for the weights of layers, and --target labels learns "
                "distributions of them: use --optimizer adam"
            )
        if model.network != "mlp":
            return "--target labels has fully connected networks: use --network mlp"
        return None
    for applies, reason in _RULES:
        if applies(model, objective, config):
            return reason
    return None


def why_unread(config: Config) -> str | None:
    """Why a setting that was changed would not be read by the chosen parts, or None.

    Asked where a run begins. A saved run may hold such a value all the same: the default of a
    setting that it never read, from before that default was another.
    """
    model, objective = config.model, config.objective
    if reason := _unread(config.optimizer, _OPTIMIZER_OWNERS):
        return reason
    if model.target == "labels":
        for settings, meaningful in ((model, _OF_LABELS), (objective, _OBJECTIVE_OF_LABELS)):
            for name in _changed(settings):
                if name not in meaningful:
                    return (
                        f"--{_flag(name)} is a setting of a VAE: --target labels trains a network "
                        "with random weights, which has none"
                    )
        return None
    return _unread(model, _MODEL_OWNERS) or _unread(objective, _OBJECTIVE_OWNERS)


def _unread(settings: Any, owners: dict[str, tuple[str, tuple[str, ...]]]) -> str | None:
    """Why a setting that was changed would not be read, or None."""
    for name in _changed(settings):
        choice, values = owners.get(name, ("", ()))
        if choice and getattr(settings, choice) not in values:
            return (
                f"--{_flag(name)} belongs to --{_flag(choice)} {' or '.join(values)}, "
                f"got --{_flag(choice)} {getattr(settings, choice)}"
            )
    return None


def _changed(settings: Any) -> list[str]:
    """The settings that are not at their defaults."""
    return [f.name for f in fields(settings) if getattr(settings, f.name) != f.default]


def _flag(name: str) -> str:
    return name.replace("_", "-")
