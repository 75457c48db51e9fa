"""What each kernel needs, read off the machine code that Triton makes of it: registers, spills,
shared memory, the width of its loads and stores, and instructions an element.

Needs no GPU: Triton compiles for any, and brings the disassembler.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from fastvae_kernels.triton_kernels import bernoulli_nll, gaussian_nll, reparameterize_kl
from fastvae_kernels.triton_kernels.launch import OPTIONS, TILE
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# By the first word of the instruction, for NVIDIA GPUs since 2018.
INTEGER = {"IADD3", "IADD", "VIADD", "IMAD", "LOP3", "SHF", "ISETP", "LEA", "PRMT", "SEL", "IABS"}
SPECIAL = {"MUFU", "I2F", "I2FP", "F2I", "F2F"}

ELEMENT = {"float32": "*fp32", "bfloat16": "*bf16"}
ITEMSIZE = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Variant:
    """One kernel as one kind of call compiles it. `constants`: beside its tile's, a None for each
    pointer that is not given among them."""

    op: str
    direction: str
    kernel: Any
    constants: dict[str, Any] = field(default_factory=dict)
    floating_target: bool = False


# Several samples are a loop, whose instructions a static count meets once.
_ONE_SAMPLE = {"num_samples": 1, "HAS_PRIOR": False}
_PRIOR = {"num_samples": 1, "HAS_PRIOR": True}
_BYTES, _FLOATS = ({"indices_B": None, "TARGET_SCALE": scale} for scale in (1 / 255, 1.0))
_CHOSEN = {"TARGET_SCALE": 1 / 255}
_ONE = {**_BYTES, "ONE_VARIANCE": True, "grad_logvar_BD": None}
_EACH = {**_BYTES, "ONE_VARIANCE": False}
_NO_GRADIENT = {"grad_logits_BD": None, "grad_mean_BD": None, "row_weight": None}
_LOGITS, _MEAN = bernoulli_nll, gaussian_nll

# The order is that of the table. Packed statistics are other strides, not another kernel.
VARIANTS = (
    Variant(
        "reparameterize_kl, also packed", "forward", reparameterize_kl.forward_kernel, _ONE_SAMPLE
    ),
    Variant(
        "reparameterize_kl, also packed", "backward", reparameterize_kl.backward_kernel, _ONE_SAMPLE
    ),
    Variant("reparameterize_kl, given prior", "forward", reparameterize_kl.forward_kernel, _PRIOR),
    Variant(
        "reparameterize_kl, given prior", "backward", reparameterize_kl.backward_kernel, _PRIOR
    ),
    *(
        Variant(name, direction, kernel, constants, name.endswith("floating target"))
        for name, given in (
            ("bernoulli_nll, uint8 target", _BYTES),
            ("bernoulli_nll, uint8 through indices", _CHOSEN),
            ("bernoulli_nll, floating target", _FLOATS),
        )
        for direction, kernel, constants in (
            ("forward", _LOGITS.forward_kernel, {**given, **_NO_GRADIENT}),
            ("backward", _LOGITS.backward_kernel, given),
            ("forward, row_weight", _LOGITS.forward_kernel, given),
            ("update", _LOGITS.update_kernel, {**given, "ROWS": 8}),
        )
    ),
    *(
        Variant(name, direction, kernel, constants)
        for name, given in (
            ("gaussian_nll, one variance", _ONE),
            ("gaussian_nll, variance of each", _EACH),
        )
        for direction, kernel, constants in (
            ("forward", _MEAN.forward_kernel, {**given, **_NO_GRADIENT, "grad_logvar_BD": None}),
            ("backward", _MEAN.backward_kernel, given),
            ("forward, row_weight", _MEAN.forward_kernel, given),
            ("update", _MEAN.update_kernel, {**given, "ROWS": 8}),
        )
    ),
)


def count(capability: int) -> list[dict[str, Any]]:
    """For a row of one tile, aligned and contiguous. `capability`: 90 for 9.0.

    Bytes: each operand read or written once. Instructions are a static count: the little that a
    program does once is shared among its elements, and both sides of a branch count.
    """
    return [
        {
            "op": variant.op,
            "direction": variant.direction,
            "dtype": dtype,
            "bytes": _bytes(variant, dtype),
            **_read(_machine_code(variant, dtype, capability)),
        }
        for variant in VARIANTS
        for dtype in ELEMENT
    ]


def _machine_code(variant: Variant, dtype: str, capability: int) -> bytes:
    """Compiled as a launch on aligned, contiguous tensors with one row a tile would be."""
    signature: dict[str, str] = {}
    values: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    constants = {**variant.constants, "BLOCK_R": 1, "BLOCK_C": TILE}
    for index, name in enumerate(variant.kernel.arg_names):
        if name in constants:
            signature[name], values[(index,)] = "constexpr", constants[name]
        elif name.endswith("stride_d") and not (name.startswith("logvar") and _is_shared(variant)):
            # Triton makes a constant of every 1.
            signature[name], values[(index,)] = "constexpr", 1
        elif name == "row_weight":
            signature[name] = "fp32"
        else:
            signature[name] = _type(variant, name, dtype)
            attributes[(index,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(variant.kernel, signature, constexprs=values, attrs=attributes),
        target=GPUTarget("cuda", capability, 32),
        options=dict(OPTIONS),
    )
    return compiled.asm["cubin"]


def _type(variant: Variant, name: str, dtype: str) -> str:
    if name in ("seed_ptr", "offset_ptr", "indices_B"):
        return "*i64"
    if name == "target_ND":
        return ELEMENT[dtype] if variant.floating_target else "*u8"
    if name == "logvar_BD" and _is_shared(variant):
        return "*fp32"
    if name.endswith(("_BD", "_SBD")):
        return ELEMENT[dtype]
    if name.endswith(("_B", "_BS", "_BP")):
        return "*fp32"
    return "i32"


def _is_shared(variant: Variant) -> bool:
    """One variance is read with strides of 0, which Triton does not make constants of."""
    return variant.constants.get("ONE_VARIANCE", False)


def _bytes(variant: Variant, dtype: str) -> int:
    total = 0
    for name in variant.kernel.arg_names:
        unused = variant.constants.get(name, 0) is None
        unused |= "prior" in name and not variant.constants["HAS_PRIOR"]
        unused |= name == "logvar_BD" and _is_shared(variant)
        if name.endswith(("_BD", "_SBD", "_ND")) and not unused:
            total += 1 if _type(variant, name, dtype) == "*u8" else ITEMSIZE[dtype]
    return total


def _read(code: bytes) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        text = _run("nvdisasm", "-c", file.name)
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
    found = {key: int(n) for key, n in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    pattern = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)"
    opcodes = re.findall(pattern, text, re.MULTILINE)
    # NOP pads the end of the code and never runs.
    words = Counter(code.split(".")[0] for code in opcodes if code != "NOP")
    each = TILE / (32 * OPTIONS["num_warps"])
    return {
        "registers": found["REG"],
        # A kernel that indexes no array has local memory for what it spills alone.
        "spilled_bytes": found["STACK"] + found["LOCAL"],
        "shared_bytes": found["SHARED"],
        "load_bits": _widths(opcodes, "LDG"),
        "store_bits": _widths(opcodes, "STG"),
        "instructions": words.total() / each,
        "integer": sum(words[k] for k in INTEGER) / each,
        "special": sum(words[k] for k in SPECIAL) / each,
    }


def _widths(opcodes: list[str], instruction: str) -> dict[int, int]:
    """How many accesses of how many bits a thread makes for a tile, the widest first."""
    bits: Counter[int] = Counter()
    for opcode in opcodes:
        first, *rest = opcode.split(".")
        if first == instruction:
            bits[next((int(w) for w in (r.lstrip("US") for r in rest) if w.isdigit()), 32)] += 1
    return dict(sorted(bits.items(), reverse=True))


def _run(tool: str, *arguments: str) -> str:
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    command = [str(bundled) if bundled.exists() else tool, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
