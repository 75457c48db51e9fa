"""Targets read through indices: the same bit for bit as a gathered copy, which the tests of the
likelihoods hold against float64."""

from functools import partial

import numpy as np
import pytest
import torch
from fastvae_kernels import bernoulli_nll, gaussian_nll, logistic_mixture_nll
from kernel_cases import DTYPES, Draw, leaf

pytestmark = pytest.mark.usefixtures("poisoned_memory")

LIKELIHOODS = ["bernoulli", "gaussian", "gaussian_learned", "logistic_mixture"]
# Of a data set: rows of one pixel, of an awkward number, shared by several programs; images.
ROWS = [(), (1,), (63,), (5000,), (3, 5, 7)]
# Of the target and of the parameters.
TYPES = [
    (torch.uint8, "float32"),
    (torch.uint8, "bfloat16"),
    (torch.bool, "float16"),
    (torch.float32, "bfloat16"),
    (torch.bfloat16, "float32"),
]


def problem(likelihood, draw, batch, row):
    """The function of target, indices and impl, and the tensors that want gradients."""
    if likelihood == "logistic_mixture":
        channels, height, width = row
        x = leaf(
            draw((batch, 2 * (1 + 2 * channels + channels * (channels - 1) // 2), height, width))
        )
        return partial(logistic_mixture_nll, x, mixtures=2), [x]
    x = leaf(draw((batch, *row)))
    if likelihood == "bernoulli":
        return partial(bernoulli_nll, x), [x]
    logvar = leaf(draw(() if likelihood == "gaussian_learned" else (batch, *row)))
    return partial(gaussian_nll, x, logvar=logvar), [x, logvar]


def check(function, wanted, data, indices, impl, **keywords):
    batch = len(indices)
    grad_nll = torch.linspace(-1, 2, batch, device=data.device)
    results = []
    for arguments in ({"target": data, "indices": indices}, {"target": data[indices]}):
        nll = function(**arguments, **keywords, impl=impl)
        results.append((nll, *torch.autograd.grad(nll, wanted, grad_nll)))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def likelihoods_and_rows():
    for likelihood in LIKELIHOODS:
        rows = [(1, 17, 31), (2, 5, 1), (3, 5, 7)] if likelihood == "logistic_mixture" else ROWS
        yield from ((likelihood, row) for row in rows)


@pytest.mark.parametrize(("target", "dtype"), TYPES, ids=str)
@pytest.mark.parametrize(("likelihood", "row"), list(likelihoods_and_rows()), ids=str)
def test_as_a_gathered_copy(impl, device, likelihood, row, target, dtype):
    """Rows in any order, some of them twice, the first and the last among them."""
    draw = Draw(device, DTYPES[dtype])
    data = draw.target((17, *row), target)
    indices = torch.tensor([16, 3, 3, 0, 9], device=device)
    function, wanted = problem(likelihood, draw, 5, row)
    check(function, wanted, data, indices, impl)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("batch", [1, 40, 300])
def test_batches_larger_than_the_data_set(impl, device, batch, likelihood):
    draw = Draw(device)
    data = draw.target((7, 1, 2, 3), torch.uint8)
    indices = torch.arange(batch, device=device).mul(5).remainder(7)
    function, wanted = problem(likelihood, draw, batch, (1, 2, 3))
    check(function, wanted, data, indices, impl)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("layout", ["sliced", "unaligned", "expanded", "channels_last", "permuted"])
def test_layouts_of_the_data_set(impl, device, layout, likelihood):
    """The last two are no view of rows without gaps, and so are gathered first."""
    draw = Draw(device)
    make = partial(draw.target, dtype=torch.uint8)
    data = {
        "sliced": lambda: make((34, 2, 3, 5))[::2],
        "unaligned": lambda: make((17 * 30 + 1,))[1:].view(17, 2, 3, 5),
        "expanded": lambda: make((1, 2, 3, 5)).expand(17, 2, 3, 5),
        "channels_last": lambda: make((17, 2, 3, 5)).to(memory_format=torch.channels_last),
        "permuted": lambda: make((5, 17, 2, 3)).permute(1, 2, 3, 0),
    }[layout]()
    function, wanted = problem(likelihood, draw, 5, (2, 3, 5))
    for indices in ([16, 3, 3, 0, 9], list(range(5))):
        check(function, wanted, data, torch.tensor(indices, device=device), impl)
    indices = torch.tensor([16, 0, 3, 0, 3, 0, 0, 0, 9, 0], device=device)[::2]
    check(function, wanted, data, indices, impl)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian", "gaussian_learned"])
def test_together_with_a_row_weight(impl, device, likelihood):
    draw = Draw(device)
    data = draw.target((17, 63), torch.uint8)
    indices = torch.tensor([16, 3, 3, 0, 9, 1, 2], device=device)
    function, wanted = problem(likelihood, draw, 7, (63,))
    for row_weight in (1 / 7, 0.5):  # the third row of seven meets ½
        check(function, wanted, data, indices, impl, row_weight=row_weight)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("row_weight", [None, 1.0])
def test_an_index_outside_of_the_data_set_is_not_overlooked(impl, device, likelihood, row_weight):
    """An error where the host can see it; else NaN in its row, and the others as they are."""
    if impl == "torch" and device == "cuda":
        pytest.skip("PyTorch's own index_select ends the process there")
    draw = Draw(device)
    data = draw.target((17, 1, 7, 9), torch.uint8)
    function, wanted = problem(likelihood, draw, 5, (1, 7, 9))
    if row_weight and likelihood != "logistic_mixture":
        function = partial(function, row_weight=row_weight)
    for outside in (-1, 17, 2**40, -(2**63)):
        indices = torch.tensor([16, outside, 3, 0, 9], device=device)
        if impl == "torch":
            with pytest.raises(IndexError):
                function(target=data, indices=indices, impl=impl)
            continue
        nll = function(target=data, indices=indices, impl=impl)
        assert nll.isnan().tolist() == [False, True, False, False, False]
        grads = torch.autograd.grad(nll.sum(), wanted)
        for grad in grads:
            if grad.dim() > 0:
                assert grad[1].isnan().all()
                assert grad[[0, 2, 3, 4]].isfinite().all()
            else:
                assert grad.isnan()


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_rows_further_apart_than_an_int32_can_count(impl, device, likelihood):
    if impl == "torch" and device == "cpu":
        pytest.skip("PyTorch's own indexing; the kernels' is meant")
    stride = 2**30
    if device == "cuda":
        memory = torch.zeros(3 * stride + 4, dtype=torch.uint8, device=device)
    else:  # zeroed memory becomes real where it is touched
        memory = torch.from_numpy(np.zeros(3 * stride + 4, np.uint8))
    data = memory.as_strided((4, 4), (stride, 1))
    data.copy_(torch.arange(16).view(4, 4) * 16)
    function, wanted = problem(likelihood, Draw(device), 3, (4,))
    check(function, wanted, data, torch.tensor([3, 0, 2], device=device), impl)


X = torch.zeros(2, 3)
INDICES = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("target", "indices", "exception", "message"),
    [
        (X, [0, 1], TypeError, "indices must be an int64 tensor, got list"),
        (X, INDICES.int(), TypeError, r"indices must be an int64 tensor, got torch\.int32"),
        (
            X,
            INDICES[:1],
            ValueError,
            r"indices has shape \(1,\); one for each row of \w+ is \(2,\)",
        ),
        (X, INDICES.to("meta"), ValueError, "indices is on meta"),
        (X.to("meta"), INDICES, ValueError, "target is on meta"),
        (X[:0], INDICES, ValueError, r"target has shape \(0, 3\), and nothing to choose from"),
        (X[:, :2], INDICES, ValueError, r"target has rows of shape \(2,\), \w+ of \(3,\)"),
    ],
)
@pytest.mark.parametrize("function", [bernoulli_nll, partial(gaussian_nll, logvar=0.0)])
def test_errors(function, target, indices, exception, message):
    with pytest.raises(exception, match=message):
        function(X, target=target, indices=indices)


def test_errors_of_images():
    x = torch.zeros(2, 3, 4, 5)
    data = torch.zeros(7, 1, 4, 5)
    call = partial(logistic_mixture_nll, x, mixtures=1)
    assert call(data, indices=INDICES).shape == (2,)
    with pytest.raises(ValueError, match=r"indices has shape \(1,\); one for each row of param"):
        call(data, indices=INDICES[:1])
    with pytest.raises(ValueError, match="batch, height and width must be the same"):
        call(data[..., :4], indices=INDICES)
