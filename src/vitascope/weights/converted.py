"""Checkpoints from one layout into another: a source seen through a key table, and the writing of what is seen.

Nothing is read before it is asked for, and no more than the tensors of one rule are in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vitascope.core.errors import CheckpointError
from vitascope.weights.keys import KeyTable, Move, plan
from vitascope.weights.sources import TensorSource
from vitascope.weights.tensor_file import TensorInfo, atomic_file, write_tensors

MAX_SHARD_BYTES = 5 * 10**9
"""Of one file, where a model is written in several."""


class Converted:
    """A source in other names: theirs as ours, or, `writing`, ours as theirs. Raises CheckpointError as `keys.plan`."""

    def __init__(self, source: TensorSource, table: KeyTable, *, writing: bool = False) -> None:
        self.label, self._source, self._writing = source.label, source, writing
        moves = plan(table, source.names(), writing=writing, label=source.label)
        self._moves = {name: move for move in moves for name in (move.theirs if writing else move.ours)}
        self._last: tuple[Move, dict[str, Tensor]] | None = None

    def names(self) -> list[str]:
        """In the order of the source, so that reading in this order reads each file once."""
        return list(self._moves)

    def info(self, name: str) -> TensorInfo:
        """Without reading values."""
        move = self._moves[name]
        tensor = self._act(move, lambda source: _on_meta(self._source.info(source)))[name]
        return TensorInfo(tensor.dtype, tuple(tensor.shape))

    def get(self, name: str) -> Tensor:
        """The tensor; what its rule gives beside it is kept until another rule is asked for."""
        move = self._moves[name]
        if self._last is None or self._last[0] is not move:
            self._last = None
            self._last = (move, self._act(move, self._source.get))
        return self._last[1][name]

    def view(self, name: str) -> Tensor:
        """As `get`."""
        return self.get(name)

    def _act(self, move: Move, get: Callable[[str], Tensor]) -> dict[str, Tensor]:
        sources, targets = (move.ours, move.theirs) if self._writing else (move.theirs, move.ours)
        tensors = [get(source) for source in sources]
        made = move.rule.write(tensors) if self._writing else move.read(tensors, self.label)
        return dict(zip(targets, made, strict=True))


@dataclass(frozen=True)
class Rounded:
    """A source whose floating-point tensors have another dtype."""

    source: TensorSource
    dtype: torch.dtype

    @property
    def label(self) -> str:
        return self.source.label

    def names(self) -> list[str]:
        """Those of the source."""
        return self.source.names()

    def info(self, name: str) -> TensorInfo:
        """With the dtype that is given."""
        info = self.source.info(name)
        return TensorInfo(self.dtype, info.shape) if info.dtype.is_floating_point else info

    def get(self, name: str) -> Tensor:
        """Rounded to the dtype."""
        return self._rounded(name, self.source.get(name))

    def view(self, name: str) -> Tensor:
        """Rounded to the dtype; a view where it has it."""
        return self._rounded(name, self.source.view(name))

    def _rounded(self, name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        rounded = tensor.to(self.dtype)
        if rounded.numel() and not torch.stack(rounded.aminmax()).isfinite().all():
            kind = str(self.dtype).removeprefix("torch.")
            raise CheckpointError(f"{self.label}: {name} has values that are no finite numbers of {kind}")
        return rounded


def write_sharded(
    folder: Path,
    source: TensorSource,
    stem: str = "diffusion_pytorch_model",
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Write a source as `stem`.safetensors or, if it is larger than a shard, as shards with an index.

    A tensor larger than a shard has one of its own. `report(bytes written, bytes in all)`. Raises CheckpointError.
    """
    infos = {name: source.info(name) for name in source.names()}
    shards = _shards(infos, max_shard_bytes)
    total, done = sum(info.num_bytes for info in infos.values()), 0
    written: list[Path] = []
    places: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        middle = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        path = folder / f"{stem}{middle}.safetensors"

        def get(name: str) -> Tensor:
            nonlocal done
            done += infos[name].num_bytes
            report(done, total)
            return source.get(name)

        write_tensors(path, {name: infos[name] for name in names}, get, {"format": "pt"})
        places |= dict.fromkeys(names, path.name)
        written.append(path)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        with atomic_file(folder / f"{stem}.safetensors.index.json") as file:
            file.write(json.dumps(index, indent=2).encode() + b"\n")
    return written


def _shards(infos: dict[str, TensorInfo], max_bytes: int) -> list[list[str]]:
    """Names in order, cut into runs of at most `max_bytes`."""
    shards: list[list[str]] = []
    room = -math.inf
    for name, info in infos.items():
        if info.num_bytes > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= info.num_bytes
    return shards or [[]]


def _on_meta(info: TensorInfo) -> Tensor:
    return torch.empty(info.shape, dtype=info.dtype, device="meta")
