"""Every kernel compiled for Ampere, Hopper and Blackwell, on a machine that may have none of them.

What a compiler says of a kernel needs no GPU: whether it compiles, whether registers spill, and
whether memory is read and written 128 bits at a time, which decides its speed.
"""

import importlib
import inspect
import pkgutil
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from kernel_cases import INTERPRETING

if INTERPRETING:
    pytest.skip("Triton's interpreter compiles nothing", allow_module_level=True)
triton = pytest.importorskip("triton", reason="the package triton is not installed")
nvidia = pytest.importorskip("triton.backends.nvidia.compiler")

from fastvae_kernels import triton_kernels  # noqa: E402
from fastvae_kernels.triton_kernels import device_math, launch  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime import JITFunction  # noqa: E402

ARCHITECTURES = [80, 90, 100]
DTYPES = {"fp32": 4, "bf16": 2, "fp16": 2}  # bytes
# (batch, columns): many rows in a tile, and a tile that is a part of a row.
SIZES = [(4096, 64), (512, 4096)]


@dataclass
class Kernel:
    """`reads` and `writes`: the floating `[B, D]` or `[S, B, D]` operands. `others`: further
    pointers, by type. `constants`: also a 1 and a None, which Triton makes constants of its own
    accord."""

    reads: list[str]
    writes: list[str]
    others: dict[str, str]
    constants: dict[str, object] = field(default_factory=dict)


SCALARS = {"seed_ptr": "*i64", "offset_ptr": "*i64"}
SCALE = {"TARGET_SCALE": 1 / 255}
TARGET, EACH = {"target_ND": "*u8"}, {"ONE_VARIANCE": False}
PLAIN = {**SCALE, "indices_B": None, "row_weight": None}
UPDATE = {**SCALE, "indices_B": None, "ROWS": 8}
Q, PRIOR = ["mu_BD", "logvar_BD"], ["prior_mu_BD", "prior_logvar_BD"]
GRADS, PRIOR_GRADS = (
    ["grad_mu_BD", "grad_logvar_BD"],
    ["grad_prior_mu_BD", "grad_prior_logvar_BD"],
)
ONE_SAMPLE = {"num_samples": 1, "HAS_PRIOR": False}
KERNELS = {
    ("reparameterize_kl", "forward_kernel"): Kernel(
        Q, ["z_SBD"], {**SCALARS, "kl_BP": "*fp32"}, ONE_SAMPLE
    ),
    ("reparameterize_kl", "backward_kernel"): Kernel(
        [*Q, "grad_z_SBD"], GRADS, {**SCALARS, "grad_kl_B": "*fp32"}, ONE_SAMPLE
    ),
    ("bernoulli_nll", "forward_kernel"): Kernel(
        ["logits_BD"], [], {**TARGET, "nll_BS": "*fp32"}, {**PLAIN, "grad_logits_BD": None}
    ),
    ("bernoulli_nll", "backward_kernel"): Kernel(
        ["logits_BD"], ["grad_logits_BD"], {**TARGET, "grad_nll_B": "*fp32"}, PLAIN
    ),
    ("bernoulli_nll", "update_kernel"): Kernel(
        ["logits_BD"], ["grad_logits_BD"], {**TARGET, "grad_nll_B": "*fp32"}, UPDATE
    ),
    ("gaussian_nll", "forward_kernel"): Kernel(
        ["mean_BD", "logvar_BD"],
        [],
        {**TARGET, "nll_BS": "*fp32"},
        {**PLAIN, **EACH, "grad_mean_BD": None, "grad_logvar_BD": None},
    ),
    ("gaussian_nll", "backward_kernel"): Kernel(
        ["mean_BD", "logvar_BD"],
        ["grad_mean_BD", "grad_logvar_BD"],
        {**TARGET, "grad_nll_B": "*fp32"},
        {**PLAIN, **EACH},
    ),
    ("gaussian_nll", "update_kernel"): Kernel(
        ["mean_BD", "logvar_BD"],
        ["grad_mean_BD", "grad_logvar_BD"],
        {**TARGET, "grad_nll_B": "*fp32"},
        {**UPDATE, **EACH},
    ),
}

# The likelihoods with the gradient written in the forward pass, with a data set to choose from,
# and with one variance.
CHOSEN = {"target_ND": "*u8", "indices_B": "*i64"}
ONE = {"ONE_VARIANCE": True, "grad_logvar_BD": None}
LIKELIHOODS = {
    ("bernoulli_nll", "forward_kernel", "gradient"): Kernel(
        ["logits_BD"],
        ["grad_logits_BD"],
        {**TARGET, "nll_BS": "*fp32"},
        {**SCALE, "indices_B": None},
    ),
    ("bernoulli_nll", "forward_kernel", "gradient, indices"): Kernel(
        ["logits_BD"],
        ["grad_logits_BD"],
        {**CHOSEN, "nll_BS": "*fp32"},
        SCALE,
    ),
    ("bernoulli_nll", "backward_kernel", "indices"): Kernel(
        ["logits_BD"], ["grad_logits_BD"], {**CHOSEN, "grad_nll_B": "*fp32"}, SCALE
    ),
    ("gaussian_nll", "forward_kernel", "gradient, indices"): Kernel(
        ["mean_BD", "logvar_BD"],
        ["grad_mean_BD", "grad_logvar_BD"],
        {**CHOSEN, "nll_BS": "*fp32"},
        {**SCALE, **EACH},
    ),
    ("gaussian_nll", "forward_kernel", "one variance, gradient"): Kernel(
        ["mean_BD"],
        ["grad_mean_BD"],
        {**TARGET, "logvar_BD": "*fp32", "nll_BS": "*fp32"},
        {**SCALE, **ONE, "indices_B": None},
    ),
    ("gaussian_nll", "forward_kernel", "one variance"): Kernel(
        ["mean_BD"],
        [],
        {**TARGET, "logvar_BD": "*fp32", "nll_BS": "*fp32"},
        {**PLAIN, **ONE, "grad_mean_BD": None},
    ),
    ("gaussian_nll", "backward_kernel", "one variance"): Kernel(
        ["mean_BD"],
        ["grad_mean_BD"],
        {**TARGET, "logvar_BD": "*fp32", "grad_nll_B": "*fp32"},
        {**PLAIN, **ONE},
    ),
    ("gaussian_nll", "update_kernel", "one variance"): Kernel(
        ["mean_BD"],
        ["grad_mean_BD"],
        {**TARGET, "logvar_BD": "*fp32", "grad_nll_B": "*fp32"},
        {**UPDATE, **ONE},
    ),
}


# The same kernels with a prior, and with any number of samples.
VARIANTS = {
    f"{name}{label}": Kernel(
        [*spec.reads, *(PRIOR if prior else [])],
        [*spec.writes, *(PRIOR_GRADS if prior and name == "backward" else [])],
        spec.others,
        {"HAS_PRIOR": prior, **({} if samples else {"num_samples": 1})},
    )
    for name in ("forward", "backward")
    for spec in [KERNELS["reparameterize_kl", f"{name}_kernel"]]
    for label, samples, prior in (
        ("-samples", True, False),
        ("-prior", False, True),
        ("-samples-prior", True, True),
    )
}


def modules():
    for info in pkgutil.iter_modules(triton_kernels.__path__):
        yield importlib.import_module(f"{triton_kernels.__name__}.{info.name}")


def jit_functions(module):
    """Those defined in the module itself."""
    for name, value in vars(module).items():
        if isinstance(value, JITFunction) and value.fn.__module__ == module.__name__:
            yield name, value


def test_every_kernel_is_listed():
    found = {
        (module.__name__.rsplit(".", 1)[-1], name)
        for module in modules()
        for name, _ in jit_functions(module)
        if name.endswith("_kernel")
    }
    own_files = ("logistic_mixture_nll", "noise", "binarize")
    elsewhere = {(m, n) for m, n in found if m in own_files}
    assert found - elsewhere == set(KERNELS)


def test_device_math_touches_no_memory():
    """Helpers take values: one that loads or stores is a kernel and belongs in the list above."""
    functions = dict(jit_functions(device_math))
    assert functions
    for name, function in functions.items():
        assert not re.search(r"tl\.(load|store|atomic)", inspect.getsource(function.fn)), name


def compile_kernel(
    module: str, name: str, dtype: str, architecture: int, size, spec=None, **constants
):
    """As the launcher would for contiguous, aligned rows."""
    spec = spec or KERNELS[module, name]
    function = getattr(importlib.import_module(f"{triton_kernels.__name__}.{module}"), name)
    tiles = launch.tiling(*size)
    constants = {
        **spec.constants,
        "BLOCK_R": tiles.block_r,
        "BLOCK_C": tiles.block_c,
        **constants,
    }
    pointers = {**spec.others, **dict.fromkeys(spec.reads + spec.writes, f"*{dtype}")}
    if "HAS_PRIOR" in constants:  # a prior that is not there has pointers all the same
        pointers |= dict.fromkeys(PRIOR + PRIOR_GRADS, f"*{dtype}")
    signature, constexprs, attributes = {}, {}, {}
    for i, parameter in enumerate(function.params):
        argument = parameter.name
        if parameter.is_constexpr or argument in constants:
            signature[argument], constexprs[i,] = "constexpr", constants[argument]
        elif argument.endswith("_stride_d"):  # Triton makes a 1 a constant of its own accord
            signature[argument], constexprs[i,] = "constexpr", 1
        elif argument in pointers:
            signature[argument], attributes[i,] = pointers[argument], [["tt.divisibility", 16]]
        elif argument == "row_weight":
            signature[argument] = "fp32"
        elif argument in ("B", "N", "num_samples"):
            signature[argument] = "i32"
        else:
            assert argument in ("D", "columns_per_split") or argument.endswith(
                ("_stride_b", "_stride_s")
            )
            signature[argument], attributes[i,] = "i32", [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(function, signature, constexprs, attributes),
        target=GPUTarget("cuda", architecture, 32),
        options=dict(launch.OPTIONS),
    )


def wide(ptx: str, instruction: str) -> int:
    """How many 128-bit accesses there are (a 256-bit one counts twice)."""
    widths = {"v4.b32": 1, "v2.b64": 1, "v8.b32": 2, "v4.b64": 2}
    found = re.findall(rf"{instruction}\.global\S*\.(v\d\.b\d\d)\b", ptx)
    return sum(widths.get(width, 0) for width in found)


def resources(ptx: str, architecture: int, folder: Path) -> str:
    """What ptxas says: registers, stack frame, bytes spilled."""
    (folder / "kernel.ptx").write_text(ptx)
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
    command = [nvidia.get_ptxas(architecture).path, "-v", f"-arch={target}", "kernel.ptx"]
    done = subprocess.run(
        [*command, "-o", "kernel.cubin"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def machine_code(folder: Path) -> str:
    """SASS, where Triton brings the disassembler; else nothing."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    if not tool.exists():
        return ""
    done = subprocess.run([tool, "kernel.cubin"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def wide_in_machine_code(sass: str, instruction: str) -> int:
    found = re.findall(rf"\b{instruction}\.E\S*?\.(128|256)\b", sass)
    return sum(int(bits) // 128 for bits in found)


def check_no_spills(ptx: str, architecture: int, folder: Path) -> None:
    report = resources(ptx, architecture, folder)
    assert re.search(r"\b0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", report)
    assert ".local" not in ptx  # a slow sine, a value indexed at run time


CASES = [
    (*kernel, dtype, architecture, size)
    for kernel in KERNELS
    for dtype in DTYPES
    for architecture in ARCHITECTURES
    # The tile's shape changes the layout, not what an architecture can do: one of them is enough.
    for size in (SIZES if architecture == 90 else SIZES[1:])
]


def check_access(spec: Kernel, ptx: str, dtype: str, architecture: int, folder: Path):
    """Each operand is read or written once, 128 bits at a time, and nothing spills."""
    check_no_spills(ptx, architecture, folder)
    bytes_a_thread = launch.TILE * DTYPES[dtype] // (32 * launch.OPTIONS["num_warps"])
    loads = len(spec.reads) * bytes_a_thread // 16
    stores = len(spec.writes) * bytes_a_thread // 16
    assert wide(ptx, "ld") == loads
    assert wide(ptx, "st") == stores

    sass = machine_code(folder)
    if sass:
        assert wide_in_machine_code(sass, "LDG") >= loads
        assert wide_in_machine_code(sass, "STG") >= stores
        assert not re.search(r"\b(LDL|STL)\b", sass)


@pytest.mark.parametrize(("module", "name", "dtype", "architecture", "size"), CASES)
def test_wide_access_and_no_spills(module, name, dtype, architecture, size, tmp_path):
    ptx = compile_kernel(module, name, dtype, architecture, size).asm["ptx"]
    check_access(KERNELS[module, name], ptx, dtype, architecture, tmp_path)


@pytest.mark.parametrize(
    ("dtype", "architecture"), [*(("fp32", n) for n in ARCHITECTURES), ("bf16", 90)]
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_samples_and_prior(variant, dtype, architecture, tmp_path):
    spec = VARIANTS[variant]
    name = variant.split("-")[0] + "_kernel"
    kernel = compile_kernel("reparameterize_kl", name, dtype, architecture, SIZES[1], spec=spec)
    check_access(spec, kernel.asm["ptx"], dtype, architecture, tmp_path)


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_one_sample_without_a_prior_pays_for_neither(name):
    """No loop over samples, and no more than the operands that it has always had. The loop over
    a row's tiles is the forward pass's own."""
    one = compile_kernel("reparameterize_kl", f"{name}_kernel", "fp32", 90, SIZES[1])
    many = compile_kernel(
        *("reparameterize_kl", f"{name}_kernel", "fp32", 90, SIZES[1]),
        spec=VARIANTS[f"{name}-samples"],
    )
    tiles = int(name == "forward")
    assert one.asm["ttgir"].count("scf.for") == tiles
    assert many.asm["ttgir"].count("scf.for") == tiles + 1


@pytest.mark.parametrize("name", ["forward_kernel", "backward_kernel"])
def test_all_numbers_of_samples_but_one_share_a_kernel(name):
    """Triton makes a constant of a 1, and compiles again for a multiple of 16 unless told."""
    module = importlib.import_module(f"{triton_kernels.__name__}.reparameterize_kl")
    (samples,) = (p for p in getattr(module, name).params if p.name == "num_samples")
    assert not samples.is_constexpr
    assert not samples.do_not_specialize
    assert samples.do_not_specialize_on_alignment


@pytest.mark.parametrize(
    ("dtype", "architecture"), [*(("fp32", n) for n in ARCHITECTURES), ("bf16", 90)]
)
@pytest.mark.parametrize("variant", LIKELIHOODS, ids=", ".join)
def test_likelihoods(variant, dtype, architecture, tmp_path):
    """One variance is read as one number, and no gradient of it is written for each pixel."""
    spec, (module, name, _) = LIKELIHOODS[variant], variant
    kernel = compile_kernel(module, name, dtype, architecture, SIZES[1], spec=spec)
    check_access(spec, kernel.asm["ptx"], dtype, architecture, tmp_path)


@pytest.mark.parametrize("variant", LIKELIHOODS, ids=", ".join)
def test_bytes_are_read_together(variant):
    """Eight neighbouring bytes of a target by a thread, also in a row that an index names."""
    module, name, _ = variant
    ptx = compile_kernel(module, name, "bf16", 90, SIZES[1], spec=LIKELIHOODS[variant]).asm["ptx"]
    assert re.search(r"ld\.global\S*\.(v2\.b32|b64)\b", ptx)
    assert not re.search(r"ld\.global\S*\.b8\b", ptx)


@pytest.mark.parametrize("columns", [1, 20, 63, 784, 3072, 5000, 100_000, 5_070_000, 10**8])
@pytest.mark.parametrize("batch", [1, 7, 16, 128, 8192, 100_000])
@pytest.mark.parametrize("loops", [True, False])
def test_tiles_cover_all_rows_and_columns(batch, columns, loops):
    """Whole parts, no program without a row or a column, and as many lanes as a program has."""
    tiles = launch.tiling(batch, columns, loops=loops)
    for size in (tiles.block_r, tiles.block_c):
        assert size & (size - 1) == 0
    assert tiles.block_r * tiles.block_c <= 2 * launch.TILE
    assert 0 <= tiles.row_programs * tiles.block_r - batch < tiles.block_r
    assert 0 <= tiles.column_programs * tiles.block_c - columns < tiles.block_c
    assert tiles.column_programs < 2**16 > tiles.splits  # CUDA's limit in a second dimension
    assert tiles.columns_per_split % tiles.block_c == 0
    assert 0 <= tiles.splits * tiles.columns_per_split - columns < tiles.columns_per_split


def test_rows_of_784_idle_few_lanes():
    """13 parts of 64 columns, where there are programs enough; else whole rows at once."""
    for batch, loops, width in [(65536, True, 64), (128, False, 64), (128, True, 1024)]:
        assert launch.tiling(batch, 784, loops=loops).block_c == width
    assert launch.tiling(2, 784, loops=False).block_c == 1024  # two rows are no tile of 16


def test_misaligned_rows_are_not_read_wide():
    """The count above can fail: a row of 63 columns does not begin on a 128-bit boundary."""
    spec = KERNELS["bernoulli_nll", "forward_kernel"]
    function = importlib.import_module(f"{triton_kernels.__name__}.bernoulli_nll").forward_kernel
    signature, constexprs = {}, {}
    tiles = launch.tiling(4096, 63)
    constants = {**spec.constants, "BLOCK_R": tiles.block_r, "BLOCK_C": tiles.block_c}
    pointers = {**spec.others, "logits_BD": "*bf16"}
    for i, parameter in enumerate(function.params):
        if parameter.name in constants:
            signature[parameter.name], constexprs[i,] = "constexpr", constants[parameter.name]
        else:
            signature[parameter.name] = pointers.get(parameter.name, "i32")
    kernel = triton.compile(
        ASTSource(function, signature, constexprs, {}),
        target=GPUTarget("cuda", 90, 32),
        options=dict(launch.OPTIONS),
    )
    assert wide(kernel.asm["ptx"], "ld") == 0
