"""The parts a VAE is composed of."""

from fastvae.parts.flows import InverseAutoregressive
from fastvae.parts.latents import GaussianPrior, LatentGaussian, MixturePrior
from fastvae.parts.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    GaussianOptimal,
    GaussianPerPixel,
    Likelihood,
    LogisticMixture,
)
from fastvae.parts.networks import (
    ConvDecoder,
    ConvEncoder,
    MLPDecoder,
    MLPEncoder,
    Table,
)
from fastvae.parts.objectives import ELBO, MMD, ImportanceWeighted, Objective, TotalCorrelation
from fastvae.parts.posteriors import Deterministic, DiagonalGaussian, Posterior
from fastvae.parts.priors import (
    ClassNormal,
    GaussianMixture,
    NoPrior,
    Prior,
    StandardNormal,
    VampPrior,
)
from fastvae.parts.terms import Terms

__all__ = [
    "ELBO",
    "MMD",
    "Bernoulli",
    "Categorical",
    "ClassNormal",
    "ConvDecoder",
    "ConvEncoder",
    "Deterministic",
    "DiagonalGaussian",
    "Gaussian",
    "GaussianMixture",
    "GaussianOptimal",
    "GaussianPerPixel",
    "GaussianPrior",
    "ImportanceWeighted",
    "InverseAutoregressive",
    "LatentGaussian",
    "Likelihood",
    "LogisticMixture",
    "MLPDecoder",
    "MLPEncoder",
    "MixturePrior",
    "NoPrior",
    "Objective",
    "Posterior",
    "Prior",
    "StandardNormal",
    "Table",
    "Terms",
    "TotalCorrelation",
    "VampPrior",
]
