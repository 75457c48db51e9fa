"""Which resource binds each kernel: bytes, integer operations, special functions, or the rate at
which instructions issue. Arithmetic from counts; nothing is timed here.

    python bench/limits.py             # the table of docs/kernels.md, without a GPU
    python bench/limits.py bernoulli   # of the kernels that are called so
"""

import sys
from typing import Any

from report import limits_table

# What one multiprocessor does in a clock, in lanes: CUDA C++ Programming Guide, table of
# arithmetic throughput, compute capability 8.0 and 9.0 (four schedulers of 32 lanes each).
LANES = {"instructions": 128, "integer": 64, "special": 16}

# Of the rate at which instructions could issue, as much can be reached beside loads and stores.
REACHABLE = 0.75
# Bytes a second that a copy moves (the first measured; the second as much less than its data sheet
# says, 4.8e12, as the first), and the clock that a loaded chip holds: 28.7e12 lanes a second issue.
CHIPS: dict[str, dict[str, Any]] = {
    "H100": {"multiprocessors": 132, "max_sm_mhz": 1700.0, "copy": 3.0e12},
    "H200": {"multiprocessors": 132, "max_sm_mhz": 1700.0, "copy": 4.3e12},
}
CAPABILITY = 90


def run(machine: dict[str, Any], copy_bytes_per_second: float | None) -> dict[str, Any]:
    """What binds each kernel on the GPU of `machine`, or where there is none on an H100."""
    from machine_code import count  # needs Triton

    name, capability = machine["device"], CAPABILITY
    if "multiprocessors" in machine and copy_bytes_per_second:
        clock = machine["max_sm_mhz"] or CHIPS["H100"]["max_sm_mhz"]
        chip = {**machine, "max_sm_mhz": clock, "copy": copy_bytes_per_second}
        capability = int(machine["capability"].replace(".", ""))
    else:
        name, chip = "an H100 (none is here)", CHIPS["H100"]
    return {
        "chip": name,
        "copy_bytes_per_second": chip["copy"],
        "sm_mhz": chip["max_sm_mhz"],
        "lanes_per_multiprocessor": LANES,
        "reachable": REACHABLE,
        "rows": [
            {**row, "within_reach": {name: within_reach(row, chip)}} for row in count(capability)
        ],
    }


def within_reach(row: dict[str, Any], chip: dict[str, Any]) -> dict[str, Any]:
    """Picoseconds an element that each resource takes, the one that takes longest, and the share of
    a copy's rate of bytes that it leaves."""
    lanes = chip["multiprocessors"] * chip["max_sm_mhz"] * 1e6
    picoseconds = {"bytes": 1e12 * row["bytes"] / chip["copy"]}
    for resource, width in LANES.items():
        picoseconds[resource] = 1e12 * row[resource] / (REACHABLE * width * lanes)
    binds = max(picoseconds, key=picoseconds.__getitem__)
    share = picoseconds["bytes"] / picoseconds[binds]
    return {"picoseconds": picoseconds, "binds": binds, "share_of_copy": share}


def main() -> None:
    from machine_code import count

    only = sys.argv[1] if len(sys.argv) > 1 else ""
    rows = [
        {**row, "within_reach": {name: within_reach(row, chip) for name, chip in CHIPS.items()}}
        for row in count(CAPABILITY, only)
    ]
    print("\n".join(limits_table(rows)))


if __name__ == "__main__":
    main()
