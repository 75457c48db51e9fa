"""z = μ + σ ε and its KL divergence, against float64, torch.distributions and stock PyTorch."""

import math
from functools import partial

import kernel_oracle as oracle
import pytest
import torch
from fastvae_kernels import functional, normal, reparameterize_kl, reparameterize_kl_packed
from fastvae_kernels.triton_kernels import launch
from kernel_cases import DTYPES, INTERPRETING, LAYOUTS, SHAPES, Draw, budget, far_apart, judge, leaf
from scipy import stats

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SEED, OFFSET = 20240229, 2**32 + 17
USES = ["z", "kl", "both"]


NAMES = ["mu", "logvar", "prior_mu", "prior_logvar"]


def stock(inputs, epsilon, grad_z, grad_kl):
    """The same in PyTorch as everybody writes it, in float32, with its autograd."""
    inputs = [leaf(x.detach().float()) for x in inputs]
    mu, logvar = inputs[:2]
    z = mu + torch.exp(0.5 * logvar) * epsilon.float().to(mu.device)
    terms = 1 + logvar - mu.pow(2) - logvar.exp()
    if inputs[2:]:
        prior_mu, prior_logvar = inputs[2:]
        square = (mu - prior_mu).pow(2)
        terms = 1 + logvar - prior_logvar - (square + logvar.exp()) / prior_logvar.exp()
    kl = -0.5 * terms.reshape(terms.shape[0], -1).sum(1)
    outputs = [(y, g) for y, g in ((z, grad_z), (kl, grad_kl)) if g is not None]
    ys, gs = zip(*outputs, strict=True)
    grads = torch.autograd.grad(ys, inputs, tuple(g.float() for g in gs), allow_unused=True)
    return {"z": z, "kl": kl, **gradients(grads)}


def fill(grads, inputs):
    """Zeros for an input that was not met."""
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, inputs, strict=True)]


def gradients(grads):
    """By name."""
    return {f"grad_{name}": grad for name, grad in zip(NAMES, grads, strict=False)}


def check(impl, device, mu, logvar, grad_z, grad_kl, *, prior=(), num_samples=None, offset=OFFSET):
    """Outputs and gradients by name; None for a gradient: that output is not used."""
    inputs = [leaf(x) for x in (mu, logvar, *prior)]
    mu, logvar = inputs[:2]
    z, kl = reparameterize_kl(
        mu,
        logvar,
        SEED,
        offset=offset,
        num_samples=num_samples,
        impl=impl,
        **dict(zip(NAMES[2:], inputs[2:], strict=False)),
    )
    shape = mu.shape if num_samples is None else (num_samples, *mu.shape)
    assert (z.shape, z.dtype, z.device) == (shape, mu.dtype, mu.device)
    assert (kl.shape, kl.dtype, kl.device) == (mu.shape[:1], torch.float32, mu.device)
    used = [(y, g) for y, g in ((z, grad_z), (kl, grad_kl)) if g is not None]
    ys, gs = zip(*used, strict=True)
    # Where z alone is used, the reference never meets the prior.
    grads = torch.autograd.grad(ys, inputs, gs, allow_unused=grad_kl is None)
    grads = fill(grads, inputs)
    for grad, x in zip(grads, inputs, strict=True):
        assert (grad.shape, grad.dtype) == (x.shape, x.dtype)
    got = {"z": z, "kl": kl, **gradients(grads)}

    epsilon = oracle.normals(tuple(mu.shape), SEED, offset, num_samples)
    on_cpu = [x.detach().cpu() for x in inputs]
    used = [None if g is None else g.cpu() for g in (grad_z, grad_kl)]
    truth = oracle.reparameterize_kl(*on_cpu[:2], epsilon, *used, tuple(on_cpu[2:]) or None)
    theirs = stock(inputs, epsilon, grad_z, grad_kl)
    theirs = {k: truth[k] if v is None else v for k, v in theirs.items()}
    judge(got, truth, theirs, impl=impl, device=device)


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


# --------------------------------------------------------------- several samples, and a prior


def case(device, shape, num_samples=None, prior=False, dtype="float32"):
    """Arguments of `check` with values of their own everywhere."""
    draw = Draw(device, DTYPES[dtype])
    mu, logvar, *given = (draw(shape) for _ in range(4 if prior else 2))
    grad_z = draw(shape if num_samples is None else (num_samples, *shape))
    return (mu, logvar, grad_z, draw(shape[:1]).float()), {
        "prior": given,
        "num_samples": num_samples,
    }


@pytest.mark.parametrize("prior", [False, True], ids=["standard", "prior"])
@pytest.mark.parametrize("num_samples", [None, 1, 2, 3, 7])
@pytest.mark.parametrize("columns", [1, 3, 4, 63, 507])
def test_samples_and_prior(impl, device, columns, num_samples, prior):
    if num_samples is None and not prior:
        pytest.skip("covered by test_shapes")
    if INTERPRETING and (columns, num_samples, prior) not in (
        *((1, 2, True), (3, 7, False), (4, 3, True), (63, 1, False), (507, 2, True)),
        (63, None, True),
    ):
        pytest.skip("slow in the interpreter")
    arguments, keywords = case(device, (3, columns), num_samples, prior)
    check(impl, device, *arguments, **keywords)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("shape", [(7,), (3, 5, 7, 2), (300, 3), (2, 5000)], ids=str)
def test_shapes_with_samples_and_prior(impl, device, shape, use):
    """Rows alone, images, more rows than a tile holds, rows that several programs share."""
    if INTERPRETING and use != "both":
        pytest.skip("slow in the interpreter; covered by use=both")
    (mu, logvar, grad_z, grad_kl), keywords = case(device, shape, 2, True)
    grad_z, grad_kl = (None if use == "kl" else grad_z), (None if use == "z" else grad_kl)
    check(impl, device, mu, logvar, grad_z, grad_kl, **keywords)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_samples", [None, 3])
def test_dtypes_with_samples_and_prior(impl, device, dtype, num_samples):
    arguments, keywords = case(device, (3, 70), num_samples, True, dtype)
    check(impl, device, *arguments, **keywords)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_float32_prior_of_low_precision_statistics(impl, device, dtype):
    arguments, keywords = case(device, (3, 70), 2, True, dtype)
    prior = [x.float() * 1.001 for x in keywords["prior"]]
    check(impl, device, *arguments, num_samples=2, prior=prior)
    mixed = [keywords["prior"][0].float(), keywords["prior"][1]]
    check(impl, device, *arguments, num_samples=2, prior=mixed)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_prior(impl, device, layout):
    draw = Draw(device)
    prior = LAYOUTS[layout](draw), LAYOUTS[layout](draw)
    shape = prior[0].shape
    arguments = draw(shape), draw(shape), draw((2, *shape)), draw(shape[:1])
    check(impl, device, *arguments, prior=prior, num_samples=2)
    check(impl, device, *arguments, prior=(prior[0], draw(shape)), num_samples=2)
    check(impl, device, *arguments, prior=(draw(shape), prior[1]), num_samples=2)


GRADIENT_LAYOUTS = {
    "one_for_all_samples": lambda make: make((1, 5, 37)).expand(3, 5, 37),
    "one_for_all_rows": lambda make: make((3, 1, 37)).expand(3, 5, 37),
    "one_number": lambda make: make((1, 1, 1)).expand(3, 5, 37),
    "reversed": lambda make: make((37, 5, 3)).permute(2, 1, 0),
    "rows_first": lambda make: make((5, 3, 37)).transpose(0, 1),
    "sliced": lambda make: make((6, 5, 75))[::2, :, 1::2],
    "unaligned": lambda make: make((3 * 5 * 37 + 1,))[1:].view(3, 5, 37),
    "images": lambda make: make((3, 5, 7, 2, 3)).permute(0, 1, 4, 2, 3),
}


@pytest.mark.parametrize("layout", GRADIENT_LAYOUTS)
def test_layouts_of_the_incoming_gradients_of_samples(impl, device, layout):
    draw = Draw(device)
    grad_z = GRADIENT_LAYOUTS[layout](draw)
    shape = grad_z.shape[1:]
    grad_kl = draw((1,)).expand(shape[0])
    check(impl, device, draw(shape), draw(shape), grad_z, grad_kl, num_samples=3)


def test_one_prior_for_all_rows_gets_the_sum_of_their_gradients(impl, device):
    draw = Draw(device)
    mu, logvar = draw((5, 63)), draw((5, 63))
    prior = leaf(draw((1, 63))), leaf(draw((1, 63)))
    expanded = dict(zip(NAMES[2:], (x.expand_as(mu) for x in prior), strict=True))
    _, kl = reparameterize_kl(mu, logvar, SEED, impl=impl, **expanded)
    grads = torch.autograd.grad(kl.sum(), prior)
    rows = [x.detach().double().cpu() for x in (mu, logvar, *expanded.values())]
    truth = oracle.reparameterize_kl(
        *rows[:2], torch.zeros(5, 63), None, torch.ones(5), tuple(rows[2:])
    )
    for name, grad in zip(NAMES[2:], grads, strict=True):
        want = truth[f"grad_{name}"].sum(0, keepdim=True)
        torch.testing.assert_close(grad.double().cpu(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 37), (5, 3, 4, 2)])
def test_an_expanded_prior_is_not_copied(shape):
    prior = torch.zeros(1, *shape[1:]).expand(shape)
    rows = launch.rows(prior)
    assert rows.shape == (5, math.prod(shape[1:]))
    assert rows.stride() == (0, 1)
    assert rows.data_ptr() == prior.data_ptr()
    samples = torch.zeros(1, *shape).expand(3, *shape)
    assert launch.rows(samples, leading=2).data_ptr() == samples.data_ptr()
    assert launch.rows(samples, leading=2).stride() == (0, math.prod(shape[1:]), 1)


def test_a_standard_normal_as_the_prior_changes_nothing(impl, device):
    draw = Draw(device)
    mu, logvar = draw((4, 63)), draw((4, 63))
    zero = torch.zeros_like(mu)
    want = reparameterize_kl(mu, logvar, SEED, impl=impl)
    got = reparameterize_kl(mu, logvar, SEED, prior_mu=zero, prior_logvar=zero, impl=impl)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-6, atol=1e-5)


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


@pytest.mark.parametrize("prior", [False, True], ids=["standard", "prior"])
@pytest.mark.parametrize("num_samples", [None, 3])
@pytest.mark.parametrize("shape", [(0,), (0, 5), (0, 3, 2), (4, 0), (2, 3, 0)])
def test_empty(impl, device, shape, num_samples, prior):
    names = NAMES if prior else NAMES[:2]
    inputs = {name: torch.zeros(shape, device=device, requires_grad=True) for name in names}
    z, kl = reparameterize_kl(seed=0, num_samples=num_samples, impl=impl, **inputs)
    assert z.shape == (shape if num_samples is None else (3, *shape))
    assert torch.equal(kl, torch.zeros(shape[:1], device=device))
    for grad in torch.autograd.grad((z, kl), inputs.values(), (torch.ones_like(z), kl + 1)):
        assert grad.shape == shape


# ------------------------------------------------------------- mu and logvar in one tensor

PACKED = {
    "rows": lambda make: make((5, 74)),
    "unaligned_halves": lambda make: make((5, 126)),
    "images": lambda make: make((3, 8, 5, 7)),
    "long_rows": lambda make: make((2, 10000)),
    "wider_than_two_halves": lambda make: make((5, 80))[:, :74],
    "transposed": lambda make: make((74, 5)).t(),
    "channels_last": lambda make: make((3, 8, 5, 7)).contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_samples", [None, 3])
@pytest.mark.parametrize("layout", PACKED)
def test_packed_is_the_same_bit_for_bit(impl, device, layout, num_samples, dtype, use):
    if INTERPRETING and (use != "both" or (num_samples and layout == "long_rows")):
        pytest.skip("slow in the interpreter")
    draw = Draw(device, DTYPES[dtype])
    statistics = PACKED[layout](draw)
    halves = [leaf(half) for half in statistics.chunk(2, dim=1)]
    want = reparameterize_kl(*halves, SEED, offset=OFFSET, num_samples=num_samples, impl=impl)
    packed = leaf(statistics)
    got = reparameterize_kl_packed(packed, SEED, offset=OFFSET, num_samples=num_samples, impl=impl)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype
        assert torch.equal(g, w)
    weights = draw(want[0].shape), draw(want[1].shape).float()
    chosen = {"z": [0], "kl": [1], "both": [0, 1]}[use]

    def grads(outputs, inputs):
        return torch.autograd.grad(
            [outputs[i] for i in chosen], inputs, [weights[i] for i in chosen]
        )

    (grad,) = grads(got, [packed])
    assert (grad.shape, grad.dtype) == (statistics.shape, statistics.dtype)
    assert torch.equal(grad, torch.cat(grads(want, halves), dim=1))


def test_packed_gradient_is_one_tensor_of_one_operator():
    """No slice, concatenation or zero-fill between the loss and the head's output."""
    statistics = leaf(Draw("cpu")((5, 74)))
    z, _ = torch.ops.fastvae.reparameterize_kl_packed(statistics, torch.tensor(1), torch.tensor(0))
    node = z.grad_fn
    assert [type(parent).__name__ for parent, _ in node.next_functions if parent] == [
        "AccumulateGrad"
    ]


@pytest.mark.parametrize("shape", [(6,), (4, 7), (4, 3, 2, 2)])
def test_statistics_that_are_no_two_halves(impl, device, shape):
    with pytest.raises(ValueError, match=r"statistics is \[B, 2D, …\]") as caught:
        reparameterize_kl_packed(torch.zeros(shape, device=device), 0, impl=impl)
    assert str(shape) in str(caught.value)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 4, 0)])
def test_packed_empty(impl, device, shape):
    statistics = torch.zeros(shape, device=device, requires_grad=True)
    z, kl = reparameterize_kl_packed(statistics, 0, impl=impl)
    assert z.shape == (shape[0], shape[1] // 2, *shape[2:])
    (grad,) = torch.autograd.grad((z.sum() + kl.sum()), statistics)
    assert grad.shape == shape


def test_gradcheck_packed():
    statistics = leaf(Draw("cpu", torch.float64)((3, 14)))
    place = torch.tensor(3), torch.tensor(0)
    op = torch.ops.fastvae.reparameterize_kl_packed
    assert torch.autograd.gradcheck(lambda s: reparameterize_kl_packed(s, 3), statistics)
    assert torch.autograd.gradcheck(lambda s: op(s, *place), statistics)
    assert torch.autograd.gradcheck(lambda s: op(s, *place, 2), statistics)


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


@pytest.mark.parametrize("dtype", DTYPES)
def test_kl_from_a_prior_is_that_of_torch_distributions(impl, device, dtype):
    draw = Draw(device, DTYPES[dtype])
    mu, logvar, prior_mu, prior_logvar = (draw((5, 123)) for _ in range(4))
    _, kl = reparameterize_kl(
        mu, logvar, SEED, prior_mu=prior_mu, prior_logvar=prior_logvar, impl=impl
    )
    q = torch.distributions.Normal(mu.double(), (0.5 * logvar.double()).exp())
    p = torch.distributions.Normal(prior_mu.double(), (0.5 * prior_logvar.double()).exp())
    want = torch.distributions.kl_divergence(q, p).sum(1)
    torch.testing.assert_close(kl.double(), want, rtol=1e-6, atol=1e-5)


def test_kl_of_the_prior_is_zero(impl, device):
    zero = torch.zeros(3, 1025, device=device)
    none = torch.zeros(3, device=device)
    assert torch.equal(reparameterize_kl(zero, zero.clone(), SEED, impl=impl)[1], none)
    for logvar in (-200.0, 0.3, 200.0):  # σ² beyond float32 in both is no matter
        mu, logvar = zero + 1.7, zero + logvar
        _, kl = reparameterize_kl(
            mu, logvar, SEED, prior_mu=mu.clone(), prior_logvar=logvar.clone(), impl=impl
        )
        assert torch.equal(kl, none)


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


@pytest.mark.parametrize("num_samples", [None, 3])
@pytest.mark.parametrize("shape", [(3, 507), (2, 20000)], ids=str)
def test_repeats_bit_for_bit(impl, device, shape, num_samples):
    if INTERPRETING and num_samples and shape[1] > 5000:
        pytest.skip("slow in the interpreter")
    (mu, logvar, *grads), keywords = case(device, shape, num_samples, num_samples is not None)

    def run():
        inputs = [leaf(x) for x in (mu, logvar, *keywords["prior"])]
        prior = dict(zip(NAMES[2:], inputs[2:], strict=False))
        outputs = reparameterize_kl(*inputs[:2], SEED, num_samples=num_samples, impl=impl, **prior)
        return *outputs, *torch.autograd.grad(outputs, inputs, grads)

    first = run()
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


def test_a_sample_does_not_depend_on_how_many_there_are(impl, device):
    draw = Draw(device)
    mu, logvar = draw((5, 63)), draw((5, 63))

    def z(num_samples):
        return reparameterize_kl(mu, logvar, SEED, offset=3, num_samples=num_samples, impl=impl)[0]

    many = z(7)
    # On a GPU the loop over one sample is other code than that over several: roundings may differ.
    tolerance = 1e-6 if device == "cuda" else 0.0
    assert torch.equal(z(3), many[:3])
    assert torch.equal(z(2), many[:2])
    for first in (z(1)[0], z(None)):
        torch.testing.assert_close(first, many[0], rtol=tolerance, atol=tolerance)
    assert all(not torch.equal(many[0], other) for other in many[1:])


def test_the_prior_does_not_change_the_draw(impl, device):
    draw = Draw(device)
    mu, logvar, prior_mu, prior_logvar = (draw((5, 63)) for _ in range(4))
    want, _ = reparameterize_kl(mu, logvar, SEED, num_samples=2, impl=impl)
    got, _ = reparameterize_kl(
        *(mu, logvar, SEED), num_samples=2, prior_mu=prior_mu, prior_logvar=prior_logvar, impl=impl
    )
    tolerance = 1e-6 if device == "cuda" else 0.0
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_samples_are_independent_draws_of_q(impl, device):
    """Their mean over S has a variance of σ²/S; each is N(0, 1) standardised."""
    num_samples, shape = 8, (16, 400)
    mu = torch.linspace(-3, 3, shape[1], device=device).expand(shape)
    logvar = torch.linspace(-4, 2, shape[0], device=device).unsqueeze(1).expand(shape)
    z, _ = reparameterize_kl(mu, logvar, 5, num_samples=num_samples, impl=impl)
    epsilon = ((z - mu) / (0.5 * logvar).exp()).double().cpu()
    assert stats.kstest(epsilon.flatten().numpy(), "norm").pvalue > 0.01
    mean = epsilon.mean(0).flatten() * math.sqrt(num_samples)
    assert stats.kstest(mean.numpy(), "norm").pvalue > 0.01
    assert abs(mean.var() - 1) < 4.5 * math.sqrt(2 / mean.numel())


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


def test_one_tensor_in_all_four_places_gets_the_whole_gradient(impl, device):
    x = leaf(Draw(device)((4, 63)))
    z, kl = reparameterize_kl(x, x, SEED, prior_mu=x, prior_logvar=x, impl=impl)
    (whole,) = torch.autograd.grad(z.sum() + kl.sum(), x)
    # The divergence of a Gaussian from itself is 0 wherever it moves; z alone is left.
    z, _ = reparameterize_kl(x, x, SEED, impl=impl)
    (want,) = torch.autograd.grad(z.sum(), x)
    torch.testing.assert_close(whole, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("wanted", NAMES)
def test_a_gradient_for_one_input_alone(impl, device, wanted):
    draw = Draw(device)
    inputs = {name: draw((4, 63)) for name in (NAMES if "prior" in wanted else NAMES[:2])}
    every = {name: leaf(x) for name, x in inputs.items()}
    outputs = reparameterize_kl(seed=SEED, impl=impl, **every)
    grads = torch.autograd.grad([y.sum() for y in outputs], every.values())
    want = dict(zip(inputs, grads, strict=True))[wanted]
    inputs[wanted] = leaf(inputs[wanted])
    z, kl = reparameterize_kl(seed=SEED, impl=impl, **inputs)
    loss = kl.sum() + (z.sum() if z.requires_grad else 0.0)
    (got,) = torch.autograd.grad(loss, inputs[wanted])
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
    assert torch.autograd.gradcheck(lambda m, v: op(m, v, *scalars, 2), inputs)


def test_gradcheck_with_samples_and_a_prior():
    draw = Draw("cpu", torch.float64)
    inputs = tuple(leaf(draw((3, 7))) for _ in range(4))

    def public(m, v, prior_mu, prior_logvar):
        return reparameterize_kl(
            m, v, 3, num_samples=2, prior_mu=prior_mu, prior_logvar=prior_logvar
        )

    assert torch.autograd.gradcheck(public, inputs)
    assert torch.autograd.gradgradcheck(public, inputs)
    assert all(y.dtype == torch.float64 for y in public(*inputs))
    scalars = (torch.tensor(3), torch.tensor(0))
    op = torch.ops.fastvae.reparameterize_kl_prior
    assert torch.autograd.gradcheck(lambda *four: op(*four, *scalars), inputs)
    assert torch.autograd.gradcheck(lambda *four: op(*four, *scalars, 2), inputs)


# ----------------------------------------------------------------------------------- extremes

LOGVARS = [-200.0, -100.0, -87.0, -30.0, 0.0, 30.0, 80.0, 88.0, 100.0, 170.0, 200.0]


def operator(mu, logvar, seed, prior_mu=None, prior_logvar=None):
    """Forward and backward as operators: the kernels, or on a CPU the references of both."""
    place = [torch.tensor(s, device=mu.device) for s in (seed, 0)]
    if prior_mu is None:
        return torch.ops.fastvae.reparameterize_kl(mu, logvar, *place)
    return torch.ops.fastvae.reparameterize_kl_prior(mu, logvar, prior_mu, prior_logvar, *place)


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


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("logvar", [-100.0, 0.0, 100.0])
@pytest.mark.parametrize("prior_logvar", [-200.0, -170.0, -86.0, 0.0, 100.0, 200.0])
def test_extreme_prior(impl, device, prior_logvar, logvar, use):
    """As above; the first column has no error, which 1/σₚ = ∞ must not make one."""
    if INTERPRETING and use != "both":
        pytest.skip("slow in the interpreter; covered by use=both")
    mu = torch.tensor([[0.5, 1.0, -2.0], [0.5, -0.5, 3.0]], device=device)
    prior_mu = torch.tensor([[0.5, 0.5, 0.0], [0.5, 2.0, 3.0]], device=device)
    v = torch.tensor([[logvar, 0.0, logvar], [logvar, -1.0, 1.0]], device=device)
    prior_v = torch.tensor([[prior_logvar, 0.0, prior_logvar], [0.0, 1.0, 0.0]], device=device)
    grad_z = torch.tensor([[1.0, 2.0, -1.0], [0.0, 1.0, 0.5]], device=device)
    grad_kl = torch.tensor([0.5, -1.0], device=device)
    used_z, used_kl = (None if use == "kl" else grad_z), (None if use == "z" else grad_kl)
    on_cpu = [None if x is None else x.cpu() for x in (mu, v, used_z, used_kl, prior_mu, prior_v)]
    epsilon = oracle.normals((2, 3), SEED)
    truth = oracle.reparameterize_kl(*on_cpu[:2], epsilon, *on_cpu[2:4], tuple(on_cpu[4:]))
    for function in (partial(reparameterize_kl, impl=impl), operator):
        inputs = [leaf(x) for x in (mu, v, prior_mu, prior_v)]
        prior = dict(zip(NAMES[2:], inputs[2:], strict=True))
        z, kl = function(*inputs[:2], SEED, **prior)
        loss = sum((y * g).sum() for y, g in ((z, used_z), (kl, used_kl)) if g is not None)
        grads = torch.autograd.grad(loss, inputs, allow_unused=use == "z")
        grads = fill(grads, inputs)
        for name, value in {"z": z, "kl": kl, **gradients(grads)}.items():
            value, want = value.detach().cpu(), truth[name].float()
            if use == "both" and name == "grad_logvar":
                value = torch.where(want.isinf() & value.isnan(), want, value)
            rtol = 4e-7 * max(8, abs(logvar) + abs(prior_logvar))
            torch.testing.assert_close(value, want, rtol=rtol, atol=1e-6, msg=name)


def test_a_row_without_weight_gets_no_gradient_from_an_infinite_kl(device):
    """The operator knows that 0 · ∞ is 0 there; autograd through the plain formula does not."""
    mu = leaf(torch.ones(2, 3, device=device))
    logvar = leaf(torch.tensor([[100.0, 0, 0], [0, 1, 2]], device=device))
    z, kl = operator(mu, logvar, SEED)
    assert kl[0].isinf()
    _, grad_logvar = torch.autograd.grad(z.sum() + kl[1], (mu, logvar))
    assert grad_logvar.isfinite().all()


def test_a_row_without_weight_gets_no_gradient_from_an_impossible_prior(impl, device):
    function = operator if impl == "torch" else partial(reparameterize_kl, impl=impl)
    mu, logvar, prior_mu = (leaf(torch.full((2, 3), n, device=device)) for n in (1.0, 1.0, 0.0))
    prior_logvar = leaf(torch.tensor([[-200.0, 0, 0], [0, 1, 2]], device=device))
    z, kl = function(mu, logvar, SEED, prior_mu=prior_mu, prior_logvar=prior_logvar)
    assert kl[0].isinf()
    grads = torch.autograd.grad(z.sum() + kl[1], (mu, logvar, prior_mu, prior_logvar))
    assert all(grad.isfinite().all() for grad in grads)


def test_samples_further_apart_than_an_int32_can_count(impl, device):
    grad_z = far_apart(impl, device, torch.float16).t()  # samples of one row with one column
    draw = Draw(device, torch.float16)
    grad_kl = draw((1,)).float()
    check(impl, device, draw((1,)), draw((1,)), grad_z, grad_kl, num_samples=3)


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
        ((X, X, 0), {"num_samples": 0}, ValueError, "num_samples must be at least 1, got 0"),
        ((X, X, 0), {"num_samples": -3}, ValueError, "num_samples must be at least 1, got -3"),
        (
            (X, X, 0),
            {"num_samples": 2.0},
            TypeError,
            "num_samples must be an int or None, got float",
        ),
        ((X, X, 0), {"num_samples": True}, TypeError, "num_samples must be an int or None, got bo"),
        (
            (X, X, 0),
            {"prior_mu": X},
            ValueError,
            "prior_mu is given without prior_logvar; a prior needs both, or neither",
        ),
        (
            (X, X, 0),
            {"prior_logvar": X},
            ValueError,
            "prior_logvar is given without prior_mu; a prior needs both, or neither",
        ),
        (
            (X, X, 0),
            {"prior_mu": X[:1], "prior_logvar": X},
            ValueError,
            r"prior_mu has shape \(1, 3\), mu \(2, 3\); they must be the same",
        ),
        (
            (X, X, 0),
            {"prior_mu": X, "prior_logvar": X[:, :2]},
            ValueError,
            r"prior_logvar has shape \(2, 2\), mu \(2, 3\); they must be the same",
        ),
        (
            (X, X, 0),
            {"prior_mu": X.long(), "prior_logvar": X},
            TypeError,
            r"prior_mu must be float32, bfloat16, float16 or float64, got torch\.int64",
        ),
        (
            (X, X, 0),
            {"prior_mu": X, "prior_logvar": 0.0},
            TypeError,
            "prior_logvar must be a tensor, got float",
        ),
        (
            (X, X, 0),
            {"prior_mu": X, "prior_logvar": X.to("meta")},
            ValueError,
            "prior_logvar is on meta, mu on cpu",
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
