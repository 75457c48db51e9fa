"""The noise in C: the bits of the definition in PyTorch, taken only where that is sound, and a
library that is built by any number of processes, survives damage, and can be done without."""

import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fastvae_kernels
import numpy as np
import pytest
import torch
from fastvae_kernels import normal, philox, reparameterize_kl, uniform
from fastvae_kernels.cpu import build, noise
from kernel_cases import needs_no_interpreter
from kernel_oracle import normals, row_bits
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

SOURCE = Path(noise.__file__).with_name("philox.c")

# One call of Philox, parts of one, a row's last call cut short, blocks of 64 calls and their
# neighbours, rows that begin anywhere in a block, nothing at all.
SHAPES = [(1, 1), (1, 3), (5, 4), (64, 4), (65, 4), (130, 2), (37, 7), (3, 255), (3, 256), (3, 257)]
SHAPES += [(2, 1021), (9, 20), (0, 5), (5, 0), (0, 0)]
PLACES = [(0, 0), (-1, 2**62 + 1), (2**63 - 1, 2**63 - 9), (-(2**63), 2**32 - 2), (2**40 + 7, -3)]


def has_compiler() -> bool:
    try:
        return bool(build._compiler())
    except OSError:
        return False


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="no C compiler on this machine")


def scalars(*values: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(value) for value in values)


def assert_equal(got, want) -> None:
    """Bit for bit."""
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.fixture
def forgotten():
    """Each test asks for the library as a new process would, and leaves no trace of it."""
    cached = (noise.library, philox._c_code)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.fixture
def cache(tmp_path, monkeypatch, forgotten):
    monkeypatch.delenv("FASTVAE_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FASTVAE_NO_C", raising=False)
    return tmp_path / "fastvae" / "kernels"


@pytest.fixture
def c(cache):
    """The library, built for this test; where there is a compiler it must come out right."""
    library = philox._c_code()
    assert library is not None
    return library


# ------------------------------------------------------------------------------------------ bits


@needs_compiler
@pytest.mark.parametrize("place", PLACES)
def test_bits_of_the_definition(poisoned_memory, c, place):
    seed, offset = scalars(*place)
    for shape in SHAPES:
        got = noise.row_uniforms(c, *shape, seed, offset)
        assert got.is_contiguous() and got.dtype == torch.float32 and got.shape == shape
        assert torch.equal(got, philox._uniforms(*shape, seed, offset))
        for samples in (None, 1, 3):
            got = noise.row_normals(c, *shape, seed, offset, samples)
            assert got.is_contiguous() and got.dtype == torch.float32
            assert got.shape == (shape if samples is None else (samples, *shape))
            assert torch.equal(got, philox._normals(*shape, seed, offset, samples))


@needs_compiler
@pytest.mark.parametrize("place", PLACES)
def test_against_the_integers_and_float64(poisoned_memory, c, place):
    words = row_bits(70, 7, *place)[:, :7] >> np.uint64(8)
    got = noise.row_uniforms(c, 70, 7, *scalars(*place))
    assert (got.double().numpy() * 2**24 == words.astype(np.float64)).all()
    got = noise.row_normals(c, 70, 7, *scalars(*place), 3).double()
    want = normals((70, 7), *place, num_samples=3)
    assert ((got - want).abs() / (1 + want.abs())).max() < 5e-7


@needs_compiler
def test_published_vector(c):
    """Random123's kat_vectors, philox4x32 with 10 rounds: the counter and the key of zeros."""
    want = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    got = noise.row_uniforms(c, 1, 4, *scalars(0, 0))
    assert (got[0] * 2**24).long().tolist() == [word >> 8 for word in want]


@needs_compiler
def test_the_ends_of_the_range(c):
    """Found by search among the first 2^26 rows: the largest and the smallest uniform, and bits of
    a radius that round to u = 1, of which the normals are zeros."""
    seed = torch.tensor(0)
    for row, column, want in [(2330056, 2, 1 - 2.0**-24), (14883995, 0, 0.0)]:
        assert noise.row_uniforms(c, 1, 4, seed, torch.tensor(row))[0, column] == want
    place = seed, torch.tensor(24962728)
    assert row_bits(1, 4, 0, 24962728)[0, 2] > 2**32 - 129
    got = noise.row_normals(c, 1, 4, *place, None)
    assert (got[0, 2:] == 0).all()
    assert torch.equal(got, philox._normals(1, 4, *place, None))


@needs_compiler
@pytest.mark.parametrize("shape", [(70, 1021), (1, 150_001)])
def test_any_number_of_threads(c, shape):
    """Large draws are shared among threads."""
    threads = torch.get_num_threads()
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        drawn = noise.row_normals(c, *shape, *scalars(5, 7), 3)
        found.append((noise.row_uniforms(c, *shape, *scalars(5, 7)), drawn))
    torch.set_num_threads(threads)
    for other in found[1:]:
        assert_equal(other, found[0])


@needs_compiler
@pytest.mark.parametrize("columns", [1, 6, 64, 507])
def test_a_row_is_the_same_in_any_batch(c, columns):
    """Also where PyTorch's logarithm and root meet it elsewhere in memory."""
    whole = noise.row_normals(c, 41, columns, *scalars(3, 2**32 - 9), None)
    for row in range(41):
        alone = noise.row_normals(c, 1, columns, *scalars(3, 2**32 - 9 + row), None)
        assert torch.equal(alone[0], whole[row])


@needs_compiler
def test_scalars_that_lie_inside_other_tensors(c):
    held = torch.tensor([[5, 7], [2**40, 11]])
    for draw in (normal, uniform):
        got = draw((4, 9), held[0, 1], offset=held[1:, :1])
        assert torch.equal(got, draw((4, 9), 7, offset=2**40))


@needs_compiler
@pytest.mark.parametrize("samples", [None, 3])
def test_the_operator_and_its_gradient_do_not_change(c, monkeypatch, samples):
    def results():
        mu = torch.linspace(-1, 1, 35).view(5, 7).requires_grad_()
        logvar = torch.linspace(1, -1, 35).view(5, 7).requires_grad_()
        z, kl = reparameterize_kl(mu, logvar, 3, offset=8, num_samples=samples)
        return z, kl, *torch.autograd.grad(z.square().sum() + kl.sum(), (mu, logvar))

    in_c = results()
    monkeypatch.setattr(philox, "_c_code", lambda: None)
    assert_equal(results(), in_c)


# ----------------------------------------------------------------------- where it is not taken


@pytest.fixture
def refused(monkeypatch):
    """Whoever reaches for the C code fails."""

    def reached():
        raise AssertionError("the C code was reached")

    monkeypatch.setattr(philox, "_c_code", reached)


def both(seed):
    return uniform((3, 5), seed), normal((3, 6), seed)


def test_it_is_what_eager_code_takes(refused):
    with pytest.raises(AssertionError, match="the C code was reached"):
        uniform((3, 5), 1)
    with pytest.raises(AssertionError, match="the C code was reached"):
        normal((3, 5), 1)


class Both(torch.nn.Module):
    def forward(self, seed):
        return both(seed)


@needs_no_interpreter
@pytest.mark.parametrize("traced", ["make_fx", "functionalize", "export", "strict_export"])
def test_traces_hold_the_noise_as_operations(refused, traced):
    """With another seed the traced program draws other numbers: none was frozen into it."""
    one, other = scalars(1, 2)
    program = {
        "make_fx": lambda: make_fx(both)(one),
        "functionalize": lambda: make_fx(torch.func.functionalize(both))(one),
        "export": lambda: torch.export.export(Both(), (one,), strict=False).module(),
        "strict_export": lambda: torch.export.export(Both(), (one,), strict=True).module(),
    }[traced]()
    want = (
        philox._uniforms(3, 5, other, torch.tensor(0)),
        philox._normals(3, 6, other, torch.tensor(0), None),
    )
    assert_equal(program(other), want)


def test_fake_tensors(refused):
    with FakeTensorMode():
        assert both(1)[0].shape == (3, 5)


def test_transformed_tensors(refused):
    try:
        torch.func.vmap(lambda x: x.view(torch.int32))(torch.zeros(2, 1))
    except RuntimeError as error:  # PyTorch 2.11
        pytest.skip(f"vmap cannot see the bits of a float in PyTorch {torch.__version__}: {error}")
    drawn = torch.func.vmap(both)(torch.arange(4))
    for i in range(4):
        seed, offset = scalars(i, 0)
        assert torch.equal(drawn[0][i], philox._uniforms(3, 5, seed, offset))
        assert torch.equal(drawn[1][i], philox._normals(3, 6, seed, offset, None))


def test_other_devices_types_and_sizes(refused):
    seed, offset = scalars(1, 0)
    assert noise.is_direct(seed, offset)
    assert not noise.is_direct(seed, offset.to("meta"))
    assert not noise.is_direct(seed, offset.int())
    assert not noise.is_direct(seed, torch.zeros(2, dtype=torch.int64))
    assert not noise.is_direct(seed, torch.zeros(0, dtype=torch.int64))
    assert uniform((3, 5), 1, device="meta").is_meta


@needs_no_interpreter
@needs_compiler
def test_compiled_code_draws_the_same_uniforms(c, monkeypatch):
    place = scalars(-5, 2**33 + 5)
    want = uniform((128, 783), place[0], offset=place[1])
    called = []
    monkeypatch.setattr(noise, "row_uniforms", lambda *_: called.append(1))
    torch._dynamo.reset()
    draw = torch.compile(lambda s, o: uniform((128, 783), s, offset=o), fullgraph=True)
    assert torch.equal(draw(*place), want)
    assert not called


# --------------------------------------------------------------------------------- the library


def draws() -> bool:
    """Whether what the public functions give is right, whichever code they take."""
    words = row_bits(5, 7, 3)[:, :7] >> np.uint64(8)
    return (uniform((5, 7), 3).double().numpy() * 2**24 == words.astype(np.float64)).all()


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@needs_compiler
def test_it_is_built_once(cache, monkeypatch):
    build.load(SOURCE)
    (library,) = cache.iterdir()
    monkeypatch.setattr(build.subprocess, "run", None)
    build.load(SOURCE)
    assert list(cache.iterdir()) == [library]
    assert philox._c_code() is not None and draws()


@needs_compiler
@pytest.mark.parametrize("what", ["source", "cpu", "compiler"])
def test_another_source_cpu_or_compiler_is_another_library(cache, monkeypatch, tmp_path, what):
    build.load(SOURCE)
    source = SOURCE
    if what == "source":
        source = tmp_path / "philox.c"
        source.write_text(SOURCE.read_text() + "\n/* another */\n")
    elif what == "cpu":
        monkeypatch.setattr(build, "_cpu", lambda: "")
    else:
        compiler = " ".join(build._compiler())
        monkeypatch.setenv("CC", script(tmp_path / "wrapped", f'exec {compiler} "$@"'))
    build.load(source)
    made_of = [path.stem.split("-")[1] for path in cache.iterdir()]
    assert len(made_of) == len(set(made_of)) == 2


@needs_compiler
@pytest.mark.parametrize(
    "damage",
    ["flipped", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cut", "empty"))],
)
def test_a_damaged_library_is_built_again(cache, damage):
    """A library that was cut short kills the process that loads it: it must not be loaded."""
    build.load(SOURCE)
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    path.unlink()  # this process has the old file mapped
    broken = bytearray(whole)
    broken[len(whole) // 2] ^= 1
    path.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "flipped": broken}[damage])
    done = in_a_process("assert philox._c_code() is not None", cache)
    assert done.returncode == 0, done.stderr
    assert any(p.stem.endswith(build._digest(p.read_bytes())) for p in cache.iterdir())


def in_a_process(code: str, cache: Path, **environment: str) -> subprocess.CompletedProcess:
    root = Path(fastvae_kernels.__file__).parent.parent
    path = os.pathsep.join(p for p in (str(root), os.environ.get("PYTHONPATH")) if p)
    code = "from fastvae_kernels import philox, uniform; import torch\n" + code
    return subprocess.run(
        [sys.executable, "-c", code],
        env={
            **os.environ,
            "PYTHONPATH": path,
            "FASTVAE_CACHE_DIR": str(cache.parent),
            **environment,
        },
        capture_output=True,
        text=True,
    )


@needs_compiler
def test_two_processes_build_at_once(cache, tmp_path):
    """The compiler waits until it was started twice, so that they do."""
    started = tmp_path / "started"
    started.mkdir()
    slow = script(
        tmp_path / "slow",
        f"touch {started}/$$; i=0\n"
        f"while [ $(ls {started} | wc -l) -lt 2 ] && [ $i -lt 300 ]\n"
        "do sleep 0.1; i=$((i+1)); done\n"
        f'exec {" ".join(build._compiler())} "$@"',
    )
    want = philox._uniforms(5, 7, *scalars(3, 0))
    code = "assert philox._c_code() is not None; print(uniform((5, 7), 3).sum().item())"
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda _: in_a_process(code, cache, CC=slow), range(2)))
    assert [process.returncode for process in done] == [0, 0], done
    assert {float(process.stdout) for process in done} == {want.sum().item()}
    assert len(list(started.iterdir())) == 2
    assert [path.suffix for path in cache.iterdir()] == [".so"]


@pytest.mark.parametrize("way", ["fails", "missing", "writes_rubbish", "hangs"])
def test_a_broken_compiler(cache, tmp_path, monkeypatch, caplog, way):
    rubbish = script(tmp_path / "rubbish", 'for last; do :; done; echo rubbish > "$last"')
    hanging = script(tmp_path / "hanging", "exec sleep 30")
    name = {"writes_rubbish": rubbish, "hangs": hanging, "missing": "no-such-compiler"}
    monkeypatch.setenv("CC", name.get(way, "false"))
    monkeypatch.setattr(build, "_SECONDS", 0.3 if way == "hangs" else 30)
    with caplog.at_level(logging.DEBUG, logger=noise.__name__):
        assert philox._c_code() is None
    assert "PyTorch draws the noise" in caplog.text
    assert draws()
    assert not list(cache.glob("build-*"))


@needs_compiler
def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch, forgotten):
    (tmp_path / "file").touch()
    monkeypatch.delenv("FASTVAE_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert philox._c_code() is None
    assert draws()


@needs_compiler
def test_code_that_draws_other_numbers_is_not_taken(cache, tmp_path, monkeypatch, caplog):
    wrong = tmp_path / "philox.c"
    wrong.write_text(SOURCE.read_text().replace("0xBB67AE85u", "0xBB67AE84u"))
    load = build.load
    monkeypatch.setattr(build, "load", lambda _: load(wrong))
    with caplog.at_level(logging.DEBUG, logger=philox.__name__):
        assert philox._c_code() is None
    assert "gives other numbers" in caplog.text
    assert draws()


def test_the_switch(cache, monkeypatch):
    monkeypatch.setenv("FASTVAE_NO_C", "1")
    assert philox._c_code() is None
    assert draws()
    assert not cache.exists()
