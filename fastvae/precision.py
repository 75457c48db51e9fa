"""How exactly float32 products and convolutions are computed: one policy for both."""

from typing import Literal

import torch

MatmulPrecision = Literal["auto", "highest", "high", "medium"]

# Relative to the product, float32 rounding leaves 3e-7 here and bfloat16 factors 3e-3.
_AS_GOOD_AS_FLOAT32 = 2e-6


def use_matmul_precision(wanted: MatmulPrecision, device: torch.device) -> str:
    """Set how exact float32 products and convolutions are in this process; return what was set.

    The names are those of `torch.set_float32_matmul_precision`. That function leaves cuDNN free to
    round the factors of convolutions to TF32, at "highest" too: here they may be rounded only
    where those of products may.

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
    torch.backends.cudnn.allow_tf32 = chosen != "highest"
    return chosen


def float32_precision(device: torch.device) -> dict[str, str]:
    """What is set now, for results: the name for matrix products, and whether convolutions are
    computed in "ieee" float32, as always on a CPU, or may round their factors to "tf32"."""
    is_rounded = device.type == "cuda" and torch.backends.cudnn.allow_tf32
    return {
        "matmul_precision": torch.get_float32_matmul_precision(),
        "convolution_precision": "tf32" if is_rounded else "ieee",
    }


def _error_of_a_product() -> float:
    """Root mean square, relative to the product's."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
    truth = a.double() @ b.double()
    return float((a @ b - truth).square().mean().sqrt() / truth.square().mean().sqrt())
