"""Embeddings of prompts on the disk, so that an encoder of several GB is loaded only for prompts that are new.

An entry is a safetensors file under the digest of everything that its content follows from: the bytes of the encoder
and of its tokeniser, how it was loaded, the options and the cleaned prompt. Entries are written whole or not at all,
carry a digest of their own and are made again where it does not fit, so processes may share a folder. Nothing is ever
removed: an entry is some 8 KB a token, and the folder may be deleted at any time.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Protocol
from uuid import uuid4

import torch
from torch import nn

from vitascope.core.errors import CheckpointError, choice
from vitascope.core.tracks import TextContext
from vitascope.models.text.rows import RowEncoder, TextRow, assemble, check_prompts, warn_of_cut
from vitascope.weights.checkpoint import DIGEST_BYTES, file_digest, load_checkpoint, save_checkpoint
from vitascope.weights.config import config_to_dict
from vitascope.weights.tensor_file import atomic_file

FAMILY = "text_embeddings"
FORMAT = 1
"""Part of every key: to be raised when the same encoder and options come to mean another content."""
_LARGE_BYTES = 1 << 20

WhatAfter = Literal["release", "keep"]


class RowOptions(Protocol):
    """How prompts are read: a dataclass of JSON values, such as `T5Options`."""

    @property
    def max_tokens(self) -> int: ...
    @property
    def row_tokens(self) -> int | None: ...
    def clean(self, prompt: str) -> str: ...


def user_cache_folder(environment: Mapping[str, str]) -> Path:
    """Where the embeddings of a user lie: vitascope/text under $XDG_CACHE_HOME, or under ~/.cache without it.

    Source: XDG Base Directory Specification; a relative XDG_CACHE_HOME is as good as none.
    """
    base = Path(environment.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "vitascope" / "text"


def model_identity(places: Sequence[Path], memory: Path, *settings: str) -> str:
    """A digest of files, and of all safetensors, JSON and tokeniser files right in folders, and of the settings.

    Digests of large files are remembered under `memory` with their size and times, so they are read through only once.
    Raises CheckpointError for a folder or file that cannot be read.
    """
    parts: list[Any] = [list(settings)]
    for place in places:
        if not place.exists():
            raise CheckpointError(f"no file or folder at {place}")
        kinds = {".safetensors", ".json", ".model", ".txt"}
        found = [place] if place.is_file() else place.iterdir()
        files = sorted(file for file in found if file.is_file() and (file == place or file.suffix in kinds))
        parts.append([[file.name, _known_digest(file, memory / "files")] for file in files])
    return _digest(parts)


class CacheFolder:
    """Rows on the disk under their keys. `identity` says whose they are; it is asked once, when first needed."""

    def __init__(self, folder: Path, identity: Callable[[], str]) -> None:
        self.folder = folder
        self._ask, self._identity = identity, ""

    def key(self, options: RowOptions, text: str) -> str:
        """40 hex digits for a cleaned text."""
        self._identity = self._identity or self._ask()
        return _digest([FORMAT, self._identity, config_to_dict(options), text])

    def place(self, key: str) -> Path:
        """The file of a key, whether it is there or not."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def read(self, key: str) -> TextRow | None:
        """The row of a key, on the CPU; None where there is none, or a damaged one."""
        try:
            found = load_checkpoint(self.place(key), family=FAMILY)
        except CheckpointError:
            return None
        config, embeddings = found.config, found.tensors.get("embeddings")
        if embeddings is None or embeddings.ndim != 2 or config.get("key") != key:
            return None
        row = TextRow(embeddings, config.get("num_tokens", -1), config.get("removed", ""))
        return row if config.get("digest") == _row_digest(row) else None

    def write(self, key: str, row: TextRow) -> None:
        """Raises CheckpointError where the disk does not take it."""
        path = self.place(key)
        config = {"key": key, "digest": _row_digest(row), "num_tokens": row.num_tokens, "removed": row.removed}
        own = path.with_name(f".{key}.{uuid4().hex}")  # of this writer alone: threads share the number of the process
        save_checkpoint(own, {"embeddings": row.embeddings}, FAMILY, config)
        try:
            os.replace(own, path)
        except OSError as error:
            own.unlink(missing_ok=True)
            raise CheckpointError(f"cannot write {path}: {error.strerror}") from error


class CachedTextEncoder:
    """`core.protocols.TextEncoder` that loads its encoder only when a prompt is not in the cache.

    load: the encoder, asked for at most once at a time. cache: None keeps nothing on the disk. width: of embeddings.
    device: where results go. after: the encoder is released after each call that loaded it, or kept for the next one
    until `release`. `fill` takes all the prompts of a job at once, so that the encoder is loaded once for them.
    """

    def __init__(
        self,
        load: Callable[[], RowEncoder],
        options: RowOptions,
        cache: CacheFolder | None,
        *,
        width: int,
        device: torch.device | str = "cpu",
        after: WhatAfter = "release",
    ) -> None:
        self.options, self.cache, self.width, self.device = options, cache, width, device
        self.after = choice("after", after, ("release", "keep"))
        self._load = load
        self._encoder: RowEncoder | None = None
        self._lock = threading.RLock()

    @property
    def loaded(self) -> bool:
        """Whether the encoder is in memory."""
        return self._encoder is not None

    def __call__(self, prompts: Sequence[str]) -> TextContext:
        """Embeddings (B, S, D) and mask (B, S). Raises what the encoder raises, and PromptError for what is no text."""
        rows = self._rows(prompts)
        return assemble(rows, self.options.row_tokens, self.device)

    def fill(self, prompts: Sequence[str]) -> None:
        """See to it that the cache, if there is one, knows all these prompts."""
        if self.cache is not None:
            self._rows(prompts)

    def missing(self, prompts: Sequence[str]) -> list[str]:
        """Those that are not in the cache, each once; all where there is none. Entries are not looked into: a damaged
        one is made again when it is read."""
        check_prompts(prompts)
        cache = self.cache
        if cache is None:
            return list(dict.fromkeys(prompts))
        by_key = {cache.key(self.options, self.options.clean(prompt)): prompt for prompt in prompts}
        return [prompt for key, prompt in by_key.items() if not cache.place(key).is_file()]

    def release(self) -> None:
        """Let go of the encoder and of the memory it took; the next new prompt loads it again."""
        with self._lock:
            if self._encoder is None:
                return
            circular = isinstance(self._encoder, nn.Module)  # its parts may refer to each other
            self._encoder = None
            if circular:
                gc.collect()
            if torch.device(self.device).type == "cuda":
                torch.cuda.empty_cache()

    def _rows(self, prompts: Sequence[str]) -> list[TextRow]:
        check_prompts(prompts)
        if self.cache is None:
            return self._encode(prompts)
        keys = [self.cache.key(self.options, self.options.clean(prompt)) for prompt in prompts]
        by_key = dict(zip(keys, prompts, strict=True))
        rows = {key: row for key in by_key if (row := self.cache.read(key)) is not None}
        for row in rows.values():
            if row.removed:
                warn_of_cut(row.removed, self.options.max_tokens)
        if len(rows) < len(by_key):
            with self._lock:
                rows |= self._make({key: prompt for key, prompt in by_key.items() if key not in rows}, self.cache)
        return [rows[key] for key in keys]

    def _make(self, missing: Mapping[str, str], cache: CacheFolder) -> dict[str, TextRow]:
        """Rows of prompts by their keys; what another thread made while this one waited is not made again."""
        rows = {key: row for key in missing if (row := cache.read(key)) is not None}
        left = [key for key in missing if key not in rows]
        if not left:
            return rows
        made = dict(zip(left, self._encode([missing[key] for key in left]), strict=True))
        for key, row in made.items():
            try:
                cache.write(key, row)
            except CheckpointError as error:
                warnings.warn(f"embeddings of a prompt are not kept: {error}", stacklevel=2)
        return rows | made

    def _encode(self, prompts: Sequence[str]) -> list[TextRow]:
        with self._lock:
            if self._encoder is None:
                self._encoder = self._load()
            try:
                return self._encoder.encode(prompts)
            finally:
                if self.after == "release":
                    self.release()


def _known_digest(path: Path, memory: Path) -> str:
    """`file_digest`, remembered for large files as long as their size and times stay."""
    try:
        stat, whole = path.stat(), str(path.resolve())
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    if stat.st_size < _LARGE_BYTES:
        return file_digest(path)
    stamp = [whole, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    note = memory / f"{_digest(whole)}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(note.read_text(encoding="utf-8"))
        if known["stamp"] == stamp:
            return str(known["digest"])
    digest = file_digest(path)
    with suppress(CheckpointError), atomic_file(note) as file:
        file.write(json.dumps({"stamp": stamp, "digest": digest}).encode())
    return digest


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=DIGEST_BYTES).hexdigest()


def _row_digest(row: TextRow) -> str:
    values = row.embeddings.detach().cpu().contiguous()
    head = json.dumps([str(values.dtype), list(values.shape), row.num_tokens, row.removed]).encode()
    content = values.reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(head + content, digest_size=DIGEST_BYTES).hexdigest()
