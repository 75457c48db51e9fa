"""The operators as PyTorch sees them, registered once: schema, devices, shapes, gradients.

Each is opaque to torch.compile (no graph break) and chooses by device inside: the Triton kernel on
a GPU, the reference elsewhere. Gradients are operators of their own, so that autocast and
autograd meet plain functions.
"""

import math
import os
from typing import Any

import torch
from torch import Tensor

from fastvae_kernels import philox, reference
from fastvae_kernels.layout import empty_rows


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


# ----------------------------------------------------------------------------- noise, binarize


@torch.library.custom_op("fastvae::uniform", mutates_args=())
def uniform(rows: int, columns: int, seed: Tensor, offset: Tensor) -> Tensor:
    """Float32 `[rows, columns]` on `seed`'s device."""
    if _draws_in_triton(seed, rows, columns):
        from fastvae_kernels.triton_kernels.noise import uniform

        return uniform(rows, columns, seed, offset)
    return philox.row_uniforms(rows, columns, seed, offset).contiguous()


@torch.library.custom_op("fastvae::normal", mutates_args=())
def normal(
    rows: int, columns: int, seed: Tensor, offset: Tensor, samples: int | None = None
) -> Tensor:
    """Float32 `[rows, columns]` on `seed`'s device; with `samples` `[samples, rows, columns]`, by
    the definition alone."""
    if samples is None and _draws_in_triton(seed, rows, columns):
        from fastvae_kernels.triton_kernels.noise import normal

        return normal(rows, columns, seed, offset)
    return philox.row_normals(rows, columns, seed, offset, samples).contiguous()


def _draws_in_triton(seed: Tensor, rows: int, columns: int) -> bool:
    return launches_triton(seed) and rows > 0 and columns > 0


@uniform.register_fake
@normal.register_fake
def _(rows: int, columns: int, seed: Tensor, offset: Tensor, samples: int | None = None) -> Tensor:
    shape = (rows, columns) if samples is None else (samples, rows, columns)
    return seed.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("fastvae::binarize", mutates_args=())
def binarize(images: Tensor, seed: Tensor, offset: Tensor, indices: Tensor | None = None) -> Tensor:
    """Float32 zeros and ones like the images that are chosen, channels_last or contiguous."""
    batch = len(images) if indices is None else len(indices)
    if _draws_in_triton(seed, batch, math.prod(images.shape[1:])):
        from fastvae_kernels.triton_kernels.binarize import binarize

        return binarize(images, seed, offset, indices)
    return reference.binarize(images, seed, offset, indices)


@binarize.register_fake
def _(images: Tensor, seed: Tensor, offset: Tensor, indices: Tensor | None = None) -> Tensor:
    batch = images.shape[0] if indices is None else indices.shape[0]
    return empty_rows(batch, like=images)


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


def _reparameterize_kl_backward(mu: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
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
def bernoulli_nll(logits: Tensor, target: Tensor, indices: Tensor | None = None) -> Tensor:
    if launches_triton(logits):
        from fastvae_kernels.triton_kernels.bernoulli_nll import forward

        return forward(logits, target, indices)[0]
    return reference.bernoulli_nll(logits, target, indices)


@bernoulli_nll.register_fake
def _(logits: Tensor, target: Tensor, indices: Tensor | None = None) -> Tensor:
    return _per_sample(logits)


@torch.library.custom_op("fastvae::bernoulli_nll_backward", mutates_args=())
def bernoulli_nll_backward(
    logits: Tensor, target: Tensor, grad_nll: Tensor, indices: Tensor | None = None
) -> Tensor:
    if launches_triton(logits):
        from fastvae_kernels.triton_kernels.bernoulli_nll import backward

        return backward(logits, target, grad_nll, indices)
    return reference.bernoulli_nll_backward(logits, target, grad_nll, indices).contiguous()


@bernoulli_nll_backward.register_fake
def _(logits: Tensor, target: Tensor, grad_nll: Tensor, indices: Tensor | None = None) -> Tensor:
    return _like(logits)


def _bernoulli_nll_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _bernoulli_nll_grad(ctx: Any, grad_nll: Tensor) -> tuple[Tensor | None, ...]:
    logits, target, indices = ctx.saved_tensors
    return bernoulli_nll_backward(logits, target, grad_nll, indices), None, None


bernoulli_nll.register_autograd(_bernoulli_nll_grad, setup_context=_bernoulli_nll_setup)


# The same where the gradient that will meet each row is foretold: the forward pass writes the
# gradient of the logits too, and the backward pass only looks whether the foretelling came true,
# writing those rows anew where it did not. Outside of the operators, since an operator would have
# to show the gradient to its caller, who would see it change.


@torch.library.custom_op("fastvae::bernoulli_nll_and_grad", mutates_args=())
def bernoulli_nll_and_grad(
    logits: Tensor, target: Tensor, row_weight: float, indices: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """nll `[B]`, and the gradient of row_weight · Σ nll for the logits."""
    if launches_triton(logits):
        from fastvae_kernels.triton_kernels.bernoulli_nll import forward

        nll, grad_logits = forward(logits, target, indices, row_weight)
        assert grad_logits is not None
        return nll, grad_logits
    nll = reference.bernoulli_nll(logits, target, indices)
    grad_nll = torch.full_like(nll, row_weight)
    grad_logits = reference.bernoulli_nll_backward(logits, target, grad_nll, indices)
    return nll, grad_logits.contiguous()


@bernoulli_nll_and_grad.register_fake
def _(
    logits: Tensor, target: Tensor, row_weight: float, indices: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return _per_sample(logits), _like(logits)


@torch.library.custom_op("fastvae::bernoulli_nll_update", mutates_args=("grad_logits",))
def bernoulli_nll_update(
    grad_logits: Tensor,
    logits: Tensor,
    target: Tensor,
    grad_nll: Tensor,
    row_weight: float,
    indices: Tensor | None = None,
) -> None:
    """Makes grad_logits, which is right where grad_nll is row_weight, right everywhere."""
    if launches_triton(logits):
        from fastvae_kernels.triton_kernels.bernoulli_nll import update

        update(grad_logits, logits, target, grad_nll, row_weight, indices)
    else:
        grad_logits.copy_(reference.bernoulli_nll_backward(logits, target, grad_nll, indices))


class BernoulliNLLForetold(torch.autograd.Function):
    """`apply(logits, target, indices, row_weight)` is nll `[B]`."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, indices: Tensor | None, row_weight: float
    ) -> Tensor:
        nll, grad_logits = bernoulli_nll_and_grad(logits, target, row_weight, indices)
        ctx.save_for_backward(logits, target, indices)
        ctx.row_weight, ctx.grads = row_weight, (grad_logits,)
        return nll

    @staticmethod
    def backward(ctx: Any, grad_nll: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, indices = ctx.saved_tensors
        if kept := _hand_out(ctx, grad_nll):
            (grad_logits,) = kept
            bernoulli_nll_update(grad_logits, logits, target, grad_nll, ctx.row_weight, indices)
        else:
            grad_logits = bernoulli_nll_backward(logits, target, grad_nll, indices)
        return grad_logits, None, None, None


def _hand_out(ctx: Any, grad_nll: Tensor) -> tuple[Tensor, ...]:
    """What the forward pass wrote, to the first backward pass, which owns it then: nothing else
    ever sees it change. Nothing to a second one, to one that is to be differentiated itself, or to
    one that a compiler traces, whose tensors are of another class: they take the plain way."""
    if torch.is_grad_enabled() or type(grad_nll) is not Tensor:
        return ()
    grads, ctx.grads = ctx.grads, ()
    return grads


# ------------------------------------------------------------------------------ gaussian_nll


@torch.library.custom_op("fastvae::gaussian_nll", mutates_args=())
def gaussian_nll(
    mean: Tensor, target: Tensor, logvar: Tensor, indices: Tensor | None = None
) -> Tensor:
    if launches_triton(mean):
        from fastvae_kernels.triton_kernels.gaussian_nll import forward

        return forward(mean, target, logvar, indices)[0]
    return reference.gaussian_nll(mean, target, logvar, indices)


@gaussian_nll.register_fake
def _(mean: Tensor, target: Tensor, logvar: Tensor, indices: Tensor | None = None) -> Tensor:
    return _per_sample(mean)


@torch.library.custom_op("fastvae::gaussian_nll_backward", mutates_args=())
def gaussian_nll_backward(
    mean: Tensor,
    target: Tensor,
    logvar: Tensor,
    nll: Tensor,
    grad_nll: Tensor,
    indices: Tensor | None = None,
    is_learned: bool = True,
) -> tuple[Tensor, Tensor]:
    """grad_mean and grad_logvar, which is empty for one variance that is not learned."""
    if launches_triton(mean):
        from fastvae_kernels.triton_kernels.gaussian_nll import backward

        grad_mean, grad_logvar = backward(mean, target, logvar, grad_nll, indices)
    else:
        grad_mean, grad_logvar = _reference_gradients(mean, target, logvar, grad_nll, indices)
    if grad_logvar is not None:
        return grad_mean, grad_logvar
    if is_learned:
        return grad_mean, _one_variance_gradient(mean, logvar, nll, grad_nll)
    return grad_mean, _like_variances(logvar)


@gaussian_nll_backward.register_fake
def _(
    mean: Tensor,
    target: Tensor,
    logvar: Tensor,
    nll: Tensor,
    grad_nll: Tensor,
    indices: Tensor | None = None,
    is_learned: bool = True,
) -> tuple[Tensor, Tensor]:
    return _like(mean), _like(logvar) if is_learned else _like_variances(logvar)


def _gaussian_nll_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs, output)


def _gaussian_nll_grad(ctx: Any, grad_nll: Tensor) -> tuple[Tensor | None, ...]:
    mean, target, logvar, indices, nll = ctx.saved_tensors
    is_learned = ctx.needs_input_grad[2]
    grad_mean, grad_logvar = gaussian_nll_backward(
        mean, target, logvar, nll, grad_nll, indices, is_learned
    )
    return grad_mean, None, grad_logvar if is_learned else None, None


gaussian_nll.register_autograd(_gaussian_nll_grad, setup_context=_gaussian_nll_setup)


@torch.library.custom_op("fastvae::gaussian_nll_and_grads", mutates_args=())
def gaussian_nll_and_grads(
    mean: Tensor,
    target: Tensor,
    logvar: Tensor,
    row_weight: float,
    indices: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """nll `[B]`, and the gradients of row_weight · Σ nll for mean and logvar; the latter is empty
    for one variance, whose gradient comes from nll."""
    if launches_triton(mean):
        from fastvae_kernels.triton_kernels.gaussian_nll import forward

        nll, grad_mean, grad_logvar = forward(mean, target, logvar, indices, row_weight)
        assert grad_mean is not None
    else:
        nll = reference.gaussian_nll(mean, target, logvar, indices)
        grad_nll = torch.full_like(nll, row_weight)
        grad_mean, grad_logvar = _reference_gradients(mean, target, logvar, grad_nll, indices)
    return nll, grad_mean, _like_variances(logvar) if grad_logvar is None else grad_logvar


@gaussian_nll_and_grads.register_fake
def _(
    mean: Tensor,
    target: Tensor,
    logvar: Tensor,
    row_weight: float,
    indices: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _per_sample(mean), _like(mean), _like_variances(logvar)


@torch.library.custom_op("fastvae::gaussian_nll_update", mutates_args=("grad_mean", "grad_logvar"))
def gaussian_nll_update(
    grad_mean: Tensor,
    grad_logvar: Tensor,
    mean: Tensor,
    target: Tensor,
    logvar: Tensor,
    grad_nll: Tensor,
    row_weight: float,
    indices: Tensor | None = None,
) -> None:
    """Makes the gradients, which are right where grad_nll is row_weight, right everywhere."""
    per_pixel = None if logvar.dim() == 0 else grad_logvar
    if launches_triton(mean):
        from fastvae_kernels.triton_kernels.gaussian_nll import update

        update(grad_mean, per_pixel, mean, target, logvar, grad_nll, row_weight, indices)
        return
    new_mean, new_logvar = _reference_gradients(mean, target, logvar, grad_nll, indices)
    grad_mean.copy_(new_mean)
    if per_pixel is not None and new_logvar is not None:
        per_pixel.copy_(new_logvar)


class GaussianNLLForetold(torch.autograd.Function):
    """`apply(mean, target, logvar, indices, row_weight)` is nll `[B]`."""

    @staticmethod
    def forward(
        ctx: Any,
        mean: Tensor,
        target: Tensor,
        logvar: Tensor,
        indices: Tensor | None,
        row_weight: float,
    ) -> Tensor:
        nll, *grads = gaussian_nll_and_grads(mean, target, logvar, row_weight, indices)
        ctx.save_for_backward(mean, target, logvar, indices, nll)
        ctx.row_weight, ctx.grads = row_weight, tuple(grads)
        return nll

    @staticmethod
    def backward(ctx: Any, grad_nll: Tensor) -> tuple[Tensor | None, ...]:
        mean, target, logvar, indices, nll = ctx.saved_tensors
        is_learned = ctx.needs_input_grad[2]
        if grads := _hand_out(ctx, grad_nll):
            gaussian_nll_update(*grads, mean, target, logvar, grad_nll, ctx.row_weight, indices)
            grad_mean, grad_logvar = grads
            if logvar.dim() == 0 and is_learned:
                grad_logvar = _one_variance_gradient(mean, logvar, nll, grad_nll)
        else:
            grad_mean, grad_logvar = gaussian_nll_backward(
                mean, target, logvar, nll, grad_nll, indices, is_learned
            )
        return grad_mean, None, grad_logvar if is_learned else None, None, None


def _reference_gradients(
    mean: Tensor, target: Tensor, logvar: Tensor, grad_nll: Tensor, indices: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Contiguous; None for one variance."""
    grads = reference.gaussian_nll_backward(mean, target, logvar, grad_nll, indices)
    return grads[0].contiguous(), None if logvar.dim() == 0 else grads[1].contiguous()


def _like_variances(logvar: Tensor) -> Tensor:
    """Memory for the gradient of the variances of pixels; none for one variance."""
    return _like(logvar) if logvar.dim() > 0 else logvar.new_empty(0)


def _one_variance_gradient(mean: Tensor, logvar: Tensor, nll: Tensor, grad_nll: Tensor) -> Tensor:
    return reference.one_variance_gradient(logvar, math.prod(mean.shape[1:]), nll, grad_nll)


# ---------------------------------------------------------------------- logistic_mixture_nll


@torch.library.custom_op("fastvae::logistic_mixture_nll", mutates_args=())
def logistic_mixture_nll(
    parameters: Tensor,
    target: Tensor,
    mixtures: int,
    levels: int,
    indices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """nll `[B]`, and for the backward pass two log-sums of each pixel, `[B, 2, H·W]`."""
    if launches_triton(parameters):
        from fastvae_kernels.triton_kernels.logistic_mixture_nll import forward

        return forward(parameters, target, mixtures, levels, indices)
    log_sums = reference.logistic_mixture_log_sums(parameters, target, mixtures, levels, indices)
    return (log_sums[:, 0] - log_sums[:, 1]).sum(1), log_sums


@logistic_mixture_nll.register_fake
def _(
    parameters: Tensor,
    target: Tensor,
    mixtures: int,
    levels: int,
    indices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
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
    indices: Tensor | None = None,
) -> Tensor:
    arguments = parameters, target, log_sums, grad_nll, mixtures, levels, indices
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
    indices: Tensor | None = None,
) -> Tensor:
    return _like(parameters)


def _logistic_mixture_nll_setup(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
    parameters, target, ctx.mixtures, ctx.levels, indices = inputs
    log_sums = output[1]
    ctx.save_for_backward(parameters, target, log_sums, indices)
    # No zeros are made for the gradient that the log-sums do not have.
    ctx.mark_non_differentiable(log_sums)
    ctx.set_materialize_grads(False)


def _logistic_mixture_nll_grad(
    ctx: Any, grad_nll: Tensor | None, grad_log_sums: None
) -> tuple[Tensor | None, ...]:
    if grad_nll is None:
        return None, None, None, None, None
    parameters, target, log_sums, indices = ctx.saved_tensors
    grad_parameters = logistic_mixture_nll_backward(
        parameters, target, log_sums, grad_nll, ctx.mixtures, ctx.levels, indices
    )
    return grad_parameters, None, None, None, None


logistic_mixture_nll.register_autograd(
    _logistic_mixture_nll_grad, setup_context=_logistic_mixture_nll_setup
)
