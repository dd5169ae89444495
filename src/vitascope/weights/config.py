"""Configurations of model families: frozen dataclasses to plain JSON values and back, strictly.

A field may be a bool, int, float, str, None, a Literal, a union of these, a list, tuple or dict of them, or another
dataclass. A key that is missing (and has no default), unknown, or of the wrong type is refused with its full name.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from vitascope.core.errors import CheckpointError

T = TypeVar("T")


def config_to_dict(config: Any) -> dict[str, Any]:
    """The fields of a dataclass instance as a plain dict; nested dataclasses become dicts, tuples become lists."""
    if not is_dataclass(config) or isinstance(config, type):
        raise CheckpointError(f"a configuration must be a dataclass instance, got {type(config).__name__}")
    return {key: _plain(value) for key, value in asdict(config).items()}


def config_from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
    """Build the dataclass `cls` from plain values as read from JSON; the inverse of `config_to_dict`.

    Raises CheckpointError naming the key that is missing, unknown or of the wrong type, or the dataclass's own
    complaint when its values contradict each other.
    """
    return _build(cls, values, cls.__name__)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _build(cls: Any, values: Any, name: str) -> Any:
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{name} must be an object with named values, got {type(values).__name__}")
    own = {field.name: field for field in fields(cls) if field.init}
    unknown = sorted(set(map(str, values)) - set(own))
    if unknown:
        raise CheckpointError(f"{name} has unknown keys: {', '.join(unknown)}; valid keys: {', '.join(own)}")
    required = [key for key, f in own.items() if f.default is MISSING and f.default_factory is MISSING]
    missing = [key for key in required if key not in values]
    if missing:
        raise CheckpointError(f"{name} lacks keys: {', '.join(missing)}")
    hints = get_type_hints(cls)
    arguments = {key: _convert(hints[key], value, f"{name}.{key}") for key, value in values.items()}
    try:
        return cls(**arguments)
    except ValueError as error:
        raise CheckpointError(f"{name} is not consistent: {error}") from error


def _convert(hint: Any, value: Any, name: str) -> Any:
    """`value` as the type `hint`, or CheckpointError naming `name`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is Literal:
        if not any(value == option and type(value) is type(option) for option in arguments):
            raise CheckpointError(f"{name} is {value!r}; valid values: {', '.join(map(repr, arguments))}")
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, name)
    if is_dataclass(hint):
        return _build(hint, value, name)
    if origin in (list, tuple) or hint in (list, tuple):
        return _convert_sequence(origin or hint, arguments, value, name)
    if origin in (dict, Mapping) or hint is dict:
        if not isinstance(value, Mapping):
            raise _wrong(name, "an object", value)
        item = arguments[1] if arguments else Any
        return {key: _convert(item, element, f"{name}.{key}") for key, element in value.items()}
    return _convert_scalar(hint, value, name)


def _convert_union(options: tuple[Any, ...], value: Any, name: str) -> Any:
    complaints: list[str] = []
    for option in options:
        try:
            return _convert(option, value, name)
        except CheckpointError as error:
            complaints.append(str(error))
    raise CheckpointError(complaints[0])


def _convert_sequence(kind: Any, items: tuple[Any, ...], value: Any, name: str) -> Any:
    if not isinstance(value, (list, tuple)):
        raise _wrong(name, "a list", value)
    if not items:
        hints = [Any] * len(value)
    elif kind is list or (len(items) == 2 and items[1] is Ellipsis):
        hints = [items[0]] * len(value)
    elif len(items) != len(value):
        raise CheckpointError(f"{name} must have {len(items)} values, got {len(value)}")
    else:
        hints = list(items)
    return kind(_convert(hint, item, f"{name}[{i}]") for i, (hint, item) in enumerate(zip(hints, value, strict=True)))


def _convert_scalar(hint: Any, value: Any, name: str) -> Any:
    if hint is None or hint is types.NoneType:
        if value is not None:
            raise _wrong(name, "null", value)
        return None
    if hint is float and type(value) is int:
        return float(value)
    if hint not in (bool, int, float, str):
        raise CheckpointError(f"{name} has the type {hint!r}, which a configuration cannot hold")
    if type(value) is not hint:
        raise _wrong(name, f"a value of type {hint.__name__}", value)
    return value


def _wrong(name: str, expected: str, value: Any) -> CheckpointError:
    return CheckpointError(f"{name} must be {expected}, got {value!r}")
