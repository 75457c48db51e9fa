"""The parts a VAE is composed of."""

from fastvae.parts.likelihoods import Bernoulli, Gaussian, Likelihood
from fastvae.parts.networks import ConvDecoder, ConvEncoder, MLPDecoder, MLPEncoder
from fastvae.parts.objectives import BetaELBO, Terms
from fastvae.parts.posteriors import DiagonalGaussian, Posterior
from fastvae.parts.priors import Prior, StandardNormal

__all__ = [
    "Bernoulli",
    "BetaELBO",
    "ConvDecoder",
    "ConvEncoder",
    "DiagonalGaussian",
    "Gaussian",
    "Likelihood",
    "MLPDecoder",
    "MLPEncoder",
    "Posterior",
    "Prior",
    "StandardNormal",
    "Terms",
]
