"""Every source and every refusal, on real files, against what PIL and NumPy read from them."""

import gzip
import hashlib
import io
import os
import pickle
import struct
import sys
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import save_file

from fastvae.data import decode
from fastvae.data.config import DataConfig
from fastvae.data.image_set import ImageSet
from fastvae.data.sources import load_all, load_data, read_images, split
from fastvae.data.tables import read_table
from fastvae.errors import UserError

REAL = Path(__file__).parents[2].parent / "shared/data"
needs_mnist = pytest.mark.skipif(
    not (REAL / "MNIST/raw").is_dir(), reason=f"no MNIST in {REAL}: real data not on this machine"
)
needs_cifar = pytest.mark.skipif(
    not (REAL / "cifar10").is_dir(), reason=f"no CIFAR-10 in {REAL}: real data not on this machine"
)
RNG = np.random.default_rng(7)


def noise(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def png(pixels: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", **options)
    return file.getvalue()


def write_image(path: Path, pixels: np.ndarray, **options: Any) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return pixels


def chw(pixels: np.ndarray) -> torch.Tensor:
    return torch.tensor(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def refusal(data: Any, *, whole: bool = False, **fields: Any) -> str:
    config = DataConfig(data=str(data), **fields)
    with pytest.raises(UserError) as caught:
        load_all(str(data), config) if whole else load_data(config, seed=0)
    return str(caught.value)


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keeps what datasets writes below pytest's temporary folder."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("huggingface")
    monkeypatch.setenv("HF_HOME", str(folder))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


# ImageSet


def test_image_set_measures_and_selects() -> None:
    images, labels = torch.arange(5 * 12, dtype=torch.uint8).view(5, 3, 2, 2), torch.arange(5)
    data = ImageSet(images, labels, "five")
    assert (len(data), data.image_shape, data.nbytes) == (5, (3, 2, 2), 60 + 40)
    for indices in ([4, 0], torch.tensor([4, 0])):
        picked = data.select(indices)
        assert torch.equal(picked.images, images[[4, 0]])
        assert picked.labels is not None and picked.labels.tolist() == [4, 0]
    assert data.select(slice(2)).images.data_ptr() == images.data_ptr()
    assert data.to("cpu").image_shape == (3, 2, 2)
    assert ImageSet(images / 255, None, "floats").select([1]).labels is None


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 3, 3), None, "float32 [2, 3, 3]"),
        (torch.zeros(2, 1, 3, 3, dtype=torch.int64), None, "int64 [2, 1, 3, 3]"),
        (torch.zeros(0, 1, 3, 3, dtype=torch.uint8), None, "no image"),
        (torch.full((2, 1, 3, 3), 1.5), None, "from 1.5 to 1.5"),
        (torch.full((2, 1, 3, 3), torch.nan), None, "from nan to nan"),
        (torch.zeros(2, 1, 3, 3), torch.zeros(3, dtype=torch.int64), "int64 [3]"),
        (torch.zeros(2, 1, 3, 3), torch.zeros(2), "float32 [2]"),
        (torch.zeros(2, 1, 3, 3), torch.tensor([0, -1]), "the lowest is -1"),
    ],
)
def test_image_set_refuses(images: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(UserError) as caught:
        ImageSet(images, labels, "mine")
    assert str(caught.value).startswith("mine: ") and message in str(caught.value)


# The split


def test_split_depends_on_seed_and_count_alone() -> None:
    numbers = torch.arange(100)
    one = ImageSet(torch.zeros(100, 1, 2, 2), numbers, "one")
    other = ImageSet(torch.ones(100, 3, 5, 4), numbers, "other")
    labels = [
        [part.labels.tolist() for part in split(data, 0.1, seed) if part.labels is not None]
        for data, seed in ((one, 3), (other, 3), (one, 4))
    ]
    assert labels[0] == labels[1] != labels[2]
    train, held = labels[0]
    assert sorted(train + held) == list(range(100)) and len(held) == 10
    # Written down, because a run resumed elsewhere or later must hold out the same images.
    assert held == [3, 20, 22, 25, 42, 48, 86, 89, 92, 93]


@pytest.mark.parametrize(("count", "holdout", "held"), [(2, 0.1, 1), (2, 0.99, 1), (9, 0.5, 4)])
def test_split_leaves_one_on_either_side(count: int, holdout: float, held: int) -> None:
    parts = split(ImageSet(torch.zeros(count, 1, 2, 2), None, "few"), holdout, seed=0)
    assert [len(part) for part in parts] == [count - held, held]


def test_one_image_cannot_be_split(tmp_path: Path) -> None:
    write_image(tmp_path / "only.png", noise(4, 4))
    assert "one image" in refusal(tmp_path) and str(tmp_path) in refusal(tmp_path)
    assert len(load_all(str(tmp_path / "only.png"), DataConfig())) == 1


# Built-in names


def test_digits() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    data = load_all("digits", DataConfig())
    assert data.images.shape == (1797, 1, 8, 8) and data.images.dtype == torch.uint8
    assert data.images.max() == 255
    expected = [[round(value * 255 / 16) for value in row] for row in digits.images[5].tolist()]
    assert data.images[5, 0].tolist() == expected
    assert data.labels is not None and data.labels.tolist() == digits.target.tolist()

    train, held = load_data(DataConfig(), seed=1)
    assert (len(train), len(held)) == (1617, 180)
    assert (train.name, held.name) == ("digits train", "digits held-out")


def test_digits_resized_and_coloured() -> None:
    data = load_all("digits", DataConfig(image_size=(16, 12), channels=3, resize="stretch"))
    original = load_all("digits", DataConfig()).images[0, 0].numpy()
    expected = np.asarray(Image.fromarray(original).resize((12, 16), Image.Resampling.BILINEAR))
    assert data.image_shape == (3, 16, 12)
    assert all(np.array_equal(channel, expected) for channel in data.images[0].numpy())


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


def test_altered_cifar10_is_not_unpickled(
    tmp_path: Path, cifar10: np.ndarray, trap: "Trap"
) -> None:
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
def test_real_cifar10_in_parquet(cache: Path) -> None:
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


# Folders of images


def test_plain_folder_in_sorted_order(tmp_path: Path) -> None:
    pixels = {name: noise(5, 4) for name in ("b.png", "a.bmp", "sub/c.PNG", "d.tiff")}
    for name, values in pixels.items():
        write_image(tmp_path / name, values)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "._b.png").write_bytes(b"what some systems leave beside a file")
    data = load_all(str(tmp_path), DataConfig())
    expected = [pixels[name] for name in ("a.bmp", "b.png", "d.tiff", "sub/c.PNG")]
    assert np.array_equal(data.images[:, 0].numpy(), np.stack(expected))
    assert data.labels is None and data.name == str(tmp_path)

    train, held = load_data(DataConfig(data=str(tmp_path), holdout=0.5), seed=5)
    assert len(train) == len(held) == 2 and held.name.endswith("held-out")


def test_class_folders(tmp_path: Path) -> None:
    for name in ("dog/2", "cat/1", "dog/1", "eel/1"):
        write_image(tmp_path / f"{name}.png", noise(4, 4))
    labels = load_all(str(tmp_path), DataConfig()).labels
    assert labels is not None and labels.tolist() == [0, 1, 1, 2]
    write_image(tmp_path / "dog/small/3.png", noise(4, 4))
    assert load_all(str(tmp_path), DataConfig()).labels is None


def test_one_folder_is_no_class(tmp_path: Path) -> None:
    for name in ("all/2", "all/1"):
        write_image(tmp_path / f"{name}.png", noise(4, 4))
    assert load_all(str(tmp_path), DataConfig()).labels is None


@pytest.mark.parametrize("held_out", ["test", "val", "validation"])
def test_split_folders(tmp_path: Path, held_out: str) -> None:
    for name in ("train/cat/1", "train/dog/1", "train/dog/2", f"{held_out}/dog/1"):
        write_image(tmp_path / f"{name}.png", noise(4, 4))
    train, test = load_data(DataConfig(data=str(tmp_path)), seed=0)
    assert train.labels is not None and train.labels.tolist() == [0, 1, 1]
    assert test.labels is not None and test.labels.tolist() == [1]
    assert len(load_all(str(tmp_path), DataConfig())) == 4


def test_test_comes_before_val_and_all_are_read_whole(tmp_path: Path) -> None:
    for index, name in enumerate(("test/1", "train/1", "train/2", "val/1")):
        write_image(tmp_path / f"{name}.png", np.full((4, 4), index, dtype=np.uint8))
    train, test = load_data(DataConfig(data=str(tmp_path)), seed=0)
    assert train.images[:, 0, 0, 0].tolist() == [1, 2] and test.images[0, 0, 0, 0] == 0
    assert len(load_all(str(tmp_path), DataConfig())) == 4


def test_empty_split_folder(tmp_path: Path) -> None:
    write_image(tmp_path / "train/1.png", noise(4, 4))
    (tmp_path / "test").mkdir()
    assert str(tmp_path / "test") in refusal(tmp_path)


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    write_image(tmp_path / "elsewhere/1.png", noise(4, 4))
    (tmp_path / "data").mkdir()
    (tmp_path / "data/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/circle").symlink_to(tmp_path / "data")
    assert len(load_all(str(tmp_path / "data"), DataConfig())) == 1


def test_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "deep/deeper").mkdir(parents=True)
    (tmp_path / "deep/readme.txt").write_text("nothing here")
    message = refusal(tmp_path)
    for part in (str(tmp_path), ".png", ".jpg", ".webp", ".parquet"):
        assert part in message


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda content: content[: len(content) // 2], "runcated"),
        (lambda content: b"", "0 bytes"),
        (lambda content: b"<html>404</html>", "none of PNG"),
        (lambda content: content[:60] + bytes(40) + content[100:], ""),
    ],
)
@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_damaged_image(tmp_path: Path, ending: str, damage: Any, reason: str) -> None:
    for index in range(40):
        write_image(tmp_path / f"{index:02}.{ending}", noise(32, 32, 3))
    file = tmp_path / f"23.{ending}"
    file.write_bytes(damage(file.read_bytes()))
    message = refusal(tmp_path)
    assert str(file) in message and "remove it" in message and reason in message


# What becomes of one image


def read_one(path: Path, **fields: Any) -> torch.Tensor:
    return read_images([path], DataConfig(**fields)).images[0]


@pytest.mark.parametrize(
    ("mode", "channels"),
    [("1", 1), ("L", 1), ("LA", 1), ("P", 3), ("RGB", 3), ("RGBA", 3)],
)
def test_grey_or_colour(tmp_path: Path, mode: str, channels: int) -> None:
    image = Image.fromarray(noise(6, 5, 3)).convert(mode)
    image.save(tmp_path / "a.png")
    expected = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    if mode in ("LA", "RGBA"):
        image.putalpha(255)
        image.save(tmp_path / "a.png")
    assert torch.equal(read_one(tmp_path / "a.png"), chw(expected))
    assert read_one(tmp_path / "a.png", channels=1).shape == (1, 6, 5)
    assert read_one(tmp_path / "a.png", channels=3).shape == (3, 6, 5)


def test_one_colour_image_makes_all_colour(tmp_path: Path) -> None:
    grey = write_image(tmp_path / "a.png", noise(4, 4))
    colour = write_image(tmp_path / "b.png", noise(4, 4, 3))
    images = load_all(str(tmp_path), DataConfig()).images
    assert torch.equal(images[0], chw(grey).expand(3, -1, -1))
    assert torch.equal(images[1], chw(colour))
    luma = np.asarray(Image.fromarray(colour).convert("L"))
    assert torch.equal(load_all(str(tmp_path), DataConfig(channels=1)).images[1], chw(luma))


def test_alpha_on_white(tmp_path: Path) -> None:
    pixels = noise(3, 3, 4)
    pixels[0, :, 3], pixels[1, :, 3], pixels[2, :, 3] = 0, 128, 255
    write_image(tmp_path / "a.png", pixels)
    share = pixels[..., 3:] / 255
    expected = pixels[..., :3] * share + 255 * (1 - share)
    found = read_one(tmp_path / "a.png").permute(1, 2, 0).numpy()
    assert np.abs(found - expected).max() <= 1
    assert (found[0] == 255).all() and np.array_equal(found[2], pixels[2, :, :3])


def test_transparent_palette_on_white(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=0)
    assert read_one(tmp_path / "a.png")[:, 0].T.tolist() == [[255, 255, 255], [200, 100, 50]]


@pytest.mark.parametrize("ending", ["png", "tiff", "pgm"])
def test_16_bit_grey_by_full_scale(tmp_path: Path, ending: str) -> None:
    values = np.array([[0, 128, 129, 257], [30000, 32896, 65407, 65535]], dtype=np.uint16)
    write_image(tmp_path / f"a.{ending}", values)
    expected = [[0, 0, 1, 1], [117, 128, 255, 255]]
    assert read_one(tmp_path / f"a.{ending}").tolist() == [expected]
    assert read_one(tmp_path / f"a.{ending}", channels=3)[2].tolist() == expected


def test_float_image_file_is_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "a.tiff", np.full((4, 4), 0.5, dtype=np.float32))
    message = refusal(tmp_path)
    assert "a.tiff" in message and "float32 from 0.5 to 0.5" in message and "16 bits" in message


@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", [3, 6])
def test_exif_orientation(tmp_path: Path, orientation: int, ending: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{ending}"
    write_image(path, noise(8, 16, 3), exif=exif, lossless=True)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert expected.shape[:2] == ((16, 8) if orientation == 6 else (8, 16))
    assert torch.equal(read_one(path), chw(expected))


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("L", (4, 4), value) for value in (50, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (read_one(tmp_path / "a.gif", channels=1) == 50).all()


# Size


def test_mixed_sizes(tmp_path: Path) -> None:
    for name, shape in (("a", (4, 4)), ("b", (4, 4)), ("c", (6, 5))):
        write_image(tmp_path / f"{name}.png", noise(*shape))
    message = refusal(tmp_path)
    for part in (f"{tmp_path / 'a.png'} is 4 x 4", f"{tmp_path / 'c.png'} is 6 x 5"):
        assert part in message
    assert "--image-size 4 4" in message
    assert load_all(str(tmp_path), DataConfig(image_size=(4,))).image_shape == (1, 4, 4)


def test_crop_keeps_the_shape_of_things(tmp_path: Path) -> None:
    """Three stripes, the middle one square: a square crop sees it alone, a stretch sees all."""
    pixels = np.repeat(np.array([10, 100, 200], dtype=np.uint8), 16)[None].repeat(16, axis=0)
    write_image(tmp_path / "a.png", pixels)
    crop = read_one(tmp_path / "a.png", image_size=(8,))
    assert crop.shape == (1, 8, 8) and (crop[:, :, 1:-1] == 100).all()
    stretch = read_one(tmp_path / "a.png", image_size=(4, 12), resize="stretch")
    assert stretch.shape == (1, 4, 12)
    assert stretch[0, 0, [0, 1, 6, 10, 11]].tolist() == [10, 10, 100, 200, 200]


def test_shrinking_is_antialiased(tmp_path: Path) -> None:
    checks = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    write_image(tmp_path / "a.png", checks)
    np.save(tmp_path / "a.npy", checks[None] / np.float32(255))
    assert (read_one(tmp_path / "a.png", image_size=(8,)).float() - 127.5).abs().max() < 3
    floats = load_all(str(tmp_path / "a.npy"), DataConfig(image_size=(8,))).images
    assert floats.dtype == torch.float32 and (floats - 0.5).abs().max() < 0.01


def test_large_jpeg_keeps_its_look_when_shrunk(tmp_path: Path) -> None:
    smooth = np.linspace(0, 255, 640, dtype=np.uint8)[None].repeat(480, axis=0)
    write_image(tmp_path / "a.jpg", smooth, quality=95)
    with Image.open(tmp_path / "a.jpg") as image:
        expected = np.asarray(ImageOps.fit(image, (32, 24), Image.Resampling.BILINEAR))
    found = read_one(tmp_path / "a.jpg", image_size=(24, 32))
    assert (found.float() - chw(expected).float()).abs().max() <= 2


@pytest.mark.parametrize("shape", [(7, 9), (7, 9, 3)])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("resize", ["crop", "stretch"])
def test_files_and_arrays_agree(
    tmp_path: Path, shape: tuple[int, ...], channels: Any, resize: Any
) -> None:
    pixels = write_image(tmp_path / "a.png", noise(*shape))
    np.save(tmp_path / "a.npy", pixels[None])
    np.save(tmp_path / "f.npy", pixels[None] / 255)
    config = DataConfig(image_size=(5, 4), channels=channels, resize=resize)
    bytes_, files = load_all(str(tmp_path / "a.npy"), config), read_images([tmp_path], config)
    assert torch.equal(bytes_.images, files.images)
    floats = load_all(str(tmp_path / "f.npy"), config)
    assert floats.image_shape == files.image_shape
    assert (floats.images * 255 - files.images).abs().max() <= 1.5  # bytes are rounded twice


def test_too_large_for_memory(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", noise(4, 4))
    assert "GiB of memory" in refusal(tmp_path, image_size=(10_000_000,))


# Files and folders on the command line


def test_read_images_keeps_the_order_given(tmp_path: Path) -> None:
    values = {name: write_image(tmp_path / name, noise(4, 4)) for name in ("z.png", "f/b.png")}
    values["f/a.png"] = write_image(tmp_path / "f/a.png", noise(4, 4))
    data = read_images([tmp_path / "z.png", str(tmp_path / "f"), tmp_path / "z.png"], DataConfig())
    expected = [values[name] for name in ("z.png", "f/a.png", "f/b.png", "z.png")]
    assert np.array_equal(data.images[:, 0].numpy(), np.stack(expected))
    assert data.labels is None and data.name == "4 images"


def test_read_images_refuses(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("words")
    for paths, message in (
        ([tmp_path / "gone.png"], "gone.png"),
        ([tmp_path / "empty"], str(tmp_path / "empty")),
        ([tmp_path / "a.txt"], "a.txt cannot be read as an image"),
        ([], "no image was given"),
    ):
        with pytest.raises(UserError, match=message):
            read_images(paths, DataConfig())


# Array files


@pytest.mark.parametrize("ending", ["npy", "npz", "safetensors"])
@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((6, 5, 4), (0, 1, 2)),
        ((6, 5, 4, 1), (0, 3, 1, 2)),
        ((6, 5, 4, 3), (0, 3, 1, 2)),
        ((6, 1, 5, 4), (0, 1, 2, 3)),
        ((6, 3, 5, 4), (0, 1, 2, 3)),
        ((6, 3, 5, 3), (0, 3, 1, 2)),  # can be read both ways: the channels are the last
    ],
)
def test_array_shapes(
    tmp_path: Path, ending: str, shape: tuple[int, ...], axes: tuple[int, ...]
) -> None:
    values, path = noise(*shape), tmp_path / f"a.{ending}"
    match ending:
        case "npy":
            np.save(path, values)
        case "npz":
            np.savez(path, faces=values)
        case _:
            save_file({"faces": torch.from_numpy(values)}, path)
    data = load_all(str(path), DataConfig())
    expected = values.transpose(axes) if len(axes) == 4 else values[:, None]
    assert np.array_equal(data.images.numpy(), expected)
    assert data.images.is_contiguous() and data.labels is None and data.name == str(path)


@pytest.mark.parametrize("kind", ["bool", ">f8", "float32", "float16", "bfloat16"])
def test_array_types(tmp_path: Path, kind: str) -> None:
    bits = noise(6, 5, 4) % 2
    path = tmp_path / ("a.safetensors" if kind == "bfloat16" else "a.npy")
    if kind == "bfloat16":
        save_file({"images": torch.from_numpy(bits).to(torch.bfloat16)}, path)
    else:
        np.save(path, bits.astype(kind))
    images = load_all(str(path), DataConfig()).images
    assert images.dtype == (torch.uint8 if kind == "bool" else torch.float32)
    assert np.array_equal(images[:, 0].numpy(), bits * (255 if kind == "bool" else 1))


@pytest.mark.parametrize(
    ("images", "labels"), [("images", "labels"), ("x", "y"), ("data", "y"), ("faces", "labels")]
)
def test_array_names(tmp_path: Path, images: str, labels: str) -> None:
    values, classes = noise(6, 5, 4), np.array([[3], [1], [2], [0], [1], [3]], dtype=np.int32)
    arrays: dict[str, Any] = {images: values, labels: classes}
    np.savez(tmp_path / "a.npz", **arrays)
    data = load_all(str(tmp_path / "a.npz"), DataConfig())
    assert np.array_equal(data.images[:, 0].numpy(), values)
    assert data.labels is not None and data.labels.tolist() == [3, 1, 2, 0, 1, 3]


@pytest.mark.parametrize(
    "names",
    [
        ("x_train", "x_test", "y_train", "y_test"),
        ("train_images", "test_images", "train_labels", "test_labels"),
        ("train", "test", "train_labels", "test_labels"),
        ("train", "test"),
    ],
)
def test_array_pairs(tmp_path: Path, names: tuple[str, ...]) -> None:
    values = [noise(6, 5, 4), noise(2, 5, 4), np.arange(6), np.arange(2)]
    arrays: dict[str, Any] = dict(zip(names, values, strict=False))
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    train, test = load_data(DataConfig(data=str(tmp_path / "a.npz")), seed=0)
    assert np.array_equal(train.images[:, 0].numpy(), values[0])
    assert np.array_equal(test.images[:, 0].numpy(), values[1])
    assert (train.labels is None) == (len(names) == 2)
    if train.labels is not None and test.labels is not None:
        assert (train.labels.tolist(), test.labels.tolist()) == ([*range(6)], [0, 1])
    assert len(load_all(str(tmp_path / "a.npz"), DataConfig())) == 8


def test_array_without_split_is_split(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", noise(20, 4, 4))
    train, held = load_data(DataConfig(data=str(tmp_path / "a.npy"), holdout=0.25), seed=0)
    assert (len(train), len(held)) == (15, 5)


@pytest.mark.parametrize(
    ("values", "messages"),
    [
        (np.array([0.0, 254.5]), ["float64", "from 0 to 254.5", "images / 255"]),
        (np.array([-1.0, 1.0]), ["from -1 to 1", "(images + 1) / 2"]),
        (np.array([-3.5, 7.0]), ["from -3.5 to 7", "(images - low) / (high - low)"]),
        (np.array([0.0, np.nan]), ["nan", "nan_to_num"]),
        (np.array([0, 255]), ["int64", "from 0 to 255", "astype('uint8')"]),
        (np.array([0, 4095], dtype=np.uint16), ["uint16", "from 0 to 4095"]),
        (np.array([0j, 1j]), ["complex128"]),
    ],
)
def test_array_values_out_of_range(tmp_path: Path, values: Any, messages: list[str]) -> None:
    np.save(tmp_path / "a.npy", np.broadcast_to(values[:, None, None], (2, 4, 4)))
    message = refusal(tmp_path / "a.npy")
    assert all(part in message for part in [str(tmp_path / "a.npy"), *messages])


@pytest.mark.parametrize(
    ("arrays", "messages"),
    [
        ({"images": np.zeros((6, 784))}, ["[6, 784]", "[N, H, W]"]),
        ({"images": np.zeros((6, 4, 4, 2))}, ["[6, 4, 4, 2]"]),
        ({"images": np.zeros((0, 4, 4))}, ["[0, 4, 4]", "no image"]),
        ({"a": np.zeros(3), "b": np.zeros(3)}, ["a, b", "images, x, data", "x_train and x_test"]),
        ({"x_train": np.zeros((2, 4, 4)), "y_train": np.zeros(2)}, ["x_train, y_train"]),
        ({"labels": np.zeros(3)}, ["labels", "which array holds the images"]),
        ({"x": np.zeros((2, 4, 4)), "y": np.zeros(3, dtype=int)}, ["int64 [2]", "int64 [3]"]),
        ({"x": np.zeros((2, 4, 4)), "y": np.zeros(2)}, ["'y'", "float64 [2]", "whole numbers"]),
        ({"x": np.zeros((2, 4, 4)), "y": np.array(["a", "b"])}, ["'y'", "<U1"]),
        ({"train": np.zeros((2, 4, 4)), "test": np.zeros((2, 5, 4))}, ["train", "test", "alike"]),
    ],
)
def test_array_contents_refused(tmp_path: Path, arrays: Any, messages: list[str]) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    message = refusal(tmp_path / "a.npz")
    assert all(part in message for part in [str(tmp_path / "a.npz"), *messages])


def test_array_without_a_name(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((6, 784)))
    assert refusal(tmp_path / "a.npy").startswith(f"{tmp_path / 'a.npy'} has shape [6, 784]. ")


class Trap:
    """Unpickling one makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)

    def sprung(self) -> bool:
        return self.folder.exists()


@pytest.fixture
def trap(tmp_path: Path) -> Trap:
    return Trap(tmp_path / "sprung")


@pytest.mark.parametrize("kind", ["npy", "npz", "bare"])
def test_nothing_is_unpickled(tmp_path: Path, trap: Trap, kind: str) -> None:
    objects, path = np.array([trap], dtype=object), tmp_path / f"a.{kind}"
    if kind == "npz":
        np.savez(path, images=objects)
    elif kind == "npy":
        np.save(path, objects)
    else:
        path = tmp_path / "bare.npy"
        path.write_bytes(pickle.dumps([trap]))
    message = refusal(path)
    assert str(path) in message and "pickle" in message and "numpy.save" in message
    assert not trap.sprung()
    pickle.loads(pickle.dumps(trap))
    assert trap.sprung()  # so it would have been, had anything been unpickled


@pytest.mark.parametrize("ending", ["npy", "npz", "safetensors"])
@pytest.mark.parametrize("keep", [0, 8, 60, -40])
def test_truncated_array_file(tmp_path: Path, ending: str, keep: int) -> None:
    path = tmp_path / f"a.{ending}"
    if ending == "safetensors":
        save_file({"images": torch.zeros(9, 4, 4)}, path)
    else:
        np.save(path, noise(9, 4, 4)) if ending == "npy" else np.savez(path, images=noise(9, 4, 4))
    path.write_bytes(path.read_bytes()[:keep])
    message = refusal(path)
    assert str(path) in message and "incomplete" in message


def test_other_files(tmp_path: Path) -> None:
    for name in ("a.pt", "a.parquet"):
        (tmp_path / name).write_bytes(b"...")
    assert all(part in refusal(tmp_path / "a.pt") for part in ("a.pt", ".npy", ".safetensors"))
    assert f"give its folder, {tmp_path}" in refusal(tmp_path / "a.parquet")


# Tables


def table(count: int, **columns: Any) -> Any:
    datasets = pytest.importorskip("datasets")
    data = {"picture": [{"bytes": png(noise(6, 5, 3)), "path": None} for _ in range(count)]}
    features = {"picture": datasets.Image()}
    for name, (kind, values) in columns.items():
        data[name], features[name] = values, kind
    return datasets.Dataset.from_dict(data, features=datasets.Features(features))


def pixels_of(rows: Any, column: str = "picture") -> torch.Tensor:
    return torch.stack([chw(np.asarray(image)) for image in rows[column]])


@pytest.mark.parametrize("held_out", ["test", "validation"])
def test_parquet_folder_with_splits(tmp_path: Path, cache: Path, held_out: str) -> None:
    from datasets import ClassLabel, Value

    kinds = ClassLabel(names=["a", "b", "c"]), Value("string")
    train = table(4, kind=(kinds[0], [2, 0, 1, 1]), note=(kinds[1], list("wxyz")))
    test = table(2, kind=(kinds[0], [0, 2]), note=(kinds[1], list("uv")))
    train.to_parquet(tmp_path / "train-00000-of-00001.parquet")
    test.to_parquet(tmp_path / f"{held_out}-00000-of-00001.parquet")
    parts = load_data(DataConfig(data=str(tmp_path)), seed=0)
    for part, rows in zip(parts, (train, test), strict=True):
        assert torch.equal(part.images, pixels_of(rows))
        assert part.labels is not None and part.labels.tolist() == rows["kind"][:]
    assert len(load_all(str(tmp_path), DataConfig())) == 6


def test_parquet_folder_without_splits(tmp_path: Path, cache: Path) -> None:
    from datasets import Value

    rows = table(10, fine_label=(Value("int8"), list(range(10))), other=(Value("int64"), [0] * 10))
    rows.to_parquet(tmp_path / "all.parquet")
    train, held = load_data(DataConfig(data=str(tmp_path), holdout=0.3), seed=0)
    assert (len(train), len(held)) == (7, 3)
    expected = pixels_of(rows)
    for part in (train, held):
        assert part.labels is not None and torch.equal(part.images, expected[part.labels])


def test_saved_to_disk(tmp_path: Path, cache: Path) -> None:
    """With the rows in another order than in the file, which is kept as a list of indices."""
    from datasets import DatasetDict, Value

    rows = table(5, labels=(Value("int64"), list(range(5))))
    rows.save_to_disk(tmp_path / "one")
    whole = load_all(str(tmp_path / "one"), DataConfig())
    assert torch.equal(whole.images, pixels_of(rows))

    picked = rows.select([3, 1])
    parts = {"train": rows.select([4, 0, 2]), "val": picked, "extra": rows}
    DatasetDict(parts).save_to_disk(tmp_path / "split")
    train, held = load_data(DataConfig(data=str(tmp_path / "split")), seed=0)
    assert train.labels is not None and train.labels.tolist() == [4, 0, 2]
    assert torch.equal(held.images, pixels_of(picked))
    assert len(load_all(str(tmp_path / "split"), DataConfig())) == 10


@pytest.mark.parametrize("values", [[0, None, 1], [0, -1, 1]])
def test_unlabelled_rows(tmp_path: Path, cache: Path, values: list[int | None]) -> None:
    from datasets import Value

    table(3, label=(Value("int64"), values)).to_parquet(tmp_path / "a.parquet")
    assert load_all(str(tmp_path), DataConfig()).labels is None


def test_table_without_one_image_column(tmp_path: Path, cache: Path) -> None:
    from datasets import Dataset, Value
    from datasets import Image as ImageFeature

    (tmp_path / "none").mkdir()
    Dataset.from_dict({"text": ["a"], "size": [3]}).to_parquet(tmp_path / "none/a.parquet")
    message = refusal(tmp_path / "none")
    assert str(tmp_path / "none") in message and "no columns of images" in message
    assert "text (" in message and "size (" in message and "datasets.Image()" in message

    (tmp_path / "two").mkdir()
    other = [{"bytes": png(noise(6, 5)), "path": None}] * 2
    rows = table(2, mask=(ImageFeature(), other), size=(Value("int64"), [1, 2]))
    rows.to_parquet(tmp_path / "two/a.parquet")
    assert "2 columns of images" in refusal(tmp_path / "two")
    (tmp_path / "named").mkdir()
    rows.rename_column("mask", "image").to_parquet(tmp_path / "named/a.parquet")
    assert load_all(str(tmp_path / "named"), DataConfig()).image_shape == (1, 6, 5)


def test_damaged_row(tmp_path: Path, cache: Path) -> None:
    from datasets import Dataset, Features
    from datasets import Image as ImageFeature

    content = png(noise(6, 5))
    good = {"bytes": content, "path": None}
    features = Features({"img": ImageFeature()})
    for name, bad in (("cut", {"bytes": content[:50], "path": None}), ("null", None)):
        (tmp_path / name).mkdir()
        Dataset.from_dict({"img": [good] * 3}, features=features).to_parquet(
            tmp_path / name / "train.parquet"
        )
        Dataset.from_dict({"img": [good, good, bad]}, features=features).to_parquet(
            tmp_path / name / "test.parquet"
        )
        message = refusal(tmp_path / name)
        assert f"{tmp_path / name}, split test, row 2, column 'img'" in message
        assert "emove" in message


def test_rows_that_name_files(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pixels = write_image(tmp_path / "a.png", noise(6, 5))
    features = datasets.Features({"img": datasets.Image()})
    rows = datasets.Dataset.from_dict({"img": [str(tmp_path / "a.png")]}, features=features)
    images, _ = read_table(rows, "mine", DataConfig(), whole=True)
    assert torch.equal(images.images[0], chw(pixels))
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match=r"mine, split all, row 0, .*No such file.*a\.png"):
        read_table(rows, "mine", DataConfig(), whole=True)


def test_damaged_parquet_file(tmp_path: Path, cache: Path) -> None:
    table(2).to_parquet(tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content[: len(content) // 2])
    assert f"{tmp_path} cannot be read by datasets" in refusal(tmp_path)


def test_splits_without_train(tmp_path: Path, cache: Path) -> None:
    from datasets import DatasetDict

    DatasetDict({"left": table(2), "right": table(2)}).save_to_disk(tmp_path / "a")
    assert "left, right" in refusal(tmp_path / "a") and "train" in refusal(tmp_path / "a")


# Names


def test_unknown_name_suggests_a_known_one() -> None:
    for name, meant in (("fashion_mnist", "fashion-mnist"), ("CIFAR10", "cifar10")):
        message = refusal(name)
        assert f"no file or folder {name} (did you mean {meant}?)" in message
        assert "digits, mnist, fashion-mnist, cifar10" in message and "owner/name" in message
    assert "did you mean" not in refusal("/nowhere/at/all")
    assert "could not be loaded" not in refusal("nowhere/faces.npy")
    assert "--data is empty" in refusal("")


def test_mistyped_path_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    message = refusal("data/faces")
    assert "no file or folder data/faces" in message and "could not be loaded" not in message


def test_hub_name(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = datasets.DatasetDict({"train": table(3), "test": table(2)})
    monkeypatch.setattr(datasets, "load_dataset", {"someone/faces": rows}.__getitem__)
    train, test = load_data(DataConfig(data="someone/faces"), seed=0)
    assert (len(train), len(test)) == (3, 2)
    assert torch.equal(test.images, pixels_of(rows["test"]))


def test_hub_name_that_cannot_be_loaded(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(name: str) -> None:
        raise ConnectionError(f"Couldn't reach {name} on the Hub\nmore\nlines")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    message = refusal("someone/faces")
    for part in ("no file or folder someone/faces", "digits, mnist", "Couldn't reach"):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("module", "package", "data"),
    [("datasets", "datasets", "someone/faces"), ("sklearn.datasets", "scikit-learn", "digits")],
)
def test_package_not_installed(
    monkeypatch: pytest.MonkeyPatch, module: str, package: str, data: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert f"pip install {package}" in refusal(data)


# The thread pool


def test_the_first_of_several_errors_is_raised() -> None:
    def work(index: int) -> None:
        if index >= 100:
            raise UserError(str(index))

    for _ in range(5):
        with pytest.raises(UserError, match=r"^100$"):
            decode._for_each(1000, work)
