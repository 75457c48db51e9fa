"""The sections of `gpu.py`: what each measures, what must be shown before it, how long it takes."""

from collections.abc import Sequence
from dataclasses import dataclass

from settings import Settings

# Seconds, on one GPU of the H100's class and 16 cores. Nobody has timed them there. They are
# arithmetic from what compiling takes on one core of an AMD EPYC (torch 2.11, triton 3.6,
# processor seconds): a process until it can compute, START; an operator forward and backward
# through Inductor, COMPILED, of which CACHED is left where another process has compiled it before
# (tracing, and loading what is in the cache); a whole step likewise; one of our Triton kernels,
# KERNEL. Timing adds `rounds` × 10 ms for each candidate and way, 200 ms for steps.
START = 8.0
COMPILED_OP, CACHED_OP, COMPILED_STEP, CACHED_STEP, KERNEL = 8.0, 1.5, 20.0, 5.0, 0.6
HOW = (
    "How the seconds were found: by arithmetic, not on a GPU. A process starts in "
    f"{START:g} s; an operator compiles in {COMPILED_OP:g} s, or {CACHED_OP:g} s from the cache "
    f"that other processes fill during the first parity tests; a step in {COMPILED_STEP:g} s, or "
    f"{CACHED_STEP:g} s; a Triton kernel in {KERNEL:g} s (measured on one CPU core); timing takes "
    "10 ms, for steps 200 ms, for each candidate and round."
)


@dataclass(frozen=True)
class Section:
    """One part of the run, in a process of its own."""

    name: str
    title: str
    seconds: float
    """That it takes, as far as is known."""
    run: str
    """MODULE:FUNCTION, which is given `Settings` and yields what it finds (`settings.Found`)."""
    needs: tuple[str, ...] = ()
    """Which of the parity tests must be green before."""
    warm: str = ""
    """MODULE:FUNCTION, which compiles the cases of one `Settings.part`, for the caches."""
    warmers: int = 0
    """So many processes do so at once, where there are 16 cores."""


_KERNELS, _STEPS = ("kernels",), ("kernels", "replay", "compiled")

# What is worth most comes first: a run may be cut at any moment.
SECTIONS = (
    Section("copy", "Copying memory", START + 2, "machine:copy_bandwidth"),
    Section("smoke", "Parity: each kernel, dtype and layout once", 60, "parity:smoke"),
    # 26 operators, sizes and dtypes: three directions, three candidates, two ways of timing.
    Section(
        "ops", "Operators", START + 26 * (CACHED_OP + 1.3), "op_speed:run", _KERNELS,
        "op_speed:warm", 3,
    ),
    # Eight cases; two compiled candidates of about five, 200 ms a round each.
    Section(
        "steps", "Training steps", START + 6 * (2 * CACHED_STEP + 5), "step_speed:run", _STEPS,
        "step_speed:warm", 6,
    ),
    Section("train", "Whole runs", START + CACHED_STEP + 5 * 5, "train_speed:run", _STEPS),
    # Two processes: start, compilation, 16,000 steps at half a millisecond, scoring.
    Section("speedrun", "Time to quality", 2 * 35, "seeds:run", _STEPS),
    Section("memory", "Memory of a step", START + 4 * COMPILED_OP, "memory:run", _KERNELS),
    # Some 1,500 Triton kernels on eight cores.
    Section("parity", "Parity: all tests", 15 + 800 * KERNEL / 8, "parity:full"),
    Section("growth", "Growth", START + 25, "growth:run", _STEPS),
    Section("limits", "What binds each kernel", 40, "machine:kernel_limits"),
    Section("more-ops", "Operators at other sizes", 150, "op_speed:run_more", _KERNELS),
    Section("more-steps", "Other training steps", 240, "step_speed:run_more", _STEPS),
)  # fmt: skip
