"""Fused kernels for variational autoencoders, usable alone.

`reparameterize_kl`, `bernoulli_nll`, `gaussian_nll` and `logistic_mixture_nll` run as one Triton
launch forward and one backward on a GPU, and as plain PyTorch elsewhere, with the same noise.
`reparameterize_kl_packed` is the first for mu and logvar in one tensor.
`normal` and `uniform` are the counter-based generator they share, `binarize` draws zeros and ones
from grey images, gathered from a data set where it lies: one launch each.
"""

from fastvae_kernels.functional import (
    Impl,
    bernoulli_nll,
    binarize,
    gaussian_nll,
    logistic_mixture_channels,
    logistic_mixture_mean,
    logistic_mixture_nll,
    logistic_mixture_sample,
    normal,
    reparameterize_kl,
    reparameterize_kl_packed,
    uniform,
)

__all__ = [
    "Impl",
    "bernoulli_nll",
    "binarize",
    "gaussian_nll",
    "logistic_mixture_channels",
    "logistic_mixture_mean",
    "logistic_mixture_nll",
    "logistic_mixture_sample",
    "normal",
    "reparameterize_kl",
    "reparameterize_kl_packed",
    "uniform",
]
