"""Zeros and ones from grey images: which draw is below which pixel, against numpy's integers."""

import importlib
from functools import partial

import numpy as np
import pytest
import torch
from fastvae_kernels import binarize, ops
from kernel_cases import HAS_TRITON, INTERPRETING, Draw, needs_no_interpreter
from kernel_oracle import row_bits
from test_noise import PLACES, SCALARS, SHAPES, Launches, Operations, compile_ahead
from torch._subclasses.fake_tensor import FakeTensorMode

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [
    torch.uint8,
    torch.bool,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
]


def truth(images: torch.Tensor, seed: int, offset: int) -> torch.Tensor:
    """draw < pixel for each, in numpy, draws and pixels being float32 as the definition says."""
    columns = int(np.prod(images.shape[1:]))
    words = row_bits(len(images), columns, seed, offset)[:, :columns] >> np.uint64(8)
    draws = words.astype(np.float32) * np.float32(2.0**-24)
    if images.dtype == torch.uint8:
        draws = draws * np.float32(255.0)
    white = draws < images.float().cpu().reshape(len(images), columns).numpy()
    return torch.from_numpy(white).float().view(images.shape)


def assert_is_truth(got, images, seed, offset):
    assert (got.dtype, got.device.type) == (torch.float32, images.device.type)
    assert got.is_contiguous()
    assert torch.equal(got.cpu(), truth(images, seed, offset))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_the_integers(impl, device, shape, dtype):
    images = Draw(device).target(shape, dtype)
    got = binarize(images, -3, offset=2**33 + 5, impl=impl)
    assert_is_truth(got, images, -3, 2**33 + 5)


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_at_large_positions(impl, device, place, dtype):
    images = Draw(device).target((9, 63), dtype)
    seed, offset = (torch.tensor(v, device=device) for v in place)
    assert_is_truth(binarize(images, seed, offset=offset, impl=impl), images, *place)


def test_black_is_never_and_white_always_drawn(impl, device):
    byte = torch.zeros(16, 784, dtype=torch.uint8, device=device)
    for black, white in (
        (byte, byte + 255),
        (byte.float(), byte.float() + 1),
        (byte > 0, byte < 1),
    ):
        assert binarize(black, 1, impl=impl).max() == 0
        assert binarize(white, 1, impl=impl).min() == 1


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_the_ends_of_the_range(impl, device, dtype):
    """The draws 1 − 2^-24 and 0, found by search (see test_cpu_noise.py): the first is below a
    white pixel alone, the second below all but a black one."""
    white = 255 if dtype == torch.uint8 else 1
    for row, column, drawn in ((2330056, 2, [0, 0, 1]), (14883995, 0, [0, 1, 1])):
        for value, want in zip((0, white / 2, white), drawn, strict=True):
            images = torch.full((1, 4), value, device=device).to(dtype)
            assert binarize(images, 0, offset=row, impl=impl)[0, column] == want


# -------------------------------------------------------------------------------------- indices


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row", [(), (1,), (63,), (507,), (1, 28, 28), (3, 5, 7)], ids=str)
def test_through_indices_as_a_gathered_copy(impl, device, row, dtype):
    """Rows in any order, some of them twice, the first and the last among them."""
    data = Draw(device).target((17, *row), dtype)
    for chosen in ([16, 3, 3, 0, 9], [4], list(range(17)) * 3, []):
        indices = torch.tensor(chosen, device=device, dtype=torch.int64)
        got = binarize(data, 5, offset=2**40, indices=indices, impl=impl)
        assert_is_truth(got, data[indices], 5, 2**40)


@pytest.mark.parametrize("layout", ["sliced", "unaligned", "expanded", "channels_last", "permuted"])
def test_layouts(impl, device, layout):
    """The last two are no view of rows without gaps, and so are gathered first."""
    make = partial(Draw(device).target, dtype=torch.uint8)
    data = {
        "sliced": lambda: make((34, 2, 3, 5))[::2],
        "unaligned": lambda: make((17 * 30 + 1,))[1:].view(17, 2, 3, 5),
        "expanded": lambda: make((1, 2, 3, 5)).expand(17, 2, 3, 5),
        "channels_last": lambda: make((17, 2, 3, 5)).to(memory_format=torch.channels_last),
        "permuted": lambda: make((5, 17, 2, 3)).permute(1, 2, 3, 0),
    }[layout]()
    assert torch.equal(binarize(data, 5, impl=impl).cpu(), truth(data, 5, 0))
    indices = torch.tensor([16, 0, 3, 0, 3, 0, 0, 0, 9, 0], device=device)[::2]
    got = binarize(data, 5, offset=9, indices=indices, impl=impl)
    assert torch.equal(got.cpu(), truth(data[indices], 5, 9))


@pytest.mark.parametrize("outside", [-1, 17, 2**40, -(2**63)])
def test_an_index_outside_of_the_data_set_is_not_overlooked(impl, device, outside):
    """An error where the host can see it; else NaN in its row, and the others as they are."""
    if impl == "torch" and device == "cuda":
        pytest.skip("PyTorch's own index_select ends the process there")
    data = Draw(device).target((17, 63), torch.uint8)
    indices = torch.tensor([16, outside, 3], device=device)
    if impl == "torch":
        with pytest.raises(IndexError):
            binarize(data, 0, indices=indices, impl=impl)
        return
    got = binarize(data, 0, indices=indices, impl=impl)
    assert got[1].isnan().all()
    want = truth(data[torch.tensor([16, 0, 3], device=device)], 0, 0)
    assert torch.equal(got[[0, 2]].cpu(), want[[0, 2]])


def test_rows_further_apart_than_an_int32_can_count(impl, device):
    if impl == "torch" and device == "cpu":
        pytest.skip("PyTorch's own indexing; the kernel's is meant")
    stride = 2**30
    if device == "cuda":
        memory = torch.zeros(3 * stride + 4, dtype=torch.uint8, device=device)
    else:  # zeroed memory becomes real where it is touched
        memory = torch.from_numpy(np.zeros(3 * stride + 4, np.uint8))
    data = memory.as_strided((4, 4), (stride, 1))
    data.copy_(torch.arange(16).view(4, 4) * 16)
    indices = torch.tensor([3, 0, 2], device=device)
    got = binarize(data, 3, indices=indices, impl=impl)
    assert torch.equal(got.cpu(), truth(data[indices], 3, 0))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0,)], ids=str)
def test_nothing_to_draw(impl, device, shape):
    images = torch.zeros(shape, dtype=torch.uint8, device=device)
    assert binarize(images, 0, impl=impl).shape == shape


def test_one_launch(impl, device, monkeypatch):
    """Gather, scale and draw; nothing else happens on the device."""
    if impl == "torch":
        pytest.skip("the kernel is meant")
    kernels = importlib.import_module("fastvae_kernels.triton_kernels.binarize")
    launches = Launches(kernels.binarize_kernel)
    monkeypatch.setattr(kernels, "binarize_kernel", launches)
    data = Draw(device).target((17, 1, 7, 9), torch.uint8)
    indices = torch.tensor([16, 3, 3], device=device)
    place = [torch.tensor(value, device=device) for value in (3, 2**40)]
    with Operations() as operations:
        ops.binarize(data, *place, indices)
    assert launches.count == 1
    views = {"aten.view.default", "aten.detach.default"}
    inside = {n for n in operations.names if n.startswith("aten.")} - views
    assert inside <= {"aten.empty.memory_format", "aten.fill_.Scalar"}  # the poison fills


# ------------------------------------------------------------------------------------- compilers


def operator_cases(device):
    place = [torch.tensor(v, device=device) for v in (2**40, 2**33)]
    draw = Draw(device)
    byte = draw.target((7, 2, 3, 4), torch.uint8)
    indices = torch.tensor([6, 0, 3], device=device)
    return [
        (byte, *place),
        (byte, *place, indices),
        (byte > 99, *place, indices),
        (draw.target((5, 7), torch.bfloat16).t(), *place),
        (byte.permute(0, 2, 3, 1), *place, indices),
        (byte[:0], *place),
    ]


@needs_no_interpreter
@pytest.mark.parametrize("case", range(6))
def test_opcheck(device, case):
    torch.library.opcheck(torch.ops.fastvae.binarize.default, operator_cases(device)[case])


@needs_no_interpreter
@pytest.mark.parametrize("operator", [False, True], ids=["public", "operator"])
def test_compiled_equals_eager(device, operator):
    """Bit for bit, and for any size of a dynamic graph."""

    def function(data, seed, offset, indices):
        if operator:
            return torch.ops.fastvae.binarize(data, seed, offset, indices)
        return binarize(data, seed, offset=offset, indices=indices)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for batch, rows in ((6, 9), (9, 30)):
        data = Draw(device).target((rows, 1, 7, 9), torch.uint8)
        indices = torch.arange(batch, device=device) * 5 % rows
        place = [torch.tensor(v, device=device) for v in (batch, 2**33)]
        assert torch.equal(compiled(data, *place, indices), function(data, *place, indices))
    torch._dynamo.reset()


@needs_no_interpreter
def test_auto_takes_the_operator_on_a_gpu_and_what_can_be_fused_elsewhere():
    """A fake GPU needs no GPU, and has no values that the host could read."""
    for kind, called in (("cuda", ["fastvae.binarize.default"] if HAS_TRITON else []), ("cpu", [])):
        with FakeTensorMode(), Operations() as operations:
            data = torch.empty(9, 1, 28, 28, dtype=torch.uint8, device=kind)
            indices, seed, offset = (
                torch.empty(n, dtype=torch.int64, device=kind) for n in (4, 1, 1)
            )
            out = binarize(data, seed, offset=offset, indices=indices)
        assert (out.device.type, out.shape, out.dtype) == (kind, (4, 1, 28, 28), torch.float32)
        assert [n for n in operations.names if n.startswith("fastvae.")] == called


def test_no_gradient(device):
    """Also within a model that is differentiated."""
    assert not binarize(torch.rand(3, 4, device=device), 0).requires_grad
    assert not ops.binarize(
        torch.rand(3, 4, device=device), *(torch.tensor(0, device=device) for _ in range(2))
    ).requires_grad


@pytest.mark.skipif(INTERPRETING, reason="Triton's interpreter compiles nothing")
@pytest.mark.skipif(not HAS_TRITON, reason="the package triton is not installed")
@pytest.mark.parametrize("ones", [("D", "images_stride_b", "images_stride_d"), ("B", "N")], ids=str)
def test_sizes_of_one_compile(ones):
    """Triton makes a constant of a 1, which the interpreter does not."""
    constants = {"WHITE": 1.0, "images_stride_d": 1, "BLOCK_R": 4, "BLOCK_C": 4}
    constants |= {"CHANNELS_LAST": False, "planes": 1}
    constants |= dict.fromkeys(ones, 1)
    pointers = {**SCALARS, "images_ND": "*fp64", "indices_B": "*i64"}
    assert compile_ahead("binarize", "binarize_kernel", constants, pointers, 90).asm["cubin"]
    constants = {"BLOCK_R": 4, "BLOCK_C": 4, **dict.fromkeys(ones, 1)}
    for is_normal in (False, True):
        kernel = {**constants, "IS_NORMAL": is_normal}
        assert compile_ahead("noise", "noise_kernel", kernel, SCALARS, 90).asm["cubin"]


@pytest.mark.skipif(INTERPRETING, reason="Triton's interpreter compiles nothing")
@pytest.mark.skipif(not HAS_TRITON, reason="the package triton is not installed")
@pytest.mark.parametrize(
    ("columns", "architecture"), [(64, 90), (784, 80), (784, 90), (784, 100), (4096, 90)]
)
@pytest.mark.parametrize(
    ("dtype", "indices"), [("u8", True), ("u8", False), ("fp32", True), ("bf16", False)]
)
def test_ahead_of_time(dtype, indices, columns, architecture, tmp_path):
    """A thread reads its eight bytes together and writes 128 bits at a time; nothing spills."""
    tools = importlib.import_module("test_ahead_of_time")
    _, blocks = importlib.import_module("fastvae_kernels.triton_kernels.noise").cut(4096, columns)
    constants = {"WHITE": 255.0 if dtype == "u8" else 1.0, "images_stride_d": 1, **blocks}
    constants |= {"CHANNELS_LAST": False, "planes": 1}
    pointers = {**SCALARS, "images_ND": f"*{dtype}"}
    if indices:
        pointers["indices_B"] = "*i64"
    else:
        constants["indices_B"] = None
    kernel = compile_ahead("binarize", "binarize_kernel", constants, pointers, architecture)
    ptx = kernel.asm["ptx"]
    tools.check_no_spills(ptx, architecture, tmp_path)
    assert tools.wide(ptx, "st") == 2
    assert tools.wide(ptx, "ld") == {"u8": 0, "bf16": 1, "fp32": 2}[dtype]
    assert not tools.re.search(r"ld\.global\S*\.b8\b", ptx)
