"""Every operator against PyTorch, eager and compiled: each size, dtype and direction."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
from measure import Call, Timing, graphed, interleaved, rotating, side_stream
from op_cases import OPS, Case, Compute, Tensors, check_agreement, dtype_name, leaves
from settings import Found, Settings, each
from torch import Tensor

QUICK_SIZES = ((32, 256),)
# Larger than this and launching takes no time beside the work: no graph is needed to see it.
GRAPHED_BYTES = 2**28
# What the slowest of the three keeps at once, in tensors like an input.
TENSORS_ALIVE = 40
MOST_INPUT_SETS = 256

BACKENDS = ("pytorch", "compiled", "fastvae")
DIRECTIONS = ("forward", "backward", "forward+backward")

# What the kernels are to reach on a GPU: of copy bandwidth, where a cache does not help; and how
# many times faster than PyTorch. The likelihoods as training calls them, forward and backward.
TARGETS = {
    "reparameterize_kl": {"share_of_copy": 0.85, "compiled": 1.5, "eager": 4.0},
    "nll": {"compiled": 1.2},
}


def run(settings: Settings) -> Iterator[Found]:
    """Time the operators that training calls most, each at a large and a common size."""
    yield from _timed(core_cases(settings), settings)


def run_more(settings: Settings) -> Iterator[Found]:
    """Time what `run` leaves out: the first size of every operator, then the second, …"""
    yield from _timed(more_cases(settings), settings)


def warm(settings: Settings) -> Iterator[Found]:
    """Compile every so-manieth core case and run it once: what `run` does before it times."""
    part, parts = settings.part
    cases = [case for case in core_cases(settings) if not _too_large(case, settings.device)]

    def compiled(case: Case) -> list[dict[str, Any]]:
        _computes(case, settings.device)
        return [{"compiled": str(case)}]

    # Which variant of a kernel is the fastest is not to be decided while others use the device.
    with inductor_config.patch(autotune_local_cache=False), _as_timed(settings.device):
        yield from each(cases[part::parts], compiled, settings)


def core_cases(settings: Settings) -> list[Case]:
    """The large sizes of all first."""
    most = max(len(op.core) for op in OPS)
    return [
        Case(op, *size, dtype)
        for place in range(1 if settings.quick else most)
        for op in OPS
        for size in (QUICK_SIZES if settings.quick and op.core else op.core)[place : place + 1]
        for dtype in op.dtypes
    ]


def more_cases(settings: Settings) -> list[Case]:
    """The first size of every operator, then the second, …; those apart that are core cases."""
    sizes = {op.name: QUICK_SIZES if settings.quick else op.sizes for op in OPS}
    every = [
        Case(op, *size, dtype)
        for place in range(max(map(len, sizes.values())))
        for op in OPS
        for size in sizes[op.name][place : place + 1]
        for dtype in op.dtypes
    ]
    core = set(map(str, core_cases(settings)))
    return [case for case in every if str(case) not in core]


def _timed(cases: list[Case], settings: Settings) -> Iterator[Found]:
    fitting = []
    for case in cases:
        if problem := _too_large(case, settings.device):
            yield "left_out", f"{case}: {problem}"
        else:
            fitting.append(case)
    with _as_timed(settings.device):
        yield from each(fitting, partial(_measure, settings=settings), settings)


@contextmanager
def _as_timed(device: torch.device) -> Iterator[None]:
    """The backward pass alone is run again on one forward pass, which buffers that it may
    overwrite do not survive."""
    with functorch_config.patch(donated_buffer=False), side_stream(device):
        yield


def _too_large(case: Case, device: torch.device) -> str:
    if device.type != "cuda":
        return "" if case.input_bytes <= 2**26 else "too large for a run on a CPU"
    fits = TENSORS_ALIVE * case.op.samples * case.input_bytes < torch.cuda.mem_get_info(device)[0]
    return "" if fits else "does not fit in the free memory"


def _computes(case: Case, device: torch.device) -> tuple[Tensors, dict[str, Compute]]:
    """The three, compiled and seen to agree on the inputs."""
    torch._dynamo.reset()
    inputs = case.op.make(case.rows, case.columns, case.dtype, device)
    computes: dict[str, Compute] = {
        "pytorch": case.op.pytorch,
        "compiled": torch.compile(case.op.pytorch, fullgraph=True, dynamic=False),
        "fastvae": case.op.fastvae,
    }
    check_agreement(case, computes, inputs)
    return inputs, computes


def _measure(case: Case, settings: Settings) -> list[dict[str, Any]]:
    first, computes = _computes(case, settings.device)
    inputs = [first, *_more_input_sets(case, settings.device)]
    rows = []
    for direction in _directions(case):
        calls = {name: _calls(direction, f, inputs, case.op.mean) for name, f in computes.items()}
        called = interleaved(
            {name: rotating(each) for name, each in calls.items()},
            settings.device,
            rounds=settings.rounds,
            seconds_per_round=settings.seconds_per_round,
        )
        on_device, note = _on_device(case, calls, called, settings)
        rate = case.bytes(direction) / on_device["fastvae"].median
        beyond_cache = case.bytes(direction) > _cache_bytes(settings.device)
        ratios = {name: _ratio(on_device, name) for name in ("pytorch", "compiled")}
        share = rate / (settings.copy_bytes_per_second or float("nan"))
        rows.append(
            {
                "op": case.op.name,
                "dtype": dtype_name(case.dtype),
                "rows": case.rows,
                "columns": case.columns,
                "direction": direction,
                "input_sets": len(inputs),
                "called": {name: timing.as_dict() for name, timing in called.items()},
                "device": {name: timing.as_dict() for name, timing in on_device.items()},
                "device_note": note,
                "bytes": case.bytes(direction),
                "bytes_per_second": rate,
                "share_of_copy": share,
                "beyond_cache": beyond_cache,
                "pytorch_over_fastvae": ratios["pytorch"],
                "compiled_over_fastvae": ratios["compiled"],
                "missed": missed(
                    case.op.name,
                    direction,
                    share if beyond_cache else None,
                    ratios["pytorch"],
                    ratios["compiled"],
                )
                if settings.device.type == "cuda"
                else None,
                "called_pytorch_over_fastvae": _ratio(called, "pytorch"),
                "called_compiled_over_fastvae": _ratio(called, "compiled"),
            }
        )
    return rows


def missed(
    name: str, direction: str, share_of_copy: float | None, eager: float, compiled: float
) -> list[str]:
    """The targets that a row misses, each with its bound. `share_of_copy`: None where a cache
    helps; `eager`, `compiled`: PyTorch's time over fastvae's."""
    if name in ("reparameterize_kl", "reparameterize_kl_packed"):
        targets = TARGETS["reparameterize_kl"]
    elif "_nll" in name and direction == "forward+backward":
        targets = TARGETS["nll"]
    else:
        targets = {}
    found = {"share_of_copy": share_of_copy, "eager": eager, "compiled": compiled}
    shown = {
        "share_of_copy": "{:.0%} of copy",
        "eager": "{:g}× eager",
        "compiled": "{:g}× compiled",
    }
    return [
        shown[key].format(bound)
        for key, bound in targets.items()
        if (value := found[key]) is not None and not value >= bound
    ]


def _directions(case: Case) -> tuple[str, ...]:
    """The gradient that a forward pass wrote is handed out once: the backward pass that would be
    run again and again on one forward pass is another there."""
    if case.op.backward is None:
        return DIRECTIONS[:1]
    return ("forward", "forward+backward") if case.op.mean else DIRECTIONS


def _cache_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return sys.maxsize  # no claim is made of a CPU's
    return torch.cuda.get_device_properties(device).L2_cache_size


def _on_device(
    case: Case, calls: dict[str, list[Call]], called: dict[str, Timing], settings: Settings
) -> tuple[dict[str, Timing], str]:
    """The time without launching from Python, and how it was found."""
    if settings.device.type != "cuda":
        return called, "as called"
    if case.input_bytes > GRAPHED_BYTES:
        return called, "as called: launching takes no time beside this"
    try:
        graphs = {name: graphed(each) for name, each in calls.items()}
    except RuntimeError as error:
        torch.cuda.synchronize()
        return called, f"as called: no CUDA graph ({str(error).splitlines()[0]})"
    timings = interleaved(
        graphs,
        settings.device,
        rounds=settings.rounds,
        seconds_per_round=settings.seconds_per_round,
    )
    count = len(next(iter(calls.values())))
    scaled = {
        name: Timing(t.median / count, t.q1 / count, t.q3 / count, t.rounds, t.calls * count)
        for name, t in timings.items()
    }
    return scaled, "CUDA graph"


def _more_input_sets(case: Case, device: torch.device) -> list[Tensors]:
    """Further sets where one would stay in the cache: together four times its size."""
    sets = 2
    if device.type == "cuda":
        sets = max(1, min(MOST_INPUT_SETS, -(-4 * _cache_bytes(device) // case.input_bytes)))
    return [case.op.make(case.rows, case.columns, case.dtype, device) for _ in range(sets - 1)]


def _calls(direction: str, compute: Compute, inputs: list[Tensors], mean: bool) -> list[Call]:
    """One call for each set of inputs. All are warmed up: whatever compiles has compiled."""
    makers: dict[str, Callable[[Compute, Tensors, bool], Call]] = {
        "forward": _forward,
        "backward": _backward,
        "forward+backward": _forward_and_backward,
    }
    calls = [makers[direction](compute, each, mean) for each in inputs]
    for call in calls[:3]:
        call()
    return calls


def _forward(compute: Compute, inputs: Tensors, mean: bool) -> Call:
    return lambda: compute(*inputs)


def _backward(compute: Compute, inputs: Tensors, mean: bool) -> Call:
    outputs, wanted = compute(*inputs), leaves(inputs)
    gradients = _gradients(outputs, mean)
    return lambda: torch.autograd.grad(outputs, wanted, gradients, retain_graph=True)


def _forward_and_backward(compute: Compute, inputs: Tensors, mean: bool) -> Call:
    wanted = leaves(inputs)
    gradients = _gradients(compute(*inputs), mean)
    return lambda: torch.autograd.grad(compute(*inputs), wanted, gradients)


def _gradients(outputs: Tensors, mean: bool) -> list[Tensor]:
    """What the outputs meet: that of their mean over the rows, or any numbers."""
    if mean:
        return [torch.full_like(y, 1 / len(y)) for y in outputs]
    return [torch.randn_like(y) for y in outputs]


def _ratio(timings: dict[str, Timing], rival: str) -> float:
    return timings[rival].median / timings["fastvae"].median
