"""What comes with scikit-learn: digits and tables, against what scikit-learn itself reads."""

from typing import Any

import numpy as np
import pytest
import torch
from data_files import refusal
from PIL import Image

from fastvae.data import DataConfig, ImageSet, load_all, load_data, scikit


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


def test_digits_that_lie_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load_all("digits", DataConfig())
    monkeypatch.setattr(scikit, "find_spec", lambda name: None)
    found = load_all("digits", DataConfig())
    assert torch.equal(found.images, expected.images)
    assert found.labels is not None and expected.labels is not None
    assert torch.equal(found.labels, expected.labels)


def test_digits_resized_and_coloured() -> None:
    data = load_all("digits", DataConfig(image_size=(16, 12), channels=3, resize="stretch"))
    original = load_all("digits", DataConfig()).images[0, 0].numpy()
    expected = np.asarray(Image.fromarray(original).resize((12, 16), Image.Resampling.BILINEAR))
    assert data.image_shape == (3, 16, 12)
    assert all(np.array_equal(channel, expected) for channel in data.images[0].numpy())


# Lowest and highest value of each feature of the diabetes table, as docs/data.md has them.
DIABETES = {
    "age": (19, 79),
    "sex": (1, 2),
    "bmi": (18, 42.2),
    "bp": (62, 133),
    "s1": (97, 301),
    "s2": (41.6, 242.4),
    "s3": (22, 99),
    "s4": (2, 9.09),
    "s5": (3.2581, 6.107),
    "s6": (58, 124),
}


def test_diabetes() -> None:
    from sklearn.datasets import load_diabetes

    table = load_diabetes(scaled=False)
    data = load_all("diabetes", DataConfig())
    assert data.images.shape == (442, 1, 1, 10) and data.images.dtype == torch.float32
    assert table.feature_names == list(DIABETES)
    low, high = np.array(list(DIABETES.values()), dtype=np.float64).T
    original = low + data.images[:, 0, 0].double().numpy() * (high - low)
    np.testing.assert_allclose(original, table.data, rtol=3e-7, atol=0)
    assert data.images.amin(0).unique().tolist() == [0] and data.images.amax(0).unique() == 1
    assert data.labels is not None and data.labels.dtype == torch.float32
    assert data.labels.tolist() == table.target.tolist() and data.num_classes is None
    assert data.labels[:4].tolist() == [151, 75, 141, 206]


def test_diabetes_is_split_by_the_seed() -> None:
    train, held = load_data(DataConfig("diabetes", holdout=0.25), seed=2)
    assert (len(train), len(held)) == (332, 110)
    assert (train.name, held.name) == ("diabetes train", "diabetes held-out")
    again = load_data(DataConfig("diabetes", holdout=0.25), seed=2)[1]
    other = load_data(DataConfig("diabetes", holdout=0.25), seed=3)[1]
    assert torch.equal(held.images, again.images) and not torch.equal(held.images, other.images)

    def rows(data: ImageSet) -> list[list[float]]:
        assert data.labels is not None
        return torch.cat([data.images.flatten(1), data.labels[:, None]], dim=1).tolist()

    # Every row is on one side, with its own target.
    assert sorted(rows(train) + rows(held)) == sorted(rows(load_all("diabetes", DataConfig())))


@pytest.mark.parametrize(
    ("name", "rows", "width", "counts"),
    [("breast-cancer", 569, 30, [212, 357]), ("wine", 178, 13, [59, 71, 48])],
)
def test_tables_of_classes(name: str, rows: int, width: int, counts: list[int]) -> None:
    data = load_all(name, DataConfig())
    assert data.images.shape == (rows, 1, 1, width) and data.images.dtype == torch.float32
    assert data.labels is not None and data.labels.bincount().tolist() == counts
    assert data.num_classes == len(counts)
    train, held = load_data(DataConfig(name), seed=0)
    assert len(train) + len(held) == rows and held.labels is not None


def test_tables_are_not_resized() -> None:
    fields: list[dict[str, Any]] = [{"image_size": (8,)}, {"image_size": (2, 10)}, {"channels": 3}]
    for options in fields:
        message = refusal("diabetes", **options)
        for part in ("diabetes is a table", "1 x 10", "--image-size", "--channels"):
            assert part in message
    # What a run of this table says of its own images holds for the table.
    assert len(load_all("diabetes", DataConfig(image_size=(1, 10), channels=1))) == 442
