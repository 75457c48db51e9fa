"""Tables as datasets reads them: Parquet, Arrow, names on the Hub."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_files import chw, keep_datasets_in, noise, png, refusal, write_image

from fastvae.data import DataConfig, load_all, load_data
from fastvae.data.tables import read_table
from fastvae.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_datasets_in(tmp_path_factory.mktemp("huggingface"), monkeypatch)


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
def test_parquet_folder_with_splits(tmp_path: Path, held_out: str) -> None:
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


def test_parquet_folder_without_splits(tmp_path: Path) -> None:
    from datasets import Value

    rows = table(10, fine_label=(Value("int8"), list(range(10))), other=(Value("int64"), [0] * 10))
    rows.to_parquet(tmp_path / "all.parquet")
    train, held = load_data(DataConfig(data=str(tmp_path), holdout=0.3), seed=0)
    assert (len(train), len(held)) == (7, 3)
    expected = pixels_of(rows)
    for part in (train, held):
        assert part.labels is not None and torch.equal(part.images, expected[part.labels])


def test_saved_to_disk(tmp_path: Path) -> None:
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
def test_unlabelled_rows(tmp_path: Path, values: list[int | None]) -> None:
    from datasets import Value

    table(3, label=(Value("int64"), values)).to_parquet(tmp_path / "a.parquet")
    assert load_all(str(tmp_path), DataConfig()).labels is None


@pytest.mark.parametrize("missing", [[None, None], [-1, -1], [1, None]])
def test_unlabelled_test_split_of_a_table(tmp_path: Path, missing: list[int | None]) -> None:
    from datasets import Value

    kind = Value("int64")
    table(3, label=(kind, [1, 0, 2])).to_parquet(tmp_path / "train.parquet")
    table(2, label=(kind, missing)).to_parquet(tmp_path / "test.parquet")
    train, test = load_data(DataConfig(data=str(tmp_path)), seed=0)
    assert train.labels is not None and train.labels.tolist() == [1, 0, 2]
    assert test.labels is None and len(test) == 2
    assert load_all(str(tmp_path), DataConfig()).labels is None


def test_test_split_without_the_column(tmp_path: Path) -> None:
    from datasets import DatasetDict, Value

    train = table(3, label=(Value("int64"), [1, 0, 2]))
    DatasetDict({"train": train, "test": table(2)}).save_to_disk(tmp_path / "a")
    parts = load_data(DataConfig(data=str(tmp_path / "a")), seed=0)
    assert [part.num_classes for part in parts] == [3, None]


@pytest.mark.parametrize("name", ["label", "target", "targets"])
@pytest.mark.parametrize("kind", ["float16", "float32", "float64"])
def test_a_column_of_floats_is_real_targets(tmp_path: Path, name: str, kind: str) -> None:
    from datasets import Value

    targets = np.array([0.1, -7.5, 300.0], dtype=kind)
    rows = table(3, **{name: (Value(kind), targets), "other": (Value("int64"), [0, 1, 2])})
    rows.save_to_disk(tmp_path / "a")
    labels = load_all(str(tmp_path / "a"), DataConfig()).labels
    assert labels is not None and labels.dtype == torch.float32
    assert labels.tolist() == targets.astype(np.float32).tolist()


def test_targets_that_are_no_number(tmp_path: Path) -> None:
    from datasets import Value

    kind = Value("float64")
    table(3, target=(kind, [0.5, float("nan"), 1.0])).to_parquet(tmp_path / "a.parquet")
    assert "finite" in refusal(tmp_path) and "row 1" in refusal(tmp_path, whole=True)
    table(3, target=(kind, [0.5, None, 1.0])).to_parquet(tmp_path / "a.parquet")
    assert load_all(str(tmp_path), DataConfig()).labels is None


def test_words_are_no_labels(tmp_path: Path) -> None:
    from datasets import Value

    rows = table(2, label=(Value("string"), ["a", "b"]), target=(Value("float32"), [0.5, 2.0]))
    rows.to_parquet(tmp_path / "a.parquet")
    labels = load_all(str(tmp_path), DataConfig()).labels
    assert labels is not None and labels.tolist() == [0.5, 2.0]


def test_table_without_one_image_column(tmp_path: Path) -> None:
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


def test_damaged_row(tmp_path: Path) -> None:
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
    (images,) = read_table(rows, "mine", DataConfig(), whole=True)
    assert torch.equal(images.loaded().tensor[0], chw(pixels))
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match=r"mine, split all, row 0, .*No such file.*a\.png"):
        read_table(rows, "mine", DataConfig(), whole=True)


def test_damaged_parquet_file(tmp_path: Path) -> None:
    table(2).to_parquet(tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content[: len(content) // 2])
    assert f"{tmp_path} cannot be read by datasets" in refusal(tmp_path)


def test_splits_without_train(tmp_path: Path) -> None:
    from datasets import DatasetDict

    DatasetDict({"left": table(2), "right": table(2)}).save_to_disk(tmp_path / "a")
    assert "left, right" in refusal(tmp_path / "a") and "train" in refusal(tmp_path / "a")


# Names on the Hub


def test_hub_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = datasets.DatasetDict({"train": table(3), "test": table(2)})
    monkeypatch.setattr(datasets, "load_dataset", {"someone/faces": rows}.__getitem__)
    train, test = load_data(DataConfig(data="someone/faces"), seed=0)
    assert (len(train), len(test)) == (3, 2)
    assert torch.equal(test.images, pixels_of(rows["test"]))


def test_hub_name_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(name: str) -> None:
        raise ConnectionError(f"Couldn't reach {name} on the Hub\nmore\nlines")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    message = refusal("someone/faces")
    for part in ("no file or folder someone/faces", "digits, mnist", "Couldn't reach"):
        assert part in message
    assert "\n" not in message
