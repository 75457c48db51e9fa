"""fastvae: train variational autoencoders fast, and say honestly how good they are.

import fastvae

vae = fastvae.VAE.from_pretrained("runs/digits-mlp")
images = vae.sample(64, seed=0)
"""

from fastvae.threads import let_waiting_threads_sleep

let_waiting_threads_sleep()  # before anything loads PyTorch

# ruff: noqa: E402
from fastvae.batch import Batch
from fastvae.bayes import BayesianNetwork
from fastvae.errors import UserError
from fastvae.models import load_pretrained
from fastvae.parts import *  # noqa: F403
from fastvae.parts import __all__ as _parts
from fastvae.parts.label_likelihoods import CategoricalLabels, GaussianTargets, TargetPrediction
from fastvae.refinement import Refinement
from fastvae.vae import VAE, build_vae

__version__ = "0.1.0"

__all__ = [
    "VAE",
    "Batch",
    "BayesianNetwork",
    "CategoricalLabels",
    "GaussianTargets",
    "Refinement",
    "TargetPrediction",
    "UserError",
    "build_vae",
    "load_pretrained",
    *_parts,
]
