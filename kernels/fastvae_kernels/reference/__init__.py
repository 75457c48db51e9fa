"""Plain PyTorch formulas: the CPU path, the fallback, and the truth that the kernels meet."""

from fastvae_kernels.reference.bernoulli_nll import bernoulli_nll, bernoulli_nll_backward
from fastvae_kernels.reference.gaussian_nll import gaussian_nll, gaussian_nll_backward
from fastvae_kernels.reference.reparameterize_kl import (
    reparameterize_kl,
    reparameterize_kl_backward,
)

__all__ = [
    "bernoulli_nll",
    "bernoulli_nll_backward",
    "gaussian_nll",
    "gaussian_nll_backward",
    "reparameterize_kl",
    "reparameterize_kl_backward",
]
