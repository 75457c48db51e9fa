"""The machine: what it is, what is installed on it, and how fast it copies memory."""

import platform
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from bare import MISSING
from measure import interleaved
from settings import Found, Settings

from fastvae.runs import cpu_name

_PACKAGES = ("torch", "triton", "accelerate", "numpy", "fastvae")


def describe(device: torch.device) -> dict[str, Any]:
    """Hardware, driver and versions."""
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    found: dict[str, Any] = {"versions": versions, "system": platform.platform(), "cpu": cpu_name()}
    if device.type != "cuda":
        return found | {"device": found["cpu"], "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    return found | {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "driver": _nvidia_smi("driver_version"),
        "max_sm_mhz": _number(_nvidia_smi("clocks.max.sm")),
    }


def copy_bandwidth(settings: Settings) -> Iterator[Found]:
    """The machine, and bytes a second of a large copy within the device's memory, read and written
    both counted."""
    yield "facts", {"machine": {**describe(settings.device), "missing": MISSING}}
    size = 2**24 if settings.quick or settings.device.type == "cpu" else 2**30
    if settings.device.type == "cuda":
        size = min(size, torch.cuda.mem_get_info(settings.device)[0] // 4)
    source = torch.randint(256, (size,), dtype=torch.uint8, device=settings.device)
    target = torch.empty_like(source)
    timing = interleaved(
        {"copy": lambda: target.copy_(source)},
        settings.device,
        rounds=settings.rounds,
        seconds_per_round=settings.seconds_per_round,
    )["copy"]
    rate = 2 * source.nbytes / timing.median
    found = {"bytes_per_second": rate, "buffer_bytes": source.nbytes, "timing": timing.as_dict()}
    yield "facts", found


def kernel_limits(settings: Settings) -> Iterator[Found]:
    """Which resource binds each kernel, by `limits.py`."""
    import limits  # needs Triton

    yield "facts", limits.run(describe(settings.device), settings.copy_bytes_per_second)


def _nvidia_smi(field: str) -> str | None:
    index = str(torch.cuda.current_device())
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", "-i", index]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None
