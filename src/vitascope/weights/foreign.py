"""Somebody else's config.json: every key is read, allowed with one value only, or refused. Nothing is imported."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from reprlib import repr as shortly
from typing import Any

from vitascope.core.errors import CheckpointError

_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
_LARGEST = 2**31 - 1


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError for one that is damaged, nested without end, that gives a key twice
    (of which each reader would take another), or has whole numbers that are none of a model."""
    try:
        return json.loads(text, object_pairs_hook=_once, parse_int=_whole)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _whole(digits: str) -> int:
    if len(digits) > 100:  # tokenisers say 10^30 for no limit
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def read_object(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError when it is not there or is something else."""
    path = Path(path)
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        what = f"{path.parent} has no {path.name}" if path.parent.is_dir() else f"there is no folder {path.parent}"
        raise CheckpointError(what) from error
    except NotADirectoryError as error:
        raise CheckpointError(f"{path.parent} is a file, not a folder with {path.name}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} cannot be read: it is not JSON in UTF-8 ({error.reason})") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read: it is not JSON ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold an object, got {type(values).__name__}")
    return values


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{shortly(twice)} is given twice")
    return values


class ForeignConfig:
    """Values taken one by one; `done` refuses what nobody asked for. Keys that begin with _ are notes."""

    def __init__(self, values: Mapping[str, Any], label: str = "config.json") -> None:
        self.label = label
        self._values = dict(values)
        self._left = {key for key in values if not key.startswith("_")}

    def take(self, key: str, default: Any) -> Any:
        """The value of `key`, or `default`; of the type of the default, as are the items of a list (None, and items
        of no list of plain values, go for any). Raises CheckpointError, also for numbers that are not finite."""
        self._left.discard(key)
        value = self._values.get(key, default)
        if value is None or default is None:
            return default if value is None else value
        if isinstance(default, tuple):
            if not isinstance(value, Sequence) or isinstance(value, str):
                raise CheckpointError(f"{self.label}: {key} must be a list, got {shortly(value)}")
            kinds = {type(item) for item in default}
            if len(kinds) != 1 or not kinds <= _KINDS.keys():
                return tuple(value)
            return tuple(self._as(f"{key}[{place}]", item, *kinds) for place, item in enumerate(value))
        return self._as(key, value, type(default))

    def number(self, key: str, default: float | None = None) -> float | None:
        """The value of `key`, a number where it is there and not null. Raises CheckpointError."""
        value = self.take(key, None)
        return default if value is None else self._as(key, value, float)

    def whole(self, key: str) -> int:
        """The value of `key`, a whole number; 0 where it is not there, or null. Raises CheckpointError."""
        value = self.take(key, None)
        return 0 if value is None else self._as(key, value, int)

    def _as(self, key: str, value: Any, kind: type) -> Any:
        right = type(value) is kind or (kind is float and type(value) is int)
        if right and kind in (int, float):
            right = abs(value) <= _LARGEST if type(value) is int else isfinite(value)
        if not right:
            raise CheckpointError(
                f"{self.label}: {key} must be {_KINDS.get(kind, kind.__name__)}, got {shortly(value)}"
            )
        return float(value) if kind is float else value

    def only(self, **allowed: Any) -> None:
        """Keys that may be there with one value, or None. Raises CheckpointError for another."""
        for key, value in allowed.items():
            found = self._values.get(key, value)
            found = list(found) if isinstance(found, tuple) else found
            expected = list(value) if isinstance(value, tuple) else value
            self._left.discard(key)
            if found != expected and found is not None:
                raise CheckpointError(f"{self.label}: {key} is {shortly(found)}; only {shortly(value)} is known here")

    def ignore(self, *keys: str) -> None:
        """Keys that change nothing here."""
        self._left -= set(keys)

    def done(self) -> None:
        """Raises CheckpointError for keys that nobody took."""
        if self._left:
            raise CheckpointError(f"{self.label} has unknown keys: {', '.join(sorted(self._left))}")
