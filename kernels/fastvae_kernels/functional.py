"""The public functions: arguments checked, implementation chosen, work handed on.

`impl="auto"` takes the Triton kernel for tensors on a GPU and the plain PyTorch reference
elsewhere, which torch.compile sees through and fuses with its neighbours. `"triton"` and `"torch"`
force one of them.

What does not belong together is refused here, before an implementation is chosen, and so alike by
all of them: TypeError for a wrong kind (no dense tensor, a dtype), ValueError for a wrong shape,
device or number. One rule holds for dtypes:

- Parameters (mu, logvar and those of a prior; logits; mean and logvar) are float32, bfloat16 or
  float16, in any mixture, and are computed with in float32; or all of them are float64 and are
  computed with in float64, by the reference.
- Data (targets, images) are uint8, bool or of those four, whatever the parameters are, and are
  rounded to the precision of the computation.
- Seed, offset and indices are int64.
"""

import math
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from fastvae_kernels import ops, philox, reference
from fastvae_kernels.layout import in_memory_order

Impl = Literal["auto", "triton", "torch"]

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LARGEST = torch.finfo(torch.float32).max
_FLOATING_DTYPES = (*_KERNEL_DTYPES, torch.float64)
_DATA_DTYPES = (torch.uint8, torch.bool, *_FLOATING_DTYPES)
_HAS_TRITON = find_spec("triton") is not None


def reparameterize_kl(
    mu: Tensor,
    logvar: Tensor,
    seed: int | Tensor,
    *,
    offset: int | Tensor = 0,
    num_samples: int | None = None,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Draw z ~ N(mu, exp(logvar)) and measure KL(N(mu, exp(logvar)) ‖ prior), in one pass.

    Kingma & Welling 2014 (arXiv:1312.6114), section 2.4 and appendix B. The prior is N(0, I), or
    N(prior_mu, exp(prior_logvar)) where those are given, which get their gradients too. The noise
    is counter-based (see `fastvae_kernels.philox`): element d of row b in sample s depends on
    `seed`, `offset + b`, d and s alone, and the backward pass draws it again instead of storing it.

    Args:
        mu, logvar: `[B, …]`, one shape and device, any strides; float32, bfloat16 or float16, not
            necessarily the same. Computed in float32 inside. Or both float64, with the reference.
        seed: an int in [-2^63, 2^63), or an int64 tensor of one element on `mu`'s device, which
            is never read by the host.
        offset: the global position of row 0, as `seed`. Pass a tensor where it changes from step
            to step, so that nothing is compiled again.
        num_samples: None to draw z once, or S ≥ 1 to draw it S times; `mu` and `logvar` are read
            once for all. Sample 0 is what None draws.
        prior_mu, prior_logvar: both or neither: `[B, …]` like `mu`, any strides (one prior for all
            rows is `prior_mu.expand_as(mu)`, which takes no memory); dtypes as there, float64
            exactly where `mu` is.
        impl: "auto", "triton" or "torch".

    Returns:
        z: shape and dtype of `mu`; `[S, B, …]` where `num_samples` is given.
        kl: `[B]` float32, nats, summed over all but the batch.

    Raises:
        ValueError, TypeError: for shapes, dtypes, devices or an `impl` that do not fit.
    """
    _check_floating("mu", mu)
    _check_parameter("logvar", logvar, "mu", mu)
    _check_num_samples(num_samples)
    place = _int64_scalar("seed", seed, mu.device), _int64_scalar("offset", offset, mu.device)
    if prior_mu is None and prior_logvar is None:
        mu, logvar = _distinct(mu, logvar)
        if _use_triton(impl, mu, logvar):
            return ops.reparameterize_kl(mu, logvar, *place, num_samples)
        return reference.reparameterize_kl(mu, logvar, *place, num_samples)
    if prior_mu is None or prior_logvar is None:
        given, missing = ("prior_mu", "prior_logvar")[:: -1 if prior_mu is None else 1]
        raise ValueError(f"{given} is given without {missing}; a prior needs both, or neither")
    for name, x in (("prior_mu", prior_mu), ("prior_logvar", prior_logvar)):
        _check_parameter(name, x, "mu", mu)
    mu, logvar, prior_mu, prior_logvar = _distinct(mu, logvar, prior_mu, prior_logvar)
    if _use_triton(impl, mu, logvar, prior_mu, prior_logvar):
        return ops.reparameterize_kl_prior(mu, logvar, prior_mu, prior_logvar, *place, num_samples)
    return reference.reparameterize_kl(mu, logvar, *place, num_samples, prior_mu, prior_logvar)


def reparameterize_kl_packed(
    statistics: Tensor,
    seed: int | Tensor,
    *,
    offset: int | Tensor = 0,
    num_samples: int | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """`reparameterize_kl` of the two halves of one tensor, as one head of an encoder gives them.

    The same numbers as `reparameterize_kl(*statistics.chunk(2, dim=1), seed, …)`, and a gradient
    that is written as one tensor: no slice, no concatenation, no second buffer.

    Args:
        statistics: `[B, 2D, …]`, any strides: mu, then logvar along dimension 1; dtypes as there.
        seed, offset, num_samples, impl: as there.

    Returns:
        z: `[B, D, …]` in the dtype of `statistics`; `[S, B, D, …]` where `num_samples` is given.
        kl: `[B]` float32, nats, summed over all but the batch, against N(0, I).

    Raises:
        ValueError, TypeError: for shapes, dtypes, devices or an `impl` that do not fit.
    """
    _check_floating("statistics", statistics)
    if statistics.dim() < 2 or statistics.shape[1] % 2:
        raise ValueError(
            "statistics is [B, 2D, …], mu and logvar along dimension 1, "
            f"got the shape {tuple(statistics.shape)}"
        )
    _check_num_samples(num_samples)
    device = statistics.device
    place = _int64_scalar("seed", seed, device), _int64_scalar("offset", offset, device)
    if _use_triton(impl, statistics):
        return ops.reparameterize_kl_packed(statistics, *place, num_samples)
    mu, logvar = statistics.chunk(2, dim=1)
    return reference.reparameterize_kl(mu, logvar, *place, num_samples)


def bernoulli_nll(
    logits: Tensor,
    target: Tensor,
    *,
    indices: Tensor | None = None,
    row_weight: float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """−log p(target) under independent Bernoulli pixels with the given logits.

    A density for targets in {0, 1}; for values in between it is a cross-entropy and no likelihood.

    Args:
        logits: `[B, …]`, any strides; float32, bfloat16 or float16 (float64 with the reference).
        target: the same shape and device; uint8 (read as target / 255), bool, or floating in
            [0, 1], which is not checked, since looking would stop a GPU. No gradient flows to it.
        indices: int64 `[B]`: `target` is then a data set `[N, …]`, of which row b meets number
            indices[b], read where it lies. An index outside of it raises IndexError on a CPU and
            makes nll and gradient of its row NaN on a GPU.
        row_weight: the gradient that each row's nll is going to meet in the backward pass, 1/B
            where the loss is a plain mean. A speed-up and no more: the kernel then writes the
            gradient while it has the inputs, and the backward pass looks at B numbers. Rows that
            meet another gradient are computed anew, so that a wrong row_weight costs time, but no
            gradient is ever wrong. Without effect under torch.compile (which would copy what is
            kept for the backward pass) and in the reference.
        impl: "auto", "triton" or "torch".

    Returns:
        nll: `[B]` float32, nats, summed over all but the batch; finite for any finite logits.

    Raises:
        ValueError, TypeError: for shapes, dtypes, devices, a `row_weight` or an `impl` that do
            not fit.
    """
    _check_floating("logits", logits)
    _check_target(target, "logits", logits, indices)
    _check_row_weight(row_weight)
    logits, target = in_memory_order(logits, target, chosen_from=_data_set(target, indices))
    if not _use_triton(impl, logits):
        return reference.bernoulli_nll(logits, target, indices)
    if row_weight is not None and _is_worth_foretelling(logits):
        return ops.BernoulliNLLForetold.apply(logits, target, indices, float(row_weight))
    return ops.bernoulli_nll(logits, target, indices)


def gaussian_nll(
    mean: Tensor,
    target: Tensor,
    logvar: float | Tensor,
    *,
    indices: Tensor | None = None,
    row_weight: float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """−log N(target; mean, exp(logvar)), the full density with its constant ½ log 2π.

    Args:
        mean: `[B, …]`, any strides; float32, bfloat16 or float16 (float64 with the reference).
        target: the same shape and device; uint8 (read as target / 255), bool, or floating. No
            gradient flows to it.
        logvar: log σ²: a float, a 0-d tensor (one variance, which may be learned), or a tensor
            of the shape of `mean`; a tensor is float64 exactly where `mean` is.
        indices, row_weight: as in `bernoulli_nll`; the gradient of a `logvar` like `mean` is
            written with that of `mean`.
        impl: "auto", "triton" or "torch".

    Returns:
        nll: `[B]` float32, nats, summed over all but the batch.

    Raises:
        ValueError, TypeError: for shapes, dtypes, devices, a `row_weight` or an `impl` that do
            not fit.
    """
    _check_floating("mean", mean)
    _check_target(target, "mean", mean, indices)
    _check_row_weight(row_weight)
    if isinstance(logvar, Tensor):
        _check_parameter("logvar", logvar, "mean", mean, or_one=True)
    elif isinstance(logvar, (float, int)) and not isinstance(logvar, bool):
        _check_finite("logvar", logvar)
        dtype = torch.float64 if mean.dtype == torch.float64 else torch.float32
        logvar = torch.full((), logvar, dtype=dtype, device=mean.device)
    else:
        raise TypeError(f"logvar must be a float or a tensor, got {type(logvar).__name__}")
    mean, logvar = _distinct(mean, logvar)
    mean, target, logvar = in_memory_order(
        mean, target, logvar, chosen_from=_data_set(target, indices)
    )
    if not _use_triton(impl, mean, logvar):
        return reference.gaussian_nll(mean, target, logvar, indices)
    if row_weight is not None and _is_worth_foretelling(mean, logvar):
        return ops.GaussianNLLForetold.apply(mean, target, logvar, indices, float(row_weight))
    return ops.gaussian_nll(mean, target, logvar, indices)


def normal(
    shape: Sequence[int],
    seed: int | Tensor,
    *,
    offset: int | Tensor = 0,
    device: torch.device | str = "cpu",
    impl: Impl = "auto",
) -> Tensor:
    """Counter-based standard normals, float32: those that `reparameterize_kl` adds.

    Row b of `shape = (B, …)` depends on `seed`, `offset + b` and the place in the row alone.

    Args:
        shape: `(B, …)`, each size 0 or more.
        seed, offset: as in `reparameterize_kl`; tensors lie on `device`.
        device: where to draw.
        impl: "auto", "triton" (one launch) or "torch".

    Raises:
        ValueError, TypeError: for a shape, a seed, an offset or an `impl` that do not fit.
    """
    return _draw(ops.normal, philox.row_normals, shape, seed, offset, device, impl)


def uniform(
    shape: Sequence[int],
    seed: int | Tensor,
    *,
    offset: int | Tensor = 0,
    device: torch.device | str = "cpu",
    impl: Impl = "auto",
) -> Tensor:
    """Counter-based uniforms on [0, 1), float32 multiples of 2^-24; otherwise as `normal`.

    Every implementation draws the same bits.
    """
    return _draw(ops.uniform, philox.row_uniforms, shape, seed, offset, device, impl)


def _draw(
    operator: Callable[..., Tensor],
    definition: Callable[..., Tensor],
    shape: Sequence[int],
    seed: int | Tensor,
    offset: int | Tensor,
    device: torch.device | str,
    impl: Impl,
) -> Tensor:
    _check_shape(shape)
    device = _device(device)
    seed, offset = _int64_scalar("seed", seed, device), _int64_scalar("offset", offset, device)
    draw = operator if _takes_triton(impl, device) else definition
    return draw(shape[0], math.prod(shape[1:]), seed, offset).view(tuple(shape))


def _device(device: torch.device | str) -> torch.device:
    """As tensors have it: "cuda" becomes "cuda:0". Raises ValueError where there is none."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        told = str(error).splitlines()[0]
        raise ValueError(f"there is no device {device} to draw on: {told}") from error


def binarize(
    images: Tensor,
    seed: int | Tensor,
    *,
    offset: int | Tensor = 0,
    indices: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Draw a zero or a one for each pixel, a one with the pixel's value as its probability.

    The dynamic binarisation of Burda et al. 2016 (arXiv:1509.00519), section 5 and their code. The
    draws are those of `uniform`: row b is a function of its image, `seed` and `offset + b` alone,
    the same bits whatever the implementation. A black pixel is never drawn as 1, a white one
    always.

    Args:
        images: `[B, …]`, any strides; uint8 (read as images / 255), bool, or floating in [0, 1],
            which is not checked, since looking would stop a GPU. No gradient flows to it.
        seed, offset: as in `reparameterize_kl`, on `images`' device.
        indices: int64 `[B]`: `images` is then a data set `[N, …]`, of which row b is number
            indices[b], read where it lies. An index outside of it raises IndexError on a CPU and
            makes its row NaN on a GPU.
        impl: "auto", "triton" (one launch: gathers, draws, compares) or "torch".

    Returns:
        `[B, …]` float32, zeros and ones; channels_last where `images` is.

    Raises:
        ValueError, TypeError: for shapes, dtypes, devices or an `impl` that do not fit.
    """
    _check_data("images", images)
    if images.dim() == 0:
        raise ValueError("images needs a batch dimension, got a 0-d tensor")
    if indices is not None:
        _check_indices(indices, "images", images)
    device = images.device
    place = _int64_scalar("seed", seed, device), _int64_scalar("offset", offset, device)
    if _takes_triton(impl, device):
        return ops.binarize(images, *place, indices)
    return reference.binarize(images, *place, indices)


def _use_triton(impl: Impl, *tensors: Tensor) -> bool:
    """For functions of parameters."""
    return _takes_triton(impl, tensors[0].device, *(x.dtype for x in tensors))


def _takes_triton(impl: Impl, device: torch.device, *dtypes: torch.dtype) -> bool:
    """Whether `impl` means the kernel, for parameters of these types."""
    supported = all(dtype in _KERNEL_DTYPES for dtype in dtypes)
    if impl == "torch":
        return False
    if impl == "auto":
        return device.type == "cuda" and _HAS_TRITON and supported
    if impl != "triton":
        raise ValueError(f'impl is "auto", "triton" or "torch", got {impl!r}')
    if not _HAS_TRITON:
        raise ValueError('impl="triton" needs the package triton; install it, or use impl="torch"')
    if not supported:
        raise TypeError(
            f'impl="triton" computes in float32 and takes float32, bfloat16 or float16, '
            f'got {[str(dtype) for dtype in dtypes]}; use impl="torch"'
        )
    if not (device.type == "cuda" or ops.interpreting()):
        raise ValueError(
            f'impl="triton" needs tensors on a GPU, got {device}; use impl="auto" or "torch" '
            "(or set TRITON_INTERPRET=1 before Python starts, to test the kernels slowly)"
        )
    return True


def _data_set(target: Tensor, indices: Tensor | None) -> Tensor | None:
    """The target where it is one that indices choose from."""
    return None if indices is None else target


def _distinct(*tensors: Tensor) -> tuple[Tensor, ...]:
    """One tensor in two places loses half its gradient in some releases of PyTorch
    (pytorch#183604): give autograd a view for each."""
    return tuple(
        x.view_as(x) if any(x is other for other in tensors[:i]) else x
        for i, x in enumerate(tensors)
    )


def _check_num_samples(num_samples: int | None) -> None:
    if num_samples is None:
        return
    if not isinstance(num_samples, int) or isinstance(num_samples, bool):
        raise TypeError(f"num_samples must be an int or None, got {type(num_samples).__name__}")
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")


def _check_dense(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.layout != torch.strided or x.is_nested:
        kind = "nested" if x.is_nested else str(x.layout)
        raise TypeError(f"{name} must be a dense tensor, got a {kind} one; make it dense first")


def _check_floating(name: str, x: Tensor) -> None:
    _check_dense(name, x)
    if x.dtype not in _FLOATING_DTYPES:
        raise TypeError(
            f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}; "
            f"convert it, for instance with {name}.float()"
        )


def _check_data(name: str, x: Tensor) -> None:
    _check_dense(name, x)
    if x.dtype not in _DATA_DTYPES:
        raise TypeError(
            f"{name} must be uint8, bool or floating, got {x.dtype}; pass bytes, which are read "
            f"as {name} / 255, or float32, bfloat16, float16 or float64"
        )
    if x.requires_grad:
        raise ValueError(f"{name} is data and gets no gradient here; pass {name}.detach()")


def _check_parameter(
    name: str, x: Tensor, other_name: str, other: Tensor, or_one: bool = False
) -> None:
    """`x` belongs to the parameter `other`, which is floating. `or_one`: it may be 0-d."""
    _check_floating(name, x)
    if not (or_one and x.dim() == 0):
        _check_matches(name, x, other_name, other)
    _check_device(name, x, other_name, other)
    if (x.dtype == torch.float64) != (other.dtype == torch.float64):
        raise TypeError(
            f"{name} is {x.dtype}, {other_name} {other.dtype}; both must be float64, or neither: "
            f"convert one of them, for instance with {name}.to({other_name}.dtype)"
        )


def _check_matches(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.shape != other.shape:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, {other_name} {tuple(other.shape)}; "
            "they must be the same"
        )
    if x.dim() == 0:
        raise ValueError(f"{other_name} needs a batch dimension, got a 0-d tensor")
    _check_device(name, x, other_name, other)


def _check_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(
            f"{name} is on {x.device}, {other_name} on {other.device}; "
            f"move one of them, for instance with {name}.to({other_name}.device)"
        )


def _check_shape(shape: Sequence[int]) -> None:
    if not isinstance(shape, (tuple, list)):
        raise TypeError(f"shape must be a tuple of ints, got {type(shape).__name__}")
    if len(shape) == 0:
        raise ValueError("shape needs a first dimension of rows, got ()")
    for size in shape:
        if not isinstance(size, (int, torch.SymInt)) or isinstance(size, bool):
            raise TypeError(f"shape must be a tuple of ints, got {type(size).__name__} in {shape}")
        if size < 0:
            raise ValueError(f"the sizes of shape must be 0 or more, got {tuple(shape)}")


def _is_worth_foretelling(*tensors: Tensor) -> bool:
    """Whether a backward pass is to come that can take over what the forward pass wrote. Compiled
    ones cannot: what is kept for them is an input of their graph, which Inductor copies before it
    lets an operator write to it, and the copy moves as many bytes as the plain backward pass."""
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return wanted and not torch.compiler.is_compiling()


def _check_row_weight(row_weight: float | None) -> None:
    if row_weight is None:
        return
    if not isinstance(row_weight, (float, int)) or isinstance(row_weight, bool):
        raise TypeError(f"row_weight must be a float, got {type(row_weight).__name__}")
    _check_finite("row_weight", row_weight)


def _check_finite(name: str, value: float) -> None:
    """As a float32 too, which is what it is used as."""
    if not -_LARGEST <= value <= _LARGEST:
        raise ValueError(f"{name} must be finite as a float32, got {str(value)[:40]}")


def _check_indices(
    indices: Tensor, name: str, data: Tensor, of: tuple[str, Tensor] | None = None
) -> None:
    """`indices` choose rows of the data set `data`: one for each row of `of`, where that is
    given, as a name and a tensor."""
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
        got = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"indices must be an int64 tensor, got {got}")
    _check_dense("indices", indices)
    if of is not None:
        other_name, other = of
        if other.dim() == 0:
            raise ValueError(f"{other_name} needs a batch dimension, got a 0-d tensor")
        if indices.shape != other.shape[:1]:
            raise ValueError(
                f"indices has shape {tuple(indices.shape)}; one for each row of {other_name} is "
                f"{tuple(other.shape[:1])}"
            )
    elif indices.dim() != 1:
        raise ValueError(f"indices must be [B], got shape {tuple(indices.shape)}")
    if data.dim() == 0 or (len(data) == 0 and len(indices) > 0):
        raise ValueError(f"{name} has shape {tuple(data.shape)}, and nothing to choose from")
    at_name, at = of or (name, data)
    for other_name, x in (("indices", indices), (name, data)):
        _check_device(other_name, x, at_name, at)


def _check_target(
    target: Tensor, other_name: str, other: Tensor, indices: Tensor | None = None
) -> None:
    _check_data("target", target)
    if indices is None:
        _check_matches("target", target, other_name, other)
        return
    _check_indices(indices, "target", target, (other_name, other))
    if target.shape[1:] != other.shape[1:]:
        raise ValueError(
            f"target has rows of shape {tuple(target.shape[1:])}, {other_name} of "
            f"{tuple(other.shape[1:])}; they must be the same"
        )


def _int64_scalar(name: str, value: int | Tensor, device: torch.device) -> Tensor:
    """As a 0-d int64 tensor on `device`, without making the host wait."""
    if isinstance(value, Tensor):
        if value.dtype != torch.int64 or value.numel() != 1:
            raise TypeError(
                f"{name} as a tensor holds one int64, got {value.dtype} {tuple(value.shape)}"
            )
        _check_dense(name, value)
        if value.device != device:
            raise ValueError(
                f"{name} is on {value.device}, the other tensors on {device}; pass an int, or a "
                f'tensor made with device="{device}"'
            )
        return value.reshape(())
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int or an int64 tensor, got {type(value).__name__}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must lie in [-2^63, 2^63), got {value}")
    return torch.full((), value, dtype=torch.int64, device=device)


# ---------------------------------------------------------------- mixtures of discretised logistics


def logistic_mixture_channels(mixtures: int, channels: int) -> int:
    """P, the parameters of a pixel: M·(1 + 2C + C(C−1)/2) for M components and C colour channels.

    The channels of a parameter tensor `[B, P, H, W]` come in groups of M, one of each component:
    the mixture's logits; for each colour channel its means and then its log-scales; for each
    colour channel after the first its couplings to the channels before it. With C = 3 the ten
    groups are: logits; means and log-scales of red, of green, of blue; green to red, blue to red,
    blue to green.
    """
    return mixtures * (1 + 2 * channels + channels * (channels - 1) // 2)


def logistic_mixture_nll(
    parameters: Tensor,
    target: Tensor,
    *,
    mixtures: int,
    levels: int = 256,
    indices: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """−log p(target) under a mixture of discretised logistics at each pixel, as in PixelCNN++.

    Salimans et al. 2017 (arXiv:1701.05517), sections 2.1 and 2.2. The levels 0 … L−1 lie at
    −1 … 1. One component m is chosen for all channels of a pixel; given m, channel c is logistic,
    and the probability of a level is the logistic's mass within half a step of it, where the bins
    of the first and the last level are open, so that all levels together have probability 1. The
    mean of a channel is its parameter plus Σ_j tanh(coupling_cj) x_j over the channels before it,
    with their true values x_j in [−1, 1].

    Log-scales below −7 count as −7 (as in the authors' code: two of 256 levels are then 8.6 scales
    apart), and have no gradient there. No pixel's term overflows for means of up to 1e34.

    Args:
        parameters: `[B, P, H, W]`, any strides, P and its order as `logistic_mixture_channels`
            has them; float32, bfloat16 or float16 (float64 with the reference).
        target: `[B, C, H, W]`, C = 1, 2 or 3, on the same device; uint8 or bool, read as levels
            0 … L−1 (with 256 levels, pixels as they are), or floating in [0, 1], read as the
            level nearest to target·(L−1). Values beyond are read as the level at that end, which
            is not reported, since looking would stop a GPU. No gradient flows to it.
        mixtures: M ≥ 1, the number of components.
        levels: L in 2 … 256.
        indices: int64 `[B]`: `target` is then a data set `[N, C, H, W]`, as in `bernoulli_nll`.
        impl: "auto", "triton" or "torch".

    Returns:
        nll: `[B]` float32, nats, summed over the pixels.

    Raises:
        ValueError, TypeError: for shapes, dtypes, devices, numbers or an `impl` that do not fit.
    """
    _check_floating("parameters", parameters)
    _check_image_target(target, parameters, indices)
    _check_logistic_mixture(parameters, mixtures, target.shape[1], levels)
    if _use_triton(impl, parameters):
        if parameters.stride(3) != 1:
            # A load of neighbouring pixels would fetch a line of memory for each, a hundred times.
            parameters = parameters.contiguous()
        return ops.logistic_mixture_nll(parameters, target, mixtures, levels, indices)[0]
    return reference.logistic_mixture_nll(parameters, target, mixtures, levels, indices)


def logistic_mixture_mean(parameters: Tensor, mixtures: int, channels: int) -> Tensor:
    """The mean image of a mixture of discretised logistics: the components' means, weighted.

    A component's means are clipped to [−1, 1] in the order of the channels, and those of later
    channels are coupled to the clipped ones, as the paper's sampling does. It is not the exact
    expectation: what the open end bins do to a wide or far component is left out.

    Args:
        parameters: `[B, P, H, W]` as in `logistic_mixture_nll`.
        mixtures, channels: M and C.

    Returns:
        `[B, C, H, W]` in [0, 1], float32.

    Raises:
        ValueError, TypeError: for parameters or numbers that do not fit.
    """
    _check_floating("parameters", parameters)
    _check_logistic_mixture(parameters, mixtures, channels)
    return reference.logistic_mixture_mean(parameters, mixtures, channels)


def logistic_mixture_sample(
    parameters: Tensor,
    mixtures: int,
    channels: int,
    levels: int,
    seed: int | Tensor,
    *,
    offset: int | Tensor = 0,
) -> Tensor:
    """Draw images from a mixture of discretised logistics: exactly what `logistic_mixture_nll`
    measures, bins, open ends and coupling to the levels drawn included.

    Args:
        parameters: `[B, P, H, W]` as in `logistic_mixture_nll`.
        mixtures, channels, levels: M, C and L.
        seed, offset: row b is a function of its parameters, `seed` and `offset + b` alone, as with
            `uniform`.

    Returns:
        `[B, C, H, W]`, level / (L−1), in [0, 1], float32.

    Raises:
        ValueError, TypeError: for parameters or numbers that do not fit.
    """
    _check_floating("parameters", parameters)
    _check_logistic_mixture(parameters, mixtures, channels, levels)
    B, _, H, W = parameters.shape
    shape = (B, mixtures + channels, H, W)
    draws = uniform(shape, seed, offset=offset, device=parameters.device)
    return reference.logistic_mixture_sample(parameters, draws, mixtures, channels, levels)


def _check_image_target(target: Tensor, parameters: Tensor, indices: Tensor | None) -> None:
    """Batch, size and device as the parameters; only the channels differ."""
    _check_data("target", target)
    for name, x in (("parameters", parameters), ("target", target)):
        if x.dim() != 4:
            raise ValueError(f"{name} must be [B, channels, H, W], got shape {tuple(x.shape)}")
    if indices is not None:
        _check_indices(indices, "target", target, ("parameters", parameters))
    batch = target.shape[0] if indices is None else len(indices)
    if (batch, *target.shape[2:]) != (parameters.shape[0], *parameters.shape[2:]):
        raise ValueError(
            f"target has shape {tuple(target.shape)}, parameters {tuple(parameters.shape)}; "
            "batch, height and width must be the same"
        )
    _check_device("target", target, "parameters", parameters)


def _check_logistic_mixture(
    parameters: Tensor, mixtures: int, channels: int, levels: int = 256
) -> None:
    for name, value, least, most in (
        ("mixtures", mixtures, 1, math.inf),
        ("channels", channels, 1, 3),
        ("levels", levels, 2, 256),
    ):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        if not least <= value <= most:
            allowed = f"{least} or more" if most == math.inf else f"{least} to {most}"
            raise ValueError(f"{name} must be {allowed}, got {value}")
    if parameters.dim() != 4:
        raise ValueError(
            f"parameters must be [B, channels, H, W], got shape {tuple(parameters.shape)}"
        )
    wanted = logistic_mixture_channels(mixtures, channels)
    if parameters.shape[1] != wanted:
        raise ValueError(
            f"parameters has {parameters.shape[1]} channels; {mixtures} components and "
            f"{channels} colour channels need {wanted}"
        )
