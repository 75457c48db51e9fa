"""C code, compiled by the system's compiler when it is first needed, and kept for the next process.

The name of a library says what it was made of (source, compiler, flags and, since it may use all of
its instructions, the CPU), so that a home folder shared by different machines never gives one the
other's; and it says what the file contains, so that a damaged one is seen before it is loaded.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

# Each float operation is rounded by itself, as PyTorch rounds it: no product is fused into a sum.
# A square root sets no errno, or it could not be one of many at once.
_FLAGS = ["-std=c11", "-O3", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"]
_FLAGS += ["-fPIC", "-shared"]
_SECONDS = 60


def load(source: Path) -> ctypes.CDLL:
    """The library of one C file, from the cache or compiled into it; any number of processes at
    once may ask.

    Raises:
        OSError: there is no compiler, the cache cannot be written, the library cannot be loaded.
        subprocess.SubprocessError: the compiler fails, or takes a minute.
    """
    # With several threads where the compiler can; those are PyTorch's own, which has loaded OpenMP.
    try:
        return _load(source, [*_FLAGS, "-fopenmp"])
    except subprocess.CalledProcessError:
        return _load(source, _FLAGS)


def _load(source: Path, flags: list[str]) -> ctypes.CDLL:
    cpu = _cpu()
    compiler = _compiler()
    flags = [*flags, "-march=native"] if cpu else flags
    ingredients = [source.read_text(encoding="utf-8"), *compiler, *flags, cpu]
    made_of = _digest("\0".join(ingredients).encode())
    folder = cache_folder() / "kernels"
    for path in sorted(folder.glob(f"{source.stem}-{made_of}-*.so")):
        if path.stem.endswith(_digest(path.read_bytes())):
            return ctypes.CDLL(str(path))
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as scratch:
        built = Path(scratch) / "library.so"
        subprocess.run(
            [*compiler, *flags, str(source), "-o", str(built)],
            check=True,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_SECONDS,
        )
        path = folder / f"{source.stem}-{made_of}-{_digest(built.read_bytes())}.so"
        built.replace(path)  # whole or not at all, whoever else builds it
    return ctypes.CDLL(str(path))


def _compiler() -> list[str]:
    """$CC, which may carry arguments, or what the system has; the first word is a real path."""
    named = shlex.split(os.environ.get("CC", ""))
    candidates = [named] if named else [["cc"], ["gcc"], ["clang"]]
    for program, *arguments in candidates:
        if path := shutil.which(program):
            return [os.path.realpath(path), *arguments]
    raise OSError(f"no C compiler: looked for {', '.join(words[0] for words in candidates)}")


def _cpu() -> str:
    """What the instructions of an x86-64 processor depend on, as Linux tells it; else empty."""
    told = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not told.exists():
        return ""
    kept = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags")
    lines = []
    with told.open(encoding="utf-8") as file:
        for line in file:
            if not line.strip():  # the end of the first core; the others are like it
                break
            if line.partition(":")[0].strip() in kept:
                lines.append(line)
    return "".join(lines)


def cache_folder() -> Path:
    """Where compiled code is kept from one process to the next: $FASTVAE_CACHE_DIR, or `fastvae`
    in $XDG_CACHE_HOME or ~/.cache."""
    if chosen := os.environ.get("FASTVAE_CACHE_DIR"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastvae"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
