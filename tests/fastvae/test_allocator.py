"""Large tensors are made of memory that this process already has."""

import subprocess
import sys

import pytest

from fastvae.allocator import keep_freed_memory

COUNT = """
import resource, sys, torch
from fastvae.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(4):
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how: str) -> int:
    """Pages that the system had to give for ten tensors of 64 MB, one after the other."""
    done = subprocess.run(
        [sys.executable, "-c", COUNT, how], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_no_page_is_cleared_twice() -> None:
    if not keep_freed_memory():
        pytest.skip("this C library is not glibc")
    assert page_faults("keep") < page_faults("as it comes") / 10
