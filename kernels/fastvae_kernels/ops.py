"""The operators as PyTorch sees them, registered once: schema, devices, shapes, gradients.

Each is opaque to torch.compile (no graph break) and chooses by device inside: the Triton kernel on
a GPU, the reference elsewhere. Gradients are operators of their own, so that autocast and
autograd meet plain functions.
"""

import os
from typing import Any

import torch
from torch import Tensor

from fastvae_kernels import reference


def launches_triton(x: Tensor) -> bool:
    """Whether the operators run their Triton kernel for this tensor: on a GPU or when Triton's
    interpreter was asked for (TRITON_INTERPRET=1); float64 is for the reference alone."""
    return (x.is_cuda or interpreting()) and x.dtype != torch.float64 and x.numel() > 0


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _per_sample(x: Tensor) -> Tensor:
    return torch.empty(x.shape[0], dtype=_accumulation_dtype(x), device=x.device)


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


# ------------------------------------------------------------------------- reparameterize_kl


@torch.library.custom_op("fastvae::reparameterize_kl", mutates_args=())
def reparameterize_kl(
    mu: Tensor, logvar: Tensor, seed: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor]:
    if launches_triton(mu):
        from fastvae_kernels.triton_kernels.reparameterize_kl import forward

        return forward(mu, logvar, seed, offset)
    z, kl = reference.reparameterize_kl(mu, logvar, seed, offset)
    return z.contiguous(), kl


@reparameterize_kl.register_fake
def _(mu: Tensor, logvar: Tensor, seed: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    return _like(mu), _per_sample(mu)


@torch.library.custom_op("fastvae::reparameterize_kl_backward", mutates_args=())
def reparameterize_kl_backward(
    mu: Tensor, logvar: Tensor, seed: Tensor, offset: Tensor, grad_z: Tensor, grad_kl: Tensor
) -> tuple[Tensor, Tensor]:
    if launches_triton(mu):
        from fastvae_kernels.triton_kernels.reparameterize_kl import backward

        return backward(mu, logvar, seed, offset, grad_z, grad_kl)
    grad_mu, grad_logvar = reference.reparameterize_kl_backward(
        mu, logvar, seed, offset, grad_z, grad_kl
    )
    return grad_mu.contiguous(), grad_logvar.contiguous()


@reparameterize_kl_backward.register_fake
def _(
    mu: Tensor, logvar: Tensor, seed: Tensor, offset: Tensor, grad_z: Tensor, grad_kl: Tensor
) -> tuple[Tensor, Tensor]:
    return _like(mu), _like(logvar)


def _reparameterize_kl_setup(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _reparameterize_kl_grad(ctx: Any, grad_z: Tensor, grad_kl: Tensor) -> tuple[Tensor | None, ...]:
    mu, logvar, seed, offset = ctx.saved_tensors
    return *reparameterize_kl_backward(mu, logvar, seed, offset, grad_z, grad_kl), None, None


reparameterize_kl.register_autograd(_reparameterize_kl_grad, setup_context=_reparameterize_kl_setup)


# ----------------------------------------------------------------------------- bernoulli_nll


@torch.library.custom_op("fastvae::bernoulli_nll", mutates_args=())
def bernoulli_nll(logits: Tensor, target: Tensor) -> Tensor:
    if launches_triton(logits):
        from fastvae_kernels.triton_kernels.bernoulli_nll import forward

        return forward(logits, target)
    return reference.bernoulli_nll(logits, target)


@bernoulli_nll.register_fake
def _(logits: Tensor, target: Tensor) -> Tensor:
    return _per_sample(logits)


@torch.library.custom_op("fastvae::bernoulli_nll_backward", mutates_args=())
def bernoulli_nll_backward(logits: Tensor, target: Tensor, grad_nll: Tensor) -> Tensor:
    if launches_triton(logits):
        from fastvae_kernels.triton_kernels.bernoulli_nll import backward

        return backward(logits, target, grad_nll)
    return reference.bernoulli_nll_backward(logits, target, grad_nll).contiguous()


@bernoulli_nll_backward.register_fake
def _(logits: Tensor, target: Tensor, grad_nll: Tensor) -> Tensor:
    return _like(logits)


def _bernoulli_nll_setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _bernoulli_nll_grad(ctx: Any, grad_nll: Tensor) -> tuple[Tensor | None, ...]:
    return bernoulli_nll_backward(*ctx.saved_tensors, grad_nll), None


bernoulli_nll.register_autograd(_bernoulli_nll_grad, setup_context=_bernoulli_nll_setup)


# ------------------------------------------------------------------------------ gaussian_nll


@torch.library.custom_op("fastvae::gaussian_nll", mutates_args=())
def gaussian_nll(mean: Tensor, target: Tensor, logvar: Tensor) -> Tensor:
    if launches_triton(mean):
        from fastvae_kernels.triton_kernels.gaussian_nll import forward

        return forward(mean, target, logvar)
    return reference.gaussian_nll(mean, target, logvar)


@gaussian_nll.register_fake
def _(mean: Tensor, target: Tensor, logvar: Tensor) -> Tensor:
    return _per_sample(mean)


@torch.library.custom_op("fastvae::gaussian_nll_backward", mutates_args=())
def gaussian_nll_backward(
    mean: Tensor, target: Tensor, logvar: Tensor, nll: Tensor, grad_nll: Tensor
) -> tuple[Tensor, Tensor]:
    if launches_triton(mean):
        from fastvae_kernels.triton_kernels.gaussian_nll import backward

        return backward(mean, target, logvar, nll, grad_nll)
    grad_mean, grad_logvar = reference.gaussian_nll_backward(mean, target, logvar, grad_nll)
    return grad_mean.contiguous(), grad_logvar.contiguous()


@gaussian_nll_backward.register_fake
def _(
    mean: Tensor, target: Tensor, logvar: Tensor, nll: Tensor, grad_nll: Tensor
) -> tuple[Tensor, Tensor]:
    return _like(mean), _like(logvar)


def _gaussian_nll_setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs, output)


def _gaussian_nll_grad(ctx: Any, grad_nll: Tensor) -> tuple[Tensor | None, ...]:
    grad_mean, grad_logvar = gaussian_nll_backward(*ctx.saved_tensors, grad_nll)
    return grad_mean, None, grad_logvar


gaussian_nll.register_autograd(_gaussian_nll_grad, setup_context=_gaussian_nll_setup)
