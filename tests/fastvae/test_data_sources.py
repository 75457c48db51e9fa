"""Which source a name means, what is held out, and how many images are kept."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_files import noise, refusal, write_image

from fastvae.data import DataConfig, ImageSet, load_all, load_data, sources
from fastvae.data.sources import split
from fastvae.errors import UserError

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


# Labels of two splits


@pytest.fixture
def arrays(tmp_path: Path) -> Callable[..., str]:
    """Writes 5 training and 3 test images, with these labels beside them; gives the file."""

    def write(**labels: Any) -> str:
        images = {"x_train": noise(5, 4, 3), "x_test": noise(3, 4, 3)}
        np.savez(tmp_path / "a.npz", **images, **labels)
        return str(tmp_path / "a.npz")

    return write


def test_an_unlabelled_test_split_leaves_the_training_labels(arrays: Callable[..., str]) -> None:
    data = arrays(y_train=np.arange(5))
    train, test = load_data(DataConfig(data), seed=0)
    assert train.labels is not None and train.labels.tolist() == [0, 1, 2, 3, 4]
    assert test.labels is None and len(test) == 3
    whole = load_all(data, DataConfig())
    assert whole.labels is None and len(whole) == 8


def test_labels_of_an_unlabelled_training_split_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.zeros(2, 1, 3, 3)
    parts = [ImageSet(images, None, "a"), ImageSet(images, torch.arange(2), "a")]
    monkeypatch.setattr(sources, "_read", lambda config, whole: parts)
    assert [part.labels for part in load_data(DataConfig(), seed=0)] == [None, None]


def test_two_kinds_of_labels(arrays: Callable[..., str]) -> None:
    data = arrays(y_train=np.arange(5), y_test=np.zeros(3))
    for whole in (False, True):
        message = refusal(data, whole=whole)
        assert data in message and "(classes)" in message and "(real targets)" in message


def test_a_held_out_class_may_be_unknown_in_training(arrays: Callable[..., str]) -> None:
    data = arrays(y_train=np.arange(5) % 2, y_test=np.array([0, 2, 1]))
    train, test = load_data(DataConfig(data), seed=0)
    assert (train.num_classes, test.num_classes) == (2, 3)


# Limits


def test_limits_keep_the_first(arrays: Callable[..., str]) -> None:
    data = arrays(y_train=np.arange(5), y_test=np.arange(3))
    whole = load_data(DataConfig(data), seed=0)
    few = load_data(DataConfig(data, train_limit=4, heldout_limit=1), seed=0)
    assert [len(part) for part in few] == [4, 1]
    for part, all_of_it in zip(few, whole, strict=True):
        assert torch.equal(part.images, all_of_it.images[: len(part)])
        assert part.labels is not None and part.labels.tolist() == list(range(len(part)))
        assert part.name == all_of_it.name
    assert [len(p) for p in load_data(DataConfig(data, train_limit=99), seed=0)] == [5, 3]
    assert len(load_all(data, DataConfig(train_limit=1, heldout_limit=1))) == 8


def test_limits_do_not_change_the_split() -> None:
    train, held = load_data(DataConfig(), seed=3)
    few_train, few_held = load_data(DataConfig(train_limit=7, heldout_limit=180), seed=3)
    assert torch.equal(few_train.images, train.images[:7])
    assert torch.equal(few_held.images, held.images)


@pytest.mark.parametrize("flag", ["train_limit", "heldout_limit"])
@pytest.mark.parametrize("value", [0, -3])
def test_impossible_limits(flag: str, value: int) -> None:
    with pytest.raises(UserError, match=f"^--{flag.replace('_', '-')} .*1 or more, got {value}"):
        DataConfig(**{flag: value})


# Names


def test_unknown_name_suggests_a_known_one() -> None:
    for name, meant in (
        ("fashion_mnist", "fashion-mnist"),
        ("CIFAR10", "cifar10"),
        ("breast_cancer", "breast-cancer"),
    ):
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


@pytest.mark.parametrize(
    ("module", "package", "data"),
    [
        ("datasets", "datasets", "someone/faces"),
        ("sklearn", "scikit-learn", "digits"),
        ("sklearn.datasets", "scikit-learn", "wine"),
    ],
)
def test_package_not_installed(
    monkeypatch: pytest.MonkeyPatch, module: str, package: str, data: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert f"pip install {package}" in refusal(data)


def test_other_files(tmp_path: Path) -> None:
    for name in ("a.pt", "a.parquet"):
        (tmp_path / name).write_bytes(b"...")
    assert all(part in refusal(tmp_path / "a.pt") for part in ("a.pt", ".npy", ".safetensors"))
    assert f"give its folder, {tmp_path}" in refusal(tmp_path / "a.parquet")
