"""What importing the kernels brings along: not Triton, and never the library above them."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import fastvae_kernels
import pytest

PACKAGE = Path(fastvae_kernels.__file__).parent


def run(code: str) -> str:
    """In a fresh Python that finds the package where this one does."""
    path = os.pathsep.join(p for p in (str(PACKAGE.parent), os.environ.get("PYTHONPATH")) if p)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


USE = """
import sys, torch
import fastvae_kernels as f
mu = torch.zeros(2, 3, requires_grad=True)
target = mu.detach()
z, kl = f.reparameterize_kl(mu, mu, 0)
loss = z.sum() + kl.sum() + f.bernoulli_nll(mu, target).sum() + f.gaussian_nll(z, target, 0.0).sum()
loss.backward()
f.binarize(target, 0), f.uniform((2, 3), 0), f.normal((2, 3), 0)
"""


def test_neither_import_nor_use_on_a_cpu_imports_triton():
    code = USE + "print(sorted(m for m in sys.modules if m.split('.')[0] == 'triton'))"
    assert run(code) == "[]"


def test_it_runs_where_triton_is_not_installed():
    code = (
        "import sys; sys.modules['triton'] = None\n"  # importing it now raises ImportError
        + USE
        + "try:\n    f.normal((2,), 0); f.bernoulli_nll(mu, target, impl='triton')\n"
        "except ValueError as error:\n    print(error)"
    )
    assert run(code) == 'impl="triton" needs the package triton; install it, or use impl="torch"'


def test_the_kernels_never_import_the_library():
    assert run("import sys, fastvae_kernels; print('fastvae' in sys.modules)") == "False"


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_no_module_imports_the_library(path):
    """Imports inside functions too, and Triton only where a kernel is launched."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    assert "fastvae" not in imported
    assert "triton" not in imported or path.parent.name == "triton_kernels"
