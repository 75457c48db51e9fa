"""fastvae: train variational autoencoders fast, and say honestly how good they are.

import fastvae

vae = fastvae.VAE.from_pretrained("runs/digits-mlp")
images = vae.sample(64, seed=0)
"""

from fastvae.errors import UserError
from fastvae.parts import (
    Bernoulli,
    BetaELBO,
    ConvDecoder,
    ConvEncoder,
    DiagonalGaussian,
    Gaussian,
    MLPDecoder,
    MLPEncoder,
    StandardNormal,
    Terms,
)
from fastvae.vae import VAE, build_vae

__version__ = "0.1.0"

__all__ = [
    "VAE",
    "Bernoulli",
    "BetaELBO",
    "ConvDecoder",
    "ConvEncoder",
    "DiagonalGaussian",
    "Gaussian",
    "MLPDecoder",
    "MLPEncoder",
    "StandardNormal",
    "Terms",
    "UserError",
    "build_vae",
]
