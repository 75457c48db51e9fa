"""z = μ + σ ε and its KL divergence, against float64, torch.distributions and stock PyTorch."""

import math
from functools import partial

import kernel_oracle as oracle
import pytest
import torch
from fastvae_kernels import functional, normal, reparameterize_kl
from kernel_cases import DTYPES, INTERPRETING, LAYOUTS, SHAPES, Draw, budget, far_apart, judge, leaf
from scipy import stats

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SEED, OFFSET = 20240229, 2**32 + 17
USES = ["z", "kl", "both"]


def stock(mu, logvar, epsilon, grad_z, grad_kl):
    """The same in PyTorch as everybody writes it, in float32, with its autograd."""
    mu, logvar = leaf(mu.detach().float()), leaf(logvar.detach().float())
    z = mu + torch.exp(0.5 * logvar) * epsilon.float().to(mu.device)
    terms = 1 + logvar - mu.pow(2) - logvar.exp()
    kl = -0.5 * terms.reshape(terms.shape[0], -1).sum(1)
    outputs = [(y, g) for y, g in ((z, grad_z), (kl, grad_kl)) if g is not None]
    ys, gs = zip(*outputs, strict=True)
    grad_mu, grad_logvar = torch.autograd.grad(
        ys, (mu, logvar), tuple(g.float() for g in gs), allow_unused=True
    )
    return {"z": z, "kl": kl, "grad_mu": grad_mu, "grad_logvar": grad_logvar}


def check(impl, device, mu, logvar, grad_z, grad_kl, seed=SEED, offset=OFFSET):
    """Outputs and gradients by name; None for a gradient: that output is not used."""
    mu, logvar = leaf(mu), leaf(logvar)
    z, kl = reparameterize_kl(mu, logvar, seed, offset=offset, impl=impl)
    assert (z.shape, z.dtype, z.device) == (mu.shape, mu.dtype, mu.device)
    assert (kl.shape, kl.dtype, kl.device) == (mu.shape[:1], torch.float32, mu.device)
    used = [(y, g) for y, g in ((z, grad_z), (kl, grad_kl)) if g is not None]
    ys, gs = zip(*used, strict=True)
    grad_mu, grad_logvar = torch.autograd.grad(ys, (mu, logvar), gs)
    for grad, x in ((grad_mu, mu), (grad_logvar, logvar)):
        assert (grad.shape, grad.dtype) == (x.shape, x.dtype)
    got = {"z": z, "kl": kl, "grad_mu": grad_mu, "grad_logvar": grad_logvar}

    epsilon = oracle.normals(tuple(mu.shape), seed, offset)
    on_cpu = [None if x is None else x.detach().cpu() for x in (mu, logvar, grad_z, grad_kl)]
    truth = oracle.reparameterize_kl(on_cpu[0], on_cpu[1], epsilon, *on_cpu[2:])
    judge(got, truth, stock(mu, logvar, epsilon, grad_z, grad_kl), impl=impl, device=device)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(impl, device, shape, dtype, use):
    if INTERPRETING and use != "both" and math.prod(shape) > 5000:
        pytest.skip("slow in the interpreter; covered by use=both")
    draw = Draw(device, DTYPES[dtype])
    grad_z = draw(shape) if use != "kl" else None
    grad_kl = draw(shape[:1]).float() if use != "z" else None
    check(impl, device, draw(shape), draw(shape), grad_z, grad_kl)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(impl, device, layout, dtype):
    draw = Draw(device, DTYPES[dtype])
    mu, logvar = LAYOUTS[layout](draw), LAYOUTS[layout](draw)
    check(impl, device, mu, logvar, draw(mu.shape), draw(mu.shape[:1]).float())
    if dtype == "float32":
        plain = draw(mu.shape)
        check(impl, device, mu, plain, draw(mu.shape), draw(mu.shape[:1]))
        check(impl, device, plain, logvar, draw(mu.shape), draw(mu.shape[:1]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_incoming_gradients(impl, device, layout):
    draw = Draw(device)
    grad_z = LAYOUTS[layout](draw)
    shape = grad_z.shape
    for grad_kl in (draw(shape[:1]), draw((1,)).expand(shape[0]), draw((2 * shape[0],))[::2]):
        check(impl, device, draw(shape), draw(shape), grad_z, grad_kl)


def test_sums_of_the_outputs(impl, device):
    """`sum().backward()` sends ones with strides of 0."""
    draw = Draw(device)
    mu, logvar = leaf(draw((4, 63))), leaf(draw((4, 63)))
    z, kl = reparameterize_kl(mu, logvar, SEED, impl=impl)
    (z.sum() + kl.sum()).backward()
    torch.testing.assert_close(mu.grad, 1 + mu.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("mu_dtype", "logvar_dtype"), [("bfloat16", "float32"), ("float32", "float16")]
)
def test_mixed_dtypes(impl, device, mu_dtype, logvar_dtype):
    mu = Draw(device, DTYPES[mu_dtype])((3, 70))
    logvar = Draw(device, DTYPES[logvar_dtype], seed=1)((3, 70))
    draw = Draw(device, DTYPES[mu_dtype], seed=2)
    check(impl, device, mu, logvar, draw((3, 70)), draw((3,)).float())


@pytest.mark.parametrize("shape", [(0,), (0, 5), (0, 3, 2), (4, 0), (2, 3, 0)])
def test_empty(impl, device, shape):
    mu, logvar = (torch.zeros(shape, device=device, requires_grad=True) for _ in range(2))
    z, kl = reparameterize_kl(mu, logvar, 0, impl=impl)
    assert z.shape == shape
    assert torch.equal(kl, torch.zeros(shape[:1], device=device))
    for grad in torch.autograd.grad((z, kl), (mu, logvar), (torch.ones_like(z), kl + 1)):
        assert grad.shape == shape


# ------------------------------------------------------------------------- against libraries


@pytest.mark.parametrize("dtype", DTYPES)
def test_kl_is_that_of_torch_distributions(impl, device, dtype):
    draw = Draw(device, DTYPES[dtype])
    mu, logvar = draw((5, 123)), draw((5, 123))
    _, kl = reparameterize_kl(mu, logvar, SEED, impl=impl)
    q = torch.distributions.Normal(mu.double(), (0.5 * logvar.double()).exp())
    p = torch.distributions.Normal(torch.zeros_like(q.loc), torch.ones_like(q.loc))
    want = torch.distributions.kl_divergence(q, p).sum(1)
    torch.testing.assert_close(kl.double(), want, rtol=1e-6, atol=1e-5)


def test_kl_of_the_prior_is_zero(impl, device):
    zero = torch.zeros(3, 1025, device=device)
    assert torch.equal(
        reparameterize_kl(zero, zero.clone(), SEED, impl=impl)[1], torch.zeros(3, device=device)
    )


def test_z_follows_q(impl, device):
    """Standardised, z is N(0, 1): Kolmogorov–Smirnov and the first two moments."""
    shape = (64, 1500)
    mu = torch.linspace(-3, 3, shape[1], device=device).expand(shape)
    logvar = torch.linspace(-4, 2, shape[0], device=device).unsqueeze(1).expand(shape)
    z, _ = reparameterize_kl(mu, logvar, 5, impl=impl)
    epsilon = ((z - mu) / (0.5 * logvar).exp()).double().cpu().flatten()
    assert stats.kstest(epsilon.numpy(), "norm").pvalue > 0.01
    assert abs(epsilon.mean()) < 4.5 / math.sqrt(epsilon.numel())
    assert abs(epsilon.var() - 1) < 4.5 * math.sqrt(2 / epsilon.numel())


# --------------------------------------------------------------------------------- one noise


def test_backward_draws_the_noise_of_the_forward_pass(impl, device):
    """∂z/∂logvar = ½ (z − μ) for one and the same ε; likewise by finite differences."""
    draw = Draw(device)
    mu, logvar = draw((6, 1300)), leaf(draw((6, 1300)))
    z, _ = reparameterize_kl(mu, logvar, SEED, offset=OFFSET, impl=impl)
    (grad,) = torch.autograd.grad(z.sum(), logvar)
    torch.testing.assert_close(grad, 0.5 * (z.detach() - mu), rtol=1e-5, atol=1e-6)

    h = 2.0**-6
    with torch.no_grad():
        up, _ = reparameterize_kl(mu, logvar + h, SEED, offset=OFFSET, impl=impl)
        down, _ = reparameterize_kl(mu, logvar - h, SEED, offset=OFFSET, impl=impl)
    # The third derivative leaves h²/24 of the slope, rounding 2^-24 · |z| / h.
    torch.testing.assert_close((up - down) / (2 * h), grad, rtol=1e-4, atol=2e-4)


def test_seed_and_offset_as_int_and_as_tensor(impl, device):
    draw = Draw(device)
    mu, logvar = draw((4, 63)), draw((4, 63))
    want = reparameterize_kl(mu, logvar, -(2**50), offset=2**40, impl=impl)
    seed, offset = torch.tensor(-(2**50), device=device), torch.tensor([[2**40]], device=device)
    got = reparameterize_kl(mu, logvar, seed, offset=offset, impl=impl)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    for other in (
        reparameterize_kl(mu, logvar, 7, offset=offset, impl=impl),
        reparameterize_kl(mu, logvar, seed, impl=impl),
    ):
        assert not torch.equal(other[0], want[0])
        assert torch.equal(other[1], want[1])


def test_z_uses_the_public_noise(impl, device):
    draw = Draw(device)
    mu, logvar = draw((4, 63)), draw((4, 63))
    z, _ = reparameterize_kl(mu, logvar, SEED, offset=3, impl=impl)
    epsilon = normal((4, 63), SEED, offset=3, device=device)
    torch.testing.assert_close(z, mu + (0.5 * logvar).exp() * epsilon, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 507), (2, 20000)], ids=str)
def test_repeats_bit_for_bit(impl, device, shape):
    draw = Draw(device)
    mu, logvar, grad_z, grad_kl = draw(shape), draw(shape), draw(shape), draw(shape[:1])

    def run():
        m, v = leaf(mu), leaf(logvar)
        outputs = reparameterize_kl(m, v, SEED, impl=impl)
        return *outputs, *torch.autograd.grad(outputs, (m, v), (grad_z, grad_kl))

    first = run()
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


# -------------------------------------------------------------------------- autograd's corners


def test_one_tensor_in_both_places_gets_the_whole_gradient(impl, device):
    values = Draw(device)((4, 63))
    x = leaf(values)
    z, kl = reparameterize_kl(x, x, SEED, impl=impl)
    (whole,) = torch.autograd.grad(z.sum() + kl.sum(), x)

    mu, logvar = leaf(values), leaf(values)
    z, kl = reparameterize_kl(mu, logvar, SEED, impl=impl)
    parts = torch.autograd.grad(z.sum() + kl.sum(), (mu, logvar))
    torch.testing.assert_close(whole, parts[0] + parts[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("wanted", ["mu", "logvar"])
def test_a_gradient_for_one_input_alone(impl, device, wanted):
    draw = Draw(device)
    inputs = {"mu": draw((4, 63)), "logvar": draw((4, 63))}
    both = [leaf(x) for x in inputs.values()]
    outputs = reparameterize_kl(*both, SEED, impl=impl)
    grads = torch.autograd.grad([y.sum() for y in outputs], both)
    want = dict(zip(inputs, grads, strict=True))[wanted]
    inputs[wanted] = leaf(inputs[wanted])
    outputs = reparameterize_kl(*inputs.values(), SEED, impl=impl)
    (got,) = torch.autograd.grad([y.sum() for y in outputs], inputs[wanted])
    assert torch.equal(got, want)


def test_no_gradient_is_recorded_where_none_is_wanted(impl, device):
    draw = Draw(device)
    z, kl = reparameterize_kl(draw((4, 63)), draw((4, 63)), SEED, impl=impl)
    assert not z.requires_grad
    assert not kl.requires_grad
    with torch.inference_mode():
        z2, _ = reparameterize_kl(*(Draw(device)((4, 63)) for _ in range(2)), SEED, impl=impl)
    assert z2.shape == z.shape


def test_gradcheck():
    draw = Draw("cpu", torch.float64)
    mu, logvar = leaf(draw((3, 7))), leaf(draw((3, 7)))
    assert torch.autograd.gradcheck(lambda m, v: reparameterize_kl(m, v, 3), (mu, logvar))
    z, kl = reparameterize_kl(mu, logvar, 3)
    assert z.dtype == kl.dtype == torch.float64


def test_gradcheck_of_the_operator():
    draw = Draw("cpu", torch.float64)
    inputs = (leaf(draw((3, 7))), leaf(draw((3, 7))))
    scalars = (torch.tensor(3), torch.tensor(0))
    op = torch.ops.fastvae.reparameterize_kl
    assert torch.autograd.gradcheck(lambda m, v: op(m, v, *scalars), inputs)


# ----------------------------------------------------------------------------------- extremes

LOGVARS = [-200.0, -100.0, -87.0, -30.0, 0.0, 30.0, 80.0, 88.0, 100.0, 170.0, 200.0]


def operator(mu, logvar, seed):
    """Forward and backward as operators: the kernels, or on a CPU the references of both."""
    seed, offset = (torch.tensor(s, device=mu.device) for s in (seed, 0))
    return torch.ops.fastvae.reparameterize_kl(mu, logvar, seed, offset)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("logvar", LOGVARS)
def test_extreme_logvar(impl, device, logvar, use):
    """∞ only where float32 cannot hold the truth, a NaN only where two infinities of different
    sign meet, and no element spoils another."""
    mu = torch.tensor([[0.0, 1.0, -2.0], [0.5, -0.5, 3.0]], device=device)
    v = torch.tensor([[logvar, 0.0, logvar], [0.0, -1.0, 1.0]], device=device)
    grad_z = torch.tensor([[1.0, 2.0, -1.0], [0.0, 1.0, 0.5]], device=device)
    grad_kl = torch.tensor([0.5, -1.0], device=device)
    used_z, used_kl = (None if use == "kl" else grad_z), (None if use == "z" else grad_kl)
    epsilon = oracle.normals((2, 3), SEED)
    truth = oracle.reparameterize_kl(
        mu.cpu(), v.cpu(), epsilon, *(None if g is None else g.cpu() for g in (used_z, used_kl))
    )
    for function in (partial(reparameterize_kl, impl=impl), operator):
        m, lv = leaf(mu), leaf(v)
        z, kl = function(m, lv, SEED)
        loss = sum((y * g).sum() for y, g in ((z, used_z), (kl, used_kl)) if g is not None)
        grads = torch.autograd.grad(loss, (m, lv))
        got = dict(zip(("z", "kl", "grad_mu", "grad_logvar"), (z, kl, *grads), strict=True))
        for name, value in got.items():
            value, want = value.detach().cpu(), truth[name].float()
            if use == "both" and name == "grad_logvar":
                value = torch.where(want.isinf() & value.isnan(), want, value)
            # exp is good to some parts in 2^24 of its exponent.
            rtol = 4e-7 * max(8, abs(logvar))
            torch.testing.assert_close(value, want, rtol=rtol, atol=1e-6, msg=name)


def test_a_row_without_weight_gets_no_gradient_from_an_infinite_kl(device):
    """The operator knows that 0 · ∞ is 0 there; autograd through the plain formula does not."""
    mu = leaf(torch.ones(2, 3, device=device))
    logvar = leaf(torch.tensor([[100.0, 0, 0], [0, 1, 2]], device=device))
    z, kl = operator(mu, logvar, SEED)
    assert kl[0].isinf()
    _, grad_logvar = torch.autograd.grad(z.sum() + kl[1], (mu, logvar))
    assert grad_logvar.isfinite().all()


def test_elements_further_apart_than_an_int32_can_count(impl, device):
    mu = far_apart(impl, device, torch.float16)
    draw = Draw(device, torch.float16)
    check(impl, device, mu, draw((1, 3)), draw((1, 3)), draw((1,)).float())
    check(impl, device, draw((1, 3)), mu, draw((1, 3)), draw((1,)).float())
    check(impl, device, draw((1, 3)), draw((1, 3)), mu.detach(), draw((1,)).float())


# ------------------------------------------------------------------------------------- errors

X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("arguments", "keywords", "exception", "message"),
    [
        ((1.0, X, 0), {}, TypeError, "mu must be a tensor, got float"),
        ((X, None, 0), {}, TypeError, "logvar must be a tensor, got NoneType"),
        (
            (X.long(), X, 0),
            {},
            TypeError,
            r"mu must be float32, bfloat16, float16 or float64, got torch\.int64",
        ),
        (
            (X, X.to(torch.complex64), 0),
            {},
            TypeError,
            r"logvar must be float32, bfloat16, float16 or float64, got torch\.complex64",
        ),
        (
            (X, X[:, :2], 0),
            {},
            ValueError,
            r"logvar has shape \(2, 2\), mu \(2, 3\); they must be the same",
        ),
        ((X[0, 0], X[0, 0], 0), {}, ValueError, "mu needs a batch dimension, got a 0-d tensor"),
        ((X, X.to("meta"), 0), {}, ValueError, "logvar is on meta, mu on cpu"),
        ((X, X, "0"), {}, TypeError, "seed must be an int or an int64 tensor, got str"),
        ((X, X, True), {}, TypeError, "seed must be an int or an int64 tensor, got bool"),
        ((X, X, 2**63), {}, ValueError, r"seed must lie in \[-2\^63, 2\^63\), got 92233720368547"),
        ((X, X, -(2**63) - 1), {}, ValueError, r"seed must lie in \[-2\^63, 2\^63\), got -9223372"),
        (
            (X, X, torch.tensor(0.0)),
            {},
            TypeError,
            r"seed as a tensor holds one int64, got torch\.float32 \(\)",
        ),
        (
            (X, X, torch.zeros(2, dtype=torch.int64)),
            {},
            TypeError,
            r"seed as a tensor holds one int64, got torch\.int64 \(2,\)",
        ),
        (
            (X, X, torch.tensor(0, device="meta")),
            {},
            ValueError,
            "seed is on meta, the other tensors on cpu",
        ),
        ((X, X, 0), {"offset": 0.5}, TypeError, "offset must be an int or an int64 tensor, got fl"),
        ((X, X, 0), {"offset": 2**64}, ValueError, r"offset must lie in \[-2\^63, 2\^63\)"),
        (
            (X, X, 0),
            {"offset": torch.tensor(0, dtype=torch.int32)},
            TypeError,
            r"offset as a tensor holds one int64, got torch\.int32 \(\)",
        ),
        (
            (X, X, 0),
            {"impl": "cuda"},
            ValueError,
            """impl is "auto", "triton" or "torch", got 'cuda'""",
        ),
    ],
)
def test_errors(arguments, keywords, exception, message):
    with pytest.raises(exception, match=message):
        reparameterize_kl(*arguments, **keywords)


def test_triton_needs_triton(monkeypatch):
    monkeypatch.setattr(functional, "_HAS_TRITON", False)
    with pytest.raises(ValueError, match='impl="triton" needs the package triton; install it, or'):
        reparameterize_kl(X, X, 0, impl="triton")
    z, _ = reparameterize_kl(X, X, 0)
    assert z.shape == X.shape


def test_triton_does_not_take_float64(monkeypatch):
    monkeypatch.setattr(functional, "_HAS_TRITON", True)
    with pytest.raises(
        TypeError, match=r"takes float32, bfloat16 or float16, got .*float64.*; use"
    ):
        reparameterize_kl(X.double(), X.double(), 0, impl="triton")


def test_triton_needs_a_gpu_or_the_interpreter(monkeypatch):
    monkeypatch.setattr(functional, "_HAS_TRITON", True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        ValueError, match='impl="triton" needs tensors on a GPU, got cpu; use impl='
    ):
        reparameterize_kl(X, X, 0, impl="triton")


@pytest.mark.parametrize("impl_name", ["auto", "torch"])
def test_float64_runs_in_float64(impl_name):
    draw = Draw("cpu", torch.float64)
    mu, logvar = draw((3, 50)), draw((3, 50))
    _, kl = reparameterize_kl(mu, logvar, 0, impl=impl_name)
    want = oracle.reparameterize_kl(mu, logvar, torch.zeros(3, 50), None, torch.ones(3))["kl"]
    torch.testing.assert_close(kl, want, rtol=1e-14, atol=1e-13)


def test_the_budget_is_honest():
    """A budget that let one wrong bfloat16 pass would hide anything."""
    assert budget(torch.float32, "triton", "cpu") < 1e-5
    assert budget(torch.bfloat16, "triton", "cuda") < 1e-5
