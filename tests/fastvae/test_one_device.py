"""What scores images on a GPU meets no tensor of the host: see one_device.py."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


@pytest.mark.skipif(torch.version.cuda is None, reason="this PyTorch is not built for CUDA")
@pytest.mark.skipif(find_spec("triton") is None, reason="the package triton is not installed")
def test_scoring_mixes_no_devices() -> None:
    presets = ["vae", "iaf", "semi-amortized", "categorical", "mnist-conv"]
    done = subprocess.run(
        [sys.executable, str(HERE / "one_device.py"), *presets],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(HERE.parents[1] / "bench"), *sys.path]),
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
