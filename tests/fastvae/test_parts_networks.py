"""Encoders and decoders for every image size."""

import pytest
import torch

from fastvae import ConvDecoder, ConvEncoder, MLPDecoder, MLPEncoder
from fastvae.errors import UserError
from fastvae.parts.networks import ACTIVATIONS, pixels

SIDES = (1, 2, 3, 4, 7, 8, 15, 16, 17, 33)


@pytest.mark.parametrize("widths", [(4,), (4, 6), (4, 6, 8)])
def test_convolutions_mirror_every_size(widths: tuple[int, ...]) -> None:
    for height in SIDES:
        for width in (1, 5, 8, height):
            shape = (3, height, width)
            encoder = ConvEncoder(shape, 6, widths=widths, hidden=(7,))
            decoder = ConvDecoder(shape, 3, 2, widths=widths[::-1], hidden=(7,))
            assert encoder(torch.zeros(2, *shape)).shape == (2, 6)
            assert decoder(torch.zeros(2, 3)).shape == (2, 6, height, width)


def test_no_hidden_layer() -> None:
    shape = (1, 5, 4)
    assert MLPEncoder(shape, 6, hidden=())(torch.zeros(2, *shape)).shape == (2, 6)
    assert MLPDecoder(shape, 3, 2, hidden=())(torch.zeros(2, 3)).shape == (2, 2, 5, 4)
    assert ConvEncoder(shape, 6, hidden=())(torch.zeros(2, *shape)).shape == (2, 6)
    assert ConvDecoder(shape, 3, hidden=())(torch.zeros(2, 3)).shape == (2, 1, 5, 4)


@pytest.mark.parametrize("network", [MLPEncoder, MLPDecoder, ConvEncoder, ConvDecoder])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(network: type[torch.nn.Module], name: str) -> None:
    module = network((1, 4, 4), 3, activation=name)
    kinds = {type(layer) for layer in module.modules()}
    assert ACTIVATIONS[name] in kinds
    assert not kinds & set(ACTIVATIONS.values()) - {ACTIVATIONS[name]}
    with pytest.raises(UserError, match="relu, silu, gelu, tanh, got 'sine'"):
        network((1, 4, 4), 3, activation="sine")


def test_pixels() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(pixels(levels), torch.arange(256).float() / 255)
    assert pixels(levels)[255] == 1
    assert pixels(torch.tensor([True, False])).tolist() == [1.0, 0.0]
    half = torch.tensor([0.5], dtype=torch.float64)
    assert pixels(half).dtype == torch.float32
    assert pixels(half).item() == 0.5
