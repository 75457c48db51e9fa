"""Plain PyTorch formulas: the CPU path, the fallback, and the truth that the kernels meet."""

from fastvae_kernels.reference.bernoulli_nll import bernoulli_nll
from fastvae_kernels.reference.gaussian_nll import gaussian_nll
from fastvae_kernels.reference.reparameterize_kl import reparameterize_kl

__all__ = ["bernoulli_nll", "gaussian_nll", "reparameterize_kl"]
