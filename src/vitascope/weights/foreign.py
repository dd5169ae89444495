"""Somebody else's config.json: every key is read, allowed with one value only, or refused. Nothing is imported."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vitascope.core.errors import CheckpointError


def read_object(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError when it is not there or is something else."""
    path = Path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} has no {path.name}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold an object, got {type(values).__name__}")
    return values


class ForeignConfig:
    """Values taken one by one; `done` refuses what nobody asked for. Keys that begin with _ are notes."""

    def __init__(self, values: Mapping[str, Any], label: str = "config.json") -> None:
        self.label = label
        self._values = dict(values)
        self._left = {key for key in values if not key.startswith("_")}

    def take(self, key: str, default: Any) -> Any:
        """The value of `key`, or `default`; of the type of the default (None goes for any). Raises CheckpointError."""
        self._left.discard(key)
        value = self._values.get(key, default)
        if value is None or default is None:
            return default if value is None else value
        if isinstance(default, float) and type(value) is int:
            return float(value)
        if isinstance(default, tuple):
            if not isinstance(value, Sequence) or isinstance(value, str):
                raise CheckpointError(f"{self.label}: {key} must be a list, got {value!r}")
            return tuple(value)
        if type(value) is not type(default):
            raise CheckpointError(f"{self.label}: {key} must be a {type(default).__name__}, got {value!r}")
        return value

    def only(self, **allowed: Any) -> None:
        """Keys that may be there with one value, or None. Raises CheckpointError for another."""
        for key, value in allowed.items():
            found = self._values.get(key, value)
            found = list(found) if isinstance(found, tuple) else found
            expected = list(value) if isinstance(value, tuple) else value
            self._left.discard(key)
            if found != expected and found is not None:
                raise CheckpointError(f"{self.label}: {key} is {found!r}; only {value!r} is known here")

    def ignore(self, *keys: str) -> None:
        """Keys that change nothing here."""
        self._left -= set(keys)

    def done(self) -> None:
        """Raises CheckpointError for keys that nobody took."""
        if self._left:
            raise CheckpointError(f"{self.label} has unknown keys: {', '.join(sorted(self._left))}")
