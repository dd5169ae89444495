"""One safetensors file per component: its tensors, its family and its configuration in one place.

The metadata key "config" holds JSON: {"family": ..., **fields}; further metadata keys are free strings ("extra").
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vitascope.core.errors import CheckpointError
from vitascope.weights.config import config_to_dict
from vitascope.weights.tensor_file import TensorInfo, write_tensors

CONFIG_KEY = "config"
DIGEST_BYTES = 20
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds: the family's name, its configuration (without the family), tensors and free metadata."""

    family: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    extra: dict[str, str] = field(default_factory=dict)


def save_checkpoint(
    path: str | Path,
    state_dict: Mapping[str, Tensor],
    family: str,
    config: Any,
    extra: Mapping[str, str] | None = None,
) -> None:
    """Write weights with their configuration (a dataclass or a dict of JSON values) to `path`.

    The file appears whole or not at all: it is written beside its place, flushed to the disk and renamed. The same
    content gives the same bytes. Tensors are stored contiguously; shared storage is written once per name.
    Raises CheckpointError if the folder or disk does not take the file or a value cannot be stored.
    """
    fields = dict(config) if isinstance(config, Mapping) else config_to_dict(config)
    if not family or fields.get("family", family) != family:
        raise CheckpointError(f"the configuration's family must be one non-empty name, got {family!r}")
    metadata = dict(extra or {})
    if CONFIG_KEY in metadata:
        raise CheckpointError(f"extra metadata cannot use the key {CONFIG_KEY!r}")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise CheckpointError(f"extra metadata must be strings, but {key!r} is {value!r}")
    try:
        metadata[CONFIG_KEY] = json.dumps({**fields, "family": family}, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the configuration of {family} cannot be written as JSON: {error}") from error
    for name, tensor in state_dict.items():
        if tensor.is_meta or tensor.layout != torch.strided:
            raise CheckpointError(f"tensor {name!r} has no dense values to store")
    infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in sorted(state_dict.items())}
    write_tensors(path, infos, lambda name: state_dict[name], metadata)


def load_checkpoint(path: str | Path, *, family: str | None = None, device: str = "cpu") -> Checkpoint:
    """Read a file written by `save_checkpoint`, tensors on `device`.

    Raises CheckpointError if the file is missing, damaged, not a safetensors file, without a configuration, or, where
    `family` is given, of another family.
    """
    return _read(Path(path), family, device, tensors=True)


def read_head(path: str | Path) -> Checkpoint:
    """`load_checkpoint` without the tensors."""
    return _read(Path(path), None, "cpu", tensors=False)


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], *, name: str = "") -> None:
    """Load `tensors` into `module`, one for one: every key present, none left over, every shape equal.

    Nothing is loaded unless everything fits. Values are cast to the module's dtypes (float to float, integer to
    integer); a module on the meta device takes the tensors themselves. `name` says in errors whose weights these are.
    Raises CheckpointError.
    """
    label = name or type(module).__name__
    own = module.state_dict()
    problems = [
        _listing("missing", [key for key in own if key not in tensors]),
        _listing("unknown", [key for key in tensors if key not in own]),
        _listing(
            "mis-shaped", [_shapes(k, t, own[k]) for k, t in tensors.items() if k in own and t.shape != own[k].shape]
        ),
        _listing(
            "of another kind", [_kinds(k, t, own[k]) for k, t in tensors.items() if k in own and _differs(t, own[k])]
        ),
    ]
    if any(problems):
        raise CheckpointError(f"weights do not fit {label}: {'; '.join(filter(None, problems))}")
    on_meta = any(tensor.is_meta for tensor in own.values())
    cast = {key: tensor.to(own[key].dtype) for key, tensor in tensors.items()} if on_meta else dict(tensors)
    module.load_state_dict(cast, strict=True, assign=on_meta)


def file_digest(path: str | Path) -> str:
    """BLAKE2b digest (40 hex digits) of a file's bytes. Raises CheckpointError if it cannot be read."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    try:
        with Path(path).open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or _one_line(error)}") from error
    return digest.hexdigest()


def directory_digest(path: str | Path) -> str:
    """BLAKE2b digest (40 hex digits) of all files below a folder: relative names and contents, in sorted order.

    Independent of the folder's place, of dates and of the order of creation. Raises CheckpointError for no folder.
    """
    root = Path(path)
    if not root.is_dir():
        raise CheckpointError(f"no folder at {path}")
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for name in sorted(file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file()):
        digest.update(json.dumps([name, file_digest(root / name)]).encode() + b"\n")
    return digest.hexdigest()


def _read(path: Path, family: str | None, device: str, tensors: bool) -> Checkpoint:
    if not path.is_file():
        raise CheckpointError(f"no checkpoint file at {path}")
    try:
        with safe_open(path, framework="pt", device=device) as file:
            metadata = dict(file.metadata() or {})
            config = _read_config(path, metadata)
            found = config.pop("family")
            if family is not None and found != family:
                raise CheckpointError(f"{path} holds a model of family {found!r}, but {family!r} is needed")
            names = list(file.keys()) if tensors else []
            return Checkpoint(found, config, {name: file.get_tensor(name) for name in names}, metadata)
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {_one_line(error)}") from error


def _read_config(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """Take the configuration out of `metadata`; it must be a JSON object with a family."""
    text = metadata.pop(CONFIG_KEY, None)
    if text is None:
        raise CheckpointError(f"{path} has no configuration in its metadata: it was not written by this package")
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} has a damaged configuration: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("family"), str):
        raise CheckpointError(f"{path} has a configuration without a family")
    return config


def _listing(what: str, items: list[str], most: int = 3) -> str:
    if not items:
        return ""
    rest = f" and {len(items) - most} more" if len(items) > most else ""
    return f"{len(items)} {what} ({', '.join(items[:most])}{rest})"


def _shapes(key: str, given: Tensor, own: Tensor) -> str:
    return f"{key} {tuple(given.shape)} for {tuple(own.shape)}"


def _kinds(key: str, given: Tensor, own: Tensor) -> str:
    return f"{key} {given.dtype} for {own.dtype}"


def _differs(given: Tensor, own: Tensor) -> bool:
    return given.is_floating_point() != own.is_floating_point() or (given.dtype == torch.bool) != (
        own.dtype == torch.bool
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
