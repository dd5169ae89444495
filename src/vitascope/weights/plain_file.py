"""A safetensors file, read by plain reads or mapped into memory.

A tensor that is read is memory of its own: a run with a limit to keep needs that, because mapped pages count as memory
of the process beside the copy that the model gets. A view costs nothing until it is used, and where it is used as it
is, the system's cache of the file is the only copy in the machine.
Format: https://huggingface.co/docs/safetensors (8 bytes header length, JSON header, tensor data).
"""

from __future__ import annotations

import json
import mmap
import os
import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitascope.core.errors import CheckpointError
from vitascope.weights.tensor_file import DTYPES, TensorInfo

_MAPPED_BYTES = 256 * 2**20
"""What may have been viewed before its pages are given back."""


@dataclass(frozen=True)
class _Place:
    """A tensor and its first byte in the file."""

    info: TensorInfo
    start: int


class PlainFile:
    """Tensors of one file by name; threads may read at the same time. Raises CheckpointError for a damaged file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._map: mmap.mmap | None = None
        self._viewed_bytes = 0
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        weakref.finalize(self, self._file.close)
        try:
            self._places = self._read_head()
        except CheckpointError:
            self.close()
            raise

    def close(self) -> None:
        """Nothing can be read after it; views stay."""
        self._release()
        self._map = None
        self._file.close()

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor. Raises CheckpointError for one that is not there."""
        return self._place(name).info

    def get(self, name: str) -> Tensor:
        """The tensor, on the CPU. Raises CheckpointError where the file does not hold it, or not the whole of it."""
        place = self._place(name)
        flat = torch.empty(place.info.num_bytes, dtype=torch.uint8)
        self._read(name, [(place.start, flat)])
        return flat.view(place.info.dtype).view(place.info.shape)

    def rows(self, name: str, numbers: Sequence[int]) -> Tensor:
        """Some rows (along the first axis) of a tensor; nothing else of it is read. Raises CheckpointError, also for
        rows that it has not."""
        place = self._place(name)
        count, *rest = place.info.shape or (0,)
        wrong = [number for number in numbers if not 0 <= number < count]
        if wrong:
            raise CheckpointError(f"{self.path}: tensor {name} has the rows 0..{count - 1}, not {wrong[0]}")
        size = prod(rest) * place.info.dtype.itemsize
        flat = torch.empty(len(numbers), size, dtype=torch.uint8)
        self._read(name, [(place.start + number * size, row) for number, row in zip(numbers, flat, strict=True)])
        return flat.view(place.info.dtype).view(len(numbers), *rest)

    def _read(self, name: str, pieces: Iterable[tuple[int, Tensor]]) -> None:
        """Bytes of the file from some places on, into tensors of bytes."""
        try:
            with self._lock:
                for start, flat in pieces:
                    view, done = flat.numpy().data, 0
                    self._file.seek(start)
                    while done < len(flat):
                        got = self._file.readinto(view[done:])
                        if not got:
                            raise CheckpointError(f"{self.path}: tensor {name} cannot be read: the file is cut short")
                        done += got
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path}: tensor {name} cannot be read: {error}") from error

    def view(self, name: str) -> Tensor:
        """The tensor as the file's pages, which nothing else sees when they are written to; not to be written to while
        the file is open. Raises CheckpointError as `get` does."""
        place = self._place(name)
        size = place.info.num_bytes
        if size == 0:
            return torch.empty(place.info.shape, dtype=place.info.dtype)
        with self._lock:
            try:
                whole = os.fstat(self._file.fileno()).st_size >= place.start + size
                if self._map is None and whole:
                    self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{self.path}: tensor {name} cannot be read: {error}") from error
            if self._map is None or not whole:
                raise CheckpointError(f"{self.path}: tensor {name} cannot be read: the file is cut short")
            if self._viewed_bytes > _MAPPED_BYTES:
                self._release()
            self._viewed_bytes += size
            flat = torch.frombuffer(self._map, dtype=torch.uint8, count=size, offset=place.start)
        return flat.view(place.info.dtype).view(place.info.shape)

    def _release(self) -> None:
        """Give back the pages that were looked at; whoever looks again finds them in the system's cache."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
        self._viewed_bytes = 0

    def _place(self, name: str) -> _Place:
        if name not in self._places:
            raise CheckpointError(f"{self.path}: tensor {name} cannot be read: it is not there")
        return self._places[name]

    def _read_head(self) -> dict[str, _Place]:
        total = os.fstat(self._file.fileno()).st_size
        size = int.from_bytes(self._file.read(8), "little")
        if not 0 < size <= total - 8:
            raise CheckpointError(f"{self.path} is not a readable safetensors file: its head is cut short")
        try:
            head: dict[str, Any] = json.loads(self._file.read(size))
            entries = {name: entry for name, entry in head.items() if name != "__metadata__"}
            places = {name: _place(entry, 8 + size) for name, entry in entries.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{self.path} is not a readable safetensors file: its head is damaged, or of a newer kind"
            ) from error
        if any(place.start + place.info.num_bytes > total for place in places.values()):
            raise CheckpointError(f"{self.path} is not a readable safetensors file: it is cut short")
        return places


def _place(entry: dict[str, Any], start: int) -> _Place:
    info = TensorInfo(DTYPES[entry["dtype"]], tuple(int(size) for size in entry["shape"]))
    begin, end = entry["data_offsets"]
    if not 0 <= begin <= end or end - begin != info.num_bytes:
        raise ValueError
    return _Place(info, start + begin)
