"""Images that are not kept in memory: the same run, with bounded memory, whoever reads them."""

import itertools
import json
import random
import shlex
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from data_files import noise, write_image
from running import (
    TINY,
    assert_same_tensors,
    kept,
    kill,
    metrics,
    ranks,
    run_process,
    started,
    train,
    training_state,
)

from fastvae.data import DataConfig, EpochOrder, load_all, load_data, stored
from fastvae.data.stored import Pixels, StoredImages
from fastvae.errors import UserError
from fastvae.training.stream import Stream

COUNT = 300


def numbered(folder: Path, count: int = COUNT) -> Path:
    """Grey images of 8 x 8 whose first two pixels say which one it is, in two class folders."""
    for i in range(count):
        pixels = noise(8, 8)
        pixels[0, :2] = i // 256, i % 256
        write_image(folder / f"{'ab'[i % 2]}/{i:04d}.png", pixels)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return numbered(tmp_path_factory.mktemp("numbered") / "images")


def table(folder: Path, kind: str) -> Path:
    """The same images as Parquet files."""
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
    target = folder.parent / kind
    target.mkdir(exist_ok=True)
    if kind == "parquet":
        loaded.to_parquet(str(target / "train.parquet"))
    else:
        loaded.save_to_disk(str(target))
    return target


# What is stored


def test_stored_is_what_memory_holds(folder: Path) -> None:
    """Order, split, labels, limits and fingerprint of labels; and pixels, however they are read."""
    limits = {"train_limit": 250, "heldout_limit": 20}
    config = DataConfig(data=str(folder), **limits)
    inside = load_data(config, seed=3)
    outside = load_data(DataConfig(data=str(folder), data_budget=0, **limits), seed=3)
    for a, b in zip(inside, outside, strict=True):
        assert isinstance(a.images, torch.Tensor) and isinstance(b.images, StoredImages)
        assert (len(a), a.image_shape, a.name, a.nbytes) == (
            len(b),
            b.image_shape,
            b.name,
            b.nbytes,
        )
        assert a.labels is not None and b.labels is not None and torch.equal(a.labels, b.labels)
        assert torch.equal(b.loaded().tensor, a.tensor)
        rows = torch.tensor([7, 0, 19, 7])
        assert torch.equal(b.select(rows).loaded().tensor, a.tensor[rows])
        assert torch.equal(b.select(rows).to("cpu").tensor, a.tensor[rows])
        assert (
            b.fingerprint
            == load_data(DataConfig(data=str(folder), data_budget=0, **limits), seed=3)[
                a is inside[1]
            ].fingerprint
        )
    with pytest.raises(AssertionError):
        outside[0].tensor  # noqa: B018


@pytest.mark.parametrize("budget", [0, 300 * 64 / 2**30, 301 * 72 / 2**30])
def test_the_budget(folder: Path, budget: float) -> None:
    """All of the images and labels count."""
    train, heldout = load_data(DataConfig(data=str(folder), data_budget=budget), seed=0)
    fits = budget * 2**30 >= 300 * (64 + 8)
    assert isinstance(train.images, torch.Tensor) == fits
    assert isinstance(heldout.images, torch.Tensor) == fits


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_tables_are_stored_too(
    folder: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = load_all(str(table(folder, kind)), DataConfig(data_budget=0))
    assert isinstance(found.images, StoredImages)
    inside = load_all(str(folder), DataConfig())
    numbers = found.loaded().tensor[:, 0, 0, :2].to(torch.int64)
    assert sorted((numbers[:, 0] * 256 + numbers[:, 1]).tolist()) == list(range(COUNT))
    assert len(found) == len(inside)


def test_static_binarisation_needs_memory(folder: Path, tmp_path: Path) -> None:
    flags = [
        "--data",
        folder,
        "--data-budget",
        0,
        "--likelihood",
        "bernoulli",
        "--binarize",
        "static",
    ]
    with pytest.raises(SystemExit):
        train(*flags, output=tmp_path / "run")


# An image that cannot be read


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Images 3, 4 and 39 of 40 are cut off."""
    folder = numbered(tmp_path / "images", 40)
    for i in (3, 4, 39):
        (file,) = folder.rglob(f"{i:04d}.png")
        file.write_bytes(file.read_bytes()[:60])
    return folder


@pytest.mark.parametrize("budget", [None, 0])
def test_a_bad_image_ends_it_or_another_takes_its_place(
    damaged: Path, budget: float | None
) -> None:
    with pytest.raises(UserError, match=r"\d{4}\.png cannot be read as an image"):
        load_all(str(damaged), DataConfig(data_budget=budget)).loaded()
    config = DataConfig(data_budget=budget, on_bad_sample="skip")
    with pytest.warns(UserWarning, match="another image takes its place") as caught:
        found = load_all(str(damaged), config).loaded()
    assert len(caught) == 3
    numbers = found.tensor[:, 0, 0, 1].tolist()
    # Class folder a has the even ones, b the odd ones. The next in order stands for a bad one, and
    # its label is the one that goes with it.
    expected = [*range(0, 40, 2), *range(1, 40, 2)]
    expected[expected.index(4)], expected[expected.index(3)] = 6, 5
    expected[expected.index(39)] = 0
    assert numbers == expected
    assert found.labels is not None
    assert found.labels.tolist() == [number % 2 for number in expected]


def test_none_can_be_read(tmp_path: Path) -> None:
    folder = numbered(tmp_path / "images", 4)
    for file in folder.rglob("*.png"):
        file.write_bytes(b"no image")
    config = DataConfig(on_bad_sample="skip")
    with pytest.raises(UserError, match="not one of 4 images can be read"):
        load_all(str(folder), config)


def test_an_image_that_became_another(tmp_path: Path) -> None:
    """Its size was read when the run began."""
    folder = numbered(tmp_path / "images", 4)
    found = load_all(str(folder), DataConfig(data_budget=0))
    write_image(folder / "a/0002.png", noise(9, 9))
    with pytest.raises(UserError, match=r"0002\.png is \(1, 9, 9\) .* was \(1, 8, 8\)"):
        found.loaded()


# The same run


FLAGS = shlex.split(
    "--batch-size 40 --max-steps 40 --epochs 100 --log-every 4 --checkpoint-every 0.5"
)


@pytest.mark.parametrize("more", ["", "--gradient-accumulation-steps 2 --ema-decay 0.9"])
def test_streamed_is_in_memory(folder: Path, more: str, tmp_path: Path) -> None:
    """To the bit: the same samples in the same order, with the same noise."""
    common = [*FLAGS, *more.split(), "--data", folder]
    inside = train(*common, output=tmp_path / "inside")
    outside = train(*common, "--data-budget", 0, "--data-workers", 3, output=tmp_path / "outside")
    assert metrics(outside) == metrics(inside)
    assert_same_tensors(training_state(outside), training_state(inside))


# A script as launch/train.py is, which notes which images each process took, by their pixels.
NOTING = """
import json, os, sys
from fastvae.cli import main
from fastvae.training.feed import Feed

streamed = Feed.streamed_batch
notes = open(f"taken-{os.environ.get('RANK', '0')}-{os.getpid()}.txt", "w", buffering=1)

def noting(self, position, count):
    rows = streamed(self, position, count)
    names = (rows.x[:, 0, 0, 0].long() * 256 + rows.x[:, 0, 0, 1]).tolist()
    notes.write(json.dumps([position, names]) + chr(10))
    return rows

Feed.streamed_batch = noting
main(["train", *sys.argv[1:]])
"""


def taken(folder: Path) -> list[tuple[int, int]]:
    """Position and identity of each sample that was taken, by all processes that there were."""
    found = []
    for path in folder.glob("taken-*.txt"):
        for line in path.read_text().splitlines():
            try:
                position, names = json.loads(line)
            except ValueError:
                continue  # cut off by SIGKILL
            found += [(position + i, name) for i, name in enumerate(names)]
    return found


@pytest.mark.slow
def test_no_sample_is_lost_or_seen_twice(folder: Path, tmp_path: Path) -> None:
    """Killed at a random moment on two processes, resumed on three, killed again, resumed on one:
    every position has met the image that belongs there, and every epoch every image once."""
    (tmp_path / "noting.py").write_text(NOTING)
    flags = [*TINY, *FLAGS, "--data", str(folder), "--data-budget", "0", "--data-workers", "1"]
    flags += ["--max-steps", "400", "--output", "run"]
    moment = random.Random(5)
    steps = []
    for count, arguments in ((2, flags), (3, ["--resume", "run"])):
        process = started(
            [*ranks(count, "noting.py"), *arguments], tmp_path, ACCELERATE_USE_CPU="true"
        )
        begun = len(taken(tmp_path))
        end = time.monotonic() + 60
        while len(taken(tmp_path)) < begun + 40 * moment.randrange(30, 80):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        kill(process)
        steps.append(json.loads((kept(tmp_path / "run") / "state.json").read_text())["step"])
    assert 0 < steps[0] <= steps[1] < 400
    process = run_process([*ranks(1, "noting.py"), "--resume", "run"], tmp_path)
    assert process.returncode == 0, process.stderr

    found = taken(tmp_path)
    train_set, _ = load_data(DataConfig(data=str(folder)), seed=0)
    numbers = train_set.tensor[:, 0, 0, :2].to(torch.int64)
    names = (numbers[:, 0] * 256 + numbers[:, 1]).numpy()
    size = len(names)
    expected = names[EpochOrder(size, seed=0).indices(0, 400 * 40).numpy()]
    # What was done after the last checkpoint is done again, with the same images.
    assert all(expected[position] == name for position, name in found)
    once = dict(found)
    assert sorted(once) == list(range(400 * 40))
    for epoch in range(400 * 40 // size):
        met = Counter(once[epoch * size + i] for i in range(size))
        assert met == Counter(names.tolist())


@pytest.mark.slow
def test_memory_is_bounded(tmp_path: Path) -> None:
    """Images of 384 MiB decoded, of which no process keeps more than a few batches."""
    folder, shape = tmp_path / "images", (256, 256, 3)
    flat = np.zeros(shape, dtype=np.uint8)
    count = 2048
    for i in range(count):
        flat[:] = i % 256
        write_image(folder / f"{i:04d}.png", flat)
    program = """
import sys
from pathlib import Path
from fastvae.cli import main
main(["train", *sys.argv[1:]])
(peak,) = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x]
print(int(peak.split()[1]) // 1024)
"""
    (tmp_path / "program.py").write_text(program)
    peaks = {}
    for budget in ("0", "1"):
        flags = ["--data", str(folder), "--data-budget", budget, "--heldout-limit", "9"]
        flags += ["--hidden", "4", "--batch-size", "16", "--max-steps", "140", "--epochs", "9"]
        flags += ["--data-workers", "2", "--eval-every", "9", "--output", f"run-{budget}"]
        process = run_process([sys.executable, "program.py", *TINY, *flags], tmp_path)
        assert process.returncode == 0, process.stderr
        peaks[budget] = int(process.stdout.split()[-1])
    assert count * 256 * 256 * 3 >= 384 * 2**20
    assert peaks["0"] < peaks["1"] - 250, peaks


# The processes that decode


def test_batches_in_the_order_announced(folder: Path) -> None:
    images, _ = load_data(DataConfig(data=str(folder), data_budget=0), seed=0)
    assert isinstance(images.images, StoredImages)
    order = EpochOrder(len(images), seed=1)
    stream = Stream(images.images, order, workers=3, pinned=False)
    rows = [range(4, 8), range(12, 16)]
    stream.begin(16, rows, first_step=5)
    for step in range(5, 60):
        for part in rows:
            position = step * 16 + part.start
            found = stream.next(position)
            expected = images.select(order.indices(position, 4)).loaded().tensor
            assert torch.equal(found.images, expected)
            assert found.taken.tolist() == [0, 1, 2, 3] and found.problems == []


class Blank(StoredImages):
    """Images that cost nothing to read: the handing over is then most of a worker's time."""

    def __init__(self) -> None:
        pass

    def view(self, rows: torch.Tensor | slice) -> "Blank":
        return self

    def read(self, threads: int | None = None) -> Pixels:
        return Pixels(torch.zeros(64, 1, 8, 8, dtype=torch.uint8), torch.arange(64), [])


@pytest.mark.parametrize("seed", range(20))
def test_a_worker_killed_at_any_moment(seed: int) -> None:
    """Also while it hands over a batch, where the other end sees a connection that breaks."""
    stream = Stream(Blank(), EpochOrder(64, seed=0), workers=2, pinned=False)
    before = psutil.Process().children()
    stream.begin(64, [range(64)], first_step=0)
    worker, _ = (child for child in psutil.Process().children() if child not in before)
    stream.next(0)
    threading.Timer(0.02 * random.Random(seed).random(), worker.kill).start()
    end = time.monotonic() + 30

    def go_on() -> None:
        for step in itertools.count(1):
            stream.next(64 * step)
            assert time.monotonic() < end

    with pytest.raises(RuntimeError, match="DataLoader worker"):
        go_on()


def test_reading_in_blocks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "ROWS_OF_A_THREAD", 7)
    found = load_all(str(folder), DataConfig(data_budget=0)).images
    assert isinstance(found, StoredImages)
    for threads in (1, 2, None):
        numbers = found.read(threads).images[:, 0, 0, :2].to(torch.int64)
        assert (numbers[:, 0] * 256 + numbers[:, 1]).tolist() == [
            *range(0, COUNT, 2), *range(1, COUNT, 2)
        ]  # fmt: skip
