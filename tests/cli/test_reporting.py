"""Lengths in frames and values as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitascope.cli.reporting import plain, print_json, track, whole_frames
from vitascope.core.errors import InputError, ShapeError


@given(st.integers(1, 500), st.sampled_from([8.0, 12.0, 23.976, 24.0, 30.0]))
def test_whole_frames_inverts_the_duration(num_frames: int, fps: float) -> None:
    assert whole_frames(num_frames / fps, fps) == num_frames


def test_lengths_between_frames_are_refused_with_their_neighbours() -> None:
    assert whole_frames(2.083, 12) == 25
    with pytest.raises(ShapeError, match=r"nearest: 2 s \(24 frames\) or 2\.083 s \(25 frames\)"):
        whole_frames(2.04, 12)
    with pytest.raises(ShapeError, match=r"nearest: 0\.08333 s \(1 frames\)"):
        whole_frames(0.01, 12)
    for seconds, fps in ((0.0, 12.0), (-1.0, 12.0), (1.0, 0.0), (math.nan, 12.0), (math.inf, 12.0), (1.0, math.inf)):
        with pytest.raises(ShapeError, match="must be positive"):
            whole_frames(seconds, fps)
    for seconds in (1e6, 1e308):
        with pytest.raises(ShapeError, match="too many frames; at most 1000000"):
            whole_frames(seconds, 12.0)


@dataclass(frozen=True)
class Figures:
    values: torch.Tensor
    names: tuple[str, ...]
    worst: float


def test_json_of_dataclasses_and_tensors(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": Figures(torch.tensor([[1.5, math.inf]]), ("é",), math.nan), 3: None})
    shown = capsys.readouterr().out
    assert json.loads(shown) == {"a": {"values": [[1.5, None]], "names": ["é"], "worst": None}, "3": None}
    with pytest.raises(InputError, match="object"):
        plain(object())


def test_track_yields_every_item_and_keeps_stdout_clean(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(iter("abc"), "working", 3)) == ["a", "b", "c"]
    assert capsys.readouterr().out == ""
