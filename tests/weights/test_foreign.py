"""Somebody else's configuration: taken, allowed, ignored, or refused by its key."""

from __future__ import annotations

from pathlib import Path

import pytest

from vitascope.core.errors import CheckpointError
from vitascope.weights.foreign import ForeignConfig, read_object


def test_values_come_in_the_type_of_their_default() -> None:
    theirs = ForeignConfig({"depth": 3, "eps": 1, "sizes": [1, 2], "none": None, "_note": "x", "act": "silu"})
    assert theirs.take("depth", 1) == 3
    assert theirs.take("eps", 1e-6) == 1.0
    assert theirs.take("sizes", ()) == (1, 2)
    assert theirs.take("none", 7) == 7
    assert theirs.take("missing", "x") == "x"
    theirs.only(act="silu", dropout=0.0)
    theirs.done()


def test_what_is_not_understood_is_refused() -> None:
    with pytest.raises(CheckpointError, match="here: depth must be a whole number, got '3'"):
        ForeignConfig({"depth": "3"}, "here").take("depth", 1)
    with pytest.raises(CheckpointError, match="sizes must be a list"):
        ForeignConfig({"sizes": "12"}).take("sizes", (1,))
    with pytest.raises(CheckpointError, match="act is 'relu'; only 'silu'"):
        ForeignConfig({"act": "relu"}).only(act="silu")
    with pytest.raises(CheckpointError, match="unknown keys: a, b"):
        ForeignConfig({"b": 1, "a": 2, "_c": 3}).done()
    ignored = ForeignConfig({"a": 1})
    ignored.ignore("a", "never there")
    ignored.done()


def test_files_that_hold_no_object_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        read_object(path)
    for text in ("[1]", "{", "\x00", ""):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            read_object(path)
    path.write_text('{"a": 1}')
    assert read_object(path) == {"a": 1}
