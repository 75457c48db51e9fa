"""MNIST, Fashion-MNIST and CIFAR-10 as published: files, downloads, damage; and the real ones."""

import gzip
import hashlib
import io
import pickle
import struct
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from data_files import REAL, Trap, chw, keep_datasets_in, noise, refusal
from PIL import Image

from fastvae.data import DataConfig, load_all, load_data

needs_mnist = pytest.mark.skipif(
    not (REAL / "MNIST/raw").is_dir(), reason=f"no MNIST in {REAL}: real data not on this machine"
)
needs_cifar = pytest.mark.skipif(
    not (REAL / "cifar10").is_dir(), reason=f"no CIFAR-10 in {REAL}: real data not on this machine"
)


def write_idx(folder: Path, *, zipped: bool) -> dict[str, np.ndarray]:
    """Four files as MNIST has them, with 5 training and 3 test images of 4 x 6."""
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for part, count in (("train", 5), ("t10k", 3)):
        for kind, shape in (("images-idx3", (count, 4, 6)), ("labels-idx1", (count,))):
            values = noise(*shape)
            content = struct.pack(f">I{len(shape)}I", 0x800 + len(shape), *shape) + values.tobytes()
            name = f"{part}-{kind}-ubyte" + (".gz" if zipped else "")
            (folder / name).write_bytes(gzip.compress(content) if zipped else content)
            written[f"{part}-{kind}"] = values
    return written


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("data", "below"),
    [("mnist", "MNIST/raw"), ("fashion-mnist", "FashionMNIST/raw"), ("mnist", "")],
)
def test_idx_files(tmp_path: Path, data: str, below: str, zipped: bool) -> None:
    written = write_idx(tmp_path / below, zipped=zipped)
    train, test = load_data(DataConfig(data=data, data_dir=tmp_path), seed=0)
    assert (train.name, test.name) == (f"{data} train", f"{data} test")
    for part, prefix in ((train, "train"), (test, "t10k")):
        assert np.array_equal(part.images[:, 0].numpy(), written[f"{prefix}-images-idx3"])
        assert part.labels is not None
        assert part.labels.tolist() == written[f"{prefix}-labels-idx1"].tolist()
    assert len(load_all(data, DataConfig(data_dir=tmp_path))) == 8


@needs_mnist
def test_real_mnist() -> None:
    train, test = load_data(DataConfig(data="mnist", data_dir=REAL), seed=0)
    assert train.images.shape == (60000, 1, 28, 28) and test.images.shape == (10000, 1, 28, 28)
    # The published MD5 of the uncompressed file, which begins with 16 bytes of header.
    header = struct.pack(">4I", 0x803, 10000, 28, 28)
    digest = hashlib.md5(header + test.images.numpy().tobytes()).hexdigest()
    assert digest == "2646ac647ad5339dbf082846283269ea"
    assert train.labels is not None and train.labels[:8].tolist() == [5, 0, 4, 1, 9, 2, 1, 3]
    assert train.labels.bincount().tolist()[:3] == [5923, 6742, 5958]


def test_missing_idx_files(tmp_path: Path) -> None:
    message = refusal("mnist", data_dir=tmp_path)
    for part in (str(tmp_path / "MNIST/raw"), "train-images-idx3-ubyte.gz", "--download"):
        assert part in message
    write_idx(tmp_path / "MNIST/raw", zipped=True)
    (tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte.gz").unlink()
    assert "t10k-labels-idx1-ubyte" in refusal("mnist", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:30], "Fetch it again"),
        (lambda content: b"", "Fetch it again"),
        (lambda content: gzip.compress(gzip.decompress(content)[:-1]), "should hold 120 values"),
        (lambda content: gzip.compress(b"<html>no</html>"), "is not an IDX file"),
    ],
)
def test_damaged_idx_file(tmp_path: Path, damage: Any, message: str) -> None:
    write_idx(tmp_path, zipped=True)
    file = tmp_path / "train-images-idx3-ubyte.gz"
    file.write_bytes(damage(file.read_bytes()))
    assert str(file) in refusal("mnist", data_dir=tmp_path)
    assert message in refusal("mnist", data_dir=tmp_path)


def test_download_of_idx_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mirrors on this machine instead of the network: the first fails, the second is read."""
    torchvision = pytest.importorskip("torchvision")
    written = write_idx(tmp_path / "mirror", zipped=True)
    resources = [
        (file.name, hashlib.md5(file.read_bytes()).hexdigest())
        for file in sorted((tmp_path / "mirror").iterdir())
    ]
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", resources)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        mirrors = [f"{address}/nothing/", f"{address}/mirror/"]
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", mirrors)
        config = DataConfig(data="mnist", data_dir=tmp_path / "data", download=True)
        train, _ = load_data(config, seed=0)
        server.shutdown()
    assert np.array_equal(train.images[:, 0].numpy(), written["train-images-idx3"])
    assert (tmp_path / "data/MNIST/raw/train-images-idx3-ubyte.gz").is_file()

    message = refusal("mnist", data_dir=tmp_path / "other", download=True)  # the server is gone
    assert "cannot be downloaded" in message and str(tmp_path / "other/MNIST/raw") in message


@pytest.fixture
def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[np.ndarray]:
    """A CIFAR-10 of 3 training and 2 test images in the published format."""
    torchvision = pytest.importorskip("torchvision")
    pixels, known = noise(5, 3072), torchvision.datasets.CIFAR10
    contents = {
        "data_batch_1": {"data": pixels[:3], "labels": [4, 0, 9]},
        "test_batch": {"data": pixels[3:], "labels": [1, 2]},
        "batches.meta": {"label_names": list("abcdefghij")},
    }
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    sums = {}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(known, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(known, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(known, "meta", {**known.meta, "md5": sums["batches.meta"]})
    return pixels.reshape(5, 3, 32, 32)


def test_cifar10_as_published(tmp_path: Path, cifar10: np.ndarray) -> None:
    train, test = load_data(DataConfig(data="cifar10", data_dir=tmp_path), seed=0)
    assert np.array_equal(torch.cat([train.images, test.images]).numpy(), cifar10)
    assert train.labels is not None and train.labels.tolist() == [4, 0, 9] and len(test) == 2


def test_altered_cifar10_is_not_unpickled(tmp_path: Path, cifar10: np.ndarray) -> None:
    trap = Trap(tmp_path / "sprung")
    file = tmp_path / "cifar-10-batches-py/data_batch_1"
    file.write_bytes(pickle.dumps(trap))
    message = refusal("cifar10", data_dir=tmp_path)
    assert str(file.parent) in message and "--download" in message and not trap.sprung()


def test_failing_download_of_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torchvision = pytest.importorskip("torchvision")
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar10.tar.gz")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    message = refusal("cifar10", data_dir=tmp_path / "new", download=True)
    assert f"cannot be downloaded into {tmp_path / 'new'}" in message


def test_missing_cifar10(tmp_path: Path) -> None:
    message = refusal("cifar10", data_dir=tmp_path)
    for part in ("cifar-10-batches-py", str(tmp_path / "cifar10"), "--download", "--data-dir"):
        assert part in message


@needs_cifar
def test_real_cifar10_in_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_datasets_in(tmp_path, monkeypatch)
    import pyarrow.parquet as parquet

    train, test = load_data(DataConfig(data="cifar10", data_dir=REAL), seed=0)
    assert train.images.shape == (10000, 3, 32, 32) and test.images.shape == (1000, 3, 32, 32)
    assert train.name == "cifar10 train"
    table = parquet.read_table(next((REAL / "cifar10").glob("test-*.parquet")))
    for row in (0, 517, 999):
        encoded = table["img"][row].as_py()["bytes"]
        pixels = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
        assert torch.equal(test.images[row], chw(pixels))
    assert test.labels is not None and test.labels.tolist() == table["label"].to_pylist()
