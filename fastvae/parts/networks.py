"""Encoders and decoders: fully connected and convolutional, for any image size.

An encoder maps images `[B, C, H, W]` to the posterior's statistics `[B, outputs]`; a decoder maps
z `[B, latent_dim]` to the likelihood's parameters `[B, channels, H, W]`. Those of a conditional
model take the classes, `[B, condition_dim]`, as a second argument. Any nn.Module that does the same
can take their place.
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


def _initialize(network: nn.Module, activation: str) -> None:
    """Glorot's uniform weights and biases of 0 around tanh (Glorot & Bengio 2010, eq. 16).

    PyTorch's own, which stay for the others, are 2 to 3 times smaller, and a VAE of tanh units
    learned more slowly from them.
    """
    if activation != "tanh":
        return
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _mlp(sizes: tuple[int, ...], activation: str) -> nn.Sequential:
    """Linear layers of the given sizes with an activation after each."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), _activation(activation)]
    return nn.Sequential(*layers)


def _joined(features: Tensor, condition: Tensor | None) -> Tensor:
    """The classes beside the features: `[B, F]`, `[B, K]` → `[B, F + K]`."""
    return features if condition is None else torch.cat([features, condition], dim=1)


@part("encoder", "mlp")
class MLPEncoder(nn.Module):
    """Flatten, hidden layers, one linear head for all statistics (one matrix product)."""

    def __init__(
        self,
        image_shape: ImageShape,
        outputs: int,
        hidden: tuple[int, ...] = (400, 400),
        activation: str = "relu",
        condition_dim: int = 0,
    ) -> None:
        super().__init__()
        sizes = (math.prod(image_shape) + condition_dim, *hidden)
        self.body = _mlp(sizes, activation)
        self.head = nn.Linear(sizes[-1], outputs)
        _initialize(self, activation)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """`[B, C, H, W]` → `[B, outputs]`."""
        return self.head(self.body(_joined(x.flatten(1), condition)))


@part("decoder", "mlp")
class MLPDecoder(nn.Module):
    """Hidden layers (in the order given) and a linear layer to every value of the image."""

    def __init__(
        self,
        image_shape: ImageShape,
        latent_dim: int,
        channels: int | None = None,
        hidden: tuple[int, ...] = (400, 400),
        activation: str = "relu",
        condition_dim: int = 0,
    ) -> None:
        """`channels` of the output: what the likelihood needs; the image's unless given."""
        super().__init__()
        sizes = (latent_dim + condition_dim, *hidden)
        self.output_shape = (channels or image_shape[0], *image_shape[1:])
        self.body = _mlp(sizes, activation)
        self.head = nn.Linear(sizes[-1], math.prod(self.output_shape))
        _initialize(self, activation)

    @torch.no_grad()
    def start_at(self, parameters: Tensor) -> None:
        """Answer about `parameters` `[channels, H, W]` before anything is learned."""
        self.head.bias.copy_(parameters.flatten())

    def forward(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        """`[B, latent_dim]` → `[B, channels, H, W]`."""
        return self.head(self.body(_joined(z, condition))).unflatten(1, self.output_shape)


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
    """3×3 convolutions, each halving height and width, then hidden layers and a linear head.

    They halve by a stride of 2, or with `pooling` by taking the largest of each 2×2 pixels.
    """

    def __init__(
        self,
        image_shape: ImageShape,
        outputs: int,
        widths: tuple[int, ...] = (32, 64),
        hidden: tuple[int, ...] = (256,),
        activation: str = "relu",
        pooling: bool = False,
        condition_dim: int = 0,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = image_shape[0]
        for width in widths:
            stride = 1 if pooling else 2
            layers.append(nn.Conv2d(channels, width, 3, stride=stride, padding=1))
            layers.append(_activation(activation))
            if pooling:
                layers.append(nn.MaxPool2d(2, ceil_mode=True))
            channels = width
        height, width = _halved_sizes(image_shape, len(widths))[-1]
        sizes = (channels * height * width + condition_dim, *hidden)
        self.convolutions = nn.Sequential(*layers)
        self.body = _mlp(sizes, activation)
        self.head = nn.Linear(sizes[-1], outputs)
        _initialize(self, activation)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """`[B, C, H, W]` → `[B, outputs]`."""
        return self.head(self.body(_joined(self.convolutions(x).flatten(1), condition)))


@part("decoder", "conv")
class ConvDecoder(nn.Module):
    """The encoder's mirror: hidden layers, convolutions that double the size, one 3×3 convolution.

    They double by transposed convolutions, or with `pooling` by repeating each pixel before it.
    """

    def __init__(
        self,
        image_shape: ImageShape,
        latent_dim: int,
        channels: int | None = None,
        widths: tuple[int, ...] = (64, 32),
        hidden: tuple[int, ...] = (256,),
        activation: str = "relu",
        pooling: bool = False,
        condition_dim: int = 0,
    ) -> None:
        """`channels` of the output: what the likelihood needs; the image's unless given."""
        super().__init__()
        sizes = _halved_sizes(image_shape, len(widths))[::-1]
        self.first_shape = (widths[0] if widths else image_shape[0], *sizes[0])
        first = math.prod(self.first_shape)
        self.body = _mlp((latent_dim + condition_dim, *hidden, first), activation)
        layers: list[nn.Module] = []
        inputs = self.first_shape[0]
        for width, small, large in zip((*widths[1:], *widths[-1:]), sizes, sizes[1:], strict=False):
            if pooling:
                layers.append(nn.Upsample(size=large))
                layers.append(nn.Conv2d(inputs, width, 3, padding=1))
            else:
                # 2n − 1 is what a stride of 2 gives back; the padding adds the row that it lost.
                lost = (large[0] - (2 * small[0] - 1), large[1] - (2 * small[1] - 1))
                layers.append(
                    nn.ConvTranspose2d(inputs, width, 3, stride=2, padding=1, output_padding=lost)
                )
            layers.append(_activation(activation))
            inputs = width
        self.convolutions = nn.Sequential(*layers)
        self.head = nn.Conv2d(inputs, channels or image_shape[0], 3, padding=1)
        _initialize(self, activation)

    @torch.no_grad()
    def start_at(self, parameters: Tensor) -> None:
        """Answer about `parameters` `[channels, H, W]`, averaged over pixels, at the start."""
        bias = self.head.bias
        assert bias is not None
        bias.copy_(parameters.mean((1, 2)))

    def forward(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        """`[B, latent_dim]` → `[B, channels, H, W]`."""
        x = self.body(_joined(z, condition)).unflatten(1, self.first_shape)
        return self.head(self.convolutions(x))


@part("encoder", "table")
class Table(nn.Module):
    """No network: the statistics of each training image are parameters of their own.

    Non-amortised (stochastic) variational inference, Hoffman et al. 2013: there is nothing to
    answer for images it was not trained on, whose statistics are found by `fastvae.refinement`.
    """

    reads_index = True

    def __init__(self, rows: int, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.statistics = nn.Embedding(rows, outputs)
        # log σ² = 0, σ = 1 where the statistics are all 0: every image starts at the prior.
        nn.init.zeros_(self.statistics.weight)

    def forward(self, index: Tensor) -> Tensor:
        """int64 `[B]` places in the training set → `[B, outputs]`."""
        return self.statistics(index)


def pixels(x: Tensor) -> Tensor:
    """Images as float32 in [0, 1]: uint8 is divided by 255, bool becomes 0 and 1."""
    require_pixels(x)
    return x.float() / 255.0 if x.dtype == torch.uint8 else x.float()


def require_pixels(x: Tensor) -> None:
    """Raise UserError for a type whose scale is not known."""
    if x.dtype not in (torch.uint8, torch.bool) and not x.is_floating_point():
        raise UserError(f"images are uint8, bool, or floating in [0, 1], got {x.dtype}")
