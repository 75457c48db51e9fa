"""The public functions: arguments checked, implementation chosen, work handed on.

`impl="auto"` takes the Triton kernel for tensors on a GPU and the plain PyTorch reference
elsewhere, which torch.compile sees through and fuses with its neighbours. `"triton"` and `"torch"`
force one of them.
"""

from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from fastvae_kernels import ops, philox, reference

Impl = Literal["auto", "triton", "torch"]

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_HAS_TRITON = find_spec("triton") is not None


def reparameterize_kl(
    mu: Tensor,
    logvar: Tensor,
    seed: int | Tensor,
    *,
    offset: int | Tensor = 0,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Draw z ~ N(mu, exp(logvar)) and measure KL(N(mu, exp(logvar)) ‖ N(0, I)), in one pass.

    Kingma & Welling 2014 (arXiv:1312.6114), section 2.4 and appendix B. The noise is counter-based
    (see `fastvae_kernels.philox`): element d of row b depends on `seed`, `offset + b` and d alone,
    and the backward pass draws it again instead of storing it.

    Args:
        mu, logvar: `[B, …]`, one shape and device, any strides; float32, bfloat16 or float16
            (float64 with the reference). Computed in float32 inside.
        seed: an int in [-2^63, 2^63), or an int64 tensor of one element on `mu`'s device, which
            is never read by the host.
        offset: the global position of row 0, as `seed`. Pass a tensor where it changes from step
            to step, so that nothing is compiled again.
        impl: "auto", "triton" or "torch".

    Returns:
        z: shape and dtype of `mu`. kl: `[B]` float32, nats, summed over all but the batch.

    Raises:
        ValueError, TypeError: for shapes, dtypes, devices or an `impl` that do not fit.
    """
    _check_floating("mu", mu)
    _check_floating("logvar", logvar)
    _check_matches("logvar", logvar, "mu", mu)
    seed_tensor = _int64_scalar("seed", seed, mu.device)
    offset_tensor = _int64_scalar("offset", offset, mu.device)
    if logvar is mu:
        # One tensor in two places loses half its gradient in some releases of PyTorch
        # (pytorch#183604): give autograd two.
        logvar = mu.view_as(mu)
    if _use_triton(impl, mu, logvar):
        return ops.reparameterize_kl(mu, logvar, seed_tensor, offset_tensor)
    return reference.reparameterize_kl(mu, logvar, seed_tensor, offset_tensor)


def bernoulli_nll(logits: Tensor, target: Tensor, *, impl: Impl = "auto") -> Tensor:
    """−log p(target) under independent Bernoulli pixels with the given logits.

    A density for targets in {0, 1}; for values in between it is a cross-entropy and no likelihood.

    Args:
        logits: `[B, …]`, any strides; float32, bfloat16 or float16 (float64 with the reference).
        target: the same shape and device; uint8 (read as target / 255), bool, or floating in
            [0, 1], which is not checked, since looking would stop a GPU. No gradient flows to it.
        impl: "auto", "triton" or "torch".

    Returns:
        nll: `[B]` float32, nats, summed over all but the batch; finite for any finite logits.

    Raises:
        ValueError, TypeError: for shapes, dtypes, devices or an `impl` that do not fit.
    """
    _check_floating("logits", logits)
    _check_target(target, "logits", logits)
    if _use_triton(impl, logits):
        return ops.bernoulli_nll(logits, target)
    return reference.bernoulli_nll(logits, target)


def gaussian_nll(
    mean: Tensor, target: Tensor, logvar: float | Tensor, *, impl: Impl = "auto"
) -> Tensor:
    """−log N(target; mean, exp(logvar)), the full density with its constant ½ log 2π.

    Args:
        mean: `[B, …]`, any strides; float32, bfloat16 or float16 (float64 with the reference).
        target: the same shape and device; uint8 (read as target / 255), bool, or floating. No
            gradient flows to it.
        logvar: log σ²: a float, a 0-d tensor (one variance, which may be learned), or a tensor
            like `mean`.
        impl: "auto", "triton" or "torch".

    Returns:
        nll: `[B]` float32, nats, summed over all but the batch.

    Raises:
        ValueError, TypeError: for shapes, dtypes, devices or an `impl` that do not fit.
    """
    _check_floating("mean", mean)
    _check_target(target, "mean", mean)
    if isinstance(logvar, Tensor):
        _check_floating("logvar", logvar)
        if logvar.dim() > 0:
            _check_matches("logvar", logvar, "mean", mean)
        elif logvar.device != mean.device:
            raise ValueError(f"logvar is on {logvar.device}, mean on {mean.device}")
    else:
        dtype = torch.float64 if mean.dtype == torch.float64 else torch.float32
        logvar = torch.full((), logvar, dtype=dtype, device=mean.device)
    if logvar is mean:
        logvar = mean.view_as(mean)
    if _use_triton(impl, mean, logvar):
        return ops.gaussian_nll(mean, target, logvar)
    return reference.gaussian_nll(mean, target, logvar)


def normal(
    shape: tuple[int, ...],
    seed: int | Tensor,
    *,
    offset: int | Tensor = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Counter-based standard normals, float32: those that `reparameterize_kl` adds.

    Row b of `shape = (B, …)` depends on `seed`, `offset + b` and the place in the row alone.
    """
    return _draw(philox.row_normals, shape, seed, offset, device)


def uniform(
    shape: tuple[int, ...],
    seed: int | Tensor,
    *,
    offset: int | Tensor = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Counter-based uniforms on [0, 1), float32 multiples of 2^-24; otherwise as `normal`."""
    return _draw(philox.row_uniforms, shape, seed, offset, device)


def _draw(draw, shape, seed, offset, device) -> Tensor:  # type: ignore[no-untyped-def]
    if len(shape) == 0:
        raise ValueError("shape needs a first dimension of rows, got ()")
    device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0", as tensors have it
    columns = 1
    for size in shape[1:]:
        columns *= size
    seed, offset = _int64_scalar("seed", seed, device), _int64_scalar("offset", offset, device)
    return draw(shape[0], columns, seed, offset).view(shape)


def _use_triton(impl: Impl, *tensors: Tensor) -> bool:
    x = tensors[0]
    supported = all(t.dtype in _KERNEL_DTYPES for t in tensors)
    if impl == "torch":
        return False
    if impl == "auto":
        return x.is_cuda and _HAS_TRITON and supported
    if impl != "triton":
        raise ValueError(f'impl is "auto", "triton" or "torch", got {impl!r}')
    if not _HAS_TRITON:
        raise ValueError('impl="triton" needs the package triton; install it, or use impl="torch"')
    if not supported:
        raise TypeError(
            f'impl="triton" computes in float32 and takes float32, bfloat16 or float16, '
            f'got {[str(t.dtype) for t in tensors]}; use impl="torch"'
        )
    if not (x.is_cuda or ops.interpreting()):
        raise ValueError(
            f'impl="triton" needs tensors on a GPU, got {x.device}; use impl="auto" or "torch" '
            "(or set TRITON_INTERPRET=1 before Python starts, to test the kernels slowly)"
        )
    return True


def _check_floating(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in (*_KERNEL_DTYPES, torch.float64):
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")


def _check_matches(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.shape != other.shape:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, {other_name} {tuple(other.shape)}; "
            "they must be the same"
        )
    if x.dim() == 0:
        raise ValueError(f"{other_name} needs a batch dimension, got a 0-d tensor")
    if x.device != other.device:
        raise ValueError(f"{name} is on {x.device}, {other_name} on {other.device}")


def _check_target(target: Tensor, other_name: str, other: Tensor) -> None:
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor, got {type(target).__name__}")
    if target.dtype not in (torch.uint8, torch.bool) and not target.is_floating_point():
        raise TypeError(f"target must be uint8, bool or floating, got {target.dtype}")
    if target.requires_grad:
        raise ValueError("target is data and gets no gradient here; pass target.detach()")
    _check_matches("target", target, other_name, other)


def _int64_scalar(name: str, value: int | Tensor, device: torch.device) -> Tensor:
    """As a 0-d int64 tensor on `device`, without making the host wait."""
    if isinstance(value, Tensor):
        if value.dtype != torch.int64 or value.numel() != 1:
            raise TypeError(
                f"{name} as a tensor holds one int64, got {value.dtype} {tuple(value.shape)}"
            )
        if value.device != device:
            raise ValueError(f"{name} is on {value.device}, the other tensors on {device}")
        return value.reshape(())
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int or an int64 tensor, got {type(value).__name__}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must lie in [-2^63, 2^63), got {value}")
    return torch.full((), value, dtype=torch.int64, device=device)
