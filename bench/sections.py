"""The sections of `gpu.py`: what each measures, what must be shown before it, how long it takes."""

from dataclasses import dataclass

# Seconds on one GPU of the H100's class and 16 cores, where nobody has timed them: arithmetic from
# processor seconds on one core of an AMD EPYC (torch 2.11, triton 3.6, Inductor's code for a CPU).
# A process until it computes: 10 (torch 5, the trainer 6, somewhat less on an idle machine). An
# operator forward and backward through Inductor: 3.6 to 4.9, and 0.2 to 0.6 once another process
# has filled the caches; a step: 16 to 61, and 0.5 to 9. One of our Triton kernels for sm_90: 0.1 to
# 0.9. A GPU's generated kernels go through Triton, of which nothing is cheaper than ours: hence the
# margin. Timing: `rounds` × 10 ms for each candidate and way of calling, 200 ms for steps.
START = 10.0
OP, STEP, KERNEL = 1.5, 5.0, 0.5
"""An operator and a step that are in the caches, a kernel that is not."""
HOW = (
    "How the seconds were found: by arithmetic from a CPU, not on a GPU. A process starts in "
    f"{START:g} s; an operator takes {OP:g} s and a step {STEP:g} s to compile where processes "
    "beside the first parity tests have filled the caches (measured with caches: 0.2 to 0.6 s and "
    "0.5 to 9 s; without: 4 to 5 s and 16 to 61 s); a Triton kernel "
    f"{KERNEL:g} s (measured: 0.1 to 0.9 s); timing 10 ms, for steps 200 ms, for each candidate "
    "and round."
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
    share: float = 0.0
    """Of the time that is left when it begins, that it may take in any case."""
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
    # Some 250 kernels on eight cores, with three processes of pytest; then the rest of the warming.
    Section("smoke", "Parity: each kernel, dtype and layout once", 60, "parity:smoke", 1 / 3),
    # 24 cases: three directions, three candidates, two ways of timing.
    Section(
        "ops", "Operators", START + 24 * (OP + 1.3), "op_speed:run", needs=_KERNELS,
        warm="op_speed:warm", warmers=3,
    ),
    # Five cases: two compiled candidates of about five, 200 ms a round each.
    Section(
        "steps", "Training steps", START + 5 * (2 * STEP + 5), "step_speed:run", needs=_STEPS,
        warm="step_speed:warm", warmers=5,
    ),
    # Six runs that begin, evaluate and draw their pictures; four of 20,000 steps.
    Section("train", "Whole runs", START + 6 * 2 + 4 * 3, "train_speed:run", needs=_STEPS),
    # Two processes: start, compilation, 16,000 steps at half a millisecond, scoring.
    Section("speedrun", "Time to quality", 2 * (START + STEP + 8 + 10), "seeds:run", needs=_STEPS),
    Section("memory", "Memory of a step", START + 20, "memory:run", needs=_KERNELS),
    # Some 1,500 kernels on eight cores.
    Section("parity", "Parity: all tests", START + 1500 * KERNEL / 8, "parity:full"),
    Section("growth", "Growth", START + 25, "growth:run", needs=_STEPS),
    Section("limits", "What binds each kernel", 40, "machine:kernel_limits"),
    Section("more-ops", "Operators at other sizes", 200, "op_speed:run_more", needs=_KERNELS),
    Section("more-steps", "Other training steps", 600, "step_speed:run_more", needs=_STEPS),
)  # fmt: skip
