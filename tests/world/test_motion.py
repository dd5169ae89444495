"""Paths of subjects against their closed forms."""

from __future__ import annotations

from itertools import pairwise
from math import pi

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitascope.core.shapes import ClipFormat
from vitascope.world.motion import BOTTOM, GRAVITY, bounces_per_s, ground_y, impact_times, trajectory
from vitascope.world.scene import MOTIONS, SHAPES, Subject

FORMAT = ClipFormat(fps=12, num_frames=25)


def moving(motion: str, shape: str = "ball") -> Subject:
    """A subject whose every number matters."""
    return Subject("red", shape, motion=motion, x=0.1, y=0.2, speed=0.7, travel=0.4, phase=0.3)


@pytest.mark.parametrize("motion", MOTIONS)
def test_position_at_time_zero_is_that_of_the_scene(motion: str) -> None:
    path = trajectory(moving(motion), FORMAT)
    assert torch.allclose(path.position[0], torch.tensor([0.1, 0.2]), atol=1e-6)
    assert path.radius[0] == pytest.approx(0.3)


@pytest.mark.parametrize("motion", MOTIONS)
def test_frame_rate_does_not_change_the_motion(motion: str) -> None:
    slow = trajectory(moving(motion), FORMAT)
    fast = trajectory(moving(motion), ClipFormat(fps=24, num_frames=49))
    for name in ("position", "velocity", "radius", "angle", "stretch"):
        assert torch.allclose(getattr(slow, name), getattr(fast, name)[::2], atol=1e-5), name


@pytest.mark.parametrize("motion", [motion for motion in MOTIONS if motion != "bounces"])
def test_velocity_is_the_derivative_of_the_position(motion: str) -> None:
    path = trajectory(moving(motion), ClipFormat(fps=240, num_frames=100))
    measured = (path.position[2:] - path.position[:-2]) * 120
    assert torch.allclose(measured, path.velocity[1:-1], atol=2e-3)


def test_directions_are_those_of_the_screen() -> None:
    steps = {m: trajectory(moving(m), FORMAT).position[-1] - torch.tensor([0.1, 0.2]) for m in MOTIONS[:4]}
    assert steps["moves left"][0] < 0 < steps["moves right"][0]
    assert steps["moves up"][1] < 0 < steps["moves down"][1]


def test_circle_keeps_its_radius_and_spin_turns_clockwise() -> None:
    path = trajectory(moving("circles"), FORMAT)
    start = torch.tensor([0.3 * 2 * pi]).double()
    centre = torch.tensor([0.1, 0.2]) - 0.4 * torch.cat([start.cos(), start.sin()]).float()
    assert torch.allclose((path.position - centre).norm(dim=1), torch.full((25,), 0.4), atol=1e-5)
    assert trajectory(moving("spins"), FORMAT).angle[12] == pytest.approx(2 * pi * (0.3 + 0.7), rel=1e-5)


def test_growing_and_shrinking_undo_each_other() -> None:
    grown, shrunk = (trajectory(moving(motion), FORMAT).radius for motion in ("grows", "shrinks"))
    assert torch.allclose(grown * shrunk, torch.full((25,), 0.09), atol=1e-5)
    assert grown[24] / grown[0] == pytest.approx(torch.exp(torch.tensor(1.4)).item(), rel=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_impacts_are_where_the_bottom_touches_the_ground(shape: str) -> None:
    subject = Subject("red", shape, motion="bounces", y=-0.2, travel=0.7, phase=0.5, radius=0.25)
    fmt = ClipFormat(fps=960, num_frames=1920)
    path = trajectory(subject, fmt)
    bottom = path.position[:, 1] + BOTTOM[shape] * path.radius * path.stretch[:, 1]
    assert bottom.max() <= ground_y(subject) + 1e-5
    lowest = [i / fmt.fps for i in range(1, 1919) if bottom[i] >= bottom[i - 1] and bottom[i] > bottom[i + 1]]
    assert len(lowest) == len(path.impacts_s) >= 2
    for seen_s, exact_s in zip(lowest, path.impacts_s, strict=True):
        assert seen_s == pytest.approx(exact_s, abs=2 / fmt.fps)


def test_a_bounce_without_speed_falls_freely() -> None:
    subject = Subject("red", "ball", motion="bounces", travel=0.8)
    fall_s = 0.5 / bounces_per_s(subject)
    assert 0.5 * GRAVITY * fall_s**2 == pytest.approx(0.8)


@settings(max_examples=30, deadline=None)
@given(phase=st.floats(0, 1), speed=st.floats(0.8, 2.0), duration_s=st.floats(0.05, 5.0))
def test_impacts_lie_in_the_clip_one_period_apart(phase: float, speed: float, duration_s: float) -> None:
    subject = Subject("red", "ball", motion="bounces", travel=0.5, speed=speed, phase=phase)
    times = impact_times(subject, duration_s)
    assert all(0 <= time < duration_s for time in times)
    assert abs(len(times) - duration_s * speed) <= 1
    for before, after in pairwise(times):
        assert after - before == pytest.approx(1 / speed)
