"""The kernels' parity tests, run on this machine's CPU by Triton's interpreter.

The interpreter has to be asked for before Triton is imported, and it does not go together with
torch.compile: hence a process of its own.
"""

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from kernel_cases import HAS_TRITON, needs_no_interpreter

HERE = Path(__file__).parent

# The least number of kernel cases that must run in each file, of the quick ones and of all: a
# filter that selects nothing, or a skip that swallows everything, is no success.
CASES = {
    "test_philox.py": (8, 50),
    "test_reparameterize_kl.py": (40, 300),
    "test_bernoulli_nll.py": (12, 100),
    "test_gaussian_nll.py": (20, 230),
    "test_noise.py": (5, 40),
    "test_binarize.py": (8, 100),
    "test_logistic_mixture_nll.py": (14, 140),
    "test_row_weight.py": (18, 260),
    "test_channels_last.py": (4, 70),
    "test_indices.py": (8, 130),
}

# Triton 3.6 makes an int of an array of one element, which numpy 2.4 refuses; Triton 3.9 does not.
KNOWN_CLASH = "only 0-dimensional arrays can be converted to Python scalars"


@needs_no_interpreter
@pytest.mark.skipif(not HAS_TRITON, reason="the package triton is not installed")
@pytest.mark.parametrize(
    ("minimum", "selected"),
    [
        ({name: quick for name, (quick, _) in CASES.items()}, "not slow"),
        pytest.param({name: n for name, (_, n) in CASES.items()}, "", marks=pytest.mark.slow),
    ],
    ids=["quick", "all"],
)
def test_kernels_pass_in_the_interpreter(tmp_path, minimum, selected):
    report = tmp_path / "report.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-k",
        "triton-cpu",
        "-m",
        selected,
        "-p",
        "no:cacheprovider",
    ]
    command += ["-W", "ignore::RuntimeWarning", f"--junitxml={report}"]
    done = subprocess.run(
        [*command, *(str(HERE / name) for name in minimum)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if KNOWN_CLASH in done.stdout and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip(f"the interpreter of Triton {version('triton')} needs numpy < 2.4")
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]

    passed = dict.fromkeys(minimum, 0)
    for case in ET.parse(report).getroot().iter("testcase"):
        if not list(case):  # a failure, an error or a skip would be a child
            assert "triton-cpu" in case.get("name")
            passed[case.get("classname").split(".")[-1] + ".py"] += 1
    too_few = {name: n for name, n in passed.items() if n < minimum[name]}
    assert not too_few, f"too few kernel cases ran: {too_few}, expected {minimum}"
