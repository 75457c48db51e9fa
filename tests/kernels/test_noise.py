"""`uniform` and `normal` of every implementation against the integers in numpy and float64; that
each is one launch; what compilers make of them."""

import importlib

import numpy as np
import pytest
import torch
from fastvae_kernels import normal, ops, philox, uniform
from kernel_cases import HAS_TRITON, INTERPRETING, needs_no_interpreter
from kernel_oracle import normals, row_bits
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# Rows alone, one column, no multiple of four, neighbours of powers of two, rows of an image, more
# rows than one tile holds, rows longer than a tile.
SHAPES = [(7,), (5, 1), (4, 63), (3, 507), (2, 123), (5, 784), (300, 3), (1, 5000), (3, 5, 7, 2)]
PLACES = [(0, 0), (-1, 2**32 - 2), (-(2**63), 2**33 + 5), (2**62 + 3, 2**62 + 1), (3, 2**63 - 9)]
WHERE = [(shape, (-3, 2**33 + 5)) for shape in SHAPES] + [((5, 63), place) for place in PLACES]
# As in test_philox.py: of float32 arithmetic against float64, parts of 1 + |ε|.
NORMAL_TOLERANCE = 5e-7


def exact_uniforms(shape, seed, offset) -> torch.Tensor:
    columns = int(np.prod(shape[1:]))
    words = row_bits(shape[0], columns, seed, offset)[:, :columns] >> np.uint64(8)
    return torch.from_numpy(words.astype(np.float64) * 2.0**-24).view(shape)


class Operations(TorchDispatchMode):
    """The names of all operations that tensors meet."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Launches:
    """Stands for a kernel and counts its launches."""

    def __init__(self, kernel) -> None:
        self.kernel, self.count = kernel, 0

    def __getitem__(self, grid):
        self.count += 1
        return self.kernel[grid]


@pytest.mark.parametrize(("shape", "place"), WHERE, ids=str)
def test_uniforms_are_the_integers(impl, device, shape, place):
    """Bit for bit."""
    seed, offset = place
    got = uniform(shape, seed, offset=offset, device=device, impl=impl)
    assert (got.shape, got.dtype, got.device.type) == (shape, torch.float32, device)
    assert got.is_contiguous() or impl == "torch"
    assert torch.equal(got.double().cpu(), exact_uniforms(shape, seed, offset))


@pytest.mark.parametrize(("shape", "place"), WHERE, ids=str)
def test_normals_against_float64(impl, device, shape, place):
    """A wrong bit anywhere gives another number altogether."""
    seed, offset = place
    got = normal(shape, seed, offset=offset, device=device, impl=impl)
    assert (got.shape, got.dtype, got.device.type) == (shape, torch.float32, device)
    assert got.is_contiguous() or impl == "torch"
    want = normals(shape, seed, offset)
    assert ((got.double().cpu() - want).abs() / (1 + want.abs())).max() < NORMAL_TOLERANCE


@pytest.mark.parametrize("draw", [uniform, normal])
def test_many_tiles_of_many_rows(impl, device, draw):
    """A row is the same in any batch, tiles cut as they may be."""
    whole = draw((300, 6), 11, offset=2**40, device=device, impl=impl)
    for rows in (range(300), range(287, 300), range(128, 129)):
        offset = 2**40 + rows.start
        part = draw((len(rows), 6), 11, offset=offset, device=device, impl=impl)
        tolerance = NORMAL_TOLERANCE if draw is normal and device == "cuda" else 0.0
        want = whole[rows.start : rows.stop]
        torch.testing.assert_close(part, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 4)], ids=str)
@pytest.mark.parametrize("draw", [uniform, normal])
def test_nothing_to_draw(impl, device, draw, shape):
    assert draw(shape, 0, device=device, impl=impl).shape == shape


@pytest.mark.parametrize("draw", [uniform, normal])
def test_seed_and_offset_inside_other_tensors(impl, device, draw):
    held = torch.tensor([[5, 7], [2**40, 11]], device=device)
    got = draw((4, 9), held[0, 1], offset=held[1:, :1], device=device, impl=impl)
    assert torch.equal(got, draw((4, 9), 7, offset=2**40, device=device, impl=impl))


@pytest.mark.parametrize("name", ["uniform", "normal"])
def test_one_launch(impl, device, name, monkeypatch):
    """And no other operation on the device but to make room for the result."""
    if impl == "torch":
        pytest.skip("the kernel is meant")
    kernels = importlib.import_module("fastvae_kernels.triton_kernels.noise")
    launches = Launches(kernels.noise_kernel)
    monkeypatch.setattr(kernels, "noise_kernel", launches)
    place = [torch.tensor(value, device=device) for value in (3, 2**40)]
    with Operations() as operations:
        getattr(ops, name)(50, 70, *place)
    assert launches.count == 1
    inside = {n for n in operations.names if n.startswith("aten.")}
    assert inside <= {"aten.empty.memory_format", "aten.fill_.Scalar"}  # the poison fills


@pytest.mark.skipif(not HAS_TRITON, reason="the package triton is not installed")
@pytest.mark.parametrize("rows", [1, 2, 100, 4096])
@pytest.mark.parametrize("columns", [1, 3, 4, 20, 63, 64, 100, 507, 784, 1024, 3072, 5000])
def test_tiles_cover_all_and_idle_little(rows, columns):
    cut = importlib.import_module("fastvae_kernels.triton_kernels.noise").cut
    programs, blocks = cut(rows, columns)
    block_r, block_c = blocks["BLOCK_R"], blocks["BLOCK_C"]
    assert block_r * block_c <= 1024 and block_c % 4 == 0
    row_tiles, column_tiles = -(-rows // block_r), -(-columns // block_c)
    assert programs == row_tiles * column_tiles
    idle = column_tiles * block_c - columns
    if rows >= 16:
        assert idle < 64 and block_r * block_c >= min(1024, block_c * rows)
    # With fewer rows, a tile has as many elements, or all there are of a row.
    assert block_r * block_c >= min(1024, columns * rows) or block_c >= columns


# ------------------------------------------------------------------------------------- compilers


def operator_cases(device):
    place = [torch.tensor(v, device=device) for v in (2**40, 2**33)]
    return [(5, 7, *place), (3, 64, *place), (1, 1, *place), (0, 4, *place)]


@needs_no_interpreter
@pytest.mark.parametrize("name", ["uniform", "normal"])
@pytest.mark.parametrize("case", range(4))
def test_opcheck(device, name, case):
    operator = getattr(torch.ops.fastvae, name).default
    torch.library.opcheck(operator, operator_cases(device)[case])


@needs_no_interpreter
@pytest.mark.parametrize("name", ["uniform", "normal"])
def test_operators_are_the_definition(device, name):
    seed, offset = (torch.tensor(v, device=device) for v in (-7, 2**40))
    got = getattr(torch.ops.fastvae, name)(5, 63, seed, offset)
    want = getattr(philox, f"row_{name}s")(5, 63, seed, offset)
    tolerance = NORMAL_TOLERANCE if name == "normal" and device == "cuda" else 0.0
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@needs_no_interpreter
def test_auto_takes_the_operators_on_a_gpu_and_where_a_cpu_compiles():
    """A fake GPU needs no GPU; compiled, each is one node of the graph."""
    from torch._dynamo.testing import EagerAndRecordGraphs

    def function(seed, offset):
        shape, device = (6, 3, 5), seed.device
        return uniform(shape, seed, offset=offset, device=device) + normal(
            shape, seed, offset=offset, device=device
        )

    both = {"fastvae.uniform.default", "fastvae.normal.default"}
    for kind, called, compiled in (
        ("cuda", both, both) if HAS_TRITON else ("cuda", set(), set()),
        ("cpu", set(), both),
    ):
        torch._dynamo.reset()
        backend = EagerAndRecordGraphs()
        with FakeTensorMode():
            place = [torch.empty((), dtype=torch.int64, device=kind) for _ in range(2)]
            with Operations() as operations:
                out = function(*place)
            assert (out.device.type, out.shape) == (kind, (6, 3, 5))
            assert {n for n in operations.names if n.startswith("fastvae.")} == called
            torch.compile(function, fullgraph=True, backend=backend)(*place)
        (graph,) = backend.graphs
        nodes = [str(n.target) for n in graph.graph.nodes if "fastvae" in str(n.target)]
        assert sorted(nodes) == sorted(compiled)
    torch._dynamo.reset()


def compile_ahead(module, name, constants, pointers, architecture):
    """As the launchers do for rows of a multiple of 16 columns."""
    tools = importlib.import_module("test_ahead_of_time")
    function = getattr(importlib.import_module(f"fastvae_kernels.triton_kernels.{module}"), name)
    signature, constexprs, attributes = {}, {}, {}
    for i, parameter in enumerate(function.params):
        argument = parameter.name
        if argument in constants:
            signature[argument], constexprs[i,] = "constexpr", constants[argument]
        elif argument in ("B", "N"):
            signature[argument] = "i32"
        else:
            assert argument in pointers or argument in ("D", "images_stride_b")
            signature[argument] = pointers.get(argument, "i32")
            attributes[i,] = [["tt.divisibility", 16]]
    return tools.triton.compile(
        tools.ASTSource(function, signature, constexprs, attributes),
        target=tools.GPUTarget("cuda", architecture, 32),
        options=dict(importlib.import_module("fastvae_kernels.triton_kernels.launch").OPTIONS),
    )


SCALARS = {"seed_ptr": "*i64", "offset_ptr": "*i64", "out_BD": "*fp32"}


@pytest.mark.skipif(INTERPRETING, reason="Triton's interpreter compiles nothing")
@pytest.mark.skipif(not HAS_TRITON, reason="the package triton is not installed")
@pytest.mark.parametrize(
    ("columns", "architecture"), [(64, 90), (784, 80), (784, 90), (784, 100), (4096, 90)]
)
@pytest.mark.parametrize("is_normal", [False, True], ids=["uniform", "normal"])
def test_ahead_of_time(is_normal, columns, architecture, tmp_path):
    """128 bits at a time, and no register spills."""
    tools = importlib.import_module("test_ahead_of_time")
    _, blocks = importlib.import_module("fastvae_kernels.triton_kernels.noise").cut(4096, columns)
    constants = {"IS_NORMAL": is_normal, **blocks}
    ptx = compile_ahead("noise", "noise_kernel", constants, SCALARS, architecture).asm["ptx"]
    tools.check_no_spills(ptx, architecture, tmp_path)
    assert tools.wide(ptx, "st") == 2  # eight numbers of a thread
    assert tools.wide(ptx, "ld") == 0
