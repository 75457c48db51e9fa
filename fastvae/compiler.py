"""torch.compile on this machine: whether it works, and where it keeps what it made."""

import os
import re
import shutil
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from fastvae_kernels.cpu.build import cache_folder
from torch import nn

from fastvae import source
from fastvae.errors import UserError

CALLS_THAT_SHOW = 3
"""What can be compiled for the first calls, and holds in the next, is taken to be compiled."""
# A graph is a handful of libraries. What is broken again each time is no relic: a disk is full.
MOST_REPAIRS = 20

_USERS_TAG = os.environ.get("TORCH_COMPILE_CACHE_KEY_TAG", "")
_RECOMPILED = "Detected recompile"  # of the RuntimeError under the stance "fail_on_recompile"


def keep_compiled_code() -> None:
    """Let Inductor keep its code where the next process, or the one after a restart, finds it.

    Its own default is the system's folder of temporary files, which PyTorch settles on when first
    asked. $TORCHINDUCTOR_CACHE_DIR goes first.
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
            return _in_one_line(error)
        return ""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if not os.environ.get("CC") and not any(map(shutil.which, ("gcc", "clang", "cc"))):
        return "there is no C compiler, with which Triton loads its kernels"
    return ""


class Compiled:
    """A function, compiled in one graph when it is first called; where that fails, then or when it
    is to be compiled for something else, called as it is from then on.

    Nothing of a call has run by then: tracing and code generation come first, those of the backward
    pass too.
    """

    def __init__(self, function: Callable[..., Any], *, required: bool) -> None:
        """`required`: what cannot be compiled is a UserError, for --compile on."""
        from torch._functorch import config  # not there before something is compiled

        config.force_non_lazy_backward_lowering = True
        # The next process finds the derivatives too. PyTorch knows operators by their names alone,
        # so that what is kept is said to be of this source.
        config.autograd_cache_allow_custom_autograd_functions = True
        torch.compiler.config.cache_key_tag = _USERS_TAG + source.fingerprint()
        _remove_relics(os.environ.get("TORCHINDUCTOR_CACHE_DIR", ""))
        self.function, self.required = function, required
        self.compiled = torch.compile(_of_its_own(function), fullgraph=True, dynamic=False)
        self.calls = self.repairs = 0
        self.problem = ""
        """Why it is not compiled, in one line."""

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        if self.problem:
            return self.function(*arguments, **keywords)
        try:
            result = self.compiled(*arguments, **keywords)
        except Exception as error:  # Dynamo, Inductor and Triton have many
            if not _is_of_the_compiler(error):
                raise
            if self.repairs < MOST_REPAIRS and _broken_libraries_removed(error):
                self.repairs += 1
                return self(*arguments, **keywords)
            problem = _in_one_line(error)
            if self.required and self.calls < CALLS_THAT_SHOW:
                self.function(*arguments, **keywords)  # where the model's own errors are raised
                text = f"--compile on: this model cannot be compiled: {problem}"
                raise UserError(text) from error
            self.problem = problem
            return self.function(*arguments, **keywords)
        self.calls += 1
        return result


def _is_of_the_compiler(error: Exception) -> bool:
    modules = ("torch._dynamo", "torch._inductor", "triton")
    return type(error).__module__.startswith(modules) or str(error).startswith(_RECOMPILED)


@cache
def _remove_relics(folder: str) -> None:
    """Delete libraries without their end, as a process leaves them that is killed while it links.
    PyTorch tries to load them for ever after, or takes one for a sign that this processor has no
    vector instructions. Those of the last minute may be being linked."""
    for file in Path(folder).glob("*/*.so") if folder else ():
        with suppress(OSError):
            if time.time() - file.stat().st_mtime > 60 and not _has_its_end(file):
                file.unlink()


def _has_its_end(library: Path) -> bool:
    """Whether an ELF file is as long as its header says: the table of sections is the last part."""
    with library.open("rb") as content:
        header = content.read(64)
    if len(header) < 64 or header[:4] != b"\x7fELF":
        return False
    begin, size, count = struct.unpack("<40xQ10xHH2x", header)
    return library.stat().st_size >= begin + size * count


def _broken_libraries_removed(error: Exception) -> bool:
    """The same at once for those that an error of the loader names. Whether any was deleted."""
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")
    if not folder or ("ImportError" not in str(error) and "OSError" not in str(error)):
        return False
    removed = False
    for file in map(Path, re.findall(r"/[^\s:'\"]+\.so\b", str(error))):
        if file.is_relative_to(folder) and file.is_file():
            for part in file.parent.glob(f"{file.name.partition('.')[0]}*.*o"):  # .so and .o
                with suppress(OSError):
                    part.unlink()
                    removed = True
    return removed


def _in_one_line(error: Exception) -> str:
    """What a compiler's error says, and where in whose code, if it knows."""
    text = str(error)
    if text.startswith(_RECOMPILED) or type(error).__name__ == "FailOnRecompileLimitHit":
        changing = re.search(r"- \d+/\d+: (.+?)(?:\s+#|$)", text, re.MULTILINE)
        which = f" (no longer: {changing[1].strip()})" if changing else ""
        return f"it depends on values in Python that change from call to call{which}"
    stack = getattr(error, "real_stack", None)
    where = f" ({stack[-1].filename}:{stack[-1].lineno})" if stack else ""
    lines = [line.strip() for line in text.splitlines()]
    told = (line for line in lines if line and not line.startswith("backend="))
    return next(told, type(error).__name__) + where


def _of_its_own(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled code is kept with the function's code, which would be that of every run in this
    process; and `Updates` does not ask again which of them it is for."""
    if isinstance(function, FunctionType):
        function.__code__ = function.__code__.replace()
    return function


def compile_in_place(module: nn.Module, *, required: bool) -> Compiled:
    """As `module.compile(fullgraph=True)`, which keeps the names of its parameters."""
    compiled = Compiled(module._call_impl, required=required)
    module._compiled_call_impl = compiled
    return compiled
