"""Arrays in .npy, .npz and .safetensors files: shapes, types, names, and nothing unpickled."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_files import Trap, noise, refusal
from safetensors.torch import save_file

from fastvae.data import DataConfig, load_all, load_data


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


@pytest.mark.parametrize("kind", ["float16", "float32", ">f8"])
@pytest.mark.parametrize("name", ["y", "labels", "targets", "target"])
def test_floating_point_labels_are_real_targets(tmp_path: Path, kind: str, name: str) -> None:
    targets = np.array([-3.25, 0.1, 7.0], dtype=kind)
    np.savez(tmp_path / "a.npz", images=noise(3, 5, 4), **{name: targets[:, None]})
    labels = load_all(str(tmp_path / "a.npz"), DataConfig()).labels
    assert labels is not None and labels.dtype == torch.float32
    assert labels.tolist() == targets.astype(np.float32).tolist()


def test_real_targets_of_a_pair_in_safetensors(tmp_path: Path) -> None:
    tensors = {
        "x_train": torch.zeros(3, 5, 4),
        "x_test": torch.ones(2, 5, 4),
        "train_targets": torch.tensor([1.5, -2.0, 0.25], dtype=torch.bfloat16),
        "test_targets": torch.tensor([0.5, 4.0], dtype=torch.float64),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    train, test = load_data(DataConfig(data=str(tmp_path / "a.safetensors")), seed=0)
    for part, expected in ((train, [1.5, -2.0, 0.25]), (test, [0.5, 4.0])):
        assert part.labels is not None and part.labels.dtype == torch.float32
        assert part.labels.tolist() == expected and part.num_classes is None


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
        (
            {"x": np.zeros((2, 4, 4)), "y": np.zeros(3, dtype=int)},
            ["[2], one to", "int64 [3]"],
        ),
        ({"x": np.zeros((2, 4, 4)), "y": np.zeros((2, 3))}, ["'y'", "float64 [2, 3]", "targets"]),
        ({"x": np.zeros((2, 4, 4)), "y": np.array([1.0, np.nan])}, ["finite", "1 of 2"]),
        ({"x": np.zeros((2, 4, 4)), "y": np.array([1e39, 1.0])}, ["finite in float32", "row 0"]),
        ({"x": np.zeros((2, 4, 4)), "y": np.array([-1, 1])}, ["the lowest is -1"]),
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


@pytest.mark.parametrize("kind", ["npy", "npz", "bare"])
def test_nothing_is_unpickled(tmp_path: Path, kind: str) -> None:
    trap = Trap(tmp_path / "sprung")
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
