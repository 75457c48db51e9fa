"""Which implementations run where, and memory that punishes whoever forgets to write it."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from kernel_cases import HAS_TRITON, INTERPRETING, ONE_IN, is_interpreted, is_quick

NO_GPU = pytest.mark.skip(reason="no CUDA device on this machine")


def implementations() -> list:
    """(impl, device): the reference everywhere, the kernels on a GPU or in the interpreter."""
    cases = [pytest.param("torch", "cpu", id="torch-cpu")]
    if INTERPRETING and HAS_TRITON:
        cases.append(pytest.param("triton", "cpu", id="triton-cpu"))
    if not INTERPRETING:
        marks = [pytest.mark.gpu] + ([] if torch.cuda.is_available() else [NO_GPU])
        cases.append(pytest.param("torch", "cuda", id="torch-cuda", marks=marks))
        cases.append(pytest.param("triton", "cuda", id="triton-cuda", marks=marks))
    return cases


def devices() -> list:
    marks = [pytest.mark.gpu] + ([] if torch.cuda.is_available() else [NO_GPU])
    return [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=marks)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "impl" in metafunc.fixturenames:
        metafunc.parametrize(("impl", "device"), implementations())
    elif "device" in metafunc.fixturenames:
        metafunc.parametrize("device", devices())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Most of what is interpreted or compiled ahead of time is slow: it takes a second a case."""
    here = Path(__file__).parent
    cases: Counter[str] = Counter()
    for item in items:
        if item.path.parent != here or not hasattr(item, "callspec"):
            continue
        parameters = item.callspec.params
        quick = is_quick(parameters)
        if quick and is_interpreted(parameters):
            test = item.nodeid.partition("[")[0]
            quick = cases[test] % ONE_IN == 0
            cases[test] += 1
        if not quick:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def poisoned_memory():
    """`torch.empty` gives NaN (or the largest integer): an output left unwritten fails."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = filling
