"""−log Bernoulli from logits, against float64, torch.distributions and stock PyTorch."""

from functools import partial

import kernel_oracle as oracle
import pytest
import torch
import torch.nn.functional as F
from fastvae_kernels import bernoulli_nll, functional
from kernel_cases import DTYPES, LAYOUTS, SHAPES, Draw, far_apart, judge, leaf

pytestmark = pytest.mark.usefixtures("poisoned_memory")

TARGETS = {
    "uint8": torch.uint8,
    "bool": torch.bool,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def stock(logits, target, grad_nll):
    """binary_cross_entropy_with_logits in float32, with its autograd."""
    x = leaf(logits.detach().float())
    t = target.float() / 255 if target.dtype == torch.uint8 else target.float()
    terms = F.binary_cross_entropy_with_logits(x, t, reduction="none")
    nll = terms.reshape(terms.shape[0], -1).sum(1)
    (grad_logits,) = torch.autograd.grad(nll, x, grad_nll.float())
    return {"nll": nll, "grad_logits": grad_logits}


def check(impl, device, logits, target, grad_nll):
    logits = leaf(logits)
    nll = bernoulli_nll(logits, target, impl=impl)
    assert (nll.shape, nll.dtype, nll.device) == (logits.shape[:1], torch.float32, logits.device)
    (grad_logits,) = torch.autograd.grad(nll, logits, grad_nll)
    assert (grad_logits.shape, grad_logits.dtype) == (logits.shape, logits.dtype)
    truth = oracle.bernoulli_nll(logits.detach().cpu(), target.cpu(), grad_nll.cpu())
    got = {"nll": nll, "grad_logits": grad_logits}
    judge(got, truth, stock(logits, target, grad_nll), impl=impl, device=device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(impl, device, shape, dtype):
    draw = Draw(device, DTYPES[dtype])
    target = draw.target(shape, torch.uint8)
    check(impl, device, 3 * draw(shape), target, draw(shape[:1]).float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_targets(impl, device, target, dtype):
    draw = Draw(device, DTYPES[dtype])
    shape = (5, 123)
    target = draw.target(shape, TARGETS[target])
    check(impl, device, 3 * draw(shape), target, draw(shape[:1]).float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(impl, device, layout, dtype):
    draw = Draw(device, DTYPES[dtype])
    logits = LAYOUTS[layout](draw)
    grad_nll = draw(logits.shape[:1]).float()
    for target_dtype in (torch.uint8, torch.bool, torch.float32):
        target = LAYOUTS[layout](partial(draw.target, dtype=target_dtype))
        check(impl, device, logits, target, grad_nll)
        if dtype == "float32":
            check(impl, device, draw(logits.shape), target, grad_nll)
            plain = draw.target(tuple(logits.shape), target_dtype)
            check(impl, device, logits, plain, grad_nll)


def test_layouts_of_the_incoming_gradient(impl, device):
    draw = Draw(device)
    target = draw.target((5, 63), torch.uint8)
    for grad_nll in (draw((1,)).expand(5), draw((10,))[::2], draw((6,))[1:]):
        check(impl, device, draw((5, 63)), target, grad_nll)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (0, 3, 2), (4, 0), (2, 3, 0)])
def test_empty(impl, device, shape):
    logits = torch.zeros(shape, device=device, requires_grad=True)
    nll = bernoulli_nll(logits, torch.zeros(shape, dtype=torch.uint8, device=device), impl=impl)
    assert torch.equal(nll, torch.zeros(shape[:1], device=device))
    (grad,) = torch.autograd.grad(nll.sum(), logits)
    assert grad.shape == shape


def test_elements_further_apart_than_an_int32_can_count(impl, device):
    logits = far_apart(impl, device, torch.float16)
    target = far_apart(impl, device, torch.uint8)
    draw = Draw(device)
    check(impl, device, logits, draw.target((1, 3), torch.uint8), draw((1,)))
    check(impl, device, draw((1, 3)), target, draw((1,)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_density_is_that_of_torch_distributions(impl, device, dtype):
    draw = Draw(device, DTYPES[dtype])
    logits, target = 3 * draw((5, 123)), draw.target((5, 123), torch.bool)
    nll = bernoulli_nll(logits, target, impl=impl)
    p = torch.distributions.Bernoulli(logits=logits.double())
    want = -p.log_prob(target.double()).sum(1)
    torch.testing.assert_close(nll.double(), want, rtol=2e-6, atol=1e-5)


def test_the_density_is_normalised(impl, device):
    """Over all 2^6 images of six pixels the probabilities add up to 1."""
    images = torch.cartesian_prod(*[torch.tensor([False, True])] * 6).to(device)
    logits = Draw(device)((1, 6)).expand(64, 6)
    total = torch.exp(-bernoulli_nll(logits, images, impl=impl)).sum()
    assert total.item() == pytest.approx(1.0, abs=1e-5)


def test_bytes_are_255ths(impl, device):
    """All 256 of them; 255 is exactly 1."""
    byte = torch.arange(256, dtype=torch.uint8, device=device)
    logits = torch.zeros(256, 1, device=device, requires_grad=True)
    nll = bernoulli_nll(logits, byte.view(256, 1), impl=impl)
    (grad,) = torch.autograd.grad(nll.sum(), logits)
    # The gradient at logit 0 is ½ − x.
    want = 0.5 - byte.double() / 255
    torch.testing.assert_close(grad.view(-1).double(), want, rtol=0, atol=2.0**-23)
    assert grad[255].item() == -0.5


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_logits(impl, device, dtype):
    """±100, ±88, 0 and the largest number: finite, right, with the derivative ½ − x at 0."""
    largest = torch.finfo(DTYPES[dtype]).max
    values = [0.0, -0.0, 1e-4, -1e-4, 17.0, -17.0, 88.0, -88.0, 100.0, -100.0, largest, -largest]
    x = torch.tensor(values, device=device, dtype=DTYPES[dtype])
    for byte in (0, 128, 255):
        logits, target = (
            leaf(x.view(-1, 1)),
            torch.full_like(x, byte, dtype=torch.uint8).view(-1, 1),
        )
        grad_nll = torch.ones_like(x).float()
        check(impl, device, logits, target, grad_nll)
        nll = bernoulli_nll(logits, target, impl=impl)
        assert nll.isfinite().all()
        # Each element alone.
        truth = oracle.bernoulli_nll(logits.detach().cpu(), target.cpu(), grad_nll.cpu())
        torch.testing.assert_close(nll.double().cpu(), truth["nll"], rtol=1e-6, atol=2.0**-23)


def test_a_small_nll_keeps_its_digits(impl, device):
    """Of a pixel that is nearly certain: log(1 + e^−20) is 2e-9, which 1 + e^−20 in float32 has
    forgotten. An exponential errs by its exponent's rounding."""
    x = torch.linspace(-80, 0, 4001, device=device).view(-1, 1)
    nll = bernoulli_nll(x, torch.zeros_like(x), impl=impl).double()
    want = torch.log1p(x.double().exp()).view(-1)
    bound = 2.0**-23 * (2 + 2 * x.double().abs().view(-1))
    assert ((nll - want).abs() <= bound * want).all()


@pytest.mark.parametrize("shape", [(3, 507), (2, 20000)], ids=str)
def test_repeats_bit_for_bit(impl, device, shape):
    draw = Draw(device)
    x, target, grad_nll = draw(shape), draw.target(shape, torch.uint8), draw(shape[:1])

    def run():
        logits = leaf(x)
        nll = bernoulli_nll(logits, target, impl=impl)
        return nll, *torch.autograd.grad(nll, logits, grad_nll)

    first = run()
    assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


def test_one_tensor_in_both_places(impl, device):
    """The target is data also where it is the logits."""
    x = Draw(device).uniform((4, 63))
    torch.testing.assert_close(
        bernoulli_nll(x, x, impl=impl), bernoulli_nll(x, x.clone(), impl=impl), rtol=0, atol=0
    )


def operator(logits, target):
    return torch.ops.fastvae.bernoulli_nll(logits, target)


@pytest.mark.parametrize("function", [bernoulli_nll, operator])
def test_gradcheck(function):
    draw = Draw("cpu", torch.float64)
    logits, target = leaf(draw((3, 7))), draw.uniform((3, 7))
    assert torch.autograd.gradcheck(lambda x: function(x, target), (logits,))
    assert function(logits, target).dtype == torch.float64


def test_float64_runs_in_float64():
    draw = Draw("cpu", torch.float64)
    logits, target = draw((3, 50)), draw.target((3, 50), torch.uint8)
    want = oracle.bernoulli_nll(logits, target, torch.ones(3))["nll"]
    torch.testing.assert_close(bernoulli_nll(logits, target), want, rtol=1e-13, atol=1e-13)


def test_the_operator_agrees_with_autograd_through_the_reference(device):
    draw = Draw(device)
    logits, target = draw((4, 63)), draw.target((4, 63), torch.uint8)
    results = []
    for function in (operator, partial(bernoulli_nll, impl="torch")):
        x = leaf(logits)
        nll = function(x, target)
        results.append((nll, *torch.autograd.grad(nll.square().sum(), x)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------- errors

X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("arguments", "keywords", "exception", "message"),
    [
        (([0.0], X), {}, TypeError, "logits must be a tensor, got list"),
        (
            (X.bool(), X),
            {},
            TypeError,
            r"logits must be float32, bfloat16, float16 or float64, got torch\.bool",
        ),
        ((X, 1.0), {}, TypeError, "target must be a tensor, got float"),
        ((X, X.long()), {}, TypeError, r"target must be uint8, bool or floating, got torch\.int64"),
        (
            (X, X.to(torch.complex64)),
            {},
            TypeError,
            r"target must be uint8, bool or floating, got torch\.complex64",
        ),
        (
            (X, X[0]),
            {},
            ValueError,
            r"target has shape \(3,\), logits \(2, 3\); they must be the same",
        ),
        ((X[0, 0], X[0, 0]), {}, ValueError, "logits needs a batch dimension, got a 0-d tensor"),
        ((X, X.to("meta")), {}, ValueError, "target is on meta, logits on cpu"),
        (
            (X, X.clone().requires_grad_()),
            {},
            ValueError,
            r"target is data and gets no gradient here; pass target\.detach\(\)",
        ),
        (
            (X, X),
            {"impl": None},
            ValueError,
            """impl is "auto", "triton" or "torch", got None""",
        ),
    ],
)
def test_errors(arguments, keywords, exception, message):
    with pytest.raises(exception, match=message):
        bernoulli_nll(*arguments, **keywords)


def test_triton_has_conditions(monkeypatch):
    monkeypatch.setattr(functional, "_HAS_TRITON", True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        TypeError, match=r"takes float32, bfloat16 or float16, got .*float64.*; use"
    ):
        bernoulli_nll(X.double(), X, impl="triton")
    with pytest.raises(
        ValueError, match='impl="triton" needs tensors on a GPU, got cpu; use impl='
    ):
        bernoulli_nll(X, X, impl="triton")
    monkeypatch.setattr(functional, "_HAS_TRITON", False)
    with pytest.raises(ValueError, match='impl="triton" needs the package triton; install it, or'):
        bernoulli_nll(X, X, impl="triton")
