"""Measures over time and over seeds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vitascope.core.errors import ShapeError
from vitascope.core.shapes import ClipFormat
from vitascope.evaluation.temporal import background_flicker, novelty_between, seed_diversity, steadiness
from vitascope.world.casting import place
from vitascope.world.render import render
from vitascope.world.scene import Scene, Subject

FMT = ClipFormat(64, 64, num_frames=13)


def _moving() -> torch.Tensor:
    scene = place(Scene((Subject("red", "ball", motion="moves right"),)), 3, FMT)
    return render([scene], FMT)[0]


def test_flicker_is_the_deviation_of_white_noise_and_zero_for_a_fade() -> None:
    ramp = torch.arange(30.0).view(-1, 1, 1, 1).expand(30, 3, 32, 32)
    assert background_flicker(ramp) == pytest.approx(0, abs=1e-4)
    noise = 128 + 5 * torch.randn(30, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    # 86,016 values: the estimate of the deviation is good to a few parts in a thousand.
    assert background_flicker(noise) == pytest.approx(5, rel=0.02)
    foreground = np.zeros((30, 32, 32), np.bool_)
    foreground[:, :16] = True
    noise[:, :, :16] = 128 + 60 * torch.randn(30, 3, 16, 32, generator=torch.Generator().manual_seed(1))
    assert background_flicker(noise, foreground) == pytest.approx(5, rel=0.03)
    with pytest.raises(ShapeError):
        background_flicker(noise[:2])


def test_a_dissolve_is_told_from_motion() -> None:
    motion = _moving()
    first, last = motion[0].float(), motion[-1].float()
    noise = torch.randn(motion.shape, generator=torch.Generator().manual_seed(2))
    weight = torch.linspace(0, 1, len(motion)).view(-1, 1, 1, 1)
    dissolve = ((1 - weight) * first + weight * last + 3 * noise).clamp(0, 255).round().to(torch.uint8)
    cut = torch.cat([motion[:1].expand(7, -1, -1, -1), motion[-1:].expand(6, -1, -1, -1)])
    assert novelty_between(motion, 0, len(motion) - 1).moves
    assert not novelty_between(dissolve, 0, len(motion) - 1).moves
    assert not novelty_between(cut, 0, len(motion) - 1).moves
    with pytest.raises(ShapeError):
        novelty_between(motion[:1].expand(5, -1, -1, -1), 0, 4)
    with pytest.raises(ShapeError):
        novelty_between(motion, 3, 4)


def test_steadiness_sees_a_change_of_colour_and_a_jump() -> None:
    present = np.ones(20, np.bool_)
    path = np.stack([np.linspace(0, 10, 20), np.zeros(20)], 1).astype(np.float32)
    colours = np.full((20, 3), 100, np.float32)
    calm = steadiness(colours, path, present)
    assert (calm.present, calm.colour_drift) == (1.0, 0.0)
    assert calm.path_jerk_px < 1e-4  # rounding of fp32 positions
    colours[5, 0] = 130
    path[9, 1] = 4
    shaken = steadiness(colours, path, present)
    assert shaken.colour_drift == pytest.approx(30)
    # Third differences of one jump of 4 px are 4, -12, 12, -4 in 17 places.
    assert shaken.path_jerk_px == pytest.approx(np.sqrt((16 + 144) * 2 / 17), rel=1e-4)


def test_diversity_is_zero_for_copies_and_the_difference_for_shifts() -> None:
    clip = torch.full((3, 3, 8, 8), 100, dtype=torch.uint8)
    assert seed_diversity([clip, clip]) == 0
    assert seed_diversity([clip, clip + 10, clip + 20]) == pytest.approx(40 / 3)
    with pytest.raises(ShapeError):
        seed_diversity([clip])
