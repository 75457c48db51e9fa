"""p(x | z): how likely an image is, given the decoder's output.

Every likelihood is a normalised density or mass over the values it names; `observe` maps stored
pixels to those values. A `Bernoulli` that does not binarise is the one exception, and says so
through `is_density`.
"""

import math
from typing import Literal, Protocol

import torch
from fastvae_kernels import Impl, bernoulli_nll, gaussian_nll, normal, uniform
from torch import Tensor, nn

from fastvae.errors import UserError
from fastvae.parts.networks import pixels
from fastvae.parts.spec import part

Binarize = Literal["dynamic", "static", "none"]


class Likelihood(Protocol):
    """What a likelihood answers. `parameters` is the decoder's output `[B, k·C, H, W]`."""

    outputs_per_value: int
    """k: how many numbers the decoder gives for each value of the image."""
    is_density: bool
    """False where `nll` is no −log p(x | z) of the observed values, but a cross-entropy."""
    bits_offset: float
    """Added to −log₂ p per dimension so that it counts bits of the stored 8-bit value."""

    def observe(self, x: Tensor, seed: int | Tensor, offset: int | Tensor) -> Tensor:
        """Stored images (uint8, or floating in [0, 1]) as the values modelled, float32."""

    def nll(self, parameters: Tensor, x: Tensor, impl: Impl) -> Tensor:
        """−log p(x | z), `[B]` in nats."""

    def mean(self, parameters: Tensor) -> Tensor:
        """E[x | z], float32 `[B, C, H, W]`."""

    def sample(self, parameters: Tensor, seed: int | Tensor) -> Tensor:
        """Draw x ~ p(x | z), float32 `[B, C, H, W]`."""


@part("likelihood", "bernoulli")
class Bernoulli(nn.Module):
    """Independent pixels in {0, 1}; the decoder gives logits.

    Grey pixels are read as probabilities. "dynamic" draws fresh zeros and ones each time an image
    is met (as in Burda et al. 2016), so that the ELBO is a bound on log p(x) of binary images;
    "static" expects images that were binarised once, when they were loaded; "none" compares with
    the grey values themselves, which is a cross-entropy and bounds no likelihood.
    """

    outputs_per_value = 1
    bits_offset = 0.0

    def __init__(self, binarize: Binarize = "dynamic") -> None:
        super().__init__()
        if binarize not in ("dynamic", "static", "none"):
            raise UserError(f"binarize is dynamic, static or none, got {binarize!r}")
        self.binarize = binarize
        self.is_density = binarize != "none"

    def observe(self, x: Tensor, seed: int | Tensor, offset: int | Tensor) -> Tensor:
        """Zeros and ones if binarised dynamically, else the pixels in [0, 1]."""
        return binarize(x, seed, offset) if self.binarize == "dynamic" else pixels(x)

    def nll(self, parameters: Tensor, x: Tensor, impl: Impl = "auto") -> Tensor:
        """Σ softplus(logit) − logit·x, `[B]` nats."""
        return bernoulli_nll(parameters, x, impl=impl)

    def mean(self, parameters: Tensor) -> Tensor:
        """The probability of a white pixel."""
        return torch.sigmoid(parameters.float())

    def sample(self, parameters: Tensor, seed: int | Tensor) -> Tensor:
        """Zeros and ones."""
        probability = self.mean(parameters)
        return (
            uniform(tuple(probability.shape), seed, device=probability.device) < probability
        ).float()


@part("likelihood", "gaussian")
class Gaussian(nn.Module):
    """Independent pixels N(mean, σ²) on [0, 1]-scaled values, with one σ² for all.

    The density is continuous and no noise is added to the 8-bit pixels, so its bits per dimension
    (which count 256 levels) are not comparable with those of a discrete likelihood.
    """

    outputs_per_value = 1
    is_density = True
    bits_offset = 8.0

    def __init__(self, variance: float | Literal["learned"] = "learned") -> None:
        """`variance`: σ² on the [0, 1] scale, or "learned" with the weights (from 0.1)."""
        super().__init__()
        self.logvar: Tensor
        if variance == "learned":
            self.logvar = nn.Parameter(torch.tensor(math.log(0.1)))
        elif math.isfinite(variance) and variance > 0:
            self.register_buffer("logvar", torch.tensor(math.log(variance)))
        else:
            raise UserError(f"variance is positive or 'learned', got {variance}")

    def observe(self, x: Tensor, seed: int | Tensor, offset: int | Tensor) -> Tensor:
        """The pixels in [0, 1]."""
        return pixels(x)

    def nll(self, parameters: Tensor, x: Tensor, impl: Impl = "auto") -> Tensor:
        """The full density with its constant, `[B]` nats."""
        return gaussian_nll(parameters, x, self.logvar, impl=impl)

    def mean(self, parameters: Tensor) -> Tensor:
        """The decoder's output itself; not clipped to [0, 1]."""
        return parameters.float()

    def sample(self, parameters: Tensor, seed: int | Tensor) -> Tensor:
        """mean + σ ε."""
        noise = normal(tuple(parameters.shape), seed, device=parameters.device)
        return self.mean(parameters) + (0.5 * self.logvar).exp() * noise


def binarize(x: Tensor, seed: int | Tensor, offset: int | Tensor) -> Tensor:
    """Zeros and ones, 1 with the pixel's probability: uint8 or floating `[B, …]` → float32.

    Row b is a function of (seed, offset + b) alone.
    """
    draws = uniform(tuple(x.shape), seed, offset=offset, device=x.device)
    # Compared as floats: 0 is never and 255 (or 1.0) always white, since the draws stay below 1.
    if x.dtype == torch.uint8:
        return (draws * 255.0 < x.float()).float()
    return (draws < pixels(x)).float()
