"""What the tests of the three operators share: sizes, layouts, tolerances, and the judge."""

import math
import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from kernel_oracle import Truth
from torch import Tensor

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = find_spec("triton") is not None

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# [B] alone, B = 1, D = 1, neighbours of powers of two, more rows than one tile holds, rows longer
# than a tile (1024), rows shared by several programs (more than 4096 columns), images.
SHAPES = [
    (7,),
    (1, 20),
    (5, 1),
    (4, 63),
    (3, 507),
    (2, 123),
    (300, 3),
    (2, 3000),
    (2, 5000),
    (2, 20000),
    (3, 5, 7, 2),
]

# The same values in other places of memory: each entry makes its tensor from `make(shape)`.
LAYOUTS = {
    "contiguous": lambda make: make((5, 37)),
    "transposed": lambda make: make((37, 5)).t(),
    "permuted": lambda make: make((7, 5, 3)).permute(2, 0, 1),
    "packed_first": lambda make: make((5, 74)).chunk(2, 1)[0],
    "packed_second": lambda make: make((5, 74)).chunk(2, 1)[1],
    "packed_channels": lambda make: make((3, 8, 5, 7)).chunk(2, 1)[1],
    "channels_last": lambda make: make((3, 4, 5, 7)).contiguous(memory_format=torch.channels_last),
    "expanded_batch": lambda make: make((1, 37)).expand(5, 37),
    "expanded_columns": lambda make: make((5, 1)).expand(5, 37),
    "sliced": lambda make: make((5, 75))[:, 1::2],
    "unaligned": lambda make: make((5 * 37 + 1,))[1:].view(5, 37),
}

# What an implementation may err beyond stock PyTorch in float32 from the same inputs, as a part of
# the size of the terms. On a CPU the largest excess seen is 2.3e-7; a GPU's fast exponential adds
# a few ulps of its own.
BUDGET = {"cpu": 5e-7, "cuda": 2e-6}


def budget(dtype: torch.dtype, impl: str, device: str) -> float:
    """Triton's interpreter cuts a float32 to bfloat16 where hardware rounds: up to one ulp."""
    if dtype == torch.bfloat16 and impl == "triton" and device == "cpu":
        return 2.0**-7
    return BUDGET[device]


def cap(dtype: torch.dtype, impl: str, device: str) -> float:
    """Whatever PyTorch does, never further from the truth: half an ulp is what rounding costs."""
    half_ulp = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    return max(half_ulp + 2 * BUDGET[device], budget(dtype, impl, device))


class Draw:
    """Makes tensors of reproducible values; call it as LAYOUTS wants: `draw(shape)`."""

    def __init__(self, device: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        values = torch.randn(shape, generator=self.generator)
        return values.to(self.dtype).to(self.device)

    def uniform(self, shape: tuple[int, ...]) -> Tensor:
        return torch.rand(shape, generator=self.generator).to(self.dtype).to(self.device)

    def target(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Bytes with both ends present, bits, or floats in [0, 1] with both ends present."""
        if dtype == torch.bool:
            return (torch.rand(shape, generator=self.generator) < 0.4).to(self.device)
        byte = torch.randint(0, 256, shape, generator=self.generator, dtype=torch.uint8)
        flat = byte.view(-1)
        if flat.numel() > 1:
            flat[0], flat[-1] = 0, 255
        if dtype == torch.uint8:
            return byte.to(self.device)
        return (byte.double() / 255).to(dtype).to(self.device)


def leaf(x: Tensor) -> Tensor:
    """`x` with its strides and storage, as a leaf that wants a gradient."""
    return x.detach().requires_grad_()


def error(got: Tensor, truth: Tensor, scale: Tensor, dtype: torch.dtype) -> float:
    """The largest error as part of its scale. A NaN or ∞ without a counterpart is infinite."""
    got, truth = got.detach().double().cpu(), truth.double().cpu()
    assert got.shape == truth.shape
    if got.numel() == 0:
        return 0.0
    # Below the smallest normal number of float16 rounding is absolute; that of float32 and
    # bfloat16 (1e-38) may come out as 0.
    smallest = max(torch.finfo(dtype).tiny, torch.finfo(torch.float32).tiny / BUDGET["cpu"])
    scale = scale.double().cpu().clamp_min(smallest)
    difference = torch.where(got == truth, 0.0, (got - truth).abs() / scale)
    return difference.nan_to_num(nan=math.inf).max().item()


def judge(
    got: dict[str, Tensor],
    truth: Truth,
    stock: dict[str, Tensor],
    *,
    impl: str,
    device: str,
) -> None:
    """Each quantity by name: no worse than PyTorch plus a budget, and within the cap."""
    for name, value in got.items():
        allowance = budget(value.dtype, impl, device)
        ours = error(value, truth[name], truth.scales[name], value.dtype)
        theirs = error(stock[name].to(value.dtype), truth[name], truth.scales[name], value.dtype)
        assert ours <= theirs + allowance, f"{name}: error {ours:.3g}, PyTorch's {theirs:.3g}"
        limit = cap(value.dtype, impl, device)
        assert ours <= limit, f"{name}: error {ours:.3g} of its scale, allowed {limit:.3g}"


def far_apart(impl: str, device: str, dtype: torch.dtype) -> Tensor:
    """`[1, 3]`, column 2 lying 2^31 elements after column 0 with a stride that fits in 32 bits."""
    if impl == "torch" and device == "cpu":
        pytest.skip("PyTorch's own indexing; the kernels' is meant")
    stride = 2**30
    if device == "cuda":
        if torch.cuda.mem_get_info()[0] < 12 * 2**30:
            pytest.skip("needs 12 GiB of free GPU memory")
        memory = torch.zeros(2 * stride + 1, dtype=dtype, device=device)
    else:
        numpy_dtype = {torch.float16: np.float16, torch.uint8: np.uint8}[dtype]
        try:
            # Zeroed memory becomes real where it is touched: here on three pages.
            memory = torch.from_numpy(np.zeros(2 * stride + 1, numpy_dtype))
        except MemoryError:
            pytest.skip("4 GiB of address space are not to be had")
    x = memory.as_strided((1, 3), (1, stride))
    return x.copy_(torch.tensor([[1, 2, 3]]))


# Of each test's cases in the interpreter the fast tests take one in so many: a number that divides
# no list of dtypes, sizes or layouts, so that the cases taken go through all of them.
ONE_IN = 13


def is_interpreted(parameters: Mapping[str, Any]) -> bool:
    """A case for a kernel that Triton's interpreter runs."""
    return INTERPRETING and parameters.get("impl") == "triton"


def is_quick(parameters: Mapping[str, Any]) -> bool:
    """What the fast tests may keep of the kernels' cases that are interpreted, or compiled only.

    Of code for a GPU that of a Hopper's, in bfloat16 where floats vary. Of interpreted cases those
    that are small and want every gradient.
    """
    if "architecture" in parameters:
        return parameters["architecture"] == 90 and parameters.get("dtype") not in ("fp32", "fp16")
    if not is_interpreted(parameters):
        return True
    shape = parameters.get("shape", parameters.get("row", ()))
    if isinstance(shape, tuple) and math.prod(shape) > 10_000:
        return False
    return parameters.get("use", "both") == "both"


needs_no_interpreter = pytest.mark.skipif(
    INTERPRETING, reason="torch.compile and Triton's compiler do not work beside its interpreter"
)
