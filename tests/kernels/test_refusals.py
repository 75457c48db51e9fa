"""What the operators refuse, in the same words whoever would compute: each implementation, eager
and compiled."""

import warnings
from functools import partial

import pytest
import torch
from fastvae_kernels import (
    bernoulli_nll,
    binarize,
    functional,
    gaussian_nll,
    logistic_mixture_mean,
    logistic_mixture_nll,
    normal,
    reparameterize_kl,
    reparameterize_kl_packed,
    uniform,
)
from kernel_cases import needs_no_interpreter

X = torch.zeros(4, 6)
DOUBLE, HALF = X.double(), X.bfloat16()
IMAGE, PARAMETERS = torch.zeros(4, 1, 3, 5), torch.zeros(4, 6, 3, 5)
ROWS, SEED = torch.tensor([0, 3]), torch.tensor(5)
ONE = torch.zeros(())


def quantised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still there
        return torch.quantize_per_tensor(X, 0.1, 0, torch.quint8)


# Calls that are allowed, which the table below spoils by one argument.
CALLS = {
    "reparameterize_kl": (reparameterize_kl, {"mu": X, "logvar": X, "seed": 0}),
    "reparameterize_kl, prior": (
        reparameterize_kl,
        {"mu": X, "logvar": X, "seed": 0, "prior_mu": X, "prior_logvar": X},
    ),
    "packed": (reparameterize_kl_packed, {"statistics": X, "seed": 0}),
    "bernoulli_nll": (bernoulli_nll, {"logits": X, "target": X}),
    "bernoulli_nll, indices": (bernoulli_nll, {"logits": X[:2], "target": X, "indices": ROWS}),
    "gaussian_nll": (gaussian_nll, {"mean": X, "target": X, "logvar": X}),
    "gaussian_nll, one": (gaussian_nll, {"mean": X, "target": X, "logvar": ONE}),
    "logistic_mixture_nll": (
        logistic_mixture_nll,
        {"parameters": PARAMETERS, "target": IMAGE, "mixtures": 2},
    ),
    "binarize": (binarize, {"images": X, "seed": 0}),
    "binarize, indices": (binarize, {"images": X, "seed": 0, "indices": ROWS}),
    "uniform": (uniform, {"shape": (4, 6), "seed": 0}),
    "normal": (normal, {"shape": (4, 6), "seed": 0}),
}

NEITHER = "both must be float64, or neither: convert one of them, for instance with"


def refused():
    """(call, the arguments that spoil it, exception, the beginning of what is said)."""
    # Precision: float64 by all the parameters, or by none.
    for name, spoilt in (
        ("reparameterize_kl", {"logvar": DOUBLE}),
        ("reparameterize_kl", {"mu": DOUBLE}),
        ("reparameterize_kl", {"mu": HALF, "logvar": DOUBLE}),
        ("gaussian_nll", {"logvar": DOUBLE}),
        ("gaussian_nll", {"mean": DOUBLE}),
        ("gaussian_nll, one", {"logvar": ONE.double()}),
        ("gaussian_nll, one", {"mean": DOUBLE}),
    ):
        other = "mu" if "mu" in CALLS[name][1] else "mean"
        given = {**CALLS[name][1], **spoilt}
        said = f"logvar is {given['logvar'].dtype}, {other} {given[other].dtype}; {NEITHER} logvar"
        yield name, spoilt, TypeError, said
    # Numbers that no float32 is, and devices that are not there.
    for number in (10**400, 1e39, -1e39, float("inf"), float("nan")):
        said = f"must be finite as a float32, got {str(number)[:40]}"
        yield "gaussian_nll", {"logvar": number}, ValueError, f"logvar {said}"
        for name in ("bernoulli_nll", "gaussian_nll"):
            yield name, {"row_weight": number}, ValueError, f"row_weight {said}"
    for device in ("gpu", "cuda:99", "a1"):
        for name in ("uniform", "normal"):
            said = f"there is no device {device} to draw on: "
            yield name, {"device": device}, ValueError, said
    for prior in ("prior_mu", "prior_logvar"):
        said = f"{prior} is torch.float64, mu torch.float32; {NEITHER} {prior}.to(mu.dtype)"
        yield "reparameterize_kl, prior", {prior: DOUBLE}, TypeError, said
    spoilt = {"mu": DOUBLE, "logvar": DOUBLE}
    said = f"prior_mu is torch.float32, mu torch.float64; {NEITHER} prior_mu.to(mu.dtype)"
    yield "reparameterize_kl, prior", spoilt, TypeError, said

    parameters = (
        *(("reparameterize_kl", "mu"), ("reparameterize_kl", "logvar")),
        *(("reparameterize_kl, prior", "prior_mu"), ("reparameterize_kl, prior", "prior_logvar")),
        *(("packed", "statistics"), ("bernoulli_nll", "logits"), ("gaussian_nll", "mean")),
        *(("gaussian_nll", "logvar"), ("gaussian_nll, one", "logvar")),
        ("logistic_mixture_nll", "parameters"),
    )
    data = (
        *(("bernoulli_nll", "target"), ("bernoulli_nll, indices", "target")),
        *(("gaussian_nll", "target"), ("logistic_mixture_nll", "target")),
        *(("binarize", "images"), ("binarize, indices", "images")),
    )
    for name, argument in parameters:
        x = CALLS[name][1][argument]
        for dtype in (torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e5m2):
            said = (
                f"{argument} must be float32, bfloat16, float16 or float64, got {dtype}; "
                f"convert it, for instance with {argument}.float()"
            )
            yield name, {argument: x.to(dtype)}, TypeError, said
    for name, argument in data:
        x = CALLS[name][1][argument]
        for dtype in (torch.int8, torch.int32, torch.int64, torch.complex64, torch.float8_e5m2):
            said = (
                f"{argument} must be uint8, bool or floating, got {dtype}; pass bytes, which are "
                f"read as {argument} / 255, or float32, bfloat16, float16 or float64"
            )
            yield name, {argument: x.to(dtype)}, TypeError, said
        said = f"{argument} is data and gets no gradient here; pass {argument}.detach()"
        yield name, {argument: x.clone().requires_grad_()}, ValueError, said
    for name, argument in (*parameters, *data):
        x = CALLS[name][1][argument]
        if argument != "logvar" or name == "reparameterize_kl":
            said = f"{argument} must be a tensor, got list"
            yield name, {argument: [0.0]}, TypeError, said
        said = f"{argument} must be a dense tensor, got a torch.sparse_coo one; make it dense first"
        yield name, {argument: x.to_sparse()}, TypeError, said
    for name, argument in (("bernoulli_nll", "logits"), ("reparameterize_kl", "logvar")):
        said = f"{argument} must be float32, bfloat16, float16 or float64, got torch.quint8"
        yield name, {argument: quantised()}, TypeError, said
    yield "binarize", {"images": quantised()}, TypeError, "images must be uint8, bool or floating"
    said = "logvar must be a float or a tensor, got list"
    yield "gaussian_nll", {"logvar": [0.0]}, TypeError, said

    # Devices.
    for name, argument, other in (
        ("reparameterize_kl", "logvar", "mu"),
        ("reparameterize_kl, prior", "prior_mu", "mu"),
        ("reparameterize_kl, prior", "prior_logvar", "mu"),
        ("bernoulli_nll", "target", "logits"),
        ("bernoulli_nll, indices", "target", "logits"),
        ("bernoulli_nll, indices", "indices", "logits"),
        ("gaussian_nll", "logvar", "mean"),
        ("gaussian_nll, one", "logvar", "mean"),
        ("logistic_mixture_nll", "target", "parameters"),
        ("binarize, indices", "indices", "images"),
    ):
        x = CALLS[name][1][argument].to("meta")
        said = (
            f"{argument} is on meta, {other} on cpu; move one of them, for instance with "
            f"{argument}.to({other}.device)"
        )
        yield name, {argument: x}, ValueError, said

    # Shapes.
    same = "; they must be the same"
    for name, argument, other in (
        ("reparameterize_kl", "logvar", "mu"),
        ("reparameterize_kl, prior", "prior_mu", "mu"),
        ("bernoulli_nll", "target", "logits"),
        ("gaussian_nll", "logvar", "mean"),
    ):
        for x in (X[:1], X[:, :5], X[0]):
            said = f"{argument} has shape {tuple(x.shape)}, {other} (4, 6){same}"
            yield name, {argument: x}, ValueError, said
    yield (
        *("reparameterize_kl", {"mu": ONE, "logvar": ONE}, ValueError),
        "mu needs a batch dimension, got a 0-d tensor",
    )
    yield (
        *("packed", {"statistics": X[:, :5]}, ValueError),
        "statistics is [B, 2D, …], mu and logvar along dimension 1, got the shape (4, 5)",
    )
    yield (
        *("binarize", {"images": ONE}, ValueError),
        "images needs a batch dimension, got a 0-d tensor",
    )
    for indices in (ROWS.view(2, 1), ROWS[0]):
        said = f"indices must be [B], got shape {tuple(indices.shape)}"
        yield "binarize, indices", {"indices": indices}, ValueError, said
    said = "images has shape (0, 6), and nothing to choose from"
    yield "binarize, indices", {"images": X[:0]}, ValueError, said
    said = "indices has shape (1,); one for each row of logits is (2,)"
    yield "bernoulli_nll, indices", {"indices": ROWS[:1]}, ValueError, said
    for name in ("bernoulli_nll, indices", "binarize, indices"):
        said = "indices must be an int64 tensor, got "
        yield name, {"indices": ROWS.int()}, TypeError, f"{said}torch.int32"
        yield name, {"indices": [0, 1]}, TypeError, f"{said}list"

    # Where noise is drawn: alike by all that draw.
    for name in ("reparameterize_kl", "packed", "binarize", "uniform", "normal"):
        for place in ("seed", "offset"):
            holds = f"{place} as a tensor holds one int64, got "
            yield name, {place: SEED.int()}, TypeError, f"{holds}torch.int32 ()"
            yield name, {place: SEED.float()}, TypeError, f"{holds}torch.float32 ()"
            yield name, {place: SEED.expand(2)}, TypeError, f"{holds}torch.int64 (2,)"
            yield (
                *(name, {place: SEED.to("meta")}, ValueError),
                f"{place} is on meta, the other tensors on cpu; pass an int, or a tensor made with "
                'device="cpu"',
            )
            kind = f"{place} must be an int or an int64 tensor, got "
            for value in (0.5, True, None, "7"):
                yield name, {place: value}, TypeError, f"{kind}{type(value).__name__}"
            for value in (2**63, -(2**63) - 1):
                said = f"{place} must lie in [-2^63, 2^63), got {value}"
                yield name, {place: value}, ValueError, said
    for name in ("uniform", "normal"):
        for shape, exception, said in (
            ((), ValueError, "shape needs a first dimension of rows, got ()"),
            (4, TypeError, "shape must be a tuple of ints, got int"),
            (X, TypeError, "shape must be a tuple of ints, got Tensor"),
            ((4, 2.0), TypeError, "shape must be a tuple of ints, got float in (4, 2.0)"),
            ((True, 2), TypeError, "shape must be a tuple of ints, got bool in (True, 2)"),
            ((4, -1), ValueError, "the sizes of shape must be 0 or more, got (4, -1)"),
        ):
            yield name, {"shape": shape}, exception, said


REFUSED = list(refused())
IDS = [f"{name}-{'-'.join(spoilt)}-{i}" for i, (name, spoilt, *_) in enumerate(REFUSED)]


@pytest.fixture(autouse=True)
def _with_triton(monkeypatch):
    monkeypatch.setattr(functional, "_HAS_TRITON", True)


@pytest.mark.parametrize(("name", "spoilt", "exception", "said"), REFUSED, ids=IDS)
def test_every_implementation_says_the_same(name, spoilt, exception, said):
    function, arguments = CALLS[name]
    found = set()
    for impl in ("auto", "torch", "triton"):
        with pytest.raises(exception) as caught:
            function(**{**arguments, **spoilt}, impl=impl)
        assert type(caught.value) is exception
        found.add(str(caught.value))
    (message,) = found
    assert message.startswith(said)


@needs_no_interpreter
@pytest.mark.parametrize(
    ("name", "spoilt", "exception", "said"),
    [
        case
        for case in REFUSED
        if not any(word in case[3] for word in ("sparse", "quint8", "there is no device"))
    ][::12],
)
def test_and_so_does_compiled_code(name, spoilt, exception, said):
    """Of every twelfth; those that the compiler can be given at all."""
    function, arguments = CALLS[name]
    torch._dynamo.reset()
    with pytest.raises(exception) as caught:
        torch.compile(partial(function, **arguments | spoilt), backend="eager")()
    assert str(caught.value).startswith(said)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", CALLS)
def test_what_is_spoilt_was_right_before(name):
    function, arguments = CALLS[name]
    for impl in ("auto", "torch"):
        function(**arguments, impl=impl)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("reparameterize_kl", {"mu": HALF}),
        ("reparameterize_kl", {"logvar": X.half()}),
        ("reparameterize_kl", {"mu": DOUBLE, "logvar": DOUBLE}),
        ("reparameterize_kl, prior", {"prior_mu": HALF, "prior_logvar": X.half()}),
        (
            "reparameterize_kl, prior",
            dict.fromkeys(("mu", "logvar", "prior_mu", "prior_logvar"), DOUBLE),
        ),
        ("bernoulli_nll", {"target": DOUBLE}),
        ("bernoulli_nll", {"logits": DOUBLE}),
        ("bernoulli_nll", {"logits": HALF, "target": X > 0}),
        ("gaussian_nll", {"mean": HALF}),
        ("gaussian_nll", {"mean": DOUBLE, "logvar": DOUBLE}),
        ("gaussian_nll, one", {"mean": DOUBLE, "logvar": ONE.double()}),
        ("gaussian_nll, one", {"mean": DOUBLE, "logvar": 0}),
        ("gaussian_nll, one", {"mean": HALF, "logvar": ONE}),
        ("binarize", {"images": DOUBLE}),
        ("binarize", {"seed": SEED.view(1, 1), "offset": SEED}),
        ("uniform", {"shape": [4, 6]}),
        ("normal", {"shape": X.shape}),
    ],
)
def test_what_is_allowed(name, arguments):
    """The rule is no narrower than it says."""
    function, usual = CALLS[name]
    function(**usual | arguments)


@pytest.mark.parametrize("name", CALLS)
def test_an_unknown_implementation(name):
    function, arguments = CALLS[name]
    with pytest.raises(ValueError, match='impl is "auto", "triton" or "torch", got \'cuda\''):
        function(**arguments, impl="cuda")


@pytest.mark.parametrize("name", CALLS)
def test_triton_has_conditions(name, monkeypatch):
    function, arguments = CALLS[name]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        ValueError, match='impl="triton" needs tensors on a GPU, got cpu; use impl='
    ):
        function(**arguments, impl="triton")
    monkeypatch.setattr(functional, "_HAS_TRITON", False)
    with pytest.raises(ValueError, match='impl="triton" needs the package triton; install it, or'):
        function(**arguments, impl="triton")


def test_parameters_of_a_mean_image_are_floating():
    with pytest.raises(TypeError, match="parameters must be float32, bfloat16, float16 or float64"):
        logistic_mixture_mean(PARAMETERS.int(), 2, 1)
