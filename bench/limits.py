"""Which resource binds each kernel: bytes, integer operations, special functions, or the rate at
which instructions issue. Arithmetic from counts; nothing is timed here.

    python bench/limits.py     # the table of docs/kernels.md, without a GPU
"""

from typing import Any

from report import limits_table

# What one multiprocessor does in a clock, in lanes: CUDA C++ Programming Guide, table of
# arithmetic throughput, compute capability 8.0 and 9.0 (four schedulers of 32 lanes each).
LANES = {"instructions": 128, "integer": 64, "special": 16}

# A named chip, for a run that has none: its data sheet says 4.8e12 bytes a second.
EXAMPLE: dict[str, Any] = {
    "device": "NVIDIA H200 (by its data sheet; none is here)",
    "multiprocessors": 132,
    "max_sm_mhz": 1980.0,
    "capability": "9.0",
}
EXAMPLE_RATE = 4.8e12
ARCHITECTURES = (80, 90, 100)


def run(machine: dict[str, Any], copy_bytes_per_second: float | None) -> dict[str, Any]:
    """Picoseconds an element that each resource takes, and the one that takes longest."""
    from machine_code import count  # needs Triton

    if "multiprocessors" not in machine:
        machine, copy_bytes_per_second = EXAMPLE, EXAMPLE_RATE
    assert copy_bytes_per_second is not None
    clock = (machine["max_sm_mhz"] or EXAMPLE["max_sm_mhz"]) * 1e6
    rows = []
    for row in count(int(machine["capability"].replace(".", ""))):
        lanes = machine["multiprocessors"] * clock
        picoseconds = {"bytes": 1e12 * row["bytes"] / copy_bytes_per_second}
        for resource, width in LANES.items():
            picoseconds[resource] = 1e12 * row[resource] / (width * lanes)
        binding = max(picoseconds, key=picoseconds.__getitem__)
        rows.append(
            {
                **row,
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


def main() -> None:
    from machine_code import count

    resources = {capability: count(capability) for capability in ARCHITECTURES}
    print("\n".join(limits_table(run({}, None)["rows"], resources)))


if __name__ == "__main__":
    main()
