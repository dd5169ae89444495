"""Where the weights of a model lie while they are not in the memory of its device.

A store copies the weights it is asked for, by our names, into tensors that are there already. What they look like
(shape, dtype) is said by those tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from vitascope.core.errors import CheckpointError, InputError
from vitascope.nn.storage import Narrow, Storage, narrow
from vitascope.weights.keys import KeyTable, Move, Rename
from vitascope.weights.sources import TensorSource
from vitascope.weights.streaming import check_kind, moves_into


class Store(Protocol):
    """`slow`: reading takes a thread of its own; else copies are started and the device orders them. transit_bytes:
    what reading takes at most of the machine's memory, beside the tensors that are read into."""

    @property
    def slow(self) -> bool: ...
    def transit_bytes(self, names: Iterable[str]) -> int: ...
    def read(self, into: Mapping[str, Tensor]) -> None: ...


class FileStore:
    """Weights in files, read anew each time, through a key table. Raises CheckpointError where names do not fit."""

    slow = True

    def __init__(self, names: Iterable[str], source: TensorSource, table: KeyTable) -> None:
        self.source = source
        self._moves = moves_into(list(names), source, table)
        self._by_name = {name: index for index, move in enumerate(self._moves) for name in move.ours}

    def read(self, into: Mapping[str, Tensor]) -> None:
        """Raises CheckpointError for a damaged file and for weights of another shape."""
        for index in dict.fromkeys(self._by_name[name] for name in into):
            self._move(self._moves[index], into)  # nothing of it is held while the next one is read

    def _move(self, move: Move, into: Mapping[str, Tensor]) -> None:
        made = move.read([self.source.get(name) for name in move.theirs], self.source.label)
        for name, tensor in zip(move.ours, made, strict=True):
            if name in into:
                self._copy(name, tensor, into[name])

    def transit_bytes(self, names: Iterable[str]) -> int:
        """Of the tensors that one rule takes, as their files have them, and of what it makes of them."""
        most = 0
        for index in {self._by_name[name] for name in names}:
            move = self._moves[index]
            read = sum(self.source.info(name).num_bytes for name in move.theirs)
            most = max(most, read if type(move.rule) is Rename else 2 * read)
        return most

    def _copy(self, name: str, tensor: Tensor, target: Tensor) -> None:
        if tensor.shape != target.shape:
            found, wanted = tuple(tensor.shape), tuple(target.shape)
            raise CheckpointError(f"{self.source.label}: {name} has the shape {found}, expected {wanted}")
        check_kind(name, tensor.dtype, target.dtype, self.source.label)
        target.copy_(tensor)


class KeptStore:
    """Weights in memory, as they are or in fewer bits: the machine's, pinned so that a GPU fetches them while it
    computes, or the device's own."""

    slow = False

    def __init__(self, kept: Mapping[str, Narrow]) -> None:
        self._kept = dict(kept)

    @classmethod
    def fill(
        cls,
        store: Store,
        like: Mapping[str, Tensor],
        storage: Storage = "as_is",
        *,
        device: torch.device | str = "cpu",
        pinned: bool = False,
    ) -> KeptStore:
        """With all that `store` has for weights that look as `like`, one after the other."""
        kept: dict[str, Narrow] = {}
        for name, tensor in like.items():
            whole = torch.empty(tensor.shape, dtype=tensor.dtype)
            store.read({name: whole})
            parts = narrow(whole, storage)
            kept[name] = Narrow(*(_placed(part, device, pinned) for part in (parts.values, parts.scales)))
        return cls(kept)

    def read(self, into: Mapping[str, Tensor]) -> None:
        """Widened, where they are kept in fewer bits."""
        for name, target in into.items():
            self._kept[name].widen(target)

    def kept(self, name: str) -> Tensor:
        """The values of a weight that is kept as it is. Raises InputError for one in fewer bits."""
        if self._kept[name].scales is not None:
            raise InputError(f"{name} is kept in fewer bits and cannot be changed")
        return self._kept[name].values

    def transit_bytes(self, names: Iterable[str]) -> int:
        """None: what is kept is copied as it is."""
        return 0

    @property
    def num_bytes(self) -> int:
        """What it holds."""
        return sum(small.num_bytes for small in self._kept.values())


def _placed(tensor: Tensor | None, device: torch.device | str, pinned: bool) -> Any:
    if tensor is None:
        return None
    return tensor.pin_memory() if pinned else tensor.to(device)


def same_names(source: TensorSource, without: Sequence[str] = ()) -> KeyTable:
    """The table of a source that has our own names."""
    return tuple(Rename(name, name) for name in source.names() if name not in without)
