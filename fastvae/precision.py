"""How exactly float32 matrices are multiplied."""

from typing import Literal

import torch

MatmulPrecision = Literal["auto", "highest", "high", "medium"]

# Relative to the product, float32 rounding leaves 3e-7 here and bfloat16 factors 3e-3.
_AS_GOOD_AS_FLOAT32 = 2e-6


def use_matmul_precision(wanted: MatmulPrecision, device: torch.device) -> str:
    """Set `torch.set_float32_matmul_precision` for this process, and return what was set.

    "auto" never trades accuracy. On a GPU it is "highest". On a CPU "medium" makes PyTorch call
    oneDNN in place of MKL: twice as fast on AMD processors and just as exact, but bfloat16 where
    the processor multiplies that in hardware. So one product is tried, and "medium" is taken if
    its error is float32's.
    """
    chosen = wanted
    if wanted == "auto":
        chosen = "highest"
        if device.type == "cpu":
            torch.set_float32_matmul_precision("medium")
            if _error_of_a_product() < _AS_GOOD_AS_FLOAT32:
                chosen = "medium"
    torch.set_float32_matmul_precision(chosen)
    return chosen


def _error_of_a_product() -> float:
    """Root mean square, relative to the product's."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
    truth = a.double() @ b.double()
    return float((a @ b - truth).square().mean().sqrt() / truth.square().mean().sqrt())
