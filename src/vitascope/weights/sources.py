"""Where the tensors of somebody else's checkpoint lie: one file, shards with an index, or a pickle.

Tensors are read one at a time, so that a model never stands in memory twice.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vitascope.core.errors import CheckpointError
from vitascope.weights.foreign import read_object
from vitascope.weights.plain_file import PlainFile
from vitascope.weights.tensor_file import TensorInfo

WEIGHTS = ("diffusion_pytorch_model", "model")
"""What diffusers and transformers call the weights in a folder."""
PICKLES = (".pth", ".pt", ".bin", ".ckpt")
_WHAT_UNPICKLING_RAISES = (UnpicklingError, RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError)


class TensorSource(Protocol):
    """Tensors by name: in memory of their own, or as a view of a file where that spares a copy. `label` says in errors
    where they are from."""

    @property
    def label(self) -> str: ...
    def names(self) -> list[str]: ...
    def info(self, name: str) -> TensorInfo: ...
    def get(self, name: str) -> Tensor: ...
    def view(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class MemorySource:
    """Tensors that are in memory, or mapped to it."""

    tensors: Mapping[str, Tensor]
    label: str = "the checkpoint"

    def names(self) -> list[str]:
        """In the order of the file."""
        return list(self.tensors)

    def info(self, name: str) -> TensorInfo:
        """Of the tensor."""
        return TensorInfo(self.tensors[name].dtype, tuple(self.tensors[name].shape))

    def get(self, name: str) -> Tensor:
        """A copy."""
        return self.tensors[name].clone(memory_format=torch.contiguous_format)

    def view(self, name: str) -> Tensor:
        """A copy too: the tensors belong to somebody else."""
        return self.get(name)


class SafetensorsSource:
    """One safetensors file or several, each opened when it is first asked for. Close it, or use it in a `with`."""

    def __init__(self, places: Mapping[str, Path], label: str) -> None:
        self.label = label
        self._places = dict(places)
        self._files: dict[Path, PlainFile] = {}

    def __enter__(self) -> SafetensorsSource:
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def names(self) -> list[str]:
        """File by file, so that reading in this order reads each file once from front to back."""
        return list(self._places)

    def info(self, name: str) -> TensorInfo:
        """From the head of its file."""
        return self._file(name).info(name)

    def get(self, name: str) -> Tensor:
        """The tensor, on the CPU. Raises CheckpointError when its file is damaged or does not hold it."""
        return self._file(name).get(name)

    def view(self, name: str) -> Tensor:
        """The tensor as pages of its file, see `PlainFile.view`."""
        return self._file(name).view(name)

    def rows(self, name: str, numbers: Sequence[int]) -> Tensor:
        """Some rows of a tensor; nothing else of it is read."""
        return self._file(name).rows(name, numbers)

    def _file(self, name: str) -> PlainFile:
        path = self._places[name]
        if path not in self._files:
            self._files[path] = PlainFile(path)
        return self._files[path]


@dataclass(frozen=True)
class Under:
    """The tensors of a source whose names begin with `prefix`, without it: a part of a file that holds several."""

    source: TensorSource
    prefix: str

    @property
    def label(self) -> str:
        return self.source.label

    def names(self) -> list[str]:
        """Without the prefix."""
        return [name.removeprefix(self.prefix) for name in self.source.names() if name.startswith(self.prefix)]

    def info(self, name: str) -> TensorInfo:
        """By its name without the prefix."""
        return self.source.info(self.prefix + name)

    def get(self, name: str) -> Tensor:
        """By its name without the prefix."""
        return self.source.get(self.prefix + name)

    def view(self, name: str) -> Tensor:
        """By its name without the prefix."""
        return self.source.view(self.prefix + name)


@dataclass(frozen=True)
class Joined:
    """Several sources as one, the names of each behind its prefix, which must tell them apart."""

    sources: Mapping[str, TensorSource]

    @property
    def label(self) -> str:
        return " and ".join(source.label for source in self.sources.values())

    def names(self) -> list[str]:
        """Source by source."""
        return [prefix + name for prefix, source in self.sources.items() for name in source.names()]

    def info(self, name: str) -> TensorInfo:
        """By its name behind the prefix."""
        source, rest = self._find(name)
        return source.info(rest)

    def get(self, name: str) -> Tensor:
        """By its name behind the prefix."""
        source, rest = self._find(name)
        return source.get(rest)

    def view(self, name: str) -> Tensor:
        """By its name behind the prefix."""
        source, rest = self._find(name)
        return source.view(rest)

    def _find(self, name: str) -> tuple[TensorSource, str]:
        prefix = next(prefix for prefix in self.sources if name.startswith(prefix))
        return self.sources[prefix], name.removeprefix(prefix)


def open_source(path: str | Path, *, variant: str = "", allow_pickle: bool = False) -> TensorSource:
    """The tensors of a file, or of a folder as diffusers and transformers write it.

    variant: such as "fp16", part of the file's name. A pickle is read only where `allow_pickle` says so, and then only
    its tensors. Raises CheckpointError saying what is missing or damaged.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path, variant)
    if not path.is_file():
        where = f"{path} leads to nothing: fetch it again" if path.is_symlink() else f"no checkpoint at {path}"
        raise CheckpointError(where)
    if path.suffix == ".safetensors":
        return SafetensorsSource(dict.fromkeys(_names(path), path), str(path))
    if path.suffix in PICKLES:
        return _open_pickle(path, allow_pickle)
    valid = ", ".join((".safetensors", *PICKLES))
    raise CheckpointError(f"{path} is not a file of weights; valid suffixes: {valid}")


def read_rows(source: TensorSource, name: str, numbers: Sequence[int]) -> Tensor:
    """Some rows (along the first axis) of a tensor, (len(numbers), ...); of safetensors nothing else is read. Raises
    CheckpointError."""
    if isinstance(source, SafetensorsSource):
        return source.rows(name, numbers)
    return source.get(name)[list(numbers)]


def read_metadata(path: str | Path) -> dict[str, str]:
    """The free strings in the head of a safetensors file. Raises CheckpointError."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def _open_folder(folder: Path, variant: str) -> SafetensorsSource:
    middle = f".{variant}" if variant else ""
    for stem in WEIGHTS:
        index = folder / f"{stem}.safetensors.index{middle}.json"
        if index.is_file():
            return SafetensorsSource(_read_index(index), str(folder))
        single = folder / f"{stem}{middle}.safetensors"
        if single.is_file():
            return SafetensorsSource(dict.fromkeys(_names(single), single), str(folder))
    wanted = " or ".join(f"{stem}{middle}.safetensors" for stem in WEIGHTS)
    raise CheckpointError(f"{folder} holds no {wanted}, whole or in shards{_instead(folder, middle)}")


def _instead(folder: Path, middle: str) -> str:
    """What lies in a folder where weights were looked for, and what may be done about it."""
    files = sorted(file for file in folder.glob("*") if file.suffix in (".safetensors", ".json", *PICKLES))
    lost = [file.name for file in files if file.is_symlink() and not file.exists()]
    if lost:
        return f"; {lost[0]} is a link that leads to nothing: fetch it again"
    there = [file.name for file in files if file.is_file() and file.suffix == ".safetensors"]
    if there:
        stem = re.match(r"(.+)-\d+-of-\d+\.safetensors", there[0])
        if stem is not None:
            return f"; there are shards, but their index {stem[1]}.safetensors.index.json is missing: fetch it again"
        names = "; there are: " + ", ".join(there[:4])
        variant = re.fullmatch(rf"(?:{'|'.join(WEIGHTS)})\.([^.]+)\.safetensors", there[0])
        return f"{names} (--variant {variant[1]} reads them)" if variant and not middle else names
    pickles = [file.name for file in files if file.is_file() and file.suffix in PICKLES]
    return f"; {pickles[0]} is a pickle, which is not read there: fetch or save it as safetensors" if pickles else ""


def _read_index(index: Path) -> dict[str, Path]:
    """Names to files; every shard must be there and hold what the index says."""
    try:
        listed: Any = read_object(index)["weight_map"]
        shards: dict[str, list[str]] = {}
        for name, file in listed.items():
            shards.setdefault(str(file), []).append(name)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not a readable index of shards: it has no table weight_map") from error
    if not shards:
        raise CheckpointError(f"{index} is not a readable index of shards: it names no tensors")
    places: dict[str, Path] = {}
    for file, names in sorted(shards.items()):
        path = index.parent / file
        if Path(file).name != file or file in ("", ".."):
            raise CheckpointError(f"{index} names a shard outside its folder: {file}")
        if not path.is_file():
            what = "is a link to nothing in" if path.is_symlink() else "is missing from"
            raise CheckpointError(f"shard {file[:80]} {what} {index.parent}: fetch it again")
        there = _names(path)
        absent = sorted(set(names) - set(there))
        if absent:
            raise CheckpointError(f"shard {path} lacks {len(absent)} tensors that the index names ({absent[0]}, ...)")
        doubled = sorted(places.keys() & set(there))
        if doubled:
            raise CheckpointError(f"tensor {doubled[0]} stands in two shards: {places[doubled[0]].name} and {file}")
        places |= dict.fromkeys(there, path)
    return places


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path | str, error: Exception) -> CheckpointError:
    """What is wrong with a file that is no safetensors: often it is what was fetched in its place, or half of it."""
    try:
        with open(path, "rb") as file:
            start, size = file.read(64), os.fstat(file.fileno()).st_size
    except OSError as again:
        return CheckpointError(f"{path} cannot be read: {again.strerror}")
    if size == 0:
        why = "it is empty"
    elif start.startswith(b"version https://git-lfs"):
        why = "it is a pointer of git-lfs (git lfs pull fetches the file)"
    elif start.lstrip()[:1] == b"<":
        why = "it is a web page"
    elif "not fully covered" in str(error) or "InvalidHeaderLength" in str(error) or "header length" in str(error):
        why = "it is cut short, or something stands behind it"
    else:
        why = _one_line(error).removeprefix("Error while deserializing header: ")
    return CheckpointError(f"{path} is not a readable safetensors file: {why}; fetch it again")


def _open_pickle(path: Path, allow_pickle: bool) -> MemorySource:
    if not allow_pickle:
        raise CheckpointError(f"{path} is a pickle: allow it (--allow-pickle) if you trust where it is from")
    try:
        # files of old are no archives, and cannot be mapped
        found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except _WHAT_UNPICKLING_RAISES as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = f"it holds {code[1]} beside tensors, which is not loaded" if code else "it is damaged, or no pickle"
        raise CheckpointError(f"{path} cannot be read as weights alone: {why}") from error
    for key in ("state_dict", "model", "module"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(x, Tensor) and isinstance(k, str) for k, x in found.items()):
        raise CheckpointError(f"{path} holds no table of tensors by name")
    return MemorySource(found, str(path))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
