from __future__ import annotations

import pytest
import torch

from vitascope.training.data import EpochOrder, batches, num_samples, to_device
from vitascope.training.stage import Batch


def test_every_item_once_an_epoch_in_an_order_that_differs_by_epoch_and_seed() -> None:
    order = EpochOrder(12, seed=1)
    stream = [item for index in range(9) for item in order.items(index, 4)]
    epochs = [stream[start : start + 12] for start in (0, 12, 24)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert EpochOrder(12, seed=2).items(0, 12) != epochs[0]


def test_order_is_a_pure_function_of_the_index_also_across_epochs() -> None:
    order = EpochOrder(5, seed=3)
    forward = [order.items(index, 3) for index in range(8)]
    assert [EpochOrder(5, seed=3).items(index, 3) for index in reversed(range(8))] == forward[::-1]
    assert [item for batch in forward for item in batch] == [
        EpochOrder(5, seed=3).items(position, 1)[0] for position in range(24)
    ]


def _batch(index: int) -> Batch:
    return {"x": torch.full((3, 2), float(index)), "name": f"b{index}"}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_come_in_order_from_any_start(num_workers: int) -> None:
    got = list(batches(_batch, range(7, 19), num_workers, 2, pin=False))
    assert [batch["name"] for batch in got] == [f"b{i}" for i in range(7, 19)]
    assert [float(batch["x"][0, 0]) for batch in got] == list(range(7, 19))


def test_samples_are_counted_and_plain_values_pass() -> None:
    batch = to_device(_batch(1), torch.device("cpu"))
    assert num_samples(batch) == 3
    assert batch["name"] == "b1"
