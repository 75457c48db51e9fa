"""Rules of the two packages: which imports which, and what is never done."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fastvae_kernels
import pytest

import fastvae

NOT_FOR_THE_MODEL = [
    *("accelerate", "datasets", "matplotlib", "pydantic", "sklearn", "torchvision", "triton"),
    "tyro",
]
PACKAGES = {
    "fastvae": Path(fastvae.__file__).parent,
    "fastvae_kernels": Path(fastvae_kernels.__file__).parent,
}
FILES = [
    (".".join([package, *path.relative_to(root).with_suffix("").parts]), path)
    for package, root in PACKAGES.items()
    for path in sorted(root.rglob("*.py"))
]


def imports(path: Path) -> Iterator[str]:
    """Every module that a file names in an import, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def below(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def test_there_are_files() -> None:
    assert len(FILES) > 40
    assert {"fastvae.cli", "fastvae_kernels.ops"} <= {n for n, _ in FILES}


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("fastvae_kernels", "fastvae"),
        ("fastvae.parts", "fastvae.training"),
        ("fastvae.parts", "fastvae.data"),
        ("fastvae.parts", "fastvae.vae"),
        ("fastvae.data", "fastvae.training"),
        ("fastvae.data", "fastvae.parts"),
        ("fastvae.vae", "fastvae.training"),
        ("fastvae.vae", "fastvae.config"),
        ("fastvae.evaluation", "fastvae.training"),
        ("fastvae.training", "fastvae.commands"),
        ("fastvae", "fastvae.cli"),
    ],
)
def test_imports_run_one_way(importer: str, imported: str) -> None:
    for name, path in FILES:
        if below(name, importer) and name != imported:
            assert not [found for found in imports(path) if below(found, imported)], name


def test_nothing_is_pickled() -> None:
    """No module that unpickles, and none of torch's functions that do. (`pickletools` takes pickles
    apart and executes nothing.)"""
    for name, path in FILES:
        modules = {found.split(".")[0] for found in imports(path)}
        assert not modules & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}, name
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                written = ast.unparse(node)
                assert written not in ("torch.save", "torch.load", "torch.jit.load"), name
                assert not written.endswith((".save_state", ".load_state")), name
                assert not written.endswith(("load_state_dict_from_url", ".get_state_dict")), name
                assert not written.endswith(("gather_object", "broadcast_object_list")), name
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert ast.unparse(node.value) == "False", name


def python(program: str) -> str:
    process = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_importing_brings_little_along() -> None:
    """What only some commands need, or some machines have, is imported where it is needed."""
    # torchvision brings PyTorch's compiler: together seconds that every command would wait.
    heavy = {*NOT_FOR_THE_MODEL, "datasets", "tqdm", "torch._dynamo"}
    program = f"""
import sys, torch
before = set(sys.modules)
for package in ("fastvae_kernels", "fastvae", "fastvae.cli"):
    __import__(package)
    brought = set(sys.modules) - before
    print("fastvae" in brought, *({heavy} & brought))
"""
    kernels, package, command = (line.split() for line in python(program).splitlines())
    assert kernels == ["False"]
    assert package == ["True"]
    late = {"datasets", "matplotlib", "pydantic", "sklearn", "torchvision", "torch._dynamo"}
    assert not late & set(command)


def test_the_model_needs_no_command_line() -> None:
    """On a machine that lacks what only training and its command need."""
    program = f"""
import sys
for name in {NOT_FOR_THE_MODEL}:
    sys.modules[name] = None
import torch, fastvae
encoder = fastvae.MLPEncoder((1, 4, 4), 4)
decoder = fastvae.MLPDecoder((1, 4, 4), 2)
vae = fastvae.VAE(encoder, decoder, fastvae.Bernoulli(), image_shape=(1, 4, 4), latent_dim=2)
vae.elbo(torch.zeros(2, 1, 4, 4)).mean().backward()
print(vae.sample(3, seed=0).shape)
"""
    assert python(program) == "torch.Size([3, 1, 4, 4])\n"


def test_triton_is_imported_by_its_kernels_alone() -> None:
    for name, path in FILES:
        if not below(name, "fastvae_kernels.triton_kernels"):
            assert not [found for found in imports(path) if below(found, "triton")], name


def test_what_is_public_is_there() -> None:
    for package in (fastvae, fastvae_kernels):
        assert all(hasattr(package, name) for name in package.__all__)
    assert fastvae.__version__
