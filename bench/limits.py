"""Which resource binds each operator: bytes, integer operations, special functions, or the rate at
which instructions issue. Arithmetic from counts; nothing is timed here."""

from typing import Any

import torch
from op_cases import OPS

# What one multiprocessor does in a clock, in lanes: CUDA C++ Programming Guide, table of
# arithmetic throughput, compute capability 8.0 and 9.0 (four schedulers of 32 lanes each).
LANES = {"instructions": 128, "integer": 64, "special": 16}

# A named chip, for a run that has none: 4.3e12 bytes a second was measured as a copy on an H200.
EXAMPLE: dict[str, Any] = {
    "device": "NVIDIA H200 (by arithmetic; none is here)",
    "multiprocessors": 132,
    "max_sm_mhz": 1980.0,
    "capability": "9.0",
}
EXAMPLE_COPY = 4.3e12


def run(machine: dict[str, Any], copy_bytes_per_second: float | None) -> dict[str, Any]:
    """Picoseconds an element that each resource takes, and the one that takes longest."""
    from machine_code import count  # needs Triton

    if "multiprocessors" not in machine:
        machine, copy_bytes_per_second = EXAMPLE, EXAMPLE_COPY
    assert copy_bytes_per_second is not None
    clock = (machine["max_sm_mhz"] or EXAMPLE["max_sm_mhz"]) * 1e6
    ops = {op.name: op for op in OPS}
    rows = []
    for row in count(int(machine["capability"].replace(".", ""))):
        moved = getattr(ops[row["op"]], row["direction"])
        columns = 1024  # the bytes of each row hardly count in rows of a whole tile
        item_bytes = moved.of(1, columns, getattr(torch, row["dtype"])) / columns
        lanes = machine["multiprocessors"] * clock
        picoseconds = {"bytes": 1e12 * item_bytes / copy_bytes_per_second}
        for resource, width in LANES.items():
            picoseconds[resource] = 1e12 * row[resource] / (width * lanes)
        binding = max(picoseconds, key=picoseconds.__getitem__)
        rows.append(
            {
                **row,
                "bytes": item_bytes,
                "picoseconds": picoseconds,
                "binds": binding,
                "most_share_of_copy": picoseconds["bytes"] / picoseconds[binding],
            }
        )
    return {
        "chip": machine["device"],
        "copy_bytes_per_second": copy_bytes_per_second,
        "sm_mhz": clock / 1e6,
        "lanes_per_multiprocessor": LANES,
        "rows": rows,
    }
