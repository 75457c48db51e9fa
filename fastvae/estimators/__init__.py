"""Estimators of how good a model is: functions of tensors and callables, which know of no model."""

from fastvae.estimators.annealed import (
    AnnealedEstimate,
    annealed_log_marginal,
    sigmoidal_schedule,
)
from fastvae.estimators.calibration import (
    ClassificationScores,
    RegressionScores,
    classification_scores,
    regression_scores,
)
from fastvae.estimators.images import (
    Features,
    FrechetDistance,
    ReconstructionMetrics,
    ReconstructionScores,
    frechet_distance,
    inception_features,
)
from fastvae.estimators.importance import (
    Estimate,
    Mean,
    chunk_size,
    importance_log_marginal,
    mean_and_standard_error,
    prior_average_log_marginal,
)
from fastvae.estimators.latents import ElboSurgery, active_units, elbo_surgery, kl_per_latent
from fastvae.estimators.probe import ProbeScore, linear_probe

__all__ = [
    "AnnealedEstimate",
    "ClassificationScores",
    "ElboSurgery",
    "Estimate",
    "Features",
    "FrechetDistance",
    "Mean",
    "ProbeScore",
    "ReconstructionMetrics",
    "ReconstructionScores",
    "RegressionScores",
    "active_units",
    "annealed_log_marginal",
    "chunk_size",
    "classification_scores",
    "elbo_surgery",
    "frechet_distance",
    "importance_log_marginal",
    "inception_features",
    "kl_per_latent",
    "linear_probe",
    "mean_and_standard_error",
    "prior_average_log_marginal",
    "regression_scores",
    "sigmoidal_schedule",
]
