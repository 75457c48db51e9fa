"""Images and labels in memory: what is measured, selected and refused."""

from dataclasses import replace

import pytest
import torch

from fastvae.data import ImageSet
from fastvae.data.image_set import join
from fastvae.errors import UserError


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


def test_number_of_classes() -> None:
    images = torch.zeros(3, 1, 2, 2)
    assert ImageSet(images, torch.tensor([0, 4, 1]), "classes").num_classes == 5
    assert ImageSet(images, torch.tensor([0, 0, 0]), "one class").num_classes == 1
    targets = ImageSet(images, torch.tensor([-2.5, 0.0, 1e30]), "targets")
    assert targets.num_classes is None and targets.nbytes == 48 + 12
    assert targets.select([2, 0]).labels.tolist() == pytest.approx([1e30, -2.5], rel=1e-7)
    assert ImageSet(images, None, "neither").num_classes is None


def test_join_keeps_what_all_parts_have() -> None:
    parts = [
        ImageSet(torch.full((n, 1, 2, 2), n, dtype=torch.uint8), torch.arange(n), f"{n}")
        for n in (2, 3)
    ]
    whole = join(parts)
    assert whole.name == "2" and whole.images[:, 0, 0, 0].tolist() == [2, 2, 3, 3, 3]
    assert whole.labels is not None and whole.labels.tolist() == [0, 1, 0, 1, 2]
    unlabelled = replace(parts[1], labels=None)
    assert join([parts[0], unlabelled]).labels is None and join(parts[:1]) is parts[0]
    with pytest.raises(UserError, match=r"^2: labels are whole numbers .* in one split"):
        join([parts[0], replace(parts[1], labels=torch.zeros(3))])


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 3, 3), None, "float32 [2, 3, 3]"),
        (torch.zeros(2, 1, 3, 3, dtype=torch.int64), None, "int64 [2, 1, 3, 3]"),
        (torch.zeros(0, 1, 3, 3, dtype=torch.uint8), None, "no image"),
        (torch.full((2, 1, 3, 3), 1.5), None, "from 1.5 to 1.5"),
        (torch.full((2, 1, 3, 3), torch.nan), None, "from nan to nan"),
        (torch.zeros(2, 1, 3, 3), torch.zeros(3, dtype=torch.int64), "int64 [3]"),
        (torch.zeros(2, 1, 3, 3), torch.zeros(2, 1), "float32 [2, 1]"),
        (torch.zeros(2, 1, 3, 3), torch.zeros(2, dtype=torch.float64), "float64 [2]"),
        (
            torch.zeros(2, 1, 3, 3),
            torch.tensor([0.5, torch.nan]),
            "1 of 2 are not, the first in row 1",
        ),
        (torch.zeros(2, 1, 3, 3), torch.tensor([-torch.inf, torch.inf]), "2 of 2 are not"),
        (torch.zeros(2, 1, 3, 3), torch.tensor([0, -1]), "the lowest is -1"),
    ],
)
def test_image_set_refuses(images: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(UserError) as caught:
        ImageSet(images, labels, "mine")
    assert str(caught.value).startswith("mine: ") and message in str(caught.value)
