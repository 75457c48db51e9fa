"""float32 products: as fast as they can be, as exact as they must be."""

from collections.abc import Iterator

import pytest
import torch

from fastvae import precision
from fastvae.precision import float32_precision, use_matmul_precision

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.parametrize("wanted", ["highest", "high", "medium"])
def test_what_is_asked_for_is_set(wanted: str) -> None:
    assert use_matmul_precision(wanted, CPU) == wanted  # type: ignore[arg-type]
    assert torch.get_float32_matmul_precision() == wanted


@pytest.mark.parametrize(
    ("wanted", "convolutions"), [("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")]
)
def test_convolutions_follow_the_products(wanted: str, convolutions: str) -> None:
    torch.backends.cudnn.allow_tf32 = wanted == "highest"  # the contrary of what must become of it
    gpu = torch.device("cuda")
    use_matmul_precision(wanted, gpu)  # type: ignore[arg-type]
    assert torch.backends.cudnn.allow_tf32 == (convolutions == "tf32")
    for device, expected in ((gpu, convolutions), (CPU, "ieee")):
        assert float32_precision(device) == {
            "matmul_precision": wanted,
            "convolution_precision": expected,
        }


@pytest.mark.parametrize("wanted", ["auto", "highest"])
def test_convolutions_on_a_cpu_are_exact(wanted: str) -> None:
    use_matmul_precision(wanted, CPU)  # type: ignore[arg-type]
    x, w = torch.randn(4, 16, 12, 12), torch.randn(32, 16, 3, 3)
    truth = torch.conv2d(x.double(), w.double())
    error = (torch.conv2d(x, w) - truth).square().mean().sqrt() / truth.square().mean().sqrt()
    assert error < 2e-6


def test_auto_on_a_cpu_is_exact() -> None:
    assert use_matmul_precision("auto", CPU) == torch.get_float32_matmul_precision()
    a, b = torch.randn(300, 700), torch.randn(700, 200)
    truth = a.double() @ b.double()
    error = (a @ b - truth).square().mean().sqrt() / truth.square().mean().sqrt()
    assert error < 2e-6


@pytest.mark.parametrize(("error", "chosen"), [(4e-7, "medium"), (2.4e-3, "highest")])
def test_auto_on_a_cpu_tries_a_product(
    error: float, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2.4e-3 is what bfloat16 factors leave."""
    tried = []

    def product() -> float:
        tried.append(torch.get_float32_matmul_precision())
        return error

    monkeypatch.setattr(precision, "_error_of_a_product", product)
    assert use_matmul_precision("auto", CPU) == chosen == torch.get_float32_matmul_precision()
    assert tried == ["medium"]


def test_the_error_of_a_product_tells_bfloat16_from_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.set_float32_matmul_precision("highest")
    assert precision._error_of_a_product() < precision._AS_GOOD_AS_FLOAT32 / 3
    draw = torch.randn
    rounded = lambda *shape, generator: draw(*shape, generator=generator).bfloat16()  # noqa: E731
    monkeypatch.setattr(torch, "randn", rounded)
    assert precision._error_of_a_product() > 100 * precision._AS_GOOD_AS_FLOAT32


def test_auto_on_a_gpu_does_not_round() -> None:
    assert use_matmul_precision("auto", torch.device("cuda")) == "highest"
