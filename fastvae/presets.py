"""Settings known to work, one row each, so that the differences show by column."""

import difflib

from fastvae.config import Config, ModelConfig, OptimizerConfig
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
# fmt: on

PRESETS = tuple(_ROWS)
DEFAULT_PRESET = "digits-mlp"


def preset(name: str) -> Config:
    """The configuration of one row. Raises UserError for a name that there is not."""
    if name not in _ROWS:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"no preset is called {name!r}; there are: {', '.join(PRESETS)}{hint}")
    row = dict(zip(_COLUMNS, _ROWS[name], strict=True))

    def take(*names: str) -> dict:
        return {name: row[name] for name in names}

    return Config(
        data=DataConfig(**take("data")),
        model=ModelConfig(**take("network", "hidden", "widths", "latent_dim", "likelihood")),
        optimizer=OptimizerConfig(**take("learning_rate", "schedule")),
        **take("batch_size", "epochs", "eval_every", "checkpoint_every"),
    )
