"""Thousands of damaged files for everything that reads one: each is read, or refused in words."""

import copy
import gzip
import json
import os
import random
import resource
import shutil
import signal
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
import torch
from data_files import Trap, noise, png
from safetensors.torch import save_file
from small_models import make_vae

import fastvae
from fastvae import checkpoints, runs
from fastvae.config import Config
from fastvae.data import DataConfig, load_all, load_data
from fastvae.errors import UserError
from fastvae.training import loop
from fastvae.training.checkpoint import load_checkpoint
from fastvae.training.course import Counters

# What one input may take: beside what the process has already.
BYTES, SECONDS = 2**30, 20

EXTREMES = [0, 1, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1]
VALUES: list[Any] = [
    None, True, -1, 0, 1, 2**31, 10**12, 2**63, -(2**63), 1e308, 1e-320, "", "x", "a" * 5000,
    "\x00", "../..", [], [[]], [1, 2, 3], {}, {"x": 1}, [None],
]  # fmt: skip


def damaged(valid: bytes, moment: random.Random) -> bytes:
    """A few bytes changed, cut off, put in or repeated."""
    content = bytearray(valid)
    for _ in range(moment.choice([1, 1, 1, 2, 5])):
        at = moment.randrange(len(content) + 1)
        end = min(len(content), at + moment.choice([1, 1, 2, 4, 8, 60]))
        match moment.randrange(7):
            case 0 if content:
                content[min(at, len(content) - 1)] ^= 1 << moment.randrange(8)
            case 1:
                del content[at:]
            case 2:
                del content[at:end]
            case 3:
                content[at:at] = content[at:end]
            case 4:
                content[at:at] = moment.randbytes(moment.choice([1, 4, 100]))
            case 5:
                form = moment.choice(["<I", ">I", "<Q", ">Q", "<H", "B"])
                value = moment.choice(EXTREMES) % 256 ** struct.calcsize(form)
                content[at : at + struct.calcsize(form)] = struct.pack(form, value)
            case 6:
                content[at:end] = bytes(end - at)
    return bytes(content)


def any_value(moment: random.Random) -> Any:
    return copy.deepcopy(moment.choice(VALUES))


def damaged_json(valid: bytes, moment: random.Random) -> bytes:
    """A value replaced, a key lost or added; or its text damaged."""
    if moment.random() < 0.3:
        return damaged(valid, moment)
    if moment.random() < 0.01:
        return b"[" * 10**5
    value = json.loads(valid)
    for _ in range(moment.choice([1, 1, 2, 4])):
        parent, key = value, None
        while isinstance(parent, dict | list) and parent:
            keys = list(parent) if isinstance(parent, dict) else range(len(parent))
            key = moment.choice(list(keys))
            if not isinstance(parent[key], dict | list) or moment.random() < 0.3:
                break
            parent = parent[key]
        if key is None or not isinstance(parent, dict | list) or not parent:
            continue
        match moment.randrange(4):
            case 0:
                del parent[key]
            case 1 if isinstance(parent, dict):
                parent[moment.choice(["x", "", "step", "format", "name"])] = any_value(moment)
            case _:
                parent[key] = any_value(moment)
    return json.dumps(value).encode()


class Target(NamedTuple):
    """A file, how to damage it and how to read it."""

    path: Path
    damage: Callable[[bytes, random.Random], bytes]
    read: Callable[[], object]
    count: int


def config_of_a_run(folder: Path) -> Target:
    path = folder / "config.json"
    path.write_text(Config(output=Path("run")).to_json())
    return Target(path, damaged_json, lambda: runs.read_config(folder), 3000)


def manifest(folder: Path) -> Target:
    def fill(fresh: Path) -> None:
        (fresh / "a").write_bytes(b"a")

    path = checkpoints.commit(folder, 7, fill, heldout=-1.5) / "manifest.json"
    return Target(path, damaged_json, lambda: checkpoints.newest(folder), 2500)


def parts_of_a_run(folder: Path) -> tuple[Path, Callable[[], object]]:
    """A checkpoint, and what reads it but for its manifest, which has its own test."""
    from fastvae.training.checkpoint import Snapshot

    model = make_vae(latent_dim=3)
    optimizer = loop.make_optimizer(Config().optimizer, model)
    model(fastvae.Batch(torch.zeros(2, 1, 8, 8)), 0, 0).nll.sum().backward()
    optimizer.step()
    state = vars(Counters.at_the_start()) | {"train_data": "x"}
    snapshot = Snapshot.of(
        model=model, trained=model, optimizer=optimizer, state=state, heldout=None
    )
    path = snapshot.write(folder)

    def read() -> object:
        found = load_checkpoint(path, model=model, trained=model, optimizer=optimizer)
        return Counters.read(found, path / "state.json", 0)

    return path, read


def state(folder: Path) -> Target:
    path, read = parts_of_a_run(folder)
    return Target(path / "state.json", damaged_json, read, 500)


def training(folder: Path) -> Target:
    path, read = parts_of_a_run(folder)
    return Target(path / "training.safetensors", damaged, read, 700)


def saved_weights(folder: Path) -> Target:
    make_vae(latent_dim=3).save_pretrained(folder)
    return Target(
        folder / "model.safetensors",
        damaged,
        lambda: fastvae.VAE.from_pretrained(folder),
        800,
    )


def saved_spec(folder: Path) -> Target:
    make_vae(latent_dim=3).save_pretrained(folder)
    return Target(
        folder / "config.json", damaged_json, lambda: fastvae.load_pretrained(folder), 1000
    )


def images_in(path: Path) -> Callable[[], object]:
    return lambda: load_data(DataConfig(data=str(path)), seed=0)


def safetensors(folder: Path) -> Target:
    path = folder / "a.safetensors"
    images, labels = torch.from_numpy(noise(6, 3, 5)), torch.arange(6)
    save_file({"images": images, "labels": labels}, path)
    return Target(path, damaged, images_in(path), 1000)


def npy(folder: Path) -> Target:
    np.save(folder / "a.npy", noise(6, 3, 5))
    return Target(folder / "a.npy", damaged, images_in(folder / "a.npy"), 700)


def npz(folder: Path) -> Target:
    np.savez_compressed(folder / "a.npz", images=noise(6, 3, 5), labels=np.arange(6))
    return Target(folder / "a.npz", damaged, images_in(folder / "a.npz"), 600)


def idx(folder: Path, zipped: bool) -> Target:
    for part, count in (("train", 5), ("t10k", 3)):
        for kind, shape in (("images-idx3", (count, 4, 6)), ("labels-idx1", (count,))):
            content = struct.pack(f">I{len(shape)}I", 0x800 + len(shape), *shape)
            content += (noise(*shape) % 10).tobytes()
            name = f"{part}-{kind}-ubyte" + (".gz" if zipped else "")
            (folder / name).write_bytes(gzip.compress(content) if zipped else content)
    path = folder / ("train-images-idx3-ubyte" + (".gz" if zipped else ""))
    config = DataConfig(data="mnist", data_dir=folder)
    return Target(path, damaged, lambda: load_data(config, seed=0), 700)


def image(folder: Path) -> Target:
    for i in range(2):
        (folder / f"{i}.png").write_bytes(png(noise(6, 5, 3)))
    return Target(folder / "0.png", damaged, lambda: load_all(str(folder), DataConfig()), 700)


def parquet(folder: Path) -> Target:
    datasets = pytest.importorskip("datasets")
    rows = {
        "image": [{"bytes": png(noise(4, 4)), "path": None} for _ in range(4)],
        "label": [0, 1] * 2,
    }
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / "a.parquet"))
    return Target(folder / "a.parquet", damaged, images_in(folder), 60)


TARGETS: dict[str, Callable[[Path], Target]] = {
    "config of a run": config_of_a_run,
    "manifest": manifest,
    "state of a run": state,
    "weights in training": training,
    "saved weights": saved_weights,
    "saved description": saved_spec,
    "safetensors of images": safetensors,
    "npy": npy,
    "npz": npz,
    "IDX": lambda folder: idx(folder, zipped=False),
    "IDX, gzipped": lambda folder: idx(folder, zipped=True),
    "PNG": image,
    "Parquet": parquet,
}
MORE = 10


def tried(target: Target, seeds: range) -> dict[str, int]:
    """In a process of its own: how many inputs were read and how many refused. Fails with the first
    that did something else."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        with os.fdopen(writing, "w") as answer:
            try:
                print(json.dumps(_tried(target, seeds)), file=answer)
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=answer)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        said = answer.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0 and said.startswith("{"), (status, said)
    return json.loads(said)


def _tried(target: Target, seeds: range) -> dict[str, int]:
    torch.set_num_threads(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1), os.dup2(null, 2)
    limit = psutil.Process().memory_info().vms + BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    valid = target.path.read_bytes()
    target.read()
    counts = {"read": 0, "refused": 0}
    for seed in seeds:
        content = target.damage(valid, random.Random(seed))
        target.path.write_bytes(content)
        signal.alarm(SECONDS)
        try:
            target.read()
            counts["read"] += 1
        except UserError as error:
            assert 10 < len(str(error)) < 20_000 and "Traceback" not in str(error)
            counts["refused"] += 1
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
        signal.alarm(0)
    target.path.write_bytes(valid)
    return counts


@pytest.fixture
def target(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Target:
    """That of the test's parameter, whose reading leaves nothing elsewhere."""
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    folder = tmp_path / "files"
    folder.mkdir()
    return TARGETS[name](folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TARGETS)
def test_malformed(name: str, target: Target) -> None:
    counts = tried(target, range(target.count))
    assert sum(counts.values()) == target.count
    assert counts["refused"] > target.count / 10


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TARGETS)
def test_many_more(name: str, target: Target) -> None:
    for block in range(1, MORE):
        tried(target, range(block * target.count, (block + 1) * target.count))


def test_they_are_more_than_ten_thousand(tmp_path: Path) -> None:
    counts = []
    for name, make in TARGETS.items():
        folder = tmp_path / name.replace(",", "")
        folder.mkdir()
        counts.append(make(folder).count)
    assert sum(counts) >= 10_000


# Files that promise more than they hold


def test_a_gzipped_bomb(tmp_path: Path) -> None:
    """Three megabytes for three gigabytes: no more is unpacked than the header asks for."""
    target = idx(tmp_path, zipped=True)
    header = struct.pack(">I3I", 0x803, 5, 4, 6)
    bomb = gzip.compress(header) + 3 * 2**10 * gzip.compress(bytes(2**20))
    found = tried(target._replace(damage=lambda valid, moment: bomb), range(1))
    assert found == {"read": 0, "refused": 1}


def test_an_array_that_says_it_is_huge(tmp_path: Path) -> None:
    target = npy(tmp_path)
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (99999999999, 8, 8), }"
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header + b"\n" + bytes(99)
    found = tried(target._replace(damage=lambda valid, moment: content), range(1))
    assert found == {"read": 0, "refused": 1}


def test_a_description_of_a_huge_model(tmp_path: Path) -> None:
    """It is compared with the weights before memory is taken for it."""
    target = saved_spec(tmp_path)
    spec = json.loads(target.path.read_text())
    spec["encoder"]["hidden"] = spec["decoder"]["hidden"] = [10**9]
    huge = json.dumps(spec).encode()
    found = tried(target._replace(damage=lambda valid, moment: huge), range(1))
    assert found == {"read": 0, "refused": 1}


# Files that would run code


NAMES = [
    "pytorch_model.bin", "model.bin", "model.pt", "model.pkl", "optimizer.bin", "scheduler.bin",
    "random_states_0.pkl", "training.pt", "state.pkl",
]  # fmt: skip


def test_a_malicious_file_beside_the_real_ones(tmp_path: Path, capfd: Any) -> None:
    """Wherever a run or a model may lie: loaded, resumed, evaluated, and nothing is executed."""
    from running import resume, train

    sprung = tmp_path / "sprung"
    run = train("--max-steps", 30, output=tmp_path / "run")
    model = tmp_path / "model"
    fastvae.VAE.from_pretrained(run).save_pretrained(model)
    folders = [run, run / "checkpoints", *checkpoints.folders(run), model]
    for folder in folders:
        for name in NAMES:
            torch.save(Trap(sprung), folder / name)
            if name.endswith(".pkl"):
                with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
                    archive.write(folder / name)
    fastvae.VAE.from_pretrained(run)
    fastvae.VAE.from_pretrained(model)
    resume(run, "--max-steps", 40)
    assert not sprung.exists()
    # Nor where it has taken the place of a real one.
    for file in ("model.safetensors", "config.json"):
        spoiled = shutil.copytree(model, tmp_path / f"spoiled-{file}")
        torch.save(Trap(sprung), spoiled / file)
        with pytest.raises(UserError):
            fastvae.VAE.from_pretrained(spoiled)
    for file in ("model.safetensors", "training.safetensors", "state.json", "manifest.json"):
        torch.save(Trap(sprung), checkpoints.folders(run)[0] / file)
    assert checkpoints.newest(run)[1]
    assert not sprung.exists()
    torch.load(folders[0] / NAMES[0], weights_only=False)
    assert sprung.exists()  # so it would have been
