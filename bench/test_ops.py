"""Each operator, forward and with its backward pass: stock PyTorch, the same compiled, fastvae.

    pytest bench/test_ops.py

Each group is one table of rivals at one size. They are timed one after the other; where the clock
drifts, `python bench/gpu.py --only ops` times them in interleaved rounds instead.
"""

from functools import partial
from typing import Any

import measure
import pytest
import torch
from op_cases import OPS, Case, Compute, Op, Tensors, check_agreement, leaves

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS = 25
SECONDS_PER_ROUND = 0.004
MOST_SECONDS = 0.3
# What the hungriest rival keeps at once, in tensors like an input.
TENSORS_ALIVE = 16


def cases() -> list[Case]:
    """Sizes that suit the device. Every compiled rival costs seconds on a CPU, so there latents
    meet their operator, images theirs, and whole floats are left to the GPU."""
    if DEVICE.type == "cuda":
        sizes = [(2**18, 64), (2**14, 784), (2**16, 1024), (2**14, 4096)]
        return [Case(op, *size, dtype) for op in OPS for size in sizes for dtype in op.dtypes]
    # A row_weight is nothing to the reference, which is what runs on a CPU.
    chosen = [
        op for op in OPS if op.backward is not None and "floating" not in op.name and not op.mean
    ]
    return [
        Case(op, rows, 64 if op.name.startswith("reparameterize_kl") else 784, torch.float32)
        for op in chosen
        for rows in (128, 512)
    ]


def rivals(op: Op) -> dict[str, Compute]:
    computes = {
        "pytorch": op.pytorch,
        "pytorch-compiled": torch.compile(op.pytorch, fullgraph=True, dynamic=False),
        "fastvae": op.fastvae,
        "fastvae-compiled": torch.compile(op.fastvae, fullgraph=True, dynamic=False),
    }
    # Noise alone has no kernel of its own: the operators draw theirs inside.
    if DEVICE.type == "cuda" and op.backward is not None:
        computes["fastvae-triton"] = partial(op.fastvae, impl="triton")
    return computes


RIVALS = [
    *("pytorch", "pytorch-compiled", "fastvae", "fastvae-compiled"),
    pytest.param(
        "fastvae-triton",
        marks=pytest.mark.skipif(DEVICE.type != "cuda", reason="Triton's kernels need a GPU"),
    ),
]


@pytest.fixture(scope="module", params=cases(), ids=str)
def contest(request: pytest.FixtureRequest) -> tuple[Case, Tensors, dict[str, Compute]]:
    """The rivals and what they are given, once they have been seen to agree."""
    case = request.param
    if DEVICE.type == "cuda":
        needed = TENSORS_ALIVE * case.op.samples * case.rows * case.columns * case.dtype.itemsize
        if needed > torch.cuda.mem_get_info()[0]:
            pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    torch._dynamo.reset()
    torch.manual_seed(0)
    inputs = case.op.make(case.rows, case.columns, case.dtype, DEVICE)
    computes = rivals(case.op)
    check_agreement(case, computes, inputs)
    return case, inputs, computes


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def test_op(benchmark: Any, contest: Any, direction: str, rival: str) -> None:
    case, inputs, computes = contest
    if rival not in computes:
        pytest.skip("noise alone has no Triton kernel: the operators draw theirs inside")
    if direction != "forward" and case.op.backward is None:
        pytest.skip("nothing to differentiate")
    compute = computes[rival]
    outputs = compute(*inputs)
    gradients = [torch.full_like(y, 1 / len(y) if case.op.mean else 1.0) for y in outputs]

    def forward() -> None:
        compute(*inputs)
        measure.synchronize(DEVICE)

    def forward_and_backward() -> None:
        torch.autograd.grad(compute(*inputs), leaves(inputs), gradients)
        measure.synchronize(DEVICE)

    call = forward if direction == "forward" else forward_and_backward
    # The fastest of a few: a neighbour's burst of work must not decide how often a round calls.
    seconds = min(measure.seconds(call, 3, DEVICE) for _ in range(5))
    iterations = max(1, round(SECONDS_PER_ROUND / seconds))
    rounds = max(5, min(ROUNDS, round(MOST_SECONDS / (iterations * seconds))))
    benchmark.group = f"{case}, {direction}, {DEVICE.type}"
    benchmark.pedantic(call, rounds=rounds, iterations=iterations, warmup_rounds=2)
