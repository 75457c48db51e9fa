"""A CUDA device that is not there: its tensors have shapes and no memory, its code is generated and
never run. What a step would launch on it can so be counted on any machine."""

import ctypes
import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import fx
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import scheduler
from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
from torch._subclasses import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

DEVICE = torch.device("cuda", 0)
CAPABILITY = 9, 0  # an H100
MULTIPROCESSORS = 132


@contextmanager
def pretended_gpu() -> Iterator[FakeTensorMode]:
    """Tensors made inside are shapes alone, on `DEVICE`. Needs a PyTorch built for CUDA."""
    _let_backward_passes_run()
    with (
        patch.object(torch.cuda, "device", lambda device: nullcontext()),
        patch.object(UniformValueConstantFolder, "_deduce_value", _deduced_on_cpu),
        FakeTensorMode(allow_non_fake_inputs=True) as mode,
    ):
        yield mode


@contextmanager
def pretended_compiler() -> Iterator[None]:
    """Inductor generates code for `DEVICE` inside."""
    properties = SimpleNamespace(
        name="NVIDIA H100",
        major=CAPABILITY[0],
        minor=CAPABILITY[1],
        multi_processor_count=MULTIPROCESSORS,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        regs_per_multiprocessor=65536,
        shared_memory_per_block_optin=232448,
        shared_memory_per_multiprocessor=233472,
        total_memory=80 * 2**30,
        warp_size=32,
        gcnArchName="",
    )
    triton_driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device=None: 0,
        utils=SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": 232448}),
    )
    worker = CudaInterface.Worker
    with ExitStack() as stack:
        for owner, name, value in (
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "_lazy_init", lambda: None),
            (torch.cuda, "current_device", lambda: 0),
            (torch.cuda, "device_count", lambda: 1),
            (torch.cuda, "get_device_properties", lambda device=None: properties),
            (torch.cuda, "get_device_capability", lambda device=None: CAPABILITY),
            (torch.cuda, "get_rng_state", lambda device=None: torch.zeros(0)),
            (torch.cuda, "set_rng_state", lambda state, device=None: None),
            (torch.cuda, "synchronize", lambda device=None: None),
            (type(driver), "active", triton_driver),
            (scheduler, "has_triton", lambda: True),
            (CudaInterface, "is_available", staticmethod(lambda: True)),
            (CudaInterface, "current_device", staticmethod(lambda: 0)),
            (CudaInterface, "get_compute_capability", staticmethod(lambda device=None: 90)),
            (CudaInterface, "get_device_properties", staticmethod(lambda device=None: properties)),
            (worker, "get_device_properties", staticmethod(lambda device=None: properties)),
        ):
            stack.enter_context(patch.object(owner, name, value))
        yield


_deduced = UniformValueConstantFolder._deduce_value


def _deduced_on_cpu(self: UniformValueConstantFolder, node: fx.Node) -> Any:
    """Inductor finds what is the same number everywhere by computing it, on the device."""
    kwargs = node.kwargs
    if "device" in kwargs:
        node.kwargs = {**kwargs, "device": torch.device("cpu")}
    try:
        return _deduced(self, node)
    finally:
        node.kwargs = kwargs


@functools.cache
def _let_backward_passes_run() -> None:
    """PyTorch's autograd asks whether the device has been begun to be used, which is an error for
    one that is not there: answer no.

    The answer is the fifth entry (after two destructors, isBuilt and isAvailable) of the table of
    virtual functions of ATen/detail/AcceleratorHooksInterface.h, of which the object gets a copy.
    """
    if torch.version.cuda is None or torch.cuda.is_available():
        return
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    hooks_of_cuda = library._ZN2at6detail12getCUDAHooksEv
    hooks_of_cuda.restype = ctypes.c_void_p
    table_of = ctypes.cast(hooks_of_cuda(), ctypes.POINTER(ctypes.c_void_p))
    before, size = 2, 64  # words: what C++ keeps ahead of the table, and no fewer than it has
    word = ctypes.sizeof(ctypes.c_void_p)
    old = (ctypes.c_void_p * (before + size)).from_address(table_of[0] - before * word)
    new = (ctypes.c_void_p * (before + size))(*old)
    answer = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_int8)(lambda self, i: False)
    new[before + 4] = ctypes.cast(answer, ctypes.c_void_p).value
    table_of[0] = ctypes.addressof(new) + before * word
    _kept.extend((new, answer))


_kept: list[Any] = []
