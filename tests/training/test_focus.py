from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitascope.core.shapes import ClipFormat, VideoStrides
from vitascope.training.focus import subject_focus
from vitascope.world.casting import draw_scene
from vitascope.world.scene import Scene, Subject
from vitascope.world.truth import ground_truth

FMT = ClipFormat(width_px=96, height_px=64, num_frames=9)
STRIDES = VideoStrides(4, 8, 8)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000))
def test_every_cell_that_shows_a_subject_is_looked_at_closely(seed: int) -> None:
    scene = draw_scene(seed, fmt=FMT)
    focus = subject_focus(scene, FMT, STRIDES)
    shown = torch.nn.functional.max_pool2d(ground_truth(scene, FMT).masks().amax(0)[None], 8)[0]
    shown = torch.cat([shown[:1], shown[1:].unflatten(0, (-1, 4)).amax(1)])
    assert focus.shape == shown.shape == (3, 8, 12)
    assert (focus[shown > 0.2] > 0).all()


def test_focus_is_around_the_subject_alone_and_greater_on_small_ones() -> None:
    def still(radius: float) -> torch.Tensor:
        subject = Subject("red", "ball", radius=radius, x=-0.75, y=-0.4)
        return subject_focus(Scene((subject,), "black"), FMT, STRIDES)

    small, medium = still(0.2), still(0.3)
    assert (small[:, :, 7:] == 0).all()
    assert (small[:, 6:] == 0).all()
    assert small.max() == pytest.approx(1.5)
    assert medium.max() == pytest.approx(1.0)
    assert 0 < (small > 0).sum() < (medium > 0).sum() < medium.numel() / 2
    assert subject_focus(Scene((Subject("red", "ball", x=9.0),), "black"), FMT, STRIDES).sum() == 0
