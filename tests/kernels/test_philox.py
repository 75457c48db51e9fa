"""The generator: the published integers, the right distribution, and noise that knows its place."""

import math

import numpy as np
import pytest
import torch
from fastvae_kernels import normal, philox, reparameterize_kl, uniform
from fastvae_kernels.functional import _HAS_TRITON
from kernel_cases import INTERPRETING, needs_no_interpreter
from kernel_oracle import normals, normals_from_bits, philox4x32_10, row_bits
from scipy import stats

if _HAS_TRITON:
    import triton
    import triton.language as tl
    from fastvae_kernels.triton_kernels import device_math

    @triton.jit
    def philox_kernel(seed_ptr, counter_ptr, out_ptr, N, BLOCK: tl.constexpr):
        """`seed` [N] int64; `counter`, `out` [4, N] int64 that hold 32-bit words."""
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask = at < N
        seed = tl.load(seed_ptr + at, mask=mask, other=0).to(tl.uint64)
        c0 = tl.load(counter_ptr + at, mask=mask, other=0).to(tl.uint32)
        c1 = tl.load(counter_ptr + N + at, mask=mask, other=0).to(tl.uint32)
        c2 = tl.load(counter_ptr + 2 * N + at, mask=mask, other=0).to(tl.uint32)
        c3 = tl.load(counter_ptr + 3 * N + at, mask=mask, other=0).to(tl.uint32)
        a, b, c, d = device_math.philox4x32(seed, c0, c1, c2, c3)
        tl.store(out_ptr + at, a.to(tl.int64), mask=mask)
        tl.store(out_ptr + N + at, b.to(tl.int64), mask=mask)
        tl.store(out_ptr + 2 * N + at, c.to(tl.int64), mask=mask)
        tl.store(out_ptr + 3 * N + at, d.to(tl.int64), mask=mask)

    @triton.jit
    def box_muller_kernel(bits_ptr, out_ptr, N, BLOCK: tl.constexpr):
        """`bits` [2, N] int64 that hold 32-bit words; `out` [2, N] float32."""
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask = at < N
        a = tl.load(bits_ptr + at, mask=mask, other=0).to(tl.uint32)
        b = tl.load(bits_ptr + N + at, mask=mask, other=0).to(tl.uint32)
        x, y = device_math.box_muller(a, b)
        tl.store(out_ptr + at, x, mask=mask)
        tl.store(out_ptr + N + at, y, mask=mask)


pytestmark = pytest.mark.usefixtures("poisoned_memory")

# kat_vectors of Random123, philox4x32 with 10 rounds: counter, key, output.
PUBLISHED = [
    ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]
SEEDS = [0, 1, -1, 12345678901234, 2**62 + 3, 2**63 - 1, -(2**63)]
OFFSETS = [0, 1, 2**32 - 1, 2**33 + 5, 2**62 + 1, 2**63 - 9]

# float32 arithmetic on the reference's and the kernels' path against float64: parts of 1 + |ε|.
# The polynomial, the logarithm and the root err by about 2^-23 each.
NORMAL_TOLERANCE = 5e-7


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def philox_on(impl: str, device: str, counter: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Ten rounds by the named implementation: counter [4, N], key [2, N] → [4, N], all int64."""
    counter, key = counter.to(device), key.to(device)
    if impl == "torch":
        return torch.stack(philox.philox4x32(tuple(counter), tuple(key)))
    n, block = counter.shape[1], 256
    out = torch.empty_like(counter)
    seed = key[0] | (key[1] << 32)
    philox_kernel[(triton.cdiv(n, block),)](seed, counter.contiguous(), out, n, BLOCK=block)
    return out


def noise_on(impl: str, device: str, rows: int, columns: int, seed: int, offset: int = 0):
    """ε as the operator uses it: z where μ = 0 and σ = 1."""
    zero = torch.zeros(rows, columns, device=device)
    return reparameterize_kl(zero, zero.clone(), seed, offset=offset, impl=impl)[0].cpu()


@pytest.mark.parametrize(("counter", "key", "output"), PUBLISHED)
def test_published_vectors(impl, device, counter, key, output):
    counter, key = (torch.tensor(words(text)).unsqueeze(1) for text in (counter, key))
    assert philox_on(impl, device, counter, key).flatten().tolist() == words(output)
    assert [int(w[0]) for w in philox4x32_10(counter.numpy(), key.numpy())] == words(output)


def test_integers_are_equal_for_any_counter_and_key(impl, device):
    generator = np.random.default_rng(7)
    counter = generator.integers(0, 2**32, (4, 3000))
    key = generator.integers(0, 2**32, (2, 3000))
    got = philox_on(impl, device, torch.from_numpy(counter), torch.from_numpy(key))
    want = np.stack(philox4x32_10(counter, key)).astype(np.int64)
    assert got.cpu().tolist() == want.tolist()


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("seed", SEEDS)
def test_reference_bits_at_large_positions(device, seed, offset):
    seed_tensor, offset_tensor = (torch.tensor(v, device=device) for v in (seed, offset))
    parts = philox.row_bits(3, 10, seed_tensor, offset_tensor)
    got = torch.stack(parts, dim=-1).flatten(1).cpu()
    assert got.tolist() == row_bits(3, 10, seed, offset).astype(np.int64).tolist()


@pytest.mark.parametrize(
    ("seed", "offset"), [(0, 0), (-(2**63), 2**33 + 5), (2**62 + 3, 2**62 + 1)]
)
def test_reference_bits_of_samples(device, seed, offset):
    """The number of the sample is word 2 of the counter; sample 0 is the row drawn once."""
    place = [torch.tensor(v, device=device) for v in (seed, offset)]
    got = torch.stack(philox.row_bits(3, 10, *place, samples=5), dim=-1).flatten(2).cpu()
    want = [row_bits(3, 10, seed, offset, sample) for sample in range(5)]
    assert got.tolist() == np.stack(want).astype(np.int64).tolist()
    once = torch.stack(philox.row_bits(3, 10, *place), dim=-1).flatten(1).cpu()
    assert torch.equal(got[0], once)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("seed", SEEDS)
def test_noise_against_float64(impl, device, seed, offset):
    """A wrong bit anywhere gives another number altogether, so this holds the integers too."""
    got = noise_on(impl, device, 3, 10, seed, offset).double()
    want = normals((3, 10), seed, offset)
    assert ((got - want).abs() / (1 + want.abs())).max() < NORMAL_TOLERANCE


def test_noise_against_float64_in_bulk(impl, device):
    rows = 16 if INTERPRETING else 256
    got = noise_on(impl, device, rows, 4001, seed=5, offset=2**35).double()
    want = normals((rows, 4001), 5, 2**35)
    assert ((got - want).abs() / (1 + want.abs())).max() < NORMAL_TOLERANCE


def test_noise_of_samples_against_float64(impl, device):
    zero = torch.zeros(3, 10, device=device)
    got, _ = reparameterize_kl(
        zero, zero.clone(), 2**62 + 3, offset=2**33 + 5, num_samples=5, impl=impl
    )
    want = normals((3, 10), 2**62 + 3, 2**33 + 5, num_samples=5)
    assert ((got.double().cpu() - want).abs() / (1 + want.abs())).max() < NORMAL_TOLERANCE


@pytest.mark.parametrize("shape", [(3, 1), (5, 63), (0, 4), (4, 0)])
def test_row_normals_with_samples(device, shape):
    seed, offset = (torch.tensor(v, device=device) for v in (3, 2**40))
    got = philox.row_normals(*shape, seed, offset, samples=4)
    assert (got.shape, got.dtype) == ((4, *shape), torch.float32)
    assert torch.equal(got[0], philox.row_normals(*shape, seed, offset))
    assert torch.equal(got[:2], philox.row_normals(*shape, seed, offset, samples=2))


def box_muller_on(impl: str, device: str, radius_bits: np.ndarray, angle_bits: np.ndarray):
    bits = torch.from_numpy(np.stack([radius_bits, angle_bits])).to(device)
    if impl == "torch":
        return torch.stack(philox._box_muller(bits[0], bits[1])).cpu()
    out = torch.empty(bits.shape, device=device)
    box_muller_kernel[(triton.cdiv(bits.shape[1], 256),)](bits, out, bits.shape[1], BLOCK=256)
    return out.cpu()


def test_extreme_bits_give_finite_normals_in_all_octants(impl, device):
    """The ends of every octant, with the smallest and the largest radius."""
    angles = [(octant << 29) + end for octant in range(8) for end in (0, 1, 2**28, 2**29 - 1)]
    radii = [0, 1, 127, 128, 2**31, 2**32 - 129, 2**32 - 1]
    radius_bits, angle_bits = (g.ravel() for g in np.meshgrid(radii, angles, indexing="ij"))
    got = box_muller_on(impl, device, radius_bits, angle_bits).double()
    want = torch.from_numpy(np.stack(normals_from_bits(radius_bits, angle_bits)))
    assert got.isfinite().all()
    assert got.abs().max() == pytest.approx(math.sqrt(-2 * math.log(2.0**-33)), rel=1e-6)
    assert ((got - want).abs() / (1 + want.abs())).max() < NORMAL_TOLERANCE


def test_logarithm_against_float64():
    """Every uniform next to 1, where the logarithm loses its size, and others up to the smallest;
    beside PyTorch's own logarithm: at most a quarter more of rounding."""
    random = np.random.default_rng(3).integers(0, 2**32, 200_000)
    bits = np.concatenate([2**32 - 1 - np.arange(0, 2**22, 64), np.arange(4096), random])
    u = torch.from_numpy(bits).float() * 2.0**-32 + 2.0**-33
    want = -2.0 * torch.log(u.double())
    got, library = philox.minus_two_log(u), -2.0 * torch.log(u)
    assert (got[u == 1] == 0).all()
    assert (got >= 0).all()
    inside = u < 1
    error, of_library = (((x.double() - want) / want)[inside] for x in (got, library))
    assert error.abs().max() < 1.3e-7
    assert error.square().mean().sqrt() < 1.25 * of_library.square().mean().sqrt()


@needs_no_interpreter
def test_compiled_noise_has_the_bits_of_eager():
    """No operation of the definition is a library's own, so that no compiler can differ."""
    seed, offset = torch.tensor(5), torch.tensor(2**33)
    compiled = torch.compile(lambda *place: philox.row_normals(37, 507, *place), fullgraph=True)
    assert torch.equal(compiled(seed, offset), philox.row_normals(37, 507, seed, offset))
    assert torch.equal(philox._normals(37, 507, seed, offset, None), compiled(seed, offset))


def test_rounding_the_uniform_to_float32_moves_no_normal_far():
    """The definition rounds u; near u = 1 that matters most, and even there only by 2^-12."""
    radius_bits = np.concatenate([2**32 - 1 - np.arange(4096), np.arange(4096) * 2**20])
    x, _ = normals_from_bits(radius_bits, np.zeros_like(radius_bits))
    exact = np.sqrt(-2 * np.log1p(-(2**32 - radius_bits - 0.5) * 2.0**-32))
    assert np.abs(x - exact).max() < 2.0**-12


def test_public_normal_is_the_operators_noise(impl, device):
    got = normal((6, 3, 5), 99, offset=12, device=device)
    assert got.dtype == torch.float32
    assert got.device.type == device
    want = noise_on(impl, device, 6, 15, 99, 12).view(6, 3, 5)
    torch.testing.assert_close(got.cpu(), want, rtol=NORMAL_TOLERANCE, atol=NORMAL_TOLERANCE)


# ------------------------------------------------------------------------------ distributions

# Deviations that chance exceeds once in 150,000; with fixed seeds a pass is a pass for ever.
SIGMAS = 4.5


@pytest.fixture(scope="module")
def draws() -> torch.Tensor:
    return normal((1024, 1023), 2024).double()


def test_normals_are_normal(draws):
    assert draws.numel() > 1e6
    assert stats.kstest(draws.flatten().numpy(), "norm").pvalue > 0.01


@pytest.mark.parametrize("column", [0, 1, 2, 3])
def test_each_output_of_a_call_is_normal(draws, column):
    part = draws[:, column::4].flatten().numpy()
    assert stats.kstest(part, "norm").pvalue > 0.01


@pytest.mark.parametrize(
    ("power", "expected", "variance"), [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]
)
def test_moments(draws, power, expected, variance):
    """E[x^k] and the variance of x^k under N(0, 1)."""
    deviation = (draws**power).mean().item() - expected
    assert abs(deviation) < SIGMAS * math.sqrt(variance / draws.numel())


def test_tails(draws):
    """The number beyond 4σ is Poisson about 64."""
    expected = 2 * stats.norm.sf(4.0) * draws.numel()
    assert abs((draws.abs() > 4).sum().item() - expected) < SIGMAS * math.sqrt(expected)


def test_uniforms_are_uniform_and_never_one():
    u = uniform((1024, 1023), 77)
    assert u.dtype == torch.float32
    assert u.min() >= 0
    assert u.max() < 1
    assert torch.equal((u * 2**24).floor() * 2.0**-24, u)
    assert stats.kstest(u.flatten().double().numpy(), "uniform").pvalue > 0.01


def test_largest_bits_give_a_uniform_below_one(monkeypatch):
    ones = torch.full((1, 1), 0xFFFFFFFF)
    monkeypatch.setattr(philox, "row_bits", lambda *_: (ones, ones, ones, ones))
    u = philox._uniforms(1, 4, torch.tensor(0), torch.tensor(0))
    assert (u == 1 - 2.0**-24).all()


def correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    """In standard errors."""
    x, y = x.flatten() - x.mean(), y.flatten() - y.mean()
    r = (x * y).sum() / (x.norm() * y.norm())
    return r.item() * math.sqrt(x.numel())


@pytest.fixture(scope="module")
def samples() -> torch.Tensor:
    zero = torch.tensor(0)
    return philox.row_normals(64, 1023, zero, zero, samples=16).double()


def test_samples_are_normal(samples):
    for sample in samples:
        assert stats.kstest(sample.flatten().numpy(), "norm").pvalue > 0.001
    assert stats.kstest(samples.flatten().numpy(), "norm").pvalue > 0.01


@pytest.mark.parametrize("of", ["values", "squares"])
@pytest.mark.parametrize("pair", ["samples", "samples2", "samples_rows", "samples_columns"])
def test_samples_are_uncorrelated(samples, pair, of):
    """One with the next and the next but one, and with its neighbours in row and column."""
    x, y = {
        "samples": (samples[:-1], samples[1:]),
        "samples2": (samples[:-2], samples[2:]),
        "samples_rows": (samples[:-1, 1:], samples[1:, :-1]),
        "samples_columns": (samples[:-1, :, 4:], samples[1:, :, :-4]),
    }[pair]
    if of == "squares":
        x, y = x.square(), y.square()
    assert abs(correlation(x, y)) < SIGMAS


def test_the_mean_over_samples_shrinks_as_it_must(samples):
    """The average of 16 independent normals has a variance of 1/16."""
    mean = samples.mean(0).flatten() * 4
    assert abs(mean.var().item() - 1) < SIGMAS * math.sqrt(2 / mean.numel())
    assert stats.kstest(mean.numpy(), "norm").pvalue > 0.01


@pytest.mark.parametrize("of", ["values", "squares"])
@pytest.mark.parametrize(
    "pair", ["seeds", "high_seeds", "rows", "columns1", "columns2", "columns4"]
)
def test_neighbours_are_uncorrelated(draws, pair, of):
    """Squares too: two outputs of one pair share a radius that must cancel."""
    x, y = {
        "seeds": lambda: (draws, normal((1024, 1023), 2025).double()),
        "high_seeds": lambda: (draws, normal((1024, 1023), 2024 + 2**32).double()),
        "rows": lambda: (draws[:-1], draws[1:]),
        "columns1": lambda: (draws[:, :-1], draws[:, 1:]),
        "columns2": lambda: (draws[:, :-2], draws[:, 2:]),
        "columns4": lambda: (draws[:, :-4], draws[:, 4:]),
    }[pair]()
    if of == "squares":
        x, y = x.square(), y.square()
    assert abs(correlation(x, y)) < SIGMAS


# ------------------------------------------------------------------------------------- places


@pytest.mark.parametrize("draw", [normal, uniform])
@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 63), (5, 3, 7)])
def test_a_row_depends_on_its_global_position_alone(device, draw, shape):
    whole = draw(shape, 3, offset=2**32 - 2, device=device)
    for r in range(shape[0]):
        row = draw((1, *shape[1:]), 3, offset=2**32 - 2 + r, device=device)
        assert torch.equal(row[0], whole[r])


@pytest.mark.parametrize(
    "columns", [1, 6, 63, pytest.param(507, marks=pytest.mark.slow if INTERPRETING else [])]
)
def test_any_partition_of_a_batch_gives_the_same_noise(impl, device, columns):
    whole = noise_on(impl, device, 37, columns, seed=11, offset=100)
    for sizes in [(37,), (1,) * 37, (30, 7), (2, 3, 5, 7, 20)]:
        parts, done = [], 0
        for size in sizes:
            parts.append(noise_on(impl, device, size, columns, seed=11, offset=100 + done))
            done += size
        # Other tiles may fuse other multiplications on a GPU; the integers are the same.
        tolerance = NORMAL_TOLERANCE if device == "cuda" else 0.0
        torch.testing.assert_close(torch.cat(parts), whole, rtol=tolerance, atol=tolerance)


def test_columns_are_not_shared_between_widths():
    """Rows of another width are other places: call numbers count groups of four."""
    assert not torch.equal(normal((4, 8), 0)[:, :4], normal((4, 4), 0))
    assert torch.equal(normal((4, 7), 0), normal((4, 8), 0)[:, :7])


@pytest.mark.parametrize("draw", [normal, uniform])
def test_seed_and_offset_as_tensors(device, draw):
    seed, offset = (torch.tensor(v, device=device) for v in (2**40, 2**41))
    want = draw((3, 5), 2**40, offset=2**41, device=device)
    assert torch.equal(draw((3, 5), seed, offset=offset, device=device), want)
    assert torch.equal(draw((3, 5), seed.view(1), offset=offset, device=seed.device), want)
    assert not torch.equal(draw((3, 5), 2**40 + 1, offset=2**41, device=device), want)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 4)])
def test_empty_shapes(shape):
    assert normal(shape, 0).shape == shape
    assert uniform(shape, 0).shape == shape


def test_shape_needs_rows():
    with pytest.raises(ValueError, match=r"shape needs a first dimension of rows, got \(\)"):
        normal((), 0)
