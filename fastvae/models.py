"""The models there are."""

from pathlib import Path
from typing import Any

from fastvae import saving
from fastvae.bayes import BayesianNetwork
from fastvae.vae import VAE

Model = VAE | BayesianNetwork


def load_pretrained(
    pretrained_model_name_or_path: str | Path, map_location: str = "cpu", **options: Any
) -> Model:
    """Load whichever model a run's folder, a folder that was saved, or a name on the Hub holds.

    `options` are those of `VAE.from_pretrained`; raises as that does.
    """
    name = str(pretrained_model_name_or_path)
    with saving.reading(name):
        kind = saving.kind_of(saving.read_spec(name, options))
    if kind == "bayesian-network":
        return BayesianNetwork.from_pretrained(name, map_location=map_location, **options)
    return VAE.from_pretrained(name, map_location=map_location, **options)
