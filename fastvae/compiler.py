"""torch.compile on this machine: whether it works, and where it keeps what it made."""

import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from types import FunctionType
from typing import Any

import torch
from fastvae_kernels.cpu.build import cache_folder
from torch import nn

from fastvae.errors import UserError


def keep_compiled_code() -> None:
    """Let Inductor keep its code where the next process, or the one after a restart, finds it.

    Its own default is the system's folder of temporary files. $TORCHINDUCTOR_CACHE_DIR goes first.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))


def require_compiler(device: torch.device) -> None:
    """Raise UserError where nothing can be compiled for `device`, for --compile on.

    It looks for the tools and compiles nothing, which takes seconds: what else may fail shows when
    the first step is compiled.
    """
    if problem := compiler_problem(device):
        raise UserError(f"--compile on: torch.compile does not work here: {problem}")


def compiler_problem(device: torch.device) -> str:
    """Which tool is missing, or nothing."""
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler  # seconds, once

        try:
            get_cpp_compiler()
        except Exception as error:  # no compiler has several faces
            return _first_line(error)
        return ""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if not os.environ.get("CC") and not any(map(shutil.which, ("gcc", "clang", "cc"))):
        return "there is no C compiler, with which Triton loads its kernels"
    return ""


class Compiled:
    """A function, compiled in one graph when it is first called; if that fails, called as it is.

    Nothing of it has run by then: tracing and code generation come first, those of the backward
    pass too.
    """

    def __init__(self, function: Callable[..., Any], *, required: bool) -> None:
        """`required`: what cannot be compiled is a UserError, for --compile on."""
        self.function, self.required = function, required
        self.compiled = torch.compile(_of_its_own(function), fullgraph=True, dynamic=False)
        self.called = False
        self.problem = ""
        """Why it is not compiled, in one line."""

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        if self.problem:
            return self.function(*arguments, **keywords)
        if self.called:
            return self.compiled(*arguments, **keywords)
        try:
            with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
                result = self.compiled(*arguments, **keywords)
        except Exception as error:  # Dynamo, Inductor and Triton have many
            if not type(error).__module__.startswith(
                ("torch._dynamo", "torch._inductor", "triton")
            ):
                raise
            self.problem = _first_line(error)
            if self.required:
                raise UserError(
                    f"--compile on: this model cannot be compiled: {self.problem}"
                ) from error
            return self.function(*arguments, **keywords)
        self.called = True
        return result


def _of_its_own(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled code is kept with the function's code, which would be that of every run in this
    process; and `Updates` does not ask again which of them it is for."""
    if isinstance(function, FunctionType):
        function.__code__ = function.__code__.replace()
    return function


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    told = (line for line in lines if line and not line.startswith("backend="))
    return next(told, type(error).__name__)


def compile_in_place(module: nn.Module, *, required: bool) -> Compiled:
    """As `module.compile(fullgraph=True)`, which keeps the names of its parameters."""
    compiled = Compiled(module._call_impl, required=required)
    module._compiled_call_impl = compiled
    return compiled
