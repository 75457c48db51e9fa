"""Instructions of each kernel, counted in the machine code that Triton makes of it.

Needs no GPU: Triton compiles for any, and brings the disassembler.
"""

import re
import subprocess
import tempfile
from collections import Counter
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
_SPLIT = {"BLOCK_R": 1, "BLOCK_C": TILE}
_BYTES = {**_SPLIT, "TARGET_SCALE": 1 / 255}
_FLOATS = {**_SPLIT, "TARGET_SCALE": 1.0}
# Several samples are a loop, whose instructions a static count meets once.
_LATENTS = {**_SPLIT, "num_samples": 1, "HAS_PRIOR": False}

# The operator's name in the table, its module, the constants of both kernels, of the backward.
KERNELS: tuple[tuple[str, Any, dict[str, Any], dict[str, Any]], ...] = (
    ("reparameterize_kl", reparameterize_kl, _LATENTS, {}),
    ("reparameterize_kl, given prior", reparameterize_kl, {**_LATENTS, "HAS_PRIOR": True}, {}),
    ("bernoulli_nll, uint8 target", bernoulli_nll, _BYTES, {}),
    ("bernoulli_nll, floating target", bernoulli_nll, _FLOATS, {}),
    ("gaussian_nll, one variance", gaussian_nll, _BYTES, {"WRITE_GRAD_LOGVAR": False}),
    ("gaussian_nll, variance of each", gaussian_nll, _BYTES, {"WRITE_GRAD_LOGVAR": True}),
)


def count(capability: int) -> list[dict[str, Any]]:
    """Instructions for each element, for a row of one tile, aligned and contiguous.

    A static count: the little that a program does once is shared among its elements, and both
    sides of a branch count. `capability`: 90 for 9.0.
    """
    found = []
    for op, module, constants, backward_constants in KERNELS:
        for direction in ("forward", "backward"):
            for dtype in ELEMENT:
                kernel = getattr(module, f"{direction}_kernel")
                extra = backward_constants if direction == "backward" else {}
                code = _machine_code(kernel, constants | extra, dtype, op, capability)
                found.append(
                    {
                        "op": op,
                        "direction": direction,
                        "dtype": dtype,
                        **_per_element(_instructions(code)),
                    }
                )
    return found


def _machine_code(
    kernel: Any, constants: dict[str, Any], dtype: str, op: str, capability: int
) -> bytes:
    """Compiled as a launch on aligned, contiguous tensors with one row a tile would be."""
    signature: dict[str, str] = {}
    values: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(index,)] = "constexpr", constants[name]
        elif name.endswith("stride_d") and not _is_shared(name, op):
            # Triton makes a constant of every 1.
            signature[name], values[(index,)] = "constexpr", 1
        else:
            signature[name] = _type(name, dtype, op)
            attributes[(index,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs=values, attrs=attributes),
        target=GPUTarget("cuda", capability, 32),
        options=dict(OPTIONS),
    )
    return compiled.asm["cubin"]


def _type(name: str, dtype: str, op: str) -> str:
    if name in ("seed_ptr", "offset_ptr"):
        return "*i64"
    if name == "target_BD" and "floating" not in op:
        return "*u8"
    if name == "logvar_BD" and _is_shared(name, op):
        return "*fp32"
    if name.endswith(("_BD", "_SBD")):
        return ELEMENT[dtype]
    if name.endswith(("_B", "_BS", "_BP")):
        return "*fp32"
    return "i32"


def _is_shared(name: str, op: str) -> bool:
    """One variance is read with strides of 0, which Triton does not make constants of."""
    return name.startswith("logvar") and op.endswith("one variance")


def _instructions(code: bytes) -> Counter[str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        command = [_disassembler(), "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    pattern = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)"
    return Counter(re.findall(pattern, text, re.MULTILINE))


def _disassembler() -> str:
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return str(bundled) if bundled.exists() else "nvdisasm"


def _per_element(instructions: Counter[str]) -> dict[str, float]:
    # NOP pads the end of the code and never runs.
    instructions = Counter({k: n for k, n in instructions.items() if k != "NOP"})
    each = TILE / (32 * OPTIONS["num_warps"])
    return {
        "instructions": instructions.total() / each,
        "integer": sum(instructions[k] for k in INTEGER) / each,
        "special": sum(instructions[k] for k in SPECIAL) / each,
    }
