"""`row_uniforms` and `row_normals` of philox.py by C code, which gives the same bits."""

import ctypes
import functools
import logging
import os
import subprocess
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fastvae_kernels.cpu import build

_log = logging.getLogger(__name__)


def is_direct(*inputs: Tensor) -> bool:
    """Whether C code may read `inputs` and write new tensors: each is one int64 in a plain tensor
    on the CPU, and nothing traces, transforms or watches the operations."""
    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or is_in_torch_dispatch_mode()
        or torch._C._functorch.peek_interpreter_stack() is not None
    ):
        return False
    return all(
        type(x) is Tensor and x.is_cpu and x.dtype == torch.int64 and x.numel() == 1 for x in inputs
    )


def is_switched_off() -> bool:
    return os.environ.get("FASTVAE_NO_C", "0") not in ("", "0")


WAS_SWITCHED_OFF = is_switched_off()
"""At the start: a compiler's trace cannot look."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The C code; None where FASTVAE_NO_C is set or it cannot be built (a debug message says why).

    Whether it computes the right thing is for the caller to see.
    """
    if is_switched_off():
        return None
    try:
        loaded = build.load(Path(__file__).with_name("philox.c"))
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        for name, arguments in {
            "fastvae_uniforms": [pointer, size, size, pointer, pointer],
            "fastvae_normals": [pointer, size, size, size, pointer, pointer],
        }.items():
            function = getattr(loaded, name)
            function.argtypes, function.restype = arguments, None
        return loaded
    except Exception as error:  # whatever it is, PyTorch draws the same noise
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) else ""
        _log.debug("PyTorch draws the noise on the CPU, not C: %s %s", error, said)
        return None


def row_uniforms(c: ctypes.CDLL, rows: int, columns: int, seed: Tensor, offset: Tensor) -> Tensor:
    """As in philox.py; `seed` and `offset` are direct (see `is_direct`)."""
    out = torch.empty(rows, columns, dtype=torch.float32, device="cpu")
    c.fastvae_uniforms(out.data_ptr(), rows, columns, seed.data_ptr(), offset.data_ptr())
    return out


def row_normals(
    c: ctypes.CDLL, rows: int, columns: int, seed: Tensor, offset: Tensor, samples: int | None
) -> Tensor:
    """As in philox.py; `seed` and `offset` are direct (see `is_direct`)."""
    shape = (rows, columns) if samples is None else (samples, rows, columns)
    out = torch.empty(shape, dtype=torch.float32, device="cpu")
    drawn = 1 if samples is None else samples
    c.fastvae_normals(out.data_ptr(), drawn, rows, columns, seed.data_ptr(), offset.data_ptr())
    return out
