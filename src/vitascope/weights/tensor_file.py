"""Safetensors files, written: whole or not at all, the same bytes for the same content, one tensor at a time.

The header is written here, not by the safetensors library, because the library orders metadata at random and takes all
tensors at once. Reading is the library's. Format: https://huggingface.co/docs/safetensors (8 bytes of header length,
JSON header, tensor data).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from vitascope.core.errors import CheckpointError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""As the format names them."""


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Of its values."""
        return prod(self.shape) * self.dtype.itemsize


def write_tensors(
    path: str | Path,
    infos: Mapping[str, TensorInfo],
    get: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the tensors that `get` gives by name, each when its turn comes, so that no more than one is in memory.

    They are asked for in the order of `infos`, but larger element types first, which keeps all of them aligned.
    The file appears whole or not at all. Raises CheckpointError if the folder or disk does not take the file, for a
    dtype that the format has not, and where a tensor is not what `infos` says.
    """
    header, order = _header(infos, metadata or {})
    with atomic_file(path) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in order:
            tensor = get(name).detach()
            if (tensor.dtype, tuple(tensor.shape)) != (infos[name].dtype, infos[name].shape):
                raise CheckpointError(f"tensor {name!r} is {tensor.dtype} {tuple(tensor.shape)}, not {infos[name]}")
            file.write(tensor.to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file that takes the name `path` only when the block ends well; else nothing is left behind.

    The folder is made if it is missing. OSError (full disk, no permission) becomes CheckpointError.
    """
    target = Path(path).resolve()
    if target.exists() and not target.is_file():
        raise CheckpointError(f"cannot write {path}: it is there and is not a plain file")
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)
        _sync_folder(target.parent)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or _one_line(error)}") from error


def _header(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> tuple[bytes, list[str]]:
    """The JSON header, padded so that data begin at a multiple of 8, and the names in the order of their data."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    for name, info in infos.items():
        if info.dtype not in names:
            raise CheckpointError(f"tensor {name!r} has dtype {info.dtype}, which a checkpoint cannot hold")
    order = sorted(infos, key=lambda name: -infos[name].dtype.itemsize)
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name in order:
        end = offset + infos[name].num_bytes
        entries[name] = {
            "dtype": names[infos[name].dtype],
            "shape": list(infos[name].shape),
            "data_offsets": [offset, end],
        }
        offset = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    return header + b" " * (-len(header) % 8), order


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable where the system can open folders (POSIX)."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
