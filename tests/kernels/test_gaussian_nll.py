"""−log N(x; mean, exp(logvar)), against float64, torch.distributions and stock PyTorch."""

import math
from functools import partial

import kernel_oracle as oracle
import pytest
import torch
from fastvae_kernels import functional, gaussian_nll
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
# One variance for each element; one learned variance; a number.
VARIANCES = ["elementwise", "learned", "number"]


def stock(mean, target, logvar, grad_nll):
    """torch.distributions.Normal in float32, with its autograd."""
    m, v = leaf(mean.detach().float()), leaf(logvar.detach().float())
    t = target.float() / 255 if target.dtype == torch.uint8 else target.float()
    log_prob = torch.distributions.Normal(m, (0.5 * v).exp(), validate_args=False).log_prob(t)
    nll = -log_prob.reshape(m.shape[0], -1).sum(1)
    grad_mean, grad_logvar = torch.autograd.grad(nll, (m, v), grad_nll.float())
    return {"nll": nll, "grad_mean": grad_mean, "grad_logvar": grad_logvar}


def check(impl, device, mean, target, logvar, grad_nll):
    """`logvar`: a tensor, or a number that gets no gradient."""
    mean = leaf(mean)
    if isinstance(logvar, torch.Tensor):
        logvar = leaf(logvar)
    nll = gaussian_nll(mean, target, logvar, impl=impl)
    assert (nll.shape, nll.dtype, nll.device) == (mean.shape[:1], torch.float32, mean.device)
    got = {"nll": nll}
    if isinstance(logvar, torch.Tensor):
        grads = torch.autograd.grad(nll, (mean, logvar), grad_nll)
        assert (grads[1].shape, grads[1].dtype) == (logvar.shape, logvar.dtype)
        got["grad_logvar"] = grads[1]
    else:
        grads = torch.autograd.grad(nll, mean, grad_nll)
        logvar = torch.tensor(logvar, device=device)
    assert (grads[0].shape, grads[0].dtype) == (mean.shape, mean.dtype)
    got["grad_mean"] = grads[0]
    on_cpu = [x.detach().cpu() for x in (mean, target, logvar, grad_nll)]
    truth = oracle.gaussian_nll(*on_cpu)
    judge(got, truth, stock(mean, target, logvar, grad_nll), impl=impl, device=device)


def variance(kind, draw, shape):
    if kind == "elementwise":
        return draw(shape)
    return -1.3 if kind == "number" else draw(())


@pytest.mark.parametrize("kind", VARIANCES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(impl, device, shape, dtype, kind):
    draw = Draw(device, DTYPES[dtype])
    target, logvar = draw.target(shape, torch.uint8), variance(kind, draw, shape)
    check(impl, device, draw(shape), target, logvar, draw(shape[:1]).float())


@pytest.mark.parametrize("kind", VARIANCES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_targets(impl, device, target, dtype, kind):
    draw = Draw(device, DTYPES[dtype])
    shape = (5, 123)
    target, logvar = draw.target(shape, TARGETS[target]), variance(kind, draw, shape)
    check(impl, device, draw(shape), target, logvar, draw(shape[:1]).float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(impl, device, layout, dtype):
    draw = Draw(device, DTYPES[dtype])
    mean, logvar = LAYOUTS[layout](draw), LAYOUTS[layout](draw)
    shape = tuple(mean.shape)
    grad_nll = draw(shape[:1]).float()
    for target_dtype in (torch.uint8, torch.float32):
        target = LAYOUTS[layout](partial(draw.target, dtype=target_dtype))
        check(impl, device, mean, target, logvar, grad_nll)
        if dtype == "float32":
            plain = draw.target(shape, target_dtype)
            check(impl, device, draw(shape), target, draw(shape), grad_nll)
            check(impl, device, mean, plain, draw(()), grad_nll)
            check(impl, device, draw(shape), plain, logvar, grad_nll)


@pytest.mark.parametrize("kind", VARIANCES)
def test_layouts_of_the_incoming_gradient(impl, device, kind):
    draw = Draw(device)
    target, logvar = draw.target((5, 63), torch.uint8), variance(kind, draw, (5, 63))
    for grad_nll in (draw((1,)).expand(5), draw((10,))[::2], draw((6,))[1:]):
        check(impl, device, draw((5, 63)), target, logvar, grad_nll)


@pytest.mark.parametrize(
    ("mean_dtype", "logvar_dtype"), [("bfloat16", "float32"), ("float32", "float16")]
)
@pytest.mark.parametrize("kind", ["elementwise", "learned"])
def test_mixed_dtypes(impl, device, mean_dtype, logvar_dtype, kind):
    mean = Draw(device, DTYPES[mean_dtype])((3, 70))
    logvar = variance(kind, Draw(device, DTYPES[logvar_dtype], seed=1), (3, 70))
    draw = Draw(device, seed=2)
    check(impl, device, mean, draw.target((3, 70), torch.uint8), logvar, draw((3,)))


@pytest.mark.parametrize("kind", VARIANCES)
@pytest.mark.parametrize("shape", [(0,), (0, 5), (0, 3, 2), (4, 0), (2, 3, 0)])
def test_empty(impl, device, shape, kind):
    draw = Draw(device)
    mean = leaf(draw(shape))
    logvar = variance(kind, draw, shape)
    logvar = leaf(logvar) if isinstance(logvar, torch.Tensor) else logvar
    nll = gaussian_nll(mean, torch.zeros_like(mean), logvar, impl=impl)
    assert torch.equal(nll, torch.zeros(shape[:1], device=device))
    (grad,) = torch.autograd.grad(nll.sum(), mean, retain_graph=True)
    assert grad.shape == shape
    if kind != "number":
        (grad,) = torch.autograd.grad(nll.sum(), logvar)
        assert torch.equal(grad, torch.zeros_like(logvar))


def test_elements_further_apart_than_an_int32_can_count(impl, device):
    values, target = (far_apart(impl, device, t) for t in (torch.float16, torch.uint8))
    draw = Draw(device)
    plain = draw.target((1, 3), torch.uint8)
    check(impl, device, values, plain, draw((1, 3)), draw((1,)))
    check(impl, device, draw((1, 3)), target, draw((1, 3)), draw((1,)))
    check(impl, device, draw((1, 3)), plain, values, draw((1,)))


# ------------------------------------------------------------------------- against libraries


@pytest.mark.parametrize("kind", VARIANCES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_density_is_that_of_torch_distributions(impl, device, dtype, kind):
    draw = Draw(device, DTYPES[dtype])
    mean, target, logvar = draw((5, 123)), draw((5, 123)), variance(kind, draw, (5, 123))
    nll = gaussian_nll(mean, target, logvar, impl=impl)
    scale = torch.as_tensor(logvar, device=device).double().mul(0.5).exp()
    want = -torch.distributions.Normal(mean.double(), scale).log_prob(target.double()).sum(1)
    torch.testing.assert_close(nll.double(), want, rtol=2e-6, atol=1e-5)


def test_the_density_is_normalised(impl, device):
    """The constant ½ log 2π is there: on a grid the density integrates to 1."""
    x = torch.linspace(-12, 12, 4001, device=device)
    nll = gaussian_nll(torch.full_like(x, 0.5), x, 0.8, impl=impl)
    assert torch.trapezoid(torch.exp(-nll.double()), x.double()).item() == pytest.approx(
        1, abs=1e-6
    )


def test_bytes_are_255ths(impl, device):
    byte = torch.arange(256, dtype=torch.uint8, device=device).view(256, 1)
    mean = torch.zeros(256, 1, device=device, requires_grad=True)
    nll = gaussian_nll(mean, byte, 0.0, impl=impl)
    (grad,) = torch.autograd.grad(nll.sum(), mean)
    torch.testing.assert_close(grad.double(), -byte.double() / 255, rtol=2.0**-22, atol=0)
    assert grad[255].item() == -1.0


# ----------------------------------------------------------------------- one learned variance


@pytest.mark.parametrize("logvar", [-8.0, -4.6, -1.0, 0.0, 3.0, 10.0])
@pytest.mark.parametrize("shape", [(5, 123), (2, 20000)], ids=str)
def test_gradient_of_one_variance_at_all_sizes(impl, device, shape, logvar):
    """It is found from nll, where D·logvar cancels: no worse than summing D terms."""
    draw = Draw(device)
    target = draw.target(shape, torch.uint8)
    mean = oracle.pixels(target).float() + math.exp(logvar / 2) * draw(shape)
    check(impl, device, mean, target, torch.tensor(logvar, device=device), draw.uniform(shape[:1]))


def test_one_variance_learns_the_mean_squared_error(impl, device):
    """At σ² = mean squared error the gradient vanishes (Rybkin et al. 2021, σ-VAE)."""
    draw = Draw(device)
    mean, target = draw((8, 507)), draw.uniform((8, 507))
    mse = (mean.double() - target.double()).square().mean()
    logvar = leaf(mse.log().float())
    (grad,) = torch.autograd.grad(gaussian_nll(mean, target, logvar, impl=impl).sum(), logvar)
    assert abs(grad.item()) < 1e-6 * mean.numel()


@pytest.mark.parametrize("wanted", ["mean", "logvar"])
@pytest.mark.parametrize("kind", ["elementwise", "learned"])
def test_a_gradient_for_one_input_alone(impl, device, kind, wanted):
    draw = Draw(device)
    target = draw.target((4, 63), torch.uint8)
    inputs = {"mean": draw((4, 63)), "logvar": variance(kind, draw, (4, 63))}
    both = {name: leaf(x) for name, x in inputs.items()}
    nll = gaussian_nll(both["mean"], target, both["logvar"], impl=impl)
    (want,) = torch.autograd.grad(nll.sum(), both[wanted])
    inputs[wanted] = leaf(inputs[wanted])
    nll = gaussian_nll(inputs["mean"], target, inputs["logvar"], impl=impl)
    (got,) = torch.autograd.grad(nll.sum(), inputs[wanted])
    assert torch.equal(got, want)


def test_one_tensor_in_two_places_gets_the_whole_gradient(impl, device):
    draw = Draw(device)
    values, target = draw((4, 63)), draw.target((4, 63), torch.uint8)
    x = leaf(values)
    (whole,) = torch.autograd.grad(gaussian_nll(x, target, x, impl=impl).sum(), x)
    mean, logvar = leaf(values), leaf(values)
    nll = gaussian_nll(mean, target, logvar, impl=impl)
    parts = torch.autograd.grad(nll.sum(), (mean, logvar))
    torch.testing.assert_close(whole, parts[0] + parts[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", VARIANCES)
@pytest.mark.parametrize("shape", [(3, 507), (2, 20000)], ids=str)
def test_repeats_bit_for_bit(impl, device, shape, kind):
    draw = Draw(device)
    mean, target, logvar = draw(shape), draw.target(shape, torch.uint8), variance(kind, draw, shape)
    grad_nll = draw(shape[:1])

    def run():
        wanted = [leaf(x) for x in (mean, logvar) if isinstance(x, torch.Tensor)]
        nll = gaussian_nll(wanted[0], target, wanted[1] if wanted[1:] else logvar, impl=impl)
        return nll, *torch.autograd.grad(nll, wanted, grad_nll)

    first = run()
    assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


# ----------------------------------------------------------------------------------- extremes


def operator(mean, target, logvar):
    """Forward and backward as operators: the kernels, or on a CPU the references of both."""
    return torch.ops.fastvae.gaussian_nll(mean, target, logvar)


@pytest.mark.parametrize("kind", ["elementwise", "learned"])
@pytest.mark.parametrize("logvar", [-170, -100, -87, -30, 0, 30, 87, 100, 200])
def test_extreme_logvar(impl, device, logvar, kind):
    """∞ only where float32 cannot hold the truth, no NaN, and no row spoils another."""
    mean = torch.tensor([[0.0, 1e-3, 0.5], [1.0, 0.0, 0.5]], device=device)
    target = torch.tensor([[0.0, 0.0, 0.5], [1.0, 0.0, 0.5]], device=device)
    v = torch.tensor(float(logvar), device=device)
    v = v.expand(2, 3).contiguous() if kind == "elementwise" else v
    grad_nll = torch.tensor([1.0, -0.5], device=device)
    for function in (partial(gaussian_nll, impl=impl), operator):
        check_extremes(function, mean, target, v, grad_nll)


def test_no_error_is_no_error_for_any_variance(impl, device):
    """Also where 1/σ overflows: the kernels do not multiply 0 by ∞. The reference, which would
    pay for it with a third of its speed on a CPU, holds down to log σ² = −177."""
    x = torch.tensor([[0.0, 0.5, 1.0]], device=device)
    v = torch.full_like(x, -200.0 if impl == "triton" else -170.0)
    grad_nll = torch.ones(1, device=device)
    check_extremes(partial(gaussian_nll, impl=impl), x, x.clone(), v, grad_nll)


def check_extremes(function, mean, target, logvar, grad_nll):
    m, v = leaf(mean), leaf(logvar)
    nll = function(m, target, v)
    grads = torch.autograd.grad(nll, (m, v), grad_nll)
    truth = oracle.gaussian_nll(*(x.cpu() for x in (mean, target, logvar, grad_nll)))
    # exp is good to some parts in 2^24 of its exponent, which one variance's gradient inherits.
    tolerance = 4e-7 * max(8, logvar.abs().max().item())
    for name, value in zip(("nll", "grad_mean", "grad_logvar"), (nll, *grads), strict=True):
        value, want = value.detach().cpu(), truth[name].float()
        atol = tolerance if logvar.dim() == 0 else 1e-6
        torch.testing.assert_close(value, want, rtol=tolerance, atol=atol, msg=name)


# ---------------------------------------------------------------------------------- references


@pytest.mark.parametrize("kind", ["elementwise", "learned"])
@pytest.mark.parametrize("function", [gaussian_nll, operator])
def test_gradcheck(function, kind):
    draw = Draw("cpu", torch.float64)
    target = draw.uniform((3, 7))
    inputs = (leaf(draw((3, 7))), leaf(variance(kind, draw, (3, 7))))
    assert torch.autograd.gradcheck(lambda m, v: function(m, target, v), inputs)
    assert function(inputs[0], target, inputs[1]).dtype == torch.float64


@pytest.mark.parametrize("kind", VARIANCES)
def test_float64_runs_in_float64(kind):
    draw = Draw("cpu", torch.float64)
    mean, target = draw((3, 50)), draw.target((3, 50), torch.uint8)
    logvar = variance(kind, draw, (3, 50))
    as_tensor = torch.as_tensor(logvar, dtype=torch.float64)
    want = oracle.gaussian_nll(mean, target, as_tensor, torch.ones(3))["nll"]
    torch.testing.assert_close(gaussian_nll(mean, target, logvar), want, rtol=1e-13, atol=1e-12)


@pytest.mark.parametrize("kind", ["elementwise", "learned"])
def test_the_operator_agrees_with_autograd_through_the_reference(device, kind):
    draw = Draw(device)
    mean, target = draw((4, 63)), draw.target((4, 63), torch.uint8)
    logvar = variance(kind, draw, (4, 63))
    results = []
    for function in (operator, partial(gaussian_nll, impl="torch")):
        m, v = leaf(mean), leaf(logvar)
        nll = function(m, target, v)
        results.append((nll, *torch.autograd.grad(nll.square().sum(), (m, v))))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------- errors

X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("arguments", "keywords", "exception", "message"),
    [
        ((None, X, 0.0), {}, TypeError, "mean must be a tensor, got NoneType"),
        (
            (X.int(), X, 0.0),
            {},
            TypeError,
            r"mean must be float32, bfloat16, float16 or float64, got torch\.int32",
        ),
        ((X, [0.0], 0.0), {}, TypeError, "target must be a tensor, got list"),
        (
            (X, X.short(), 0.0),
            {},
            TypeError,
            r"target must be uint8, bool or floating, got torch\.int16",
        ),
        (
            (X, X[:1], 0.0),
            {},
            ValueError,
            r"target has shape \(1, 3\), mean \(2, 3\); they must be the same",
        ),
        ((X[0, 0], X[0, 0], 0.0), {}, ValueError, "mean needs a batch dimension, got a 0-d tensor"),
        ((X, X.to("meta"), 0.0), {}, ValueError, "target is on meta, mean on cpu"),
        (
            (X, X.clone().requires_grad_(), 0.0),
            {},
            ValueError,
            r"target is data and gets no gradient here; pass target\.detach\(\)",
        ),
        (
            (X, X, X.long()),
            {},
            TypeError,
            r"logvar must be float32, bfloat16, float16 or float64, got torch\.int64",
        ),
        (
            (X, X, X[0]),
            {},
            ValueError,
            r"logvar has shape \(3,\), mean \(2, 3\); they must be the same",
        ),
        ((X, X, X.to("meta")), {}, ValueError, "logvar is on meta, mean on cpu"),
        ((X, X, X[0, 0].to("meta")), {}, ValueError, "logvar is on meta, mean on cpu"),
        (
            (X, X, 0.0),
            {"impl": "Triton"},
            ValueError,
            """impl is "auto", "triton" or "torch", got 'Triton'""",
        ),
    ],
)
def test_errors(arguments, keywords, exception, message):
    with pytest.raises(exception, match=message):
        gaussian_nll(*arguments, **keywords)


def test_triton_has_conditions(monkeypatch):
    monkeypatch.setattr(functional, "_HAS_TRITON", True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        TypeError, match=r"takes float32, bfloat16 or float16, got .*float64.*; use"
    ):
        gaussian_nll(X.double(), X, 0.0, impl="triton")
    with pytest.raises(
        ValueError, match='impl="triton" needs tensors on a GPU, got cpu; use impl='
    ):
        gaussian_nll(X, X, 0.0, impl="triton")
    monkeypatch.setattr(functional, "_HAS_TRITON", False)
    with pytest.raises(ValueError, match='impl="triton" needs the package triton; install it, or'):
        gaussian_nll(X, X, 0.0, impl="triton")
