"""Settings known to work, one row each, so that the differences show by column."""

import difflib
from typing import Any

from fastvae.config import Config, ModelConfig, ObjectiveConfig, OptimizerConfig
from fastvae.data import DataConfig
from fastvae.errors import UserError

# fmt: off
_COLUMNS = (              "data",          "network", "hidden",   "widths",       "latent_dim", "likelihood", "learning_rate", "schedule", "batch_size", "epochs", "eval_every", "checkpoint_every")  # noqa: E501
_ROWS = {
    "digits-mlp":         ("digits",        "mlp",    (256, 256), (32, 64),       8,            "gaussian",   2e-3,            "cosine",   128,          200.0,    10.0,         10.0),  # noqa: E501
    "digits-conv":        ("digits",        "conv",   (128,),     (32, 64),       8,            "gaussian",   2e-3,            "cosine",   128,          100.0,    10.0,         10.0),  # noqa: E501
    "mnist-mlp":          ("mnist",         "mlp",    (400, 400), (32, 64),       20,           "bernoulli",  1e-3,            "constant", 128,          10.0,     1.0,          1.0),  # noqa: E501
    "mnist-conv":         ("mnist",         "conv",   (256,),     (32, 64),       20,           "bernoulli",  1e-3,            "constant", 128,          10.0,     1.0,          1.0),  # noqa: E501
    "fashion-mnist-conv": ("fashion-mnist", "conv",   (256,),     (32, 64),       20,           "gaussian",   1e-3,            "constant", 128,          20.0,     1.0,          1.0),  # noqa: E501
    "cifar10-conv":       ("cifar10",       "conv",   (512,),     (64, 128, 256), 128,          "gaussian",   5e-4,            "cosine",   128,          30.0,     1.0,          1.0),  # noqa: E501
}

# The family: each differs from a base in what its paper is about. docs/models.md names the papers.
_RUN = {"epochs": 20.0, "eval_every": 5.0, "checkpoint_every": 5.0}
_TANH = {"hidden": (200, 200), "activation": "tanh", "latent_dim": 50}  # Burda et al. 2016
_LAMBDA = {"hidden": (512, 512), "latent_dim": 64, "likelihood": "gaussian", "variance": 0.098}
_IWAE = {"objective": "importance-weighted"}
_PAPER: dict[str, dict[str, Any]] = {
    "optimizer": {"schedule": "stages", "beta1": 0.99, "beta2": 0.999, "epsilon": 1e-4},
    "": {"batch_size": 20, "epochs": 3280.0, "eval_every": 20.0, "checkpoint_every": 20.0},
}
_VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "vae":                {"model": _TANH},
    "autoencoder":        {"model": {**_LAMBDA, "posterior": "deterministic", "prior": "none"}},
    "vae-gaussian-mlp":   {"model": _LAMBDA},
    "vae-gaussian-conv":  {"model": {**_LAMBDA, "network": "conv", "pooling": True, "hidden": (512,)}, "": {"epochs": 3.0, "eval_every": 1.0}},  # noqa: E501
    "vae-gaussian-pixel": {"model": {**_LAMBDA, "variance": "predicted"}},
    "sigma-vae":          {"model": {**_LAMBDA, "variance": "optimal"}},
    "sigma-vae-learned":  {"model": {**_LAMBDA, "variance": "learned"}},
    "vae-softplus-2d":    {"model": {"hidden": (100,), "activation": "relu", "latent_dim": 2, "posterior_scale": "softplus"}},  # noqa: E501
    "vae-5-draws":        {"model": _TANH, "objective": {"num_samples": 5}},
    "cvae":               {"model": {**_TANH, "conditional": True}},
    "cvae-class-prior":   {"model": {**_TANH, "conditional": True, "prior": "class-normal"}},
    "svi":                {"model": {**_TANH, "inference": "table"}, "": {"eval_every": 20.0}},
    "semi-amortized":     {"model": {**_TANH, "refine_steps": 5}, "": {"epochs": 5.0}},
    "bnn-digits":         {"data": {"data": "digits"}, "model": {"target": "labels", "hidden": (50,)}, "optimizer": {"learning_rate": 0.1, "schedule": "cosine"}, "": {"epochs": 200.0, "eval_every": 10.0, "checkpoint_every": 50.0}},  # noqa: E501
    "bnn-classes":        {"model": {"target": "labels", "hidden": (200, 200)}, "optimizer": {"learning_rate": 0.03, "schedule": "cosine"}, "": {"epochs": 10.0, "eval_every": 1.0}},  # noqa: E501
    "bnn-regression":     {"data": {"data": "diabetes"}, "model": {"target": "labels", "hidden": (50,), "weight_std": 1.0}, "objective": {"num_samples": 4}, "optimizer": {"learning_rate": 0.03, "schedule": "cosine"}, "": {"batch_size": 100, "epochs": 500.0, "eval_every": 25.0, "checkpoint_every": 100.0}},  # noqa: E501
    "iwae-5":             {"model": _TANH, "objective": {**_IWAE, "num_samples": 5}},
    "iwae-50":            {"model": _TANH, "objective": {**_IWAE, "num_samples": 50}},
    "iwae-5-dreg":        {"model": _TANH, "objective": {**_IWAE, "num_samples": 5, "gradient": "doubly-reparameterized"}},  # noqa: E501
    "miwae":              {"model": _TANH, "objective": {**_IWAE, "num_samples": 8, "groups": 2}},
    "piwae":              {"model": _TANH, "objective": {**_IWAE, "num_samples": 8, "groups": 2, "decoder_draws": "all"}},  # noqa: E501
    "ciwae":              {"model": _TANH, "objective": {**_IWAE, "num_samples": 5, "elbo_share": 0.5}},  # noqa: E501
    "beta-vae":           {"model": _TANH, "objective": {"beta": 4.0}},
    "capacity":           {"model": _TANH, "objective": {"beta": 10.0, "capacity": 25.0, "capacity_epochs": 10.0}},  # noqa: E501
    "free-bits":          {"model": _TANH, "objective": {"free_bits": 0.1}},
    "kl-warmup":          {"model": _TANH, "objective": {"kl_warmup_epochs": 10.0}},
    "kl-cycles":          {"model": _TANH, "objective": {"kl_warmup_epochs": 2.5, "kl_cycle_epochs": 5.0}},  # noqa: E501
    "beta-tcvae":         {"model": _TANH, "objective": {"objective": "total-correlation"}},
    "infovae":            {"model": _TANH, "objective": {"objective": "mmd", "mmd_weight": 100.0}},
    "wae-mmd":            {"model": {**_LAMBDA, "latent_dim": 8, "posterior": "deterministic"}, "objective": {"objective": "mmd", "beta": 0.0, "mmd_weight": 500.0}},  # noqa: E501
    "mixture-prior":      {"model": {**_TANH, "prior": "mixture"}},
    "vampprior":          {"model": {**_TANH, "prior": "vamp", "prior_components": 500}},
    "iaf":                {"model": {**_TANH, "posterior": "inverse-autoregressive"}},
    "categorical":        {"model": {**_TANH, "likelihood": "categorical", "levels": 16}, "": {"epochs": 5.0}},  # noqa: E501
    "logistic-mixture":   {"data": {"data": "cifar10"}, "model": {"likelihood": "logistic-mixture", "network": "conv", "hidden": (256,), "activation": "silu", "latent_dim": 64}},  # noqa: E501
    # The setting of a published 89.8 nats (importance-weighted, 200 draws), 500 epochs long.
    "mnist-static-400":   {"model": {"hidden": (400,), "activation": "relu", "latent_dim": 40, "binarize": "static"}, "optimizer": {"learning_rate": 1e-4, "schedule": "step", "lr_step_epochs": 175.0, "lr_step_factor": 0.631}, "": {"batch_size": 100, "epochs": 500.0, "eval_every": 5.0, "checkpoint_every": 5.0}},  # noqa: E501
    # Burda et al. 2016, table 1: their schedule, for the bound of one draw (k = 1) or of five.
    "vae-paper":          {"model": _TANH, **_PAPER},
    "iwae-paper":         {"model": _TANH, "objective": {**_IWAE, "num_samples": 5}, **_PAPER},
    # To 86.76 nats in little time: docs/speedrun.md.
    "mnist-speedrun":     {"model": _TANH, "objective": {**_IWAE, "num_samples": 5, "gradient": "doubly-reparameterized"}, "optimizer": {"optimizer": "muon", "learning_rate": 1e-2, "schedule": "cosine", "lr_warmup_steps": 200, "ema_decay": 0.999}, "": {"batch_size": 500, "epochs": 133.0, "eval_every": 133.0, "checkpoint_every": 133.0}},  # noqa: E501
}
# fmt: on

PRESETS = (*_ROWS, *_VARIANTS)
DEFAULT_PRESET = "digits-mlp"
DEFAULT_LABELS_PRESET = "bnn-digits"  # with --target labels


def preset(name: str) -> Config:
    """The configuration of one row. Raises UserError for a name that there is not."""
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"no preset is called {name!r}; there are: {', '.join(PRESETS)}{hint}")
    if name in _VARIANTS:
        return _variant(_VARIANTS[name])
    row = dict(zip(_COLUMNS, _ROWS[name], strict=True))

    def take(*names: str) -> dict:
        return {name: row[name] for name in names}

    return Config(
        data=DataConfig(**take("data")),
        model=ModelConfig(**take("network", "hidden", "widths", "latent_dim", "likelihood")),
        optimizer=OptimizerConfig(**take("learning_rate", "schedule")),
        **take("batch_size", "epochs", "eval_every", "checkpoint_every"),
    )


def _variant(changes: dict[str, dict[str, Any]]) -> Config:
    return Config(
        data=DataConfig(**changes.get("data", {"data": "mnist"})),
        model=ModelConfig(**changes.get("model", {})),
        objective=ObjectiveConfig(**changes.get("objective", {})),
        optimizer=OptimizerConfig(**changes.get("optimizer", {})),
        **{**_RUN, **changes.get("", {})},
    )
