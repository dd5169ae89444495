"""Layers that take turns in the memory of a device: the present group, and the next one on its way.

A group is a table of weights, by name. All groups share one or two buffers of the size of the largest, so memory does
not grow with the number of layers and nothing is allocated on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from vitascope.models.offload.stores import Store

ALIGNMENT = 64
"""Bytes that every weight begins at a multiple of."""

Views = Mapping[str, Tensor]
Install = Callable[[str, Tensor | None], None]
"""Gives the model a weight by its name; None takes it away."""


def buffer_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Of a buffer that holds all of them."""
    return sum(_padded(tensor.numel() * tensor.element_size()) for tensor in tensors.values())


class _Lane(Protocol):
    """The way of a group from the store: begun ahead of time, and waited for when it is needed."""

    def begin(self, into: Views) -> None: ...
    def finish(self) -> None: ...
    def close(self) -> None: ...


class _Direct:
    """Reads when it is waited for."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._into: Views = {}

    def begin(self, into: Views) -> None:
        self._into = into

    def finish(self) -> None:
        self._store.read(self._into)

    def close(self) -> None:
        self._into = {}


class _Thread:
    """Reads beside the computation, in a thread."""

    def __init__(self, store: Store, device: torch.device) -> None:
        self._store, self._device = store, device
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._running: Future[None] | None = None

    def begin(self, into: Views) -> None:
        before = _reached(torch.cuda.current_stream(self._device)) if self._stream is not None else None
        self._running = self._pool.submit(self._read, into, before)

    def _read(self, into: Views, before: torch.cuda.Event | None) -> None:
        if self._stream is None or before is None:
            self._store.read(into)
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(before)
            self._store.read(into)
        self._stream.synchronize()

    def finish(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._running = None


class _Side:
    """Copies from pinned memory on a stream of their own: the device orders them, the host does not wait."""

    def __init__(self, store: Store, device: torch.device) -> None:
        self._store, self._device, self._stream = store, device, torch.cuda.Stream(device)
        self._done: torch.cuda.Event | None = None

    def begin(self, into: Views) -> None:
        # the buffer may still be read by what was computed last
        self._stream.wait_event(_reached(torch.cuda.current_stream(self._device)))
        with torch.cuda.stream(self._stream):
            self._store.read(into)
            self._done = _reached(self._stream)

    def finish(self) -> None:
        done, self._done = self._done, None
        if done is not None:
            torch.cuda.current_stream(self._device).wait_event(done)

    def close(self) -> None:
        self._stream.synchronize()
        self._done = None


class LayerWindow:
    """Sees to it that the weights of a group are there when `need` is called for it.

    groups: weights by name, as they look (meta tensors do), about in the order of use; after the last comes the first
    again. prefetch: the group that came next the last time is fetched while the present one is used, into a second
    buffer.
    """

    def __init__(
        self, groups: Sequence[Views], store: Store, device: torch.device, install: Install, prefetch: bool = True
    ) -> None:
        self.groups, self._install = list(groups), install
        self._prefetch = prefetch and len(self.groups) > 1
        size = max(buffer_bytes(group) for group in self.groups)
        with torch.inference_mode(False):
            self._buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(1 + self._prefetch)]
        self._lane = self._lane_for(store, device)
        self._here: tuple[int, int] | None = None
        self._coming: tuple[int, int] | None = None
        self._after = {index: (index + 1) % len(self.groups) for index in range(len(self.groups))}

    def need(self, index: int) -> None:
        """Give the model the weights of this group and take those of the last one away. Raises what reading raises;
        then no group is there, and the next call begins anew."""
        if self._here is not None and self._here[0] == index:
            return
        if self._here is not None:
            self._after[self._here[0]] = index
        self._take_away()
        coming, self._coming = self._coming, None
        if coming is None or coming[0] != index:
            if coming is not None:
                self._lane.finish()
            coming = (index, 0)
            self._lane.begin(self._views(*coming))
        self._lane.finish()
        for name, tensor in self._views(*coming).items():
            self._install(name, tensor)
        self._here = coming
        if self._prefetch:
            self._coming = (self._after[index], 1 - coming[1])
            self._lane.begin(self._views(*self._coming))

    def close(self) -> None:
        """Take all weights away and give the buffers back."""
        self._lane.close()
        self._take_away()
        self._coming = None
        self._buffers.clear()

    def _take_away(self) -> None:
        here, self._here = self._here, None
        if here is not None:
            for name in self.groups[here[0]]:
                self._install(name, None)

    def _views(self, index: int, buffer: int) -> dict[str, Tensor]:
        """The weights of a group inside a buffer."""
        views, start = {}, 0
        for name, like in self.groups[index].items():
            size = prod(like.shape) * like.element_size()
            views[name] = self._buffers[buffer][start : start + size].view(like.dtype).view(like.shape)
            start += _padded(size)
        return views

    def _lane_for(self, store: Store, device: torch.device) -> _Lane:
        if not self._prefetch:
            return _Direct(store)
        return _Side(store, device) if device.type == "cuda" and not store.slow else _Thread(store, device)


def _reached(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """An event that is over when the stream has done what it was given so far."""
    event = torch.cuda.Event()
    event.record(stream)
    return event


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
