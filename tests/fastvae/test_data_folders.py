"""Folders of images: order, classes, splits, and what is no image."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import noise, refusal, write_image

from fastvae.data import DataConfig, load_all, load_data, read_images
from fastvae.errors import UserError


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


@pytest.mark.parametrize("place", ["test", "test/unknown", "test/deep/deeper"])
def test_unlabelled_test_folder(tmp_path: Path, place: str) -> None:
    for name in ("train/cat/1", "train/dog/1", f"{place}/1", f"{place}/2"):
        write_image(tmp_path / f"{name}.png", noise(4, 4))
    train, test = load_data(DataConfig(data=str(tmp_path)), seed=0)
    assert train.labels is not None and train.labels.tolist() == [0, 1]
    assert test.labels is None and len(test) == 2


def test_a_class_that_only_the_test_folder_has_comes_last(tmp_path: Path) -> None:
    for name in ("test/ant", "test/cat", "train/cat", "train/eel"):
        write_image(tmp_path / f"{name}/1.png", noise(4, 4))
    train, test = load_data(DataConfig(data=str(tmp_path)), seed=0)
    assert train.labels is not None and train.labels.tolist() == [0, 1]
    assert test.labels is not None and test.labels.tolist() == [2, 0]
    whole = load_all(str(tmp_path), DataConfig()).labels
    assert whole is not None and whole.tolist() == [2, 0, 0, 1]


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
