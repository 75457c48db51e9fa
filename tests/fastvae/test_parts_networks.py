"""Encoders and decoders for every image size."""

from typing import Any

import pytest
import torch
from torch import nn

from fastvae import ConvDecoder, ConvEncoder, MLPDecoder, MLPEncoder
from fastvae.errors import UserError
from fastvae.parts.networks import ACTIVATIONS, pixels
from fastvae.parts.spec import build_part, spec_of

SIDES = (1, 2, 3, 4, 7, 8, 15, 16, 17, 33)


@pytest.mark.parametrize("pooling", [False, True])
@pytest.mark.parametrize("widths", [(), (4,), (4, 6), (4, 6, 8)])
def test_convolutions_mirror_every_size(widths: tuple[int, ...], pooling: bool) -> None:
    for height in SIDES:
        for width in (1, 5, 8, height):
            shape = (3, height, width)
            encoder = ConvEncoder(shape, 6, widths=widths, hidden=(7,), pooling=pooling)
            decoder = ConvDecoder(shape, 3, 2, widths[::-1], hidden=(7,), pooling=pooling)
            assert encoder(torch.zeros(2, *shape)).shape == (2, 6)
            assert decoder(torch.zeros(2, 3)).shape == (2, 2, height, width)


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


@pytest.mark.parametrize("pooling", [False, True])
def test_pooling_has_no_strides(pooling: bool) -> None:
    shape = (1, 7, 5)
    for network in (ConvEncoder(shape, 4, pooling=pooling), ConvDecoder(shape, 2, pooling=pooling)):
        strides = {m.stride for m in network.modules() if hasattr(m, "output_padding")}
        assert strides - {(1, 1)} == (set() if pooling else {(2, 2)})
        pools = [m for m in network.modules() if isinstance(m, nn.MaxPool2d | nn.Upsample)]
        assert len(pools) == (2 if pooling else 0)


@pytest.mark.parametrize("networks", [(MLPEncoder, MLPDecoder), (ConvEncoder, ConvDecoder)])
def test_every_output_depends_on_the_class(networks: Any) -> None:
    torch.manual_seed(0)
    shape, classes = (1, 5, 4), torch.eye(3)
    encoder = networks[0](shape, 6, activation="tanh", condition_dim=3)
    decoder = networks[1](shape, 2, activation="tanh", condition_dim=3)
    for network, inputs in ((encoder, torch.rand(1, *shape)), (decoder, torch.rand(1, 2))):
        answers = network(inputs.expand(3, *inputs.shape[1:]), classes).detach().flatten(1)
        assert (answers[0] - answers[1]).abs().min() > 0
        assert (answers[1] - answers[2]).abs().min() > 0


def test_a_table_is_a_part_like_the_networks() -> None:
    table = build_part("encoder", {"name": "table", "rows": 4, "outputs": 6})
    assert table.reads_index
    assert spec_of(table) == {"name": "table", "rows": 4, "outputs": 6}
    statistics = torch.arange(24.0).view(4, 6)
    table.load_state_dict({"statistics.weight": statistics})
    assert torch.equal(table(torch.tensor([3, 0, 3])), statistics[[3, 0, 3]])


def test_pixels() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(pixels(levels), torch.arange(256).float() / 255)
    assert pixels(levels)[255] == 1
    assert pixels(torch.tensor([True, False])).tolist() == [1.0, 0.0]
    half = torch.tensor([0.5], dtype=torch.float64)
    assert pixels(half).dtype == torch.float32
    assert pixels(half).item() == 0.5
    with pytest.raises(UserError, match=r"uint8, bool, or floating .* got torch\.int64"):
        pixels(torch.zeros(2, dtype=torch.int64))


def test_where_a_decoder_starts() -> None:
    """With z = 0 and no hidden biases, only the output's own bias is left."""
    start = torch.randn(2, 5, 4)
    dense = MLPDecoder((1, 5, 4), 3, 2, hidden=(6,), activation="tanh")
    dense.start_at(start)
    torch.testing.assert_close(dense(torch.zeros(1, 3))[0], start)
    conv = ConvDecoder((1, 5, 4), 3, 2, widths=(4,), hidden=(6,), activation="tanh")
    conv.start_at(start)
    expected = start.mean((1, 2), keepdim=True).expand(2, 5, 4)
    torch.testing.assert_close(conv(torch.zeros(1, 3))[0], expected)


def test_weights_around_tanh() -> None:
    """Glorot & Bengio 2010: uniform with variance 2 / (inputs + outputs), and biases of 0."""
    encoder = MLPEncoder((1, 28, 28), 10, hidden=(300,), activation="tanh")
    for layer, fans in ((encoder.body[0], 784 + 300), (encoder.head, 300 + 10)):
        assert isinstance(layer, nn.Linear)
        assert layer.weight.std().item() == pytest.approx((2 / fans) ** 0.5, rel=0.05)
        assert layer.weight.abs().max().item() <= (6 / fans) ** 0.5
        assert layer.bias.abs().max() == 0
    others = MLPEncoder((1, 28, 28), 10, hidden=(300,), activation="relu").body[0]
    assert isinstance(others, nn.Linear)
    assert others.weight.abs().max().item() <= 1 / 28
