"""How this process gets its memory from the system."""

import ctypes

# Of mallopt(3), in glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let glibc reuse large blocks instead of giving them back to the system at once.

    A tensor above 32 MB on a CPU is otherwise a fresh mapping each time it is made, and the system
    clears its every page before it can be written: an eager convolutional training step on 2 cores
    took 1.6 times as long. Returns whether this C library could be told so.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False  # not glibc
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
