"""How many threads the steps of a run take on a CPU."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# An eager step of fewer floating-point operations gains next to nothing by a second thread, and
# beside other programs loses most of its speed to the wait for one that they have pushed aside. A
# constant, so that the same run is always rounded alike.
FLOPS_WORTH_THREADS = 2e8

_NAMES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def take_one_thread_for_short_steps(flops: float) -> None:
    """`flops`: of the matrix products and convolutions of one eager step. The number of threads
    stays what it is where the user has said one in the environment."""
    if flops < FLOPS_WORTH_THREADS and not any(os.environ.get(name) for name in _NAMES):
        torch.set_num_threads(1)


@contextmanager
def threads_as_before() -> Iterator[None]:
    """Give the program its own number of threads back at the end."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
