"""Plain PyTorch formulas: the CPU path, the fallback, and the truth that the kernels meet."""

from fastvae_kernels.reference.bernoulli_nll import bernoulli_nll, bernoulli_nll_backward
from fastvae_kernels.reference.binarize import binarize
from fastvae_kernels.reference.gaussian_nll import (
    gaussian_nll,
    gaussian_nll_backward,
    one_variance_gradient,
)
from fastvae_kernels.reference.logistic_mixture_nll import (
    logistic_mixture_log_sums,
    logistic_mixture_mean,
    logistic_mixture_nll,
    logistic_mixture_nll_backward,
    logistic_mixture_sample,
)
from fastvae_kernels.reference.reparameterize_kl import (
    reparameterize_kl,
    reparameterize_kl_backward,
)

__all__ = [
    "bernoulli_nll",
    "bernoulli_nll_backward",
    "binarize",
    "gaussian_nll",
    "gaussian_nll_backward",
    "logistic_mixture_log_sums",
    "logistic_mixture_mean",
    "logistic_mixture_nll",
    "logistic_mixture_nll_backward",
    "logistic_mixture_sample",
    "one_variance_gradient",
    "reparameterize_kl",
    "reparameterize_kl_backward",
]
