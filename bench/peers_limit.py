"""The matrix products of one training step and nothing else: what no trainer can be faster than."""

from collections.abc import Callable, Iterator

import torch
from peers_cases import Case, PlainVAE
from torch import Tensor, nn

Call = Callable[[], object]


def products(case: Case, variant: str = "contiguous") -> list[Call]:
    """One call for each product of a step: forward, of the weights' and of the inputs' gradients.

    Shapes are taken from a pass through the network itself; the pixels need no gradient. Products
    of float32 are oneDNN's where `torch.set_float32_matmul_precision("medium")` was called.
    """
    found: list[tuple[nn.Module, Tensor, Tensor]] = []

    def keep(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found.append((layer, inputs[0], output))

    vae = PlainVAE(case.model)
    for layer in vae.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            layer.register_forward_hook(keep)
    vae(torch.rand(case.batch, 1, 28, 28))
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    return [call for layer in found for call in _of_layer(*layer, dtype, variant)]


def _of_layer(
    layer: nn.Module, x: Tensor, y: Tensor, dtype: torch.dtype, variant: str
) -> Iterator[Call]:
    needs_input = x.requires_grad
    assert isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)
    x, w, grad = (t.detach().to(dtype) for t in (x, layer.weight, torch.randn_like(y)))
    if isinstance(layer, nn.Linear):
        yield _product(x, w.t())
        yield _product(grad.t(), x)
        if needs_input:
            yield _product(grad, w)
        return
    if variant == "channels-last":
        x, w, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, w, grad))
    assert not isinstance(layer.padding, str)
    transposed = isinstance(layer, nn.ConvTranspose2d)
    geometry = (
        layer.stride,
        layer.padding,
        layer.dilation,
        transposed,
        layer.output_padding,
        layer.groups,
    )
    aten = torch.ops.aten
    wanted = [needs_input, True, False]
    yield lambda: aten.convolution(x, w, None, *geometry)
    yield lambda: aten.convolution_backward(grad, x, w, None, *geometry, wanted)


def _product(a: Tensor, b: Tensor) -> Call:
    out = a.new_empty(a.shape[0], b.shape[1])
    return lambda: torch.mm(a, b, out=out)
