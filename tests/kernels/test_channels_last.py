"""Images and parameters in the order of memory that convolutions use: read where they lie, and
answered in kind."""

from functools import partial

import pytest
import torch
from fastvae_kernels import bernoulli_nll, binarize, gaussian_nll, logistic_mixture_nll
from kernel_cases import Draw, leaf
from torch.profiler import ProfilerActivity, profile

SHAPE = (5, 3, 6, 7)
LAST = {"memory_format": torch.channels_last}


def likelihoods():
    """By name: of mean or logits, and a logvar like them where there is one, an nll of a target."""
    return {
        "bernoulli": lambda x, _, target, **kw: bernoulli_nll(x, target, **kw),
        "gaussian": lambda x, _, target, **kw: gaussian_nll(x, target, -1.0, **kw),
        "gaussian_each": lambda x, logvar, target, **kw: gaussian_nll(x, target, logvar, **kw),
    }


def gradients(function, inputs, **arguments):
    """nll and its gradients for those of two inputs that it has."""
    inputs = [leaf(x) for x in inputs]
    nll = function(*inputs, **arguments)
    weights = torch.linspace(0.5, 2, len(nll), device=nll.device)
    return nll.detach(), torch.autograd.grad((nll * weights).sum(), inputs, allow_unused=True)


def is_last(x):
    return x.is_contiguous(**LAST) and not x.is_contiguous()


@pytest.mark.parametrize("name", likelihoods())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("through_indices", [False, True])
@pytest.mark.parametrize("row_weight", [None, 1.0])
@pytest.mark.parametrize("target_is_last", [True, False])
def test_likelihoods(impl, device, name, dtype, through_indices, row_weight, target_is_last):
    """As in the other order of memory; the gradient of what is channels_last is so too."""
    draw = Draw(device, dtype)
    inputs = [draw(SHAPE), draw(SHAPE)]
    data = draw.target((17, *SHAPE[1:]), torch.uint8)
    indices = torch.tensor([16, 3, 3, 0, 9], device=device) if through_indices else None
    target = data if through_indices else data[:5]
    run = partial(likelihoods()[name], indices=indices, row_weight=row_weight, impl=impl)
    want, want_grads = gradients(run, inputs, target=target)

    last = [x.to(**LAST) for x in inputs]
    got, grads = gradients(run, last, target=target.to(**LAST) if target_is_last else target)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5)
    for grad, want_grad in zip(grads, want_grads, strict=True):
        assert (grad is None) == (want_grad is None)
        if grad is not None:
            # A data set is read where it lies, and then the rest is read in its order.
            assert is_last(grad) == (target_is_last or not through_indices)
            torch.testing.assert_close(grad, want_grad)


@pytest.mark.parametrize("name", likelihoods())
@pytest.mark.parametrize("along", [0, 1, 2, 4])
def test_vmap(name, along):
    """What vmap hands on is often neither contiguous nor channels_last."""
    draw = Draw("cpu")
    x, logvar, target = (draw((5, 4, 3, 6, 7)) for _ in range(3))
    got = torch.func.vmap(likelihoods()[name], in_dims=along)(x, logvar, target)
    for i, part in enumerate(got):
        want = likelihoods()[name](*(t.select(along, i) for t in (x, logvar, target)))
        torch.testing.assert_close(part, want)
    drawn = torch.func.vmap(partial(binarize, seed=3), in_dims=along)(target)
    assert torch.equal(drawn[1], binarize(target.select(along, 1), 3))


@pytest.mark.parametrize("name", likelihoods())
@pytest.mark.parametrize("through_indices", [False, True])
def test_nothing_is_copied(impl, device, name, through_indices):
    draw = Draw(device)
    inputs = [draw(SHAPE).to(**LAST), draw(SHAPE).to(**LAST)]
    data = draw.target((17, *SHAPE[1:]), torch.uint8).to(**LAST)
    indices = torch.tensor([16, 3, 3, 0, 9], device=device) if through_indices else None
    target = data if through_indices else data[:5]
    run = partial(likelihoods()[name], indices=indices, impl=impl)
    gradients(run, inputs, target=target)  # what is made once is made before
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        gradients(run, inputs, target=target)
    copies = [e.key for e in watched.key_averages() if e.key in ("aten::clone", "aten::contiguous")]
    assert copies == []


@pytest.mark.parametrize("channels", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (32, 32)], ids=str)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_binarize_draws_for_places_and_not_for_memory(impl, device, channels, size, dtype):
    data = Draw(device).target((9, channels, *size), dtype)
    indices = torch.tensor([8, 0, 0, 3], device=device)
    for arguments in ({}, {"indices": indices}):
        want = binarize(data, 3, offset=7, impl=impl, **arguments)
        got = binarize(data.to(**LAST), 3, offset=7, impl=impl, **arguments)
        assert torch.equal(got, want)
        assert got.is_contiguous(**LAST) and want.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("through_indices", [False, True])
def test_logistic_mixture(impl, device, dtype, through_indices):
    """Its parameters are brought into the other order; images are read where they lie."""
    draw = Draw(device, dtype)
    parameters = draw((5, 20, 6, 7))
    data = draw.target((17, *SHAPE[1:]), torch.uint8)
    indices = torch.tensor([16, 3, 3, 0, 9], device=device) if through_indices else None
    target = data if through_indices else data[:5]

    def run(x, target):
        return logistic_mixture_nll(x, target, mixtures=2, indices=indices, impl=impl)

    want, want_grads = gradients(run, [parameters], target=target)
    got, grads = gradients(run, [parameters.to(**LAST)], target=target.to(**LAST))
    assert torch.equal(got, want)
    assert torch.equal(grads[0], want_grads[0])


@pytest.mark.parametrize(
    "name",
    ["bernoulli", *(pytest.param(n, marks=pytest.mark.slow) for n in list(likelihoods())[1:])],
)
def test_compiled(device, name):
    """The layout that a graph was traced for is the one that its operators answer in."""
    draw = Draw(device)
    inputs = [draw(SHAPE).to(**LAST), draw(SHAPE).to(**LAST)]
    target = draw.target(SHAPE, torch.uint8).to(**LAST)
    run = likelihoods()[name]
    want, want_grads = gradients(run, inputs, target=target)
    got, grads = gradients(torch.compile(run, fullgraph=True), inputs, target=target)
    torch.testing.assert_close(got, want)
    for grad, want_grad in zip(grads, want_grads, strict=True):
        assert (grad is None) == (want_grad is None)
        if grad is not None:
            assert is_last(grad)
            torch.testing.assert_close(grad, want_grad)
