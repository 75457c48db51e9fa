"""Each operator beside the PyTorch that it replaces, and the fewest bytes that it must move.

The PyTorch side computes in float32 inside and returns what the operator returns (z in the input's
dtype, sums in float32), so that both do the same work. B rows, D columns.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import fastvae_kernels as kernels
import torch
import torch.nn.functional as F
from fastvae_kernels import Impl
from torch import Tensor

Tensors = tuple[Tensor, ...]
Compute = Callable[..., Tensors]
Make = Callable[[int, int, torch.dtype, torch.device], Tensors]

SEED, OFFSET = 2024, 10**6
SAMPLES = 8
MIXTURES, COLOURS = 5, 3
PARAMETERS = kernels.logistic_mixture_channels(MIXTURES, COLOURS)


@dataclass(frozen=True)
class Bytes:
    """Bytes to move: so many for each element (of an input's dtype, and of one byte each), and so
    many for each row."""

    items: int
    single: int = 0
    row: int = 4

    def of(self, rows: int, columns: int, dtype: torch.dtype) -> int:
        return rows * (columns * (self.items * dtype.itemsize + self.single) + self.row)


# Rows × columns on a GPU, what tells most first: a run that is short of time leaves out the last.
LATENTS = (
    *((2**14, 256), (2**18, 256), (2**10, 16), (2**14, 4096), (2**18, 16), (2**10, 256)),
    *((2**18, 1024), (2**14, 16), (2**10, 4096)),
)
PIXELS = ((2**16, 784), (2**10, 784), (2**14, 4096))
ONCE = ((2**16, 1024),)
# A large one, far beyond any cache, and one of a common training step.
CORE_LATENTS = ((2**18, 256), (2**10, 64))
CORE_PIXELS = ((2**16, 784), (2**7, 784))
CORE_IMAGES = ((2**11, 1024), (2**7, 1024))  # of 32 × 32 pixels in three colours


@dataclass(frozen=True)
class Op:
    """One operator. `make` gives fresh inputs; those that want a gradient are differentiated."""

    name: str
    make: Make
    fastvae: Compute
    pytorch: Compute
    forward: Bytes
    backward: Bytes | None
    is_random: bool = False
    """Its first output is drawn, so only the others can be compared with PyTorch's."""
    samples: int = 1
    """So many tensors like an input are drawn."""
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    sizes: tuple[tuple[int, int], ...] = ONCE
    """At which it is timed on a GPU."""
    core: tuple[tuple[int, int], ...] = ()
    """Two of the sizes, a large one and a typical one, which are timed first; none: neither."""
    width: int = 1
    """Values that an input has for each column: a mixture's parameters of a pixel."""
    mean: bool = False
    """Its rows are averaged, so that the gradient that meets each is 1/B, as in training."""


# ------------------------------------------------------------------------------------- inputs


def _values(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(rows, columns, device=device, dtype=dtype).requires_grad_()


def _latents(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensors:
    # On the device from the start: the seed in a trained model is a buffer.
    seed, offset = (torch.tensor(n, device=device) for n in (SEED, OFFSET))
    mu, logvar = (_values(rows, columns, dtype, device) for _ in range(2))
    return mu, logvar, seed, offset


def _latents_and_prior(
    rows: int, columns: int, dtype: torch.dtype, device: torch.device
) -> Tensors:
    """A prior of its own for each row, as one that knows the label has."""
    prior = (_values(rows, columns, dtype, device) for _ in range(2))
    return *_latents(rows, columns, dtype, device), *prior


def _packed_latents(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensors:
    """As one head of an encoder gives them: mu and logvar side by side."""
    return _values(rows, 2 * columns, dtype, device), *_latents(1, 1, dtype, device)[2:]


def _with_bytes(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensors:
    target = torch.randint(256, (rows, columns), dtype=torch.uint8, device=device)
    return _values(rows, columns, dtype, device), target


def _with_bits(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensors:
    target = torch.randint(2, (rows, columns), device=device).to(dtype)
    return _values(rows, columns, dtype, device), target


def _one_variance(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensors:
    logvar = torch.tensor(-2.0, device=device, requires_grad=True)
    return *_with_bytes(rows, columns, dtype, device), logvar


def _variances(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensors:
    return *_with_bytes(rows, columns, dtype, device), _values(rows, columns, dtype, device)


def _data_set(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensors:
    """Of as many rows as are chosen of it, in another order."""
    images = torch.randint(256, (rows, columns), dtype=torch.uint8, device=device)
    seed, offset = (torch.tensor(n, device=device) for n in (SEED, OFFSET))
    return images, seed, offset, torch.randperm(rows, device=device)


def _images(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensors:
    """Square images of so many pixels, and the parameters of a mixture for each pixel."""
    side = math.isqrt(columns)
    assert side**2 == columns
    shape = (rows, PARAMETERS, side, side)
    parameters = torch.randn(shape, device=device, dtype=dtype).requires_grad_()
    target = torch.randint(256, (rows, COLOURS, side, side), dtype=torch.uint8, device=device)
    return parameters, target


def _place(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensors:
    """Nothing is read but a shape."""
    seed, offset = (torch.tensor(n, device=device) for n in (SEED, OFFSET))
    return torch.empty(rows, columns, 0, device=device), seed, offset


# ------------------------------------------------------------- the operators and their rivals


def _fastvae_reparameterize_kl(
    mu: Tensor, logvar: Tensor, seed: Tensor, offset: Tensor, impl: Impl = "auto"
) -> Tensors:
    return kernels.reparameterize_kl(mu, logvar, seed, offset=offset, impl=impl)


def _fastvae_packed(
    statistics: Tensor, seed: Tensor, offset: Tensor, impl: Impl = "auto"
) -> Tensors:
    return kernels.reparameterize_kl_packed(statistics, seed, offset=offset, impl=impl)


def _pytorch_packed(statistics: Tensor, seed: Tensor, offset: Tensor) -> Tensors:
    mu, logvar = statistics.chunk(2, dim=1)
    return _pytorch_reparameterize_kl(mu, logvar, seed, offset)


def _pytorch_reparameterize_kl(mu: Tensor, logvar: Tensor, seed: Tensor, offset: Tensor) -> Tensors:
    mu32, logvar32 = mu.float(), logvar.float()
    z = mu32 + torch.exp(0.5 * logvar32) * torch.randn_like(mu32)
    kl = -0.5 * (1 + logvar32 - mu32.pow(2) - logvar32.exp()).sum(1)
    return z.to(mu.dtype), kl


def _fastvae_samples(
    mu: Tensor, logvar: Tensor, seed: Tensor, offset: Tensor, impl: Impl = "auto"
) -> Tensors:
    return kernels.reparameterize_kl(
        mu, logvar, seed, offset=offset, num_samples=SAMPLES, impl=impl
    )


def _pytorch_samples(mu: Tensor, logvar: Tensor, seed: Tensor, offset: Tensor) -> Tensors:
    mu32, logvar32 = mu.float(), logvar.float()
    noise = torch.randn(SAMPLES, *mu.shape, device=mu.device)
    z = mu32 + torch.exp(0.5 * logvar32) * noise
    kl = -0.5 * (1 + logvar32 - mu32.pow(2) - logvar32.exp()).sum(1)
    return z.to(mu.dtype), kl


def _fastvae_prior(
    mu: Tensor,
    logvar: Tensor,
    seed: Tensor,
    offset: Tensor,
    prior_mu: Tensor,
    prior_logvar: Tensor,
    impl: Impl = "auto",
) -> Tensors:
    return kernels.reparameterize_kl(
        mu, logvar, seed, offset=offset, prior_mu=prior_mu, prior_logvar=prior_logvar, impl=impl
    )


def _pytorch_prior(
    mu: Tensor,
    logvar: Tensor,
    seed: Tensor,
    offset: Tensor,
    prior_mu: Tensor,
    prior_logvar: Tensor,
) -> Tensors:
    mu32, logvar32, prior_logvar32 = mu.float(), logvar.float(), prior_logvar.float()
    z = mu32 + torch.exp(0.5 * logvar32) * torch.randn_like(mu32)
    error, delta = mu32 - prior_mu.float(), logvar32 - prior_logvar32
    kl = -0.5 * (1 + delta - error.pow(2) * torch.exp(-prior_logvar32) - delta.exp()).sum(1)
    return z.to(mu.dtype), kl


def _fastvae_bernoulli_nll(logits: Tensor, target: Tensor, impl: Impl = "auto") -> Tensors:
    return (kernels.bernoulli_nll(logits, target, impl=impl),)


def _foretold_bernoulli_nll(logits: Tensor, target: Tensor, impl: Impl = "auto") -> Tensors:
    return (kernels.bernoulli_nll(logits, target, row_weight=1 / len(logits), impl=impl),)


def _pytorch_bernoulli_nll(logits: Tensor, target: Tensor) -> Tensors:
    x = _unit_interval(target)
    return (F.binary_cross_entropy_with_logits(logits.float(), x, reduction="none").sum(1),)


def _fastvae_gaussian_nll(
    mean: Tensor, target: Tensor, logvar: Tensor, impl: Impl = "auto"
) -> Tensors:
    return (kernels.gaussian_nll(mean, target, logvar, impl=impl),)


def _foretold_gaussian_nll(
    mean: Tensor, target: Tensor, logvar: Tensor, impl: Impl = "auto"
) -> Tensors:
    row_weight = 1 / len(mean)
    return (kernels.gaussian_nll(mean, target, logvar, row_weight=row_weight, impl=impl),)


def _pytorch_gaussian_nll(mean: Tensor, target: Tensor, logvar: Tensor) -> Tensors:
    x, logvar = _unit_interval(target), logvar.float()
    terms = (x - mean.float()).pow(2) * torch.exp(-logvar) + logvar + math.log(2 * math.pi)
    return (0.5 * terms.sum(1),)


def _fastvae_logistic_mixture(parameters: Tensor, target: Tensor, impl: Impl = "auto") -> Tensors:
    return (kernels.logistic_mixture_nll(parameters, target, mixtures=MIXTURES, impl=impl),)


def _pytorch_logistic_mixture(parameters: Tensor, target: Tensor) -> Tensors:
    """The library's own reference: code that is passed on loses what float32 cannot hold where a
    bin is narrow, and would not agree."""
    return _fastvae_logistic_mixture(parameters, target, impl="torch")


def _unit_interval(target: Tensor) -> Tensor:
    return target.float() / 255 if target.dtype == torch.uint8 else target.float()


def _fastvae_binarize(images: Tensor, seed: Tensor, offset: Tensor, indices: Tensor) -> Tensors:
    return (kernels.binarize(images, seed, offset=offset, indices=indices),)


def _pytorch_binarize(images: Tensor, seed: Tensor, offset: Tensor, indices: Tensor) -> Tensors:
    return (torch.bernoulli(images.index_select(0, indices).float() / 255),)


def _fastvae_normal(place: Tensor, seed: Tensor, offset: Tensor) -> Tensors:
    shape = (place.shape[0], place.shape[1])
    return (kernels.normal(shape, seed, offset=offset, device=place.device),)


def _pytorch_normal(place: Tensor, seed: Tensor, offset: Tensor) -> Tensors:
    return (torch.randn(place.shape[0], place.shape[1], device=place.device),)


def _fastvae_uniform(place: Tensor, seed: Tensor, offset: Tensor) -> Tensors:
    shape = (place.shape[0], place.shape[1])
    return (kernels.uniform(shape, seed, offset=offset, device=place.device),)


def _pytorch_uniform(place: Tensor, seed: Tensor, offset: Tensor) -> Tensors:
    return (torch.rand(place.shape[0], place.shape[1], device=place.device),)


# Reads and writes, an input's dtype each, in the order of the arguments.
OPS = (
    Op(
        "reparameterize_kl",
        _latents,
        _fastvae_reparameterize_kl,
        _pytorch_reparameterize_kl,
        forward=Bytes(items=3),  # mu, logvar → z, kl
        backward=Bytes(items=5),  # mu, logvar, grad_z, grad_kl → grad_mu, grad_logvar
        is_random=True,
        sizes=LATENTS,
        core=CORE_LATENTS,
    ),
    Op(
        "reparameterize_kl_packed",
        _packed_latents,
        _fastvae_packed,
        _pytorch_packed,
        forward=Bytes(items=3),  # the same, two of them in one tensor
        backward=Bytes(items=5),
        is_random=True,
        sizes=LATENTS,
    ),
    Op(
        f"reparameterize_kl, {SAMPLES} samples",
        _latents,
        _fastvae_samples,
        _pytorch_samples,
        forward=Bytes(items=2 + SAMPLES),  # mu, logvar → z, kl
        backward=Bytes(items=4 + SAMPLES),  # and grad_z, grad_kl → grad_mu, grad_logvar
        is_random=True,
        samples=SAMPLES,
        core=((2**16, 256), (2**10, 64)),
    ),
    Op(
        "reparameterize_kl, given prior",
        _latents_and_prior,
        _fastvae_prior,
        _pytorch_prior,
        forward=Bytes(items=5),  # mu, logvar, prior_mu, prior_logvar → z, kl
        backward=Bytes(items=9),  # and grad_z, grad_kl → the gradients of all four
        is_random=True,
        core=CORE_LATENTS,
    ),
    Op(
        "bernoulli_nll, uint8 target",
        _with_bytes,
        _fastvae_bernoulli_nll,
        _pytorch_bernoulli_nll,
        forward=Bytes(items=1, single=1),  # logits, target → nll
        backward=Bytes(items=2, single=1),  # logits, target, grad_nll → grad_logits
        sizes=PIXELS,
        core=CORE_PIXELS,
    ),
    Op(
        "bernoulli_nll, row_weight",
        _with_bytes,
        _foretold_bernoulli_nll,
        _pytorch_bernoulli_nll,
        forward=Bytes(items=2, single=1),  # logits, target → nll, grad_logits
        backward=Bytes(items=0),  # grad_nll
        sizes=PIXELS,
        mean=True,
    ),
    Op(
        "bernoulli_nll, floating target",
        _with_bits,
        _fastvae_bernoulli_nll,
        _pytorch_bernoulli_nll,
        forward=Bytes(items=2),
        backward=Bytes(items=3),
    ),
    Op(
        "gaussian_nll, one variance",
        _one_variance,
        _fastvae_gaussian_nll,
        _pytorch_gaussian_nll,
        forward=Bytes(items=1, single=1),  # mean, target → nll
        backward=Bytes(items=2, single=1, row=8),  # and nll, grad_nll → grad_mean
        sizes=PIXELS,
        core=CORE_PIXELS,
    ),
    Op(
        "gaussian_nll, row_weight",
        _one_variance,
        _foretold_gaussian_nll,
        _pytorch_gaussian_nll,
        forward=Bytes(items=2, single=1),  # mean, target → nll, grad_mean
        backward=Bytes(items=0, row=8),  # nll, grad_nll
        sizes=PIXELS,
        mean=True,
    ),
    Op(
        "gaussian_nll, variance of each",
        _variances,
        _fastvae_gaussian_nll,
        _pytorch_gaussian_nll,
        forward=Bytes(items=2, single=1),  # mean, target, logvar → nll
        backward=Bytes(items=4, single=1),  # and grad_nll → grad_mean, grad_logvar
    ),
    Op(
        "binarize, uint8 through indices",
        _data_set,
        _fastvae_binarize,
        _pytorch_binarize,
        forward=Bytes(items=1, single=1, row=8),  # image, index → zeros and ones
        backward=None,
        is_random=True,
        dtypes=(torch.float32,),
        sizes=PIXELS,
    ),
    Op(
        "logistic_mixture_nll, colour",
        _images,
        _fastvae_logistic_mixture,
        _pytorch_logistic_mixture,
        # parameters, target → nll, and two float32 of each pixel for the backward pass
        forward=Bytes(items=PARAMETERS, single=COLOURS + 8),
        # parameters, target, those two, grad_nll → grad_parameters
        backward=Bytes(items=2 * PARAMETERS, single=COLOURS + 8),
        width=PARAMETERS,
        sizes=((2**7, 256),),
        core=CORE_IMAGES,
    ),
    Op(
        "normal",
        _place,
        _fastvae_normal,
        _pytorch_normal,
        forward=Bytes(items=1, row=0),
        backward=None,
        is_random=True,
        dtypes=(torch.float32,),
    ),
    Op(
        "uniform",
        _place,
        _fastvae_uniform,
        _pytorch_uniform,
        forward=Bytes(items=1, row=0),
        backward=None,
        is_random=True,
        dtypes=(torch.float32,),
    ),
)


@dataclass(frozen=True)
class Case:
    """An operator at one size and dtype: what its rivals are compared on."""

    op: Op
    rows: int
    columns: int
    dtype: torch.dtype

    def __str__(self) -> str:
        # An x, since pytest escapes a ×.
        return f"{self.op.name}, {self.rows}x{self.columns}, {dtype_name(self.dtype)}"

    def bytes(self, direction: str) -> int:
        """The fewest bytes that this direction moves."""
        parts = {"forward": self.op.forward, "backward": self.op.backward}
        counted = [part for name, part in parts.items() if name in direction and part is not None]
        return sum(part.of(self.rows, self.columns, self.dtype) for part in counted)

    @property
    def input_bytes(self) -> int:
        return self.rows * self.columns * self.op.width * self.dtype.itemsize


def dtype_name(dtype: torch.dtype) -> str:
    """float32, bfloat16, …"""
    return str(dtype).removeprefix("torch.")


def leaves(inputs: Tensors) -> list[Tensor]:
    """The inputs that get a gradient."""
    return [x for x in inputs if x.requires_grad]


def check_agreement(case: Case, computes: dict[str, Compute], inputs: Tensors) -> None:
    """On these very inputs: everything that is not drawn, and its gradients."""
    found = {}
    for name, compute in computes.items():
        outputs = compute(*inputs)
        assert all(y.isfinite().all() for y in outputs), f"{case}: {name} is not finite"
        kept = outputs[1:] if case.op.is_random else outputs
        found[name] = [y.detach() for y in kept]
        if kept and case.op.backward:
            totals = [y.mean() if case.op.mean else y.sum() for y in kept]
            grads = torch.autograd.grad(totals, leaves(inputs))
            found[name] += [g.detach() for g in grads]
    for name, values in found.items():
        for got, wanted in zip(values, found["pytorch"], strict=True):
            tolerance = 1e-4 if got.dtype == torch.float32 else 2e-2
            error = float((got - wanted).abs().max() / wanted.abs().max())
            assert error < tolerance, f"{case}: {name} differs from eager PyTorch by {error:.3g}"
