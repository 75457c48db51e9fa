"""The gradient written in the forward pass: whatever the backward pass meets, it is the same bit
for bit as without, which the tests of the likelihoods hold against float64."""

import gc
import weakref
from functools import partial

import pytest
import torch
from fastvae_kernels import bernoulli_nll, functional, gaussian_nll
from kernel_cases import DTYPES, LAYOUTS, SHAPES, Draw, leaf

pytestmark = pytest.mark.usefixtures("poisoned_memory")

LIKELIHOODS = ["bernoulli", "gaussian", "gaussian_learned", "gaussian_fixed"]
SPECIAL = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, -1.0, 0.5]


def problem(likelihood, draw, shape, target_dtype=torch.uint8, make=None):
    """The function of row_weight and impl, and the tensors that want gradients."""
    make = make or (lambda draw, shape: draw(shape))
    x = leaf(make(draw, shape))
    target = draw.target(tuple(x.shape), target_dtype)
    if likelihood == "bernoulli":
        return partial(bernoulli_nll, x, target), [x]
    if likelihood == "gaussian_fixed":
        return partial(gaussian_nll, x, target, -1.3), [x]
    logvar = leaf(draw(()) if likelihood == "gaussian_learned" else make(draw, shape))
    return partial(gaussian_nll, x, target, logvar), [x, logvar]


def incoming(kind, batch, row_weight, device):
    """What the backward pass meets: all as foretold, none, or some, in unlike tiles."""
    foretold = torch.full((batch,), row_weight, device=device)
    other = torch.linspace(-2, 3, batch, device=device)
    if kind == "foretold":
        return foretold
    if kind == "expanded":
        return foretold[:1].expand(batch)
    if kind == "other":
        return other
    if kind == "special":
        return torch.tensor(SPECIAL, device=device).repeat(batch)[:batch]
    return torch.where(torch.arange(batch, device=device) % 5 == 2, other, foretold)


def same(got, want):
    """Bit for bit, but for the sign and payload of a NaN."""
    for g, w in zip(got, want, strict=True):
        assert (g.shape, g.dtype, g.is_contiguous()) == (w.shape, w.dtype, w.is_contiguous())
        bits = {2: torch.int16, 4: torch.int32}[g.element_size()]
        assert torch.equal(g.isnan(), w.isnan())
        zero = g.new_zeros(())
        g, w = (torch.where(x.isnan(), zero, x).view(bits) for x in (g, w))
        assert torch.equal(g, w)


def check(function, wanted, row_weight, grad_nll, impl):
    want = function(impl=impl)
    got = function(row_weight=row_weight, impl=impl)
    same([got], [want])
    same(
        torch.autograd.grad(got, wanted, grad_nll),
        torch.autograd.grad(want, wanted, grad_nll),
    )


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [("float32", "foretold"), ("float32", "mixed"), ("bfloat16", "mixed"), ("float16", "foretold")],
)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(impl, device, shape, dtype, likelihood, kind):
    function, wanted = problem(likelihood, Draw(device, DTYPES[dtype]), shape)
    row_weight = 1 / shape[0]
    check(function, wanted, row_weight, incoming(kind, shape[0], row_weight, device), impl)


@pytest.mark.parametrize("kind", ["expanded", "other", "special"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("shape", [(9, 37), (300, 3), (8, 4100)], ids=str)
def test_incoming_gradients(impl, device, shape, likelihood, kind):
    """Zeros of both signs, NaN and infinities are what they are without a row_weight."""
    function, wanted = problem(likelihood, Draw(device), shape)
    for row_weight in (1 / shape[0], 0.0, -1)[: 3 if shape[1] < 1000 else 1]:
        grad_nll = incoming(kind, shape[0], row_weight, device)
        check(function, wanted, row_weight, grad_nll, impl)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(impl, device, layout, likelihood):
    make = lambda draw, _: LAYOUTS[layout](draw)  # noqa: E731
    function, wanted = problem(likelihood, Draw(device), None, make=make)
    batch = len(wanted[0])
    grad_nll = incoming("mixed", 2 * batch, 0.25, device)[::2]
    check(function, wanted, 0.25, grad_nll, impl)


@pytest.mark.parametrize("target_dtype", [torch.bool, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_targets(impl, device, likelihood, target_dtype):
    function, wanted = problem(likelihood, Draw(device), (7, 123), target_dtype)
    check(function, wanted, 0.5, incoming("mixed", 7, 0.5, device), impl)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("shape", [(0,), (0, 5), (4, 0), (2, 3, 0)])
def test_empty(impl, device, shape, likelihood):
    function, wanted = problem(likelihood, Draw(device), shape)
    check(function, wanted, 0.5, torch.ones(shape[0], device=device), impl)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_every_backward_pass_of_several_is_right(impl, device, likelihood):
    """Also after a first that met zeros or NaN, from which nothing could be rescaled; and what
    the first handed out does not change any more."""
    function, wanted = problem(likelihood, Draw(device), (6, 70))
    want, got = function(impl=impl), function(row_weight=0.5, impl=impl)
    for first in ("special", "foretold", "other"):
        handed_out = []
        for kind in (first, "other", "foretold", "special"):
            grad_nll = incoming(kind, 6, 0.5, device)
            grads = [
                torch.autograd.grad(y, wanted, grad_nll, retain_graph=True) for y in (got, want)
            ]
            same(*grads)
            handed_out.append(grads)
        for grads in handed_out:
            same(*grads)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_gradients_accumulate(impl, device, likelihood):
    """Into leaves, and where a tensor is used twice."""
    function, wanted = problem(likelihood, Draw(device), (6, 70))
    results = []
    for row_weight in (None, 1 / 6):
        for x in wanted:
            x.grad = None
        for _ in range(2):
            nll = function(row_weight=row_weight, impl=impl)
            penalty = sum(x.square().sum() for x in wanted)
            (nll.mean() + penalty).backward()
        results.append([x.grad.clone() for x in wanted])
    same(*results)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_a_gradient_to_be_differentiated_fails_aloud_or_is_right(impl, device, likelihood):
    function, wanted = problem(likelihood, Draw(device), (6, 7), torch.float32)
    nll = function(row_weight=1.0, impl=impl)
    (grad, *_) = torch.autograd.grad(nll.sum(), wanted, create_graph=True)
    if impl == "torch":
        assert torch.autograd.grad(grad.square().sum(), wanted[0])[0].abs().sum() > 0
    else:
        with pytest.raises(RuntimeError, match="backward"):
            torch.autograd.grad(grad.square().sum(), wanted[0])


def test_one_tensor_in_two_places_gets_the_whole_gradient(impl, device):
    draw = Draw(device)
    x, target = leaf(draw((4, 63))), draw.target((4, 63), torch.uint8)
    check(
        partial(gaussian_nll, x, target, x), [x], 0.25, torch.full((4,), 0.25, device=device), impl
    )


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_what_the_forward_pass_wrote_is_what_is_handed_out(device, likelihood, monkeypatch):
    """The same memory, no copy, and then it is the receiver's alone."""
    monkeypatch.setattr(functional, "_use_triton", lambda *_: True)
    function, wanted = problem(likelihood, Draw(device), (4, 63))
    nll = function(row_weight=0.25)
    kept, place = weakref.ref(nll.grad_fn.grads[0]), nll.grad_fn.grads[0].data_ptr()
    grad_x, *_ = torch.autograd.grad(nll.mean(), wanted, retain_graph=True)
    assert grad_x.data_ptr() == place
    again, *_ = torch.autograd.grad(nll.mean(), wanted)
    assert again.data_ptr() != place
    assert torch.equal(again, grad_x)
    del grad_x
    assert kept() is None


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_a_graph_without_a_backward_pass_leaves_nothing_behind(device, likelihood, monkeypatch):
    monkeypatch.setattr(functional, "_use_triton", lambda *_: True)
    function, _ = problem(likelihood, Draw(device), (4, 63))
    nll = function(row_weight=0.25)
    kept = weakref.ref(nll.grad_fn.grads[0])
    gc.disable()
    try:
        del nll
        assert kept() is None  # no cycle that a collector would have to find
    finally:
        gc.enable()


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("shape", [(7, 130), (300, 3), (5000, 3), (8, 4100)], ids=str)
def test_only_rows_that_met_another_gradient_are_written(impl, device, shape, likelihood):
    """The reference writes all; the kernel must leave the others alone, which is its speed."""
    if impl == "torch":
        pytest.skip("the kernel is meant")
    draw = Draw(device)
    x, logvar, target = draw(shape), draw(shape), draw.target(shape, torch.uint8)
    grad_nll = incoming("mixed", shape[0], 0.25, device)
    changed = grad_nll != 0.25
    ops = torch.ops.fastvae
    if likelihood == "bernoulli":
        grads = [torch.full_like(x, 99.0)]
        ops.bernoulli_nll_update(*grads, x, target, grad_nll, 0.25)
        wants = [ops.bernoulli_nll_backward(x, target, grad_nll)]
    else:
        grads = [torch.full_like(x, 99.0), torch.full_like(x, 99.0)]
        ops.gaussian_nll_update(*grads, x, target, logvar, grad_nll, 0.25)
        wants = ops.gaussian_nll_backward(x, target, logvar, grad_nll, grad_nll)
    assert changed.any() and not changed.all()
    for grad, want in zip(grads, wants, strict=True):
        assert torch.equal(grad[changed], want[changed])
        assert (grad[~changed] == 99.0).all()


def test_no_gradient_is_written_where_none_can_be_wanted(device, monkeypatch):
    """Without autograd, and for inputs that want none."""
    called = []
    for name in (
        "bernoulli_nll",
        "bernoulli_nll_and_grad",
        "gaussian_nll",
        "gaussian_nll_and_grads",
    ):
        op = getattr(functional.ops, name)

        def spy(*arguments, _op=op, _name=name):
            called.append(_name)
            return _op(*arguments)

        monkeypatch.setattr(functional.ops, name, spy)
    monkeypatch.setattr(functional, "_use_triton", lambda *_: True)
    draw = Draw(device)
    x, target, logvar = draw((3, 5)), draw.target((3, 5), torch.uint8), leaf(draw(()))
    bernoulli_nll(x, target, row_weight=0.5)
    gaussian_nll(x, target, 0.0, row_weight=0.5)
    with torch.no_grad():
        bernoulli_nll(leaf(x), target, row_weight=0.5)
    assert called == ["bernoulli_nll", "gaussian_nll", "bernoulli_nll"]
    bernoulli_nll(leaf(x), target, row_weight=0.5)
    gaussian_nll(x, target, logvar, row_weight=0.5)
    assert called[3:] == ["bernoulli_nll_and_grad", "gaussian_nll_and_grads"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_a_cuda_graph_decides_anew_at_each_replay(likelihood):
    """What the rows meet is read on the device: recorded where all is as foretold, and replayed
    where nothing is. The host waits for nothing."""
    function, wanted = problem(likelihood, Draw("cuda"), (9, 130))
    grad_nll = torch.full((9,), 0.25, device="cuda")

    def run(row_weight):
        return torch.autograd.grad(function(row_weight=row_weight), wanted, grad_nll)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(0.25)  # the first call compiles
        run(None)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(0.25)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(0.25)
    for value in (0.25, 2.0, 0.0, float("nan"), 0.25):
        grad_nll.fill_(value)
        graph.replay()
        same(got, run(None))


@pytest.mark.parametrize(
    ("row_weight", "exception", "message"),
    [
        ("1", TypeError, "row_weight must be a float, got str"),
        (True, TypeError, "row_weight must be a float, got bool"),
        (torch.tensor(1.0), TypeError, "row_weight must be a float, got Tensor"),
        (float("nan"), ValueError, "row_weight must be finite as a float32, got nan"),
        (float("inf"), ValueError, "row_weight must be finite as a float32, got inf"),
    ],
)
@pytest.mark.parametrize("function", [bernoulli_nll, partial(gaussian_nll, logvar=0.0)])
def test_errors(function, row_weight, exception, message):
    x = torch.zeros(2, 3)
    with pytest.raises(exception, match=message):
        function(x, target=x, row_weight=row_weight)
