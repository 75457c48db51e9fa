"""The order of the data is a function of (seed, position), whatever asks for it in what pieces."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastvae import Bernoulli
from fastvae.batch import Batch
from fastvae.build import build_model, build_objective
from fastvae.config import ModelConfig, ObjectiveConfig
from fastvae.data import EpochOrder, ImageSet
from fastvae.training.feed import Feed
from fastvae.training.step import TrainingStep, mirrored


def test_every_sample_once_an_epoch() -> None:
    order = EpochOrder(37, seed=1)
    epochs = [order.indices(37 * epoch, 37).tolist() for epoch in range(5)]
    assert all(sorted(epoch) == list(range(37)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert epochs[0] != EpochOrder(37, seed=2).indices(0, 37).tolist()


@pytest.mark.parametrize("size", [1, 5, 16, 37])
@pytest.mark.parametrize("batch", [4, 12, 48, 120])
def test_batches_span_epochs_and_lose_nothing(size: int, batch: int) -> None:
    """Also where the set is smaller than the batch."""
    order, steps = EpochOrder(size, seed=3), 11
    met = torch.cat([order.indices(step * batch, batch) for step in range(steps)])
    assert len(met) == steps * batch
    assert torch.equal(met, EpochOrder(size, seed=3).indices(0, steps * batch))
    for epoch in met[: len(met) // size * size].view(-1, size).tolist():
        assert sorted(epoch) == list(range(size))


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("accumulation", [1, 2, 5])
def test_slices_of_processes_tile_the_batch(processes: int, accumulation: int) -> None:
    numbers = torch.arange(50)
    images = ImageSet(numbers.to(torch.uint8).view(50, 1, 1, 1), numbers / 2, "numbers")
    part, batch = 3, 3 * processes * accumulation
    whole = Feed(images, 9, torch.device("cpu"), samples_ahead=batch)
    for step in (0, 1, 7):
        pieces = []
        for process in range(processes):
            feed = Feed(images, 9, torch.device("cpu"), samples_ahead=batch)
            feed.prepare(step * batch, (step + 1) * batch)
            for index in range(accumulation):
                position = step * batch + process * part * accumulation + index * part
                pieces.append(feed.batch(torch.tensor(position), part))
        rows = [(piece.x, piece.labels, piece.indices) for piece in pieces]
        x, labels, indices = (torch.cat(parts) for parts in zip(*rows, strict=True))
        at_once = whole.copied_batch(step * batch, batch)
        assert at_once.chosen is None and at_once.rows == batch
        assert torch.equal(x, at_once.x) and torch.equal(labels, at_once.labels)
        assert torch.equal(indices, at_once.indices)
        # What belongs to one row stays together.
        assert torch.equal(x.flatten().long(), indices) and torch.equal(labels, indices / 2)


def test_going_back_gives_the_same() -> None:
    """Only a few permutations are kept; a forgotten one comes back as it was."""
    order = EpochOrder(20, seed=4)
    first = order.indices(0, 20)
    for epoch in range(1, 10):
        order.indices(20 * epoch, 20)
    assert torch.equal(order.indices(0, 20), first)


def test_the_order_never_changes() -> None:
    """Written down: a run resumed later or elsewhere must go on in the same order."""
    expected = [9, 3, 8, 5, 2, 7, 6, 0, 4, 1, 1, 6, 2, 9, 5, 0, 4, 8, 7, 3]
    assert EpochOrder(10, seed=0).indices(0, 20).tolist() == expected


@pytest.mark.parametrize(
    ("size", "batch", "steps"), [(37, 8, 1), (37, 8, 30), (5, 12, 3), (40, 40, 2)]
)
def test_places_computed_on_the_device_are_those_of_the_order(
    size: int, batch: int, steps: int
) -> None:
    """Also where a batch crosses an epoch's end, or meets a tiny data set several times."""
    images = ImageSet(torch.zeros(size, 1, 1, 1, dtype=torch.uint8), None, "none")
    feed = Feed(images, 9, torch.device("cpu"), samples_ahead=steps * batch)
    order = EpochOrder(size, seed=9)
    for first in range(0, 20 * steps * batch, steps * batch):
        feed.prepare(first, first + steps * batch)
        for step in range(steps):
            at = first + step * batch
            found = feed.batch(torch.tensor(at), batch).indices
            assert found is not None and torch.equal(found, order.indices(at, batch))


class Operations(TorchDispatchMode):
    """The names of all operations that tensors meet, without views and questions."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        if not name.startswith(("view.", "slice.", "detach.", "prim.")):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def test_a_batch_on_the_device_is_its_places() -> None:
    """A launch for each operation named, on a GPU; the images are left where they are."""
    numbers = torch.arange(50)
    images = ImageSet(numbers.to(torch.uint8).view(50, 1, 1, 1), numbers, "numbers")
    feed = Feed(images, 9, torch.device("cpu"), samples_ahead=8)
    feed.prepare(0, 8)
    position = torch.tensor(3)
    with Operations() as operations:
        batch = feed.batch(position, 5)
    places = ["add.Tensor", "remainder.Scalar", "index_select.default"]
    assert operations.names == [*places, "index_select.default"]  # the labels last
    assert batch.images.data_ptr() == images.tensor.data_ptr() and batch.rows == 5
    assert batch.chosen is batch.indices
    assert torch.equal(batch.x, images.tensor[batch.indices])
    with pytest.raises(AssertionError):
        feed.batch(position, 9)  # more than is prepared for


def test_on_a_gpu_the_rows_are_gathered_and_binarised_in_one_launch() -> None:
    """A fake GPU, which has the shapes of one and no memory."""
    with FakeTensorMode():
        seed, offset = (torch.empty((), dtype=torch.int64, device="cuda") for _ in range(2))
        chosen = torch.empty(8, dtype=torch.int64, device="cuda")
        batch = Batch(
            torch.empty(50, 1, 8, 8, dtype=torch.uint8, device="cuda"), None, chosen, chosen
        )
        with Operations() as operations:
            x = Bernoulli().observe(batch.images, seed, offset, batch.chosen)
        assert operations.names == ["fastvae.binarize.default"]
        assert (x.shape, x.device.type) == ((8, 1, 8, 8), "cuda")
        # Whoever looks at the bytes first, as mirroring does, gathers them: no mistake, one more.
        with Operations() as operations:
            mirrored(batch.x, seed, offset)
        assert operations.names.count("index_select.default") == 1
        assert operations.names.count("fastvae.uniform.default") == 1


def test_a_step_reads_the_rows_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same loss as of a copied batch, to the bit; and the images are never gathered apart."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (50, 1, 8, 8), generator=generator).to(torch.uint8)
    data = ImageSet(pixels, None, "noise")
    feed = Feed(data, 9, torch.device("cpu"), samples_ahead=8)
    feed.prepare(40, 48)
    model = build_model(ModelConfig(hidden=(16,), latent_dim=3), data, 8)
    position = torch.tensor(40)
    for flip in (False, True):
        step = TrainingStep(model, build_objective(ObjectiveConfig(), 50), 0, flip)
        loss, sums = step(feed.copied_batch(40, 8), position)
        got, got_sums = step(feed.batch(position, 8), position)
        assert torch.equal(got, loss)
        assert torch.equal(torch.stack(got_sums), torch.stack(sums))

    def gathered_apart(batch: Batch) -> Tensor:
        raise AssertionError("the rows were gathered before they were observed")

    monkeypatch.setattr(Batch, "x", property(gathered_apart))
    step = TrainingStep(model, build_objective(ObjectiveConfig(), 50), 0)
    step(feed.batch(position, 8), position)
