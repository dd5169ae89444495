"""Mouths follow the speech timeline."""

from __future__ import annotations

import pytest
import torch

from vitascope.core.shapes import ClipFormat
from vitascope.world.faces import BLEND_S, MOUTHS, mouth_shape
from vitascope.world.scene import FACE, VISEMES, Subject
from vitascope.world.speech import speech_timeline

FORMAT = ClipFormat(fps=100.0, num_frames=208)


def test_every_viseme_has_a_mouth_of_its_own() -> None:
    assert set(MOUTHS) == set(VISEMES)
    assert len(set(MOUTHS.values())) == len(MOUTHS)
    assert min(MOUTHS, key=lambda name: MOUTHS[name][1]) == "closed"


@pytest.mark.parametrize("syllables", [("ma", "o", "ee"), ("boo", "eh", "pa", "mee")])
def test_the_mouth_has_the_shape_of_the_sound_between_changes(syllables: tuple[str, ...]) -> None:
    mouth = mouth_shape(Subject("pink", FACE, syllables=syllables), FORMAT)
    held = 0
    for segment in speech_timeline(syllables, FORMAT.duration_s).segments:
        first = round((segment.start_s + BLEND_S / 2) * FORMAT.fps) + 1
        last = min(round((segment.end_s - BLEND_S / 2) * FORMAT.fps) - 1, FORMAT.num_frames)
        for frame in range(first, last):
            assert torch.allclose(mouth[frame], torch.tensor(MOUTHS[segment.viseme]), atol=1e-4)
            held += 1
    assert held > 60


def test_the_mouth_moves_smoothly() -> None:
    mouth = mouth_shape(Subject("pink", FACE, syllables=("ma", "pee")), FORMAT)
    assert (mouth[1:] - mouth[:-1]).abs().max() < 0.08
    assert mouth[:, 1].max() > 0.3


def test_a_silent_face_keeps_its_mouth_closed() -> None:
    mouth = mouth_shape(Subject("pink", FACE), FORMAT)
    assert torch.equal(mouth, torch.tensor([MOUTHS["closed"]]).expand(208, 2))
