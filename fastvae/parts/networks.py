"""Encoders and decoders: fully connected and convolutional, for any image size.

An encoder maps images `[B, C, H, W]` to the posterior's statistics `[B, outputs]`; a decoder maps
z `[B, latent_dim]` to the likelihood's parameters `[B, outputs_per_value · C, H, W]`. Any nn.Module
that does the same can take their place.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from fastvae.errors import UserError
from fastvae.parts.spec import part

ImageShape = tuple[int, int, int]
"""(channels, height, width)"""

ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU, "tanh": nn.Tanh}


def _activation(name: str) -> nn.Module:
    if name not in ACTIVATIONS:
        raise UserError(f"activation is one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]()


def _mlp(sizes: tuple[int, ...], activation: str) -> nn.Sequential:
    """Linear layers of the given sizes with an activation after each."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), _activation(activation)]
    return nn.Sequential(*layers)


@part("encoder", "mlp")
class MLPEncoder(nn.Module):
    """Flatten, hidden layers, one linear head for all statistics (one matrix product)."""

    def __init__(
        self,
        image_shape: ImageShape,
        outputs: int,
        hidden: tuple[int, ...] = (400, 400),
        activation: str = "relu",
    ) -> None:
        super().__init__()
        sizes = (math.prod(image_shape), *hidden)
        self.body = _mlp(sizes, activation)
        self.head = nn.Linear(sizes[-1], outputs)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` → `[B, outputs]`."""
        return self.head(self.body(x.flatten(1)))


@part("decoder", "mlp")
class MLPDecoder(nn.Module):
    """Hidden layers (in the order given) and a linear layer to every value of the image."""

    def __init__(
        self,
        image_shape: ImageShape,
        latent_dim: int,
        outputs_per_value: int = 1,
        hidden: tuple[int, ...] = (400, 400),
        activation: str = "relu",
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        sizes = (latent_dim, *hidden)
        self.output_shape = (outputs_per_value * channels, height, width)
        self.body = _mlp(sizes, activation)
        self.head = nn.Linear(sizes[-1], math.prod(self.output_shape))

    def forward(self, z: Tensor) -> Tensor:
        """`[B, latent_dim]` → `[B, outputs_per_value · C, H, W]`."""
        return self.head(self.body(z)).unflatten(1, self.output_shape)


def _halved_sizes(image_shape: ImageShape, times: int) -> list[tuple[int, int]]:
    """Heights and widths after each stride of 2 (rounded up), the full size first."""
    _, height, width = image_shape
    sizes = [(height, width)]
    for _ in range(times):
        height, width = (height + 1) // 2, (width + 1) // 2
        sizes.append((height, width))
    return sizes


@part("encoder", "conv")
class ConvEncoder(nn.Module):
    """3×3 convolutions, each halving height and width, then hidden layers and a linear head."""

    def __init__(
        self,
        image_shape: ImageShape,
        outputs: int,
        widths: tuple[int, ...] = (32, 64),
        hidden: tuple[int, ...] = (256,),
        activation: str = "relu",
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = image_shape[0]
        for width in widths:
            layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), _activation(activation)]
            channels = width
        height, width = _halved_sizes(image_shape, len(widths))[-1]
        sizes = (channels * height * width, *hidden)
        self.convolutions = nn.Sequential(*layers)
        self.body = _mlp(sizes, activation)
        self.head = nn.Linear(sizes[-1], outputs)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` → `[B, outputs]`."""
        return self.head(self.body(self.convolutions(x).flatten(1)))


@part("decoder", "conv")
class ConvDecoder(nn.Module):
    """The encoder's mirror: hidden layers, transposed convolutions, one 3×3 convolution."""

    def __init__(
        self,
        image_shape: ImageShape,
        latent_dim: int,
        outputs_per_value: int = 1,
        widths: tuple[int, ...] = (64, 32),
        hidden: tuple[int, ...] = (256,),
        activation: str = "relu",
    ) -> None:
        super().__init__()
        sizes = _halved_sizes(image_shape, len(widths))[::-1]
        self.first_shape = (widths[0] if widths else image_shape[0], *sizes[0])
        self.body = _mlp((latent_dim, *hidden, math.prod(self.first_shape)), activation)
        layers: list[nn.Module] = []
        channels = self.first_shape[0]
        for width, small, large in zip((*widths[1:], widths[-1]), sizes, sizes[1:], strict=False):
            # 2n − 1 is what a stride of 2 gives back; the padding adds the row that it lost.
            padding = (large[0] - (2 * small[0] - 1), large[1] - (2 * small[1] - 1))
            layers += [
                nn.ConvTranspose2d(channels, width, 3, stride=2, padding=1, output_padding=padding),
                _activation(activation),
            ]
            channels = width
        self.convolutions = nn.Sequential(*layers)
        self.head = nn.Conv2d(channels, outputs_per_value * image_shape[0], 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """`[B, latent_dim]` → `[B, outputs_per_value · C, H, W]`."""
        x = self.body(z).unflatten(1, self.first_shape)
        return self.head(self.convolutions(x))


def pixels(x: Tensor) -> Tensor:
    """Images as float32 in [0, 1]: uint8 is divided by 255, bool becomes 0 and 1."""
    if x.dtype == torch.uint8:
        return x.float() / 255.0
    if x.dtype != torch.bool and not x.is_floating_point():
        raise UserError(f"images are uint8, bool, or floating in [0, 1], got {x.dtype}")
    return x.float()
