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


def _like(x: Tensor, num_samples: int | None = None) -> Tensor:
    samples = () if num_samples is None else (num_samples,)
    return torch.empty((*samples, *x.shape), dtype=x.dtype, device=x.device)


# ------------------------------------------------------------------------- reparameterize_kl


@torch.library.custom_op("fastvae::reparameterize_kl", mutates_args=())
def reparameterize_kl(
    mu: Tensor, logvar: Tensor, seed: Tensor, offset: Tensor, num_samples: int | None = None
) -> tuple[Tensor, Tensor]:
    return _reparameterize_kl(mu, logvar, seed, offset, num_samples)


def _reparameterize_kl(mu: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    if launches_triton(mu):
        from fastvae_kernels.triton_kernels.reparameterize_kl import forward

        return forward(mu, *arguments)
    z, kl = reference.reparameterize_kl(mu, *arguments)
    return z.contiguous(), kl


@reparameterize_kl.register_fake
def _(
    mu: Tensor, logvar: Tensor, seed: Tensor, offset: Tensor, num_samples: int | None = None
) -> tuple[Tensor, Tensor]:
    return _like(mu, num_samples), _per_sample(mu)


@torch.library.custom_op("fastvae::reparameterize_kl_backward", mutates_args=())
def reparameterize_kl_backward(
    mu: Tensor, logvar: Tensor, seed: Tensor, offset: Tensor, grad_z: Tensor, grad_kl: Tensor
) -> tuple[Tensor, Tensor]:
    grad_mu, grad_logvar = _reparameterize_kl_backward(mu, logvar, seed, offset, grad_z, grad_kl)
    return grad_mu, grad_logvar


def _reparameterize_kl_backward(mu: Tensor, *arguments: Tensor) -> tuple[Tensor, ...]:
    if launches_triton(mu):
        from fastvae_kernels.triton_kernels.reparameterize_kl import backward

        return backward(mu, *arguments)
    grads = reference.reparameterize_kl_backward(mu, *arguments)
    return tuple(grad.contiguous() for grad in grads)


@reparameterize_kl_backward.register_fake
def _(
    mu: Tensor, logvar: Tensor, seed: Tensor, offset: Tensor, grad_z: Tensor, grad_kl: Tensor
) -> tuple[Tensor, Tensor]:
    return _like(mu), _like(logvar)


def _reparameterize_kl_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, _ = inputs  # grad_z has the number of samples
    ctx.save_for_backward(*tensors)


def _reparameterize_kl_grad(ctx: Any, grad_z: Tensor, grad_kl: Tensor) -> tuple[Tensor | None, ...]:
    grads = reparameterize_kl_backward(*ctx.saved_tensors, grad_z, grad_kl)
    return *grads, None, None, None


reparameterize_kl.register_autograd(_reparameterize_kl_grad, setup_context=_reparameterize_kl_setup)


# The same with a Gaussian prior: an operator of its own, since one whose arguments are optional
# would have to return gradients that are not there. Kernels and references are those above.


@torch.library.custom_op("fastvae::reparameterize_kl_prior", mutates_args=())
def reparameterize_kl_prior(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor,
    prior_logvar: Tensor,
    seed: Tensor,
    offset: Tensor,
    num_samples: int | None = None,
) -> tuple[Tensor, Tensor]:
    return _reparameterize_kl(mu, logvar, seed, offset, num_samples, prior_mu, prior_logvar)


@reparameterize_kl_prior.register_fake
def _(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor,
    prior_logvar: Tensor,
    seed: Tensor,
    offset: Tensor,
    num_samples: int | None = None,
) -> tuple[Tensor, Tensor]:
    return _like(mu, num_samples), _per_sample(mu)


@torch.library.custom_op("fastvae::reparameterize_kl_prior_backward", mutates_args=())
def reparameterize_kl_prior_backward(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor,
    prior_logvar: Tensor,
    seed: Tensor,
    offset: Tensor,
    grad_z: Tensor,
    grad_kl: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_mu, grad_logvar, grad_prior_mu, grad_prior_logvar = _reparameterize_kl_backward(
        mu, logvar, seed, offset, grad_z, grad_kl, prior_mu, prior_logvar
    )
    return grad_mu, grad_logvar, grad_prior_mu, grad_prior_logvar


@reparameterize_kl_prior_backward.register_fake
def _(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor,
    prior_logvar: Tensor,
    seed: Tensor,
    offset: Tensor,
    grad_z: Tensor,
    grad_kl: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _like(mu), _like(logvar), _like(prior_mu), _like(prior_logvar)


def _reparameterize_kl_prior_grad(
    ctx: Any, grad_z: Tensor, grad_kl: Tensor
) -> tuple[Tensor | None, ...]:
    grads = reparameterize_kl_prior_backward(*ctx.saved_tensors, grad_z, grad_kl)
    return *grads, None, None, None


reparameterize_kl_prior.register_autograd(
    _reparameterize_kl_prior_grad, setup_context=_reparameterize_kl_setup
)


# The same of one tensor whose halves are mu and logvar, and whose gradient is one tensor too:
# autograd would write two and then concatenate them.


@torch.library.custom_op("fastvae::reparameterize_kl_packed", mutates_args=())
def reparameterize_kl_packed(
    statistics: Tensor, seed: Tensor, offset: Tensor, num_samples: int | None = None
) -> tuple[Tensor, Tensor]:
    mu, logvar = statistics.chunk(2, dim=1)
    return _reparameterize_kl(mu, logvar, seed, offset, num_samples)


@reparameterize_kl_packed.register_fake
def _(
    statistics: Tensor, seed: Tensor, offset: Tensor, num_samples: int | None = None
) -> tuple[Tensor, Tensor]:
    return _like(statistics.chunk(2, dim=1)[0], num_samples), _per_sample(statistics)


@torch.library.custom_op("fastvae::reparameterize_kl_packed_backward", mutates_args=())
def reparameterize_kl_packed_backward(
    statistics: Tensor, seed: Tensor, offset: Tensor, grad_z: Tensor, grad_kl: Tensor
) -> Tensor:
    mu, logvar = statistics.chunk(2, dim=1)
    if not launches_triton(mu):
        grads = reference.reparameterize_kl_backward(mu, logvar, seed, offset, grad_z, grad_kl)
        return torch.cat(grads, dim=1)
    from fastvae_kernels.triton_kernels.reparameterize_kl import backward

    grad = _like(statistics)
    grad_mu, grad_logvar = grad.chunk(2, dim=1)
    backward(mu, logvar, seed, offset, grad_z, grad_kl, out=(grad_mu, grad_logvar))
    return grad


@reparameterize_kl_packed_backward.register_fake
def _(statistics: Tensor, seed: Tensor, offset: Tensor, grad_z: Tensor, grad_kl: Tensor) -> Tensor:
    return _like(statistics)


def _reparameterize_kl_packed_grad(
    ctx: Any, grad_z: Tensor, grad_kl: Tensor
) -> tuple[Tensor | None, ...]:
    grad = reparameterize_kl_packed_backward(*ctx.saved_tensors, grad_z, grad_kl)
    return grad, None, None, None


reparameterize_kl_packed.register_autograd(
    _reparameterize_kl_packed_grad, setup_context=_reparameterize_kl_setup
)


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


# ---------------------------------------------------------------------- logistic_mixture_nll


@torch.library.custom_op("fastvae::logistic_mixture_nll", mutates_args=())
def logistic_mixture_nll(
    parameters: Tensor, target: Tensor, mixtures: int, levels: int
) -> tuple[Tensor, Tensor]:
    """nll `[B]`, and for the backward pass two log-sums of each pixel, `[B, 2, H·W]`."""
    if launches_triton(parameters):
        from fastvae_kernels.triton_kernels.logistic_mixture_nll import forward

        return forward(parameters, target, mixtures, levels)
    log_sums = reference.logistic_mixture_log_sums(parameters, target, mixtures, levels)
    return (log_sums[:, 0] - log_sums[:, 1]).sum(1), log_sums


@logistic_mixture_nll.register_fake
def _(parameters: Tensor, target: Tensor, mixtures: int, levels: int) -> tuple[Tensor, Tensor]:
    nll = _per_sample(parameters)
    pixels = parameters.shape[2] * parameters.shape[3]
    return nll, nll.new_empty(parameters.shape[0], 2, pixels)


@torch.library.custom_op("fastvae::logistic_mixture_nll_backward", mutates_args=())
def logistic_mixture_nll_backward(
    parameters: Tensor,
    target: Tensor,
    log_sums: Tensor,
    grad_nll: Tensor,
    mixtures: int,
    levels: int,
) -> Tensor:
    arguments = parameters, target, log_sums, grad_nll, mixtures, levels
    if launches_triton(parameters):
        from fastvae_kernels.triton_kernels.logistic_mixture_nll import backward

        return backward(*arguments)
    return reference.logistic_mixture_nll_backward(*arguments).contiguous()


@logistic_mixture_nll_backward.register_fake
def _(
    parameters: Tensor,
    target: Tensor,
    log_sums: Tensor,
    grad_nll: Tensor,
    mixtures: int,
    levels: int,
) -> Tensor:
    return _like(parameters)


def _logistic_mixture_nll_setup(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
    parameters, target, ctx.mixtures, ctx.levels = inputs
    log_sums = output[1]
    ctx.save_for_backward(parameters, target, log_sums)
    # No zeros are made for the gradient that the log-sums do not have.
    ctx.mark_non_differentiable(log_sums)
    ctx.set_materialize_grads(False)


def _logistic_mixture_nll_grad(
    ctx: Any, grad_nll: Tensor | None, grad_log_sums: None
) -> tuple[Tensor | None, ...]:
    if grad_nll is None:
        return None, None, None, None
    grad_parameters = logistic_mixture_nll_backward(
        *ctx.saved_tensors, grad_nll, ctx.mixtures, ctx.levels
    )
    return grad_parameters, None, None, None


logistic_mixture_nll.register_autograd(
    _logistic_mixture_nll_grad, setup_context=_logistic_mixture_nll_setup
)
