"""The functions and the operators under torch.compile, opcheck, autocast and fake tensors."""

from functools import partial

import pytest
import torch
from fastvae_kernels import (
    bernoulli_nll,
    functional,
    gaussian_nll,
    normal,
    reparameterize_kl,
    uniform,
)
from functorch.compile import aot_function, nop
from kernel_cases import Draw, leaf, needs_no_interpreter
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

pytestmark = needs_no_interpreter


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tensors(device, batch=6, columns=130, dtype=torch.float32):
    """mu, logvar, logits, mean, pixel_logvar, one_logvar, prior_mu, prior_logvar want gradients;
    the rest is data. The prior is one for all rows."""
    draw = Draw(device, dtype)
    shape = (batch, columns)
    wanted = [leaf(draw(shape)) for _ in range(5)] + [leaf(draw(()))]
    wanted += [leaf(draw((1, columns))) for _ in range(2)]
    data = [
        draw.target(shape, torch.uint8),
        torch.tensor(2**40 + 1, device=device),
        torch.tensor(2**33, device=device),
    ]
    return wanted, data


def public(wanted, data):
    """Every public function once: noise, KL, and both likelihoods in all their forms."""
    mu, logvar, logits, mean, pixel_logvar, one_logvar, *prior = wanted
    target, seed, offset = data
    z, kl = reparameterize_kl(mu, logvar, seed, offset=offset)
    prior_mu, prior_logvar = (x.expand_as(mu) for x in prior)
    zs, kl_from_prior = reparameterize_kl(
        *(mu, logvar, seed),
        offset=offset,
        num_samples=3,
        prior_mu=prior_mu,
        prior_logvar=prior_logvar,
    )
    bernoulli = bernoulli_nll(logits, target)
    elementwise = gaussian_nll(mean, target, pixel_logvar)
    learned = gaussian_nll(z, target, one_logvar)
    number = gaussian_nll(mean, target, -1.0)
    noise = normal(z.shape, seed, offset=offset, device=z.device) + uniform(
        z.shape, seed, offset=offset, device=z.device
    )
    return z, kl, zs, kl_from_prior, bernoulli, elementwise, learned, number, noise


def operators(wanted, data):
    mu, logvar, logits, mean, pixel_logvar, one_logvar, *prior = wanted
    target, seed, offset = data
    ops = torch.ops.fastvae
    z, kl = ops.reparameterize_kl(mu, logvar, seed, offset)
    prior = [x.expand_as(mu) for x in prior]
    return (
        z,
        kl,
        *ops.reparameterize_kl_prior(mu, logvar, *prior, seed, offset, 3),
        ops.bernoulli_nll(logits, target),
        ops.gaussian_nll(mean, target, pixel_logvar),
        ops.gaussian_nll(z, target, one_logvar),
    )


def results(function, wanted, data):
    """Outputs and gradients; each output is weighted by other numbers."""
    outputs = function(wanted, data)
    used = [y for y in outputs if y.requires_grad]
    weights = [torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape) for y in used]
    return *outputs, *torch.autograd.grad(
        used, wanted, [w.to(y.dtype) for w, y in zip(weights, used, strict=True)]
    )


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
@pytest.mark.parametrize("function", [public, operators])
def test_compiled_equals_eager(device, function, backend):
    """Forward and backward in one graph each, within what reordering a float32 sum may cost."""
    wanted, data = tensors(device)
    want = results(function, wanted, data)
    got = results(torch.compile(function, fullgraph=True, backend=backend), wanted, data)
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype
        torch.testing.assert_close(g, w, rtol=1e-5, atol=2e-5)


def test_traced_without_dynamo(monkeypatch):
    """AOT autograd alone meets the function itself: what it kept is no buffer to write to, and
    each backward pass is right."""
    monkeypatch.setattr(functional, "_use_triton", lambda *_: True)
    draw = Draw("cpu")
    logits, target = leaf(draw((6, 130))), draw.target((6, 130), torch.uint8)
    function = partial(bernoulli_nll, row_weight=0.5)
    got = aot_function(function, fw_compiler=nop)(logits, target)
    want = bernoulli_nll(logits, target, impl="torch")
    for weight in (0.0, 2.0, 0.5):
        grad_nll = torch.full_like(want, weight)
        g, w = (torch.autograd.grad(y, logits, grad_nll, retain_graph=True)[0] for y in (got, want))
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6)


def test_a_row_weight_adds_nothing_to_a_compiled_graph():
    """A buffer kept for a compiled backward pass would be copied before it is written to. A fake
    GPU, so that the operators are taken."""
    from torch._dynamo.testing import EagerAndRecordGraphs

    backend = EagerAndRecordGraphs()

    def function(x, target):
        one = bernoulli_nll(x, target, row_weight=0.5)
        return one + gaussian_nll(x, target, 0.0, row_weight=0.5)

    with FakeTensorMode():
        x = torch.empty(2, 130, device="cuda", requires_grad=True)
        target = torch.empty(2, 130, device="cuda", dtype=torch.uint8)
        torch.compile(function, fullgraph=True, backend=backend)(x, target)
    (graph,) = backend.graphs
    called = {str(node.target) for node in graph.graph.nodes if "fastvae" in str(node.target)}
    assert called == {"fastvae.bernoulli_nll.default", "fastvae.gaussian_nll.default"}


def test_compiled_under_autocast_equals_eager(device):
    """bfloat16 activations from a layer inside the graph; the terms stay float32."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(20, 32, device=device)
    x = torch.randn(6, 20, device=device)
    target = (torch.rand(6, 16, device=device) * 255).to(torch.uint8)
    seed = torch.tensor(5, device=device)

    def step(x, target, seed):
        with torch.autocast(x.device.type, torch.bfloat16):
            mu, logvar = layer(x).chunk(2, 1)
            z, kl = reparameterize_kl(mu, logvar, seed)
            return z, kl, bernoulli_nll(mu, target), gaussian_nll(mu, target, logvar)

    def run(function):
        layer.zero_grad()
        outputs = function(x, target, seed)
        sum(y.float().sum() for y in outputs).backward()
        return *outputs, layer.weight.grad.clone()

    want, got = run(step), run(torch.compile(step, fullgraph=True))
    assert want[0].dtype == got[0].dtype == torch.bfloat16
    for g, w in zip(got[1:], want[1:], strict=True):
        assert g.dtype == w.dtype == torch.float32
        # The layer rounds to bfloat16 at other places once it is compiled.
        torch.testing.assert_close(g, w, rtol=2e-2, atol=2e-2 * w.abs().max().item())
    torch.testing.assert_close(got[0], want[0], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("function", [public, operators])
def test_new_values_of_seed_and_offset_compile_nothing(device, function):
    counter = CompileCounter()
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    wanted, (target, *_) = tensors(device)
    for seed, offset in ((0, 0), (1, 100), (-1, 2**40), (2**62, 2**62)):
        places = [torch.tensor(v, device=device) for v in (seed, offset)]
        got = compiled(wanted, [target, *places])[0]
        want = reparameterize_kl(*wanted[:2], places[0], offset=places[1])[0]
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert counter.frame_count == 1


@pytest.mark.parametrize("function", [pytest.param(public, marks=pytest.mark.slow), operators])
def test_a_dynamic_graph_serves_all_batch_sizes(device, function):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
    counts = []
    for batch in (6, 9, 17):
        wanted, data = tensors(device, batch=batch)
        got, want = results(compiled, wanted, data), results(function, wanted, data)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)
        counts.append(counter.frame_count)
    # The first call may compile more than once (torch 2.11 does), the next ones nothing.
    assert counts == [counts[0]] * 3


@pytest.mark.parametrize("function", [reparameterize_kl, torch.ops.fastvae.reparameterize_kl])
def test_a_dynamic_graph_serves_all_numbers_of_samples(device, function):
    """Forward and backward; the number of samples is a size like another."""
    counter = CompileCounterWithBackend("aot_eager")
    public = function is reparameterize_kl

    def run(mu, logvar, seed, num_samples):
        if public:
            return function(mu, logvar, seed, num_samples=num_samples)
        return function(mu, logvar, seed, seed * 0, num_samples)

    compiled = torch.compile(run, fullgraph=True, backend=counter, dynamic=True)
    (mu, logvar, *_), (_, seed, _) = tensors(device)
    counts = []
    for num_samples in (5, 3, 8):
        grad_z = Draw(device, seed=num_samples)((num_samples, *mu.shape))
        both = []
        for f in (compiled, run):
            z, kl = f(mu, logvar, seed, num_samples)
            grads = torch.autograd.grad((z, kl), (mu, logvar), (grad_z, torch.ones_like(kl)))
            both.append((z, kl, *grads))
        for g, w in zip(*both, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)
        counts.append(counter.frame_count)
    assert counts == [counts[0]] * 3


# ------------------------------------------------------------------------------------ opcheck


def _detached(tensors):
    return tuple(x.detach() for x in tensors)


def opcheck_cases():
    """Each operator's name and functions that make arguments: plain, strided, low precision."""

    def both(d, shape=(3, 5), dtype=torch.float32):
        draw = Draw(d, dtype)
        return leaf(draw(shape)), leaf(draw(shape))

    def scalars(d):
        return torch.tensor(2**40, device=d), torch.tensor(2**33, device=d)

    def strided(d):
        return leaf(Draw(d)((5, 3)).t()), leaf(Draw(d)((3, 10)).chunk(2, 1)[1])

    def expanded(d):
        return tuple(leaf(Draw(d)((1, 5)).expand(3, 5)) for _ in range(2))

    def ones(d, n=3):
        return torch.ones(1, device=d).expand(n)

    def byte(d, shape=(3, 5)):
        return Draw(d).target(shape, torch.uint8)

    def rows(d, n):
        return torch.tensor([6, 0, 3], device=d)[:n]

    bf16 = torch.bfloat16
    image = (2, 3, 4, 5)
    return {
        "reparameterize_kl": [
            lambda d: (*both(d), *scalars(d)),
            lambda d: (*both(d, image, bf16), *scalars(d)),
            lambda d: (*strided(d), *scalars(d)),
            lambda d: (*both(d, (0, 5)), *scalars(d)),
            lambda d: (*both(d), *scalars(d), 1),
            lambda d: (*both(d, image, bf16), *scalars(d), 3),
            lambda d: (*strided(d), *scalars(d), 2),
        ],
        "reparameterize_kl_prior": [
            lambda d: (*both(d), *both(d), *scalars(d)),
            lambda d: (*both(d, image, bf16), *both(d, image), *scalars(d), 3),
            lambda d: (*strided(d), *expanded(d), *scalars(d), 2),
            lambda d: (*both(d, (0, 5)), *both(d, (0, 5)), *scalars(d), 2),
        ],
        "reparameterize_kl_prior_backward": [
            lambda d: (
                *(x.detach() for x in (*both(d), *strided(d))),
                *scalars(d),
                Draw(d)((3, 5)),
                ones(d),
            ),
            lambda d: (
                *(x.detach() for x in (*both(d, image, bf16), *both(d, image))),
                *scalars(d),
                Draw(d, bf16)((1, *image)).expand(3, *image),
                ones(d, 2),
            ),
            lambda d: (
                *(x.detach() for x in (*strided(d), *expanded(d))),
                *scalars(d),
                Draw(d)((5, 3, 2)).permute(2, 1, 0),
                ones(d),
            ),
        ],
        "reparameterize_kl_backward": [
            lambda d: (
                *(x.detach() for x in both(d)),
                *scalars(d),
                Draw(d)((1, 3, 5)).expand(4, 3, 5),
                ones(d),
            ),
            lambda d: (*(x.detach() for x in both(d)), *scalars(d), Draw(d)((3, 5)), ones(d)),
            lambda d: (
                *(x.detach() for x in both(d, image, bf16)),
                *scalars(d),
                Draw(d, bf16)(image),
                ones(d, 2),
            ),
            lambda d: (
                *(x.detach() for x in strided(d)),
                *scalars(d),
                strided(d)[0].detach(),
                ones(d),
            ),
        ],
        "reparameterize_kl_packed": [
            lambda d: (both(d, (3, 6))[0], *scalars(d)),
            lambda d: (both(d, (2, 4, 3, 2), bf16)[0], *scalars(d), 3),
        ],
        "reparameterize_kl_packed_backward": [
            lambda d: (both(d, (3, 6))[0].detach(), *scalars(d), Draw(d)((3, 3)), ones(d)),
            lambda d: (
                both(d, (2, 4, 3, 2), bf16)[0].detach(),
                *scalars(d),
                Draw(d, bf16)((5, 2, 2, 3, 2)),
                ones(d, 2),
            ),
        ],
        "bernoulli_nll": [
            lambda d: (both(d)[0], byte(d, (7, 5)), rows(d, 3)),
            lambda d: (both(d)[0], byte(d)),
            lambda d: (both(d, image, bf16)[0], byte(d, image) > 99),
            lambda d: (strided(d)[0], strided(d)[1].detach().sigmoid()),
        ],
        "bernoulli_nll_backward": [
            lambda d: (both(d)[0].detach(), byte(d, (7, 5)), ones(d), rows(d, 3)),
            lambda d: (both(d)[0].detach(), byte(d), ones(d)),
            lambda d: (both(d, image, bf16)[0].detach(), byte(d, image), ones(d, 2)),
            lambda d: (strided(d)[0].detach(), byte(d), ones(d)),
        ],
        "bernoulli_nll_and_grad": [
            lambda d: (both(d)[0].detach(), byte(d), 0.25),
            lambda d: (
                *_detached(both(d, image, bf16)[:1]),
                byte(d, (7, *image[1:])),
                0.5,
                rows(d, 2),
            ),
            lambda d: (strided(d)[0].detach(), byte(d), 0.0),
        ],
        "bernoulli_nll_update": [
            lambda d: (*_detached(both(d)), byte(d), ones(d), 0.25),
            lambda d: (*_detached(both(d)), byte(d, (7, 5)), ones(d), 1.0, rows(d, 3)),
        ],
        "gaussian_nll_and_grads": [
            lambda d: (both(d)[0].detach(), byte(d), both(d)[1].detach(), 0.25),
            lambda d: (*_detached(both(d, image, bf16)[:1]), byte(d, image), Draw(d)(()), 0.25),
            lambda d: (both(d)[0].detach(), byte(d, (7, 5)), Draw(d)(()), 0.25, rows(d, 3)),
        ],
        "gaussian_nll_update": [
            lambda d: (
                *_detached(both(d)),
                both(d)[0].detach(),
                byte(d),
                Draw(d)((3, 5)),
                ones(d),
                0.5,
            ),
            lambda d: (
                *(both(d)[0].detach(), torch.empty(0, device=d), both(d)[0].detach()),
                *(byte(d, (7, 5)), Draw(d)(()), ones(d), 0.5, rows(d, 3)),
            ),
        ],
        "gaussian_nll": [
            lambda d: (both(d)[0], byte(d, (7, 5)), both(d)[1], rows(d, 3)),
            lambda d: (both(d)[0], byte(d), both(d)[1]),
            lambda d: (both(d, image, bf16)[0], byte(d, image), leaf(Draw(d)(()))),
            lambda d: (strided(d)[0], byte(d), strided(d)[1]),
            lambda d: (both(d)[0].detach(), byte(d), leaf(Draw(d)(()))),
        ],
        "gaussian_nll_backward": [
            lambda d: (both(d)[0].detach(), byte(d), both(d)[1].detach(), ones(d), ones(d)),
            lambda d: (
                both(d, image, bf16)[0].detach(),
                byte(d, image),
                Draw(d)(()),
                ones(d, 2),
                ones(d, 2),
            ),
            lambda d: (strided(d)[0].detach(), byte(d), strided(d)[1].detach(), ones(d), ones(d)),
            lambda d: (
                *(both(d)[0].detach(), byte(d, (7, 5)), Draw(d)(())),
                *(ones(d), ones(d), rows(d, 3), False),
            ),
        ],
    }


def test_every_operator_has_opcheck_cases():
    registered = {name for name in dir(torch.ops.fastvae) if not name.startswith("_")}
    own_files = ("logistic_mixture", "uniform", "normal", "binarize")
    elsewhere = {name for name in registered if name.startswith(own_files)}
    assert set(opcheck_cases()) == registered - elsewhere - {"name"}


@pytest.mark.parametrize(
    "case", [f"{n}-{i}" for n, c in opcheck_cases().items() for i in range(len(c))]
)
def test_opcheck(device, case):
    """Schema, autograd registration, fake shapes, and AOT dispatch with dynamic shapes."""
    name, index = case.rsplit("-", 1)
    arguments = opcheck_cases()[name][int(index)](device)
    torch.library.opcheck(getattr(torch.ops.fastvae, name).default, arguments)


def test_second_derivatives_through_an_operator_fail_aloud(device):
    """The reference has them; the operators' backward passes have no gradient of their own."""
    x = leaf(Draw(device)((3, 5)))
    target = torch.zeros_like(x)
    nll = bernoulli_nll(x, target, impl="torch")
    (grad,) = torch.autograd.grad(nll.sum(), x, create_graph=True)
    assert torch.autograd.grad(grad.sum(), x)[0].abs().sum() > 0
    nll = torch.ops.fastvae.bernoulli_nll(x, target)
    (grad,) = torch.autograd.grad(nll.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        torch.autograd.grad(grad.sum(), x)


# ----------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("function", [public, operators])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(device, function, dtype):
    """z has the dtype of mu, the terms are float32, and all is computed in float32."""
    wanted, data = tensors(device, dtype=dtype)
    with torch.autocast(device, torch.bfloat16):
        outputs = function(wanted, data)
        got = results(function, wanted, data)
    drawn = (outputs[0], outputs[2])
    assert all(y.dtype == dtype for y in drawn)
    assert all(y.dtype == torch.float32 for y in outputs if not any(y is z for z in drawn))
    for g, w in zip(got, results(function, wanted, data), strict=True):
        assert g.dtype == w.dtype
        assert torch.equal(g, w)


# -------------------------------------------------------------------------- the host never waits


@pytest.mark.parametrize("function", [public, operators])
def test_no_value_is_read_by_the_host(function):
    """Fake tensors have no values: whoever reads one raises. Forward and backward."""
    with FakeTensorMode():
        wanted = [torch.randn(6, 130, requires_grad=True) for _ in range(5)]
        wanted.append(torch.zeros((), requires_grad=True))
        wanted += [torch.randn(1, 130, requires_grad=True) for _ in range(2)]
        data = [
            torch.zeros(6, 130, dtype=torch.uint8),
            *(torch.zeros((), dtype=torch.int64) for _ in range(2)),
        ]
        got = results(function, wanted, data)
        assert [y.shape for y in got[-len(wanted) :]] == [x.shape for x in wanted]


def test_a_gpu_takes_the_operators_without_reading_a_value():
    """A fake GPU needs no GPU: "auto" goes through the operators, ints become device tensors."""
    with FakeTensorMode():
        mu = torch.empty(6, 130, device="cuda", dtype=torch.bfloat16)
        byte = torch.empty(6, 130, device="cuda", dtype=torch.uint8)
        one = torch.empty((), device="cuda")
        seed = torch.empty((), device="cuda", dtype=torch.int64)
        for args in ((seed, seed), (-3, 2**40)):
            z, kl = reparameterize_kl(mu, mu, args[0], offset=args[1])
            assert (z.device.type, z.dtype, z.shape) == ("cuda", torch.bfloat16, (6, 130))
            assert (kl.device.type, kl.dtype, kl.shape) == ("cuda", torch.float32, (6,))
            z, kl = reparameterize_kl(
                *(mu, mu, args[0]), num_samples=4, prior_mu=mu, prior_logvar=mu
            )
            assert (z.device.type, z.dtype, z.shape) == ("cuda", torch.bfloat16, (4, 6, 130))
            assert (kl.device.type, kl.dtype, kl.shape) == ("cuda", torch.float32, (6,))
            noise = normal((6, 3), args[0], offset=args[1], device="cuda")
            assert (noise.device.type, noise.shape) == ("cuda", (6, 3))
        for logvar in (mu, one, 0.0):
            assert gaussian_nll(mu, byte, logvar).shape == (6,)
        assert bernoulli_nll(mu, byte).device.type == "cuda"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("function", [public, operators])
def test_no_synchronisation_on_a_gpu(function):
    wanted, data = tensors("cuda")
    results(function, wanted, data)  # the first call compiles, which may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(function, wanted, data)
        reparameterize_kl(*wanted[:2], 12345, offset=678)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_a_cuda_graph_replays_with_new_noise():
    """The seed is read on the device: writing to it changes what a recorded graph draws."""
    wanted, (target, seed, offset) = tensors("cuda")
    run = partial(public, wanted, [target, seed, offset])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        z = run()[0]
    for value in (7, 8):
        offset.fill_(value)
        graph.replay()
        want = reparameterize_kl(*wanted[:2], seed, offset=value)[0]
        torch.testing.assert_close(z, want.detach(), rtol=0, atol=0)
