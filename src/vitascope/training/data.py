"""Data order and background loading. Batch number `index` is a pure function of (seed, index), in any process."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitascope.core.random import generator
from vitascope.training.stage import Batch


class EpochOrder:
    """A fresh shuffle of `num_items` for every epoch: item `position` of the endless stream of epochs."""

    def __init__(self, num_items: int, seed: int) -> None:
        self.num_items = num_items
        self.seed = seed
        self._shuffled = lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch: int) -> Tensor:
        return torch.randperm(self.num_items, generator=generator(self.seed, "epoch", epoch))

    def items(self, index: int, batch_size: int) -> list[int]:
        """The items of batch number `index`; a batch may cross from one epoch into the next."""
        positions = range(index * batch_size, (index + 1) * batch_size)
        return [int(self._shuffled(position // self.num_items)[position % self.num_items]) for position in positions]


class _Batches(Dataset[Any]):
    def __init__(self, batch: Callable[[int], Batch]) -> None:
        self._batch = batch

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self._batch(index))


def batches(
    batch: Callable[[int], Batch], indices: range, num_workers: int, prefetch: int, pin: bool
) -> Iterator[Batch]:
    """`batch(index)` for each of `indices`, in that order, computed ahead by `num_workers` forked processes.

    0 workers computes in line. `pin` puts tensors in page-locked memory for a faster copy to CUDA.
    """
    # DataLoader accepts any iterable of indices as sampler; a range carries no state and starts anywhere.
    loader = DataLoader(
        _Batches(batch),
        batch_size=None,
        sampler=cast(Any, indices),
        num_workers=num_workers,
        prefetch_factor=prefetch if num_workers else None,
        multiprocessing_context="fork" if num_workers else None,
        worker_init_fn=_quiet_worker if num_workers else None,
        pin_memory=pin,
    )
    return iter(loader)


def _quiet_worker(_: int) -> None:
    # Ctrl-C reaches the whole process group; the loop writes its checkpoint and then ends the loaders itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def to_device(batch: Batch, device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on `device`."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


def num_samples(batch: Batch) -> int:
    """Samples in a batch: the length of its first entry."""
    return len(next(iter(batch.values())))
