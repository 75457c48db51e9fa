"""What each kernel needs, read off the machine code that Triton makes of it: registers, spills,
shared memory, the width of its loads and stores, and instructions an element.

Needs no GPU: Triton compiles for any, and brings the disassembler.
"""

import math
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from fastvae_kernels.triton_kernels import (
    bernoulli_nll,
    gaussian_nll,
    logistic_mixture_nll,
    reparameterize_kl,
)
from fastvae_kernels.triton_kernels.launch import OPTIONS, tiling
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# By the first word of the instruction, for NVIDIA GPUs since 2018.
INTEGER = {"IADD3", "IADD", "VIADD", "IMAD", "LOP3", "SHF", "ISETP", "LEA", "PRMT", "SEL", "IABS"}
SPECIAL = {"MUFU", "I2F", "I2FP", "F2I", "F2F"}

# As many rows as any GPU is filled by, and the components of a mixture.
ROWS, MIXTURES = 65536, 10

ELEMENT = {"float32": "*fp32", "bfloat16": "*bf16"}
ITEMSIZE = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Variant:
    """One kernel as one kind of call compiles it. `constants`: beside its tile's, a None for each
    pointer that is not given among them. `sizes`: columns (or pixels) of a row."""

    op: str
    direction: str
    kernel: Any
    constants: dict[str, Any]
    sizes: tuple[int, ...]
    floating_target: bool = False
    samples: int = 1


_BYTES, _FLOATS = ({"indices_B": None, "TARGET_SCALE": scale} for scale in (1 / 255, 1.0))
_CHOSEN = {"TARGET_SCALE": 1 / 255}
_ONE = {**_BYTES, "ONE_VARIANCE": True, "grad_logvar_BD": None}
_EACH = {**_BYTES, "ONE_VARIANCE": False}
_NO_GRADIENT = {"grad_logits_BD": None, "grad_mean_BD": None, "row_weight": None}
_LOGITS, _MEAN, _LATENT, _MIXTURE = (
    bernoulli_nll,
    gaussian_nll,
    reparameterize_kl,
    logistic_mixture_nll,
)
_LEVELS = {"indices_B": None, "TARGET_SCALE": 1.0, "CHANNELS": 3, "LEVELS": 256}

# Of the presets: 20 latents, images of 28×28 and of 32×32×3; and a width that idles no lane.
LATENTS, PIXELS = (20, 1024), (784, 3072)

# The order is that of the table. Packed statistics are other strides, not another kernel.
VARIANTS = (
    *(
        Variant(name, direction, kernel, {"HAS_PRIOR": prior}, sizes, samples=samples)
        for name, prior, samples, sizes in (
            ("reparameterize_kl, also packed", False, 1, LATENTS),
            ("reparameterize_kl, 8 samples", False, 8, LATENTS),
            ("reparameterize_kl, given prior", True, 1, LATENTS[1:]),
        )
        for direction, kernel in (
            ("forward", _LATENT.forward_kernel),
            ("backward", _LATENT.backward_kernel),
        )
    ),
    *(
        Variant(name, direction, kernel, constants, sizes, name.endswith("floating target"))
        for name, given, sizes in (
            ("bernoulli_nll, uint8 target", _BYTES, PIXELS),
            ("bernoulli_nll, uint8 through indices", _CHOSEN, PIXELS[:1]),
            ("bernoulli_nll, floating target", _FLOATS, PIXELS[:1]),
        )
        for direction, kernel, constants in (
            ("forward", _LOGITS.forward_kernel, {**given, **_NO_GRADIENT}),
            ("backward", _LOGITS.backward_kernel, given),
            ("forward, row_weight", _LOGITS.forward_kernel, given),
        )
    ),
    *(
        Variant(name, direction, kernel, constants, sizes)
        for name, given, sizes in (
            ("gaussian_nll, one variance", _ONE, PIXELS),
            ("gaussian_nll, variance of each", _EACH, PIXELS[1:]),
        )
        for direction, kernel, constants in (
            ("forward", _MEAN.forward_kernel, {**given, **_NO_GRADIENT, "grad_logvar_BD": None}),
            ("backward", _MEAN.backward_kernel, given),
            ("forward, row_weight", _MEAN.forward_kernel, given),
        )
    ),
    Variant("logistic_mixture_nll", "forward", _MIXTURE.forward_kernel, _LEVELS, (1024,)),
    Variant("logistic_mixture_nll", "backward", _MIXTURE.backward_kernel, _LEVELS, (1024,)),
)


def count(capability: int, only: str = "") -> list[dict[str, Any]]:
    """For as many rows as fill a GPU, aligned and contiguous. `capability`: 90 for 9.0. `only`:
    the variants whose name contains this.

    An element is one of `[B, D]`, with all samples of it, or with all components and colours of a
    pixel. Bytes: each operand read or written once. Instructions are a static count in which what
    a loop repeats counts as often as it is repeated, shared among the elements that there are:
    lanes that a mask idles are paid for by the others. Both sides of a branch count.
    """
    return [
        {
            "op": variant.op,
            "direction": variant.direction,
            "dtype": dtype,
            "columns": columns,
            "bytes": _bytes(variant, dtype),
            **_read(variant, _machine_code(variant, dtype, columns, capability), columns),
        }
        for variant in VARIANTS
        if only in variant.op
        for columns in variant.sizes
        for dtype in ELEMENT
    ]


def _cut(variant: Variant, columns: int) -> tuple[int, int, list[int]]:
    """BLOCK_R, BLOCK_C and how often the loops of a program run: over the parts of a row (1 where
    a program has one tile alone) and, inside, over samples or components."""
    if variant.kernel in (_MIXTURE.forward_kernel, _MIXTURE.backward_kernel):
        return *_MIXTURE.tile(ROWS, columns), [1, MIXTURES]
    loops = variant.kernel in (k.forward_kernel for k in (_LOGITS, _MEAN, _LATENT))
    tiles = tiling(ROWS, columns, loops=loops)
    parts = tiles.column_programs if loops else 1
    return tiles.block_r, tiles.block_c, [parts, variant.samples]


def _machine_code(variant: Variant, dtype: str, columns: int, capability: int) -> bytes:
    """Compiled as a launch on aligned, contiguous tensors would be."""
    signature: dict[str, str] = {}
    values: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    block_r, block_c, _ = _cut(variant, columns)
    constants = {**variant.constants, "BLOCK_R": block_r, "BLOCK_C": block_c}
    if variant.samples == 1:
        constants["num_samples"] = 1
    for index, name in enumerate(variant.kernel.arg_names):
        if name in constants:
            signature[name], values[(index,)] = "constexpr", constants[name]
        elif name.endswith(("stride_d", "stride_n")) and not (
            name.startswith("logvar") and _is_shared(variant)
        ):
            # Triton makes a constant of every 1.
            signature[name], values[(index,)] = "constexpr", 1
        elif name == "row_weight":
            signature[name] = "fp32"
        else:
            signature[name] = _type(variant, name, dtype)
            # Triton tells multiples of 16 apart.
            if not (columns % 16 and (name == "D" or name.endswith("stride_b"))) and name not in (
                *("num_samples", "M"),
            ):
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
    if name in ("target_ND", "target_TCN"):
        return ELEMENT[dtype] if variant.floating_target else "*u8"
    if name == "logvar_BD" and _is_shared(variant):
        return "*fp32"
    if name.endswith(("_BD", "_SBD", "_BPN")):
        return ELEMENT[dtype]
    if name.endswith(("_B", "_BS", "_BP", "_B2N")):
        return "*fp32"
    return "i32"


def _is_shared(variant: Variant) -> bool:
    """One variance is read with strides of 0, which Triton does not make constants of."""
    return variant.constants.get("ONE_VARIANCE", False)


def _bytes(variant: Variant, dtype: str) -> int:
    total = 0
    for name in variant.kernel.arg_names:
        unused = variant.constants.get(name, 0) is None
        unused |= name.startswith(("prior", "grad_prior")) and not variant.constants["HAS_PRIOR"]
        unused |= name == "logvar_BD" and _is_shared(variant)
        if name.endswith(("_BD", "_SBD", "_ND")) and not unused:
            size = 1 if _type(variant, name, dtype) == "*u8" else ITEMSIZE[dtype]
            total += size * (variant.samples if name.endswith("_SBD") else 1)
        total += {"_BPN": 10 * MIXTURES * ITEMSIZE[dtype], "_TCN": 3, "_B2N": 8}.get(name[-4:], 0)
    return total


def _read(variant: Variant, code: bytes, columns: int) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        text = _run("nvdisasm", "-c", file.name)
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
    found = {key: int(n) for key, n in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    block_r, block_c, trips = _cut(variant, columns)
    padded = -(-columns // block_c) * block_c
    each = block_r * block_c * trips[0] * (columns / padded) / (32 * OPTIONS["num_warps"])
    opcodes, depths = _loops(text)
    words: Counter[str] = Counter()
    # A loop that runs once is none, or stands there as one.
    repeated = [n for n in trips if n > 1] if max(depths) < len(trips) else trips
    for opcode, depth in zip(opcodes, depths, strict=True):
        words[opcode.split(".")[0]] += math.prod(repeated[:depth])
    return {
        "registers": found["REG"],
        # A kernel that indexes no array has local memory for what it spills alone.
        "spilled_bytes": found["STACK"] + found["LOCAL"],
        "shared_bytes": found["SHARED"],
        "idle": 1.0 - columns / padded,
        "load_bits": _widths(opcodes, "LDG"),
        "store_bits": _widths(opcodes, "STG"),
        "instructions": words.total() / each,
        "integer": sum(words[k] for k in INTEGER) / each,
        "special": sum(words[k] for k in SPECIAL) / each,
    }


def _loops(text: str) -> tuple[list[str], list[int]]:
    """The instructions and in how many loops each stands: a loop ends in a branch backwards.

    Raises:
        RuntimeError: a compiler has unrolled a loop, so that a count of its turns is needed.
    """
    pattern = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)"
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    spans: list[tuple[int, int]] = []
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(opcodes)
        elif (found := re.match(pattern, line)) and found[1] != "NOP":  # which pads the end
            target = re.search(r"\.L_x_\d+", found[2]) if found[1].startswith("BRA") else None
            # The last branch is one to itself, which guards the end of the code.
            if target and labels.get(target[0], len(opcodes)) < len(opcodes):
                spans.append((labels[target[0]], len(opcodes)))
            opcodes.append(found[1])
    if any(end < start for _, end in spans for start, _ in spans):
        raise RuntimeError(f"loops one after another: {spans}")
    return opcodes, [
        sum(first <= at <= last for first, last in spans) for at in range(len(opcodes))
    ]


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
