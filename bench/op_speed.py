"""Every operator against PyTorch, eager and compiled: each size, dtype and direction."""

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch._functorch.config as functorch_config
from measure import Call, Timing, graphed, interleaved, rotating, synchronize
from op_cases import OPS, Case, Compute, Tensors, check_agreement, dtype_name, leaves
from settings import Settings

# Rows and columns, from latents of a few images to images by the ten thousand.
SIZES = [
    (1024, 784),
    (65536, 1024),
    (262144, 16),
    (16384, 4096),
    (16384, 784),
    (1024, 16),
    (65536, 4096),
    (262144, 256),
]
QUICK_SIZES = [(64, 16), (32, 256)]
# Larger than this and launching takes no time beside the work: no graph is needed to see it.
GRAPHED_BYTES = 2**28
# What the slowest of the three keeps at once, in tensors like an input.
TENSORS_ALIVE = 40
MOST_INPUT_SETS = 256

BACKENDS = ("pytorch", "compiled", "fastvae")
DIRECTIONS = ("forward", "backward", "forward+backward")


def run(settings: Settings, copy_bytes_per_second: float) -> dict[str, Any]:
    """Time what there is time for. `left_out` names the rest, `failures` what went wrong."""
    results: list[dict[str, Any]] = []
    left_out: list[str] = []
    failures: list[str] = []
    # The backward pass alone is run again on one forward pass, which buffers that it may
    # overwrite do not survive.
    with functorch_config.patch(donated_buffer=False), _side_stream(settings.device):
        for case in _cases(settings):
            if settings.seconds_left < 5:
                left_out.append(f"{case}: no time left")
            elif problem := _too_large(case, settings.device):
                left_out.append(f"{case}: {problem}")
            else:
                try:
                    results += _measure(case, settings, copy_bytes_per_second)
                except Exception as error:  # one case must not cost the others
                    failures.append(f"{case}: {type(error).__name__}: {error}")
                _forget(settings.device)
    return {"rows": results, "left_out": left_out, "failures": failures}


def _cases(settings: Settings) -> Iterator[Case]:
    """Sizes outermost, so that what the time does not reach are whole sizes."""
    for rows, columns in QUICK_SIZES if settings.quick else SIZES:
        for op in OPS:
            for dtype in op.dtypes:
                yield Case(op, rows, columns, dtype)


def _too_large(case: Case, device: torch.device) -> str:
    if device.type != "cuda":
        return "" if case.input_bytes <= 2**26 else "too large for a run on a CPU"
    fits = TENSORS_ALIVE * case.op.samples * case.input_bytes < torch.cuda.mem_get_info(device)[0]
    return "" if fits else "does not fit in the free memory"


def _measure(case: Case, settings: Settings, copy_bytes_per_second: float) -> list[dict[str, Any]]:
    inputs = _input_sets(case, settings.device)
    torch._dynamo.reset()
    computes: dict[str, Compute] = {
        "pytorch": case.op.pytorch,
        "compiled": torch.compile(case.op.pytorch, fullgraph=True, dynamic=False),
        "fastvae": case.op.fastvae,
    }
    check_agreement(case, computes, inputs[0])
    rows = []
    for direction in DIRECTIONS if case.op.backward else DIRECTIONS[:1]:
        calls = {name: _calls(direction, f, inputs) for name, f in computes.items()}
        called = interleaved(
            {name: rotating(each) for name, each in calls.items()},
            settings.device,
            rounds=settings.rounds,
            seconds_per_round=settings.seconds_per_round,
        )
        on_device, note = _on_device(case, calls, called, settings)
        rate = case.bytes(direction) / on_device["fastvae"].median
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
                "share_of_copy": rate / copy_bytes_per_second,
                "pytorch_over_fastvae": _ratio(on_device, "pytorch"),
                "compiled_over_fastvae": _ratio(on_device, "compiled"),
                "called_pytorch_over_fastvae": _ratio(called, "pytorch"),
                "called_compiled_over_fastvae": _ratio(called, "compiled"),
            }
        )
    return rows


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


def _input_sets(case: Case, device: torch.device) -> list[Tensors]:
    """Several sets where one would stay in the cache: together four times its size."""
    sets = 2
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        sets = max(1, min(MOST_INPUT_SETS, -(-4 * cache // case.input_bytes)))
    return [case.op.make(case.rows, case.columns, case.dtype, device) for _ in range(sets)]


def _calls(direction: str, compute: Compute, inputs: list[Tensors]) -> list[Call]:
    """One call for each set of inputs. All are warmed up: whatever compiles has compiled."""
    makers: dict[str, Callable[[Compute, Tensors], Call]] = {
        "forward": _forward,
        "backward": _backward,
        "forward+backward": _forward_and_backward,
    }
    calls = [makers[direction](compute, each) for each in inputs]
    for call in calls[:3]:
        call()
    return calls


def _forward(compute: Compute, inputs: Tensors) -> Call:
    return lambda: compute(*inputs)


def _backward(compute: Compute, inputs: Tensors) -> Call:
    outputs, wanted = compute(*inputs), leaves(inputs)
    gradients = [torch.randn_like(y) for y in outputs]
    return lambda: torch.autograd.grad(outputs, wanted, gradients, retain_graph=True)


def _forward_and_backward(compute: Compute, inputs: Tensors) -> Call:
    wanted = leaves(inputs)
    gradients = [torch.randn_like(y) for y in compute(*inputs)]
    return lambda: torch.autograd.grad(compute(*inputs), wanted, gradients)


def _ratio(timings: dict[str, Timing], rival: str) -> float:
    return timings[rival].median / timings["fastvae"].median


def _side_stream(device: torch.device) -> AbstractContextManager[Any]:
    """A CUDA graph is captured on a stream of its own, where its forward pass must have run."""
    if device.type != "cuda":
        return nullcontext()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(stream)


def _forget(device: torch.device) -> None:
    synchronize(device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
