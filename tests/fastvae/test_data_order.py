"""The order of the data is a function of (seed, position), whatever asks for it in what pieces."""

import pytest
import torch

from fastvae.data import EpochOrder, ImageSet
from fastvae.training.feed import Feed


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
        x, labels, indices = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        for tiled, at_once in zip(
            (x, labels, indices), whole.copied_batch(step * batch, batch), strict=True
        ):
            assert torch.equal(tiled, at_once)
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
