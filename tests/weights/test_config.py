"""Configurations come back as they were, and nothing else is accepted."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from vitascope.core.errors import CheckpointError
from vitascope.weights.config import config_from_dict, config_to_dict


@dataclass(frozen=True)
class Inner:
    strides: tuple[int, int, int] = (4, 16, 16)
    rate: float = 1.0


@dataclass(frozen=True)
class Outer:
    width: int
    kind: Literal["small", "large"] = "small"
    layers: tuple[int, ...] = ()
    inner: Inner = field(default_factory=Inner)
    many: tuple[Inner, ...] = ()
    table: dict[str, float] = field(default_factory=dict)
    maybe: int | None = None
    flag: bool = False

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width must be positive, got {self.width}")


def test_round_trip_through_json() -> None:
    config = Outer(8, "large", (1, 5), Inner((1, 2, 3), 0.5), (Inner(), Inner((2, 2, 2))), {"video": 2.0}, 7, True)
    assert config_from_dict(Outer, json.loads(json.dumps(config_to_dict(config)))) == config


def test_defaults_fill_in_and_integers_become_floats() -> None:
    config = config_from_dict(Outer, {"width": 3, "inner": {"rate": 2}})
    assert config == Outer(3, inner=Inner(rate=2.0))
    assert type(config.inner.rate) is float


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, ["lacks", "width"]),
        ({"width": 1, "depth": 2}, ["unknown", "depth", "valid keys"]),
        ({"width": "1"}, ["Outer.width", "int", "'1'"]),
        ({"width": True}, ["Outer.width", "int"]),
        ({"width": 1.5}, ["Outer.width", "int"]),
        ({"width": 1, "kind": "huge"}, ["Outer.kind", "'small', 'large'"]),
        ({"width": 1, "inner": {"strides": [1, 2]}}, ["Outer.inner.strides", "3 values"]),
        ({"width": 1, "inner": 3}, ["Outer.inner", "object"]),
        ({"width": 1, "layers": 3}, ["Outer.layers", "list"]),
        ({"width": 1, "many": [{}, {"rat": 1}]}, ["Outer.many[1]", "rat"]),
        ({"width": 1, "table": {"a": "x"}}, ["Outer.table.a", "float"]),
        ({"width": 1, "maybe": "x"}, ["Outer.maybe"]),
        ({"width": 0}, ["not consistent", "positive"]),
    ],
)
def test_refusals_name_the_key(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(CheckpointError) as caught:
        config_from_dict(Outer, values)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_only_dataclass_instances_are_configurations() -> None:
    with pytest.raises(CheckpointError, match="dataclass instance"):
        config_to_dict(Inner)
