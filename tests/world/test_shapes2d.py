"""Outlines as signed distances: zero on the edge, one unit of distance a unit of length, and inside their extents."""

from __future__ import annotations

from math import cos, pi, sin

import pytest
import torch

from vitascope.world.motion import BOTTOM
from vitascope.world.scene import SHAPES
from vitascope.world.shapes2d import EXTENT, OUTLINES, smooth, soft_step


def grid(num: int = 201, half: float = 1.5) -> tuple[torch.Tensor, torch.Tensor]:
    axis = torch.linspace(-half, half, num)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return x, y


@pytest.mark.parametrize("shape", SHAPES)
def test_no_part_lies_outside_the_extent_or_below_the_bottom(shape: str) -> None:
    x, y = grid()
    inside = OUTLINES[shape](x, y) <= 0
    assert torch.hypot(x, y)[inside].max() <= EXTENT[shape] + 1e-3
    assert torch.hypot(x, y)[inside].max() >= EXTENT[shape] - 0.06, "the extent is no larger than it needs to be"
    assert y[inside].max().item() == pytest.approx(BOTTOM[shape], abs=0.016)


@pytest.mark.parametrize("shape", SHAPES)
def test_distances_grow_at_unit_rate_near_the_edge(shape: str) -> None:
    x, y = grid()
    distance = OUTLINES[shape](x, y)
    step = 3.0 / 200
    slope = torch.hypot(*torch.gradient(distance, spacing=step))
    near = distance.abs() < 0.05
    assert slope[near].median().item() == pytest.approx(1.0, abs=0.02)
    assert (slope[near] < 1.02).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_outlines_are_mirror_symmetric_and_the_box_is_not_round(shape: str) -> None:
    x, y = grid()
    assert torch.allclose(OUTLINES[shape](x, y), OUTLINES[shape](-x, y), atol=1e-6)
    along, diagonal = torch.tensor([0.9, 0.64]), torch.tensor([0.0, 0.64])
    assert OUTLINES["box"](along, diagonal)[1] < 0 < OUTLINES["box"](along, diagonal)[0]


def test_the_star_has_five_points() -> None:
    angle = torch.arange(0, 10) * pi / 5 - pi / 2
    on_rays = OUTLINES["star"](0.9 * angle.cos(), 0.9 * angle.sin())
    assert (on_rays[0::2] < 0).all()
    assert (on_rays[1::2] > 0).all()
    tip = OUTLINES["star"](torch.tensor([1.15 * cos(-pi / 2)]), torch.tensor([1.15 * sin(-pi / 2)]))
    assert tip.item() == pytest.approx(0.0, abs=1e-5)


def test_the_ring_has_a_hole() -> None:
    x = torch.tensor([0.0, 0.4, 0.76, 1.1])
    assert (OUTLINES["ring"](x, torch.zeros(4)) < 0).tolist() == [False, False, True, False]


def test_edges_are_half_covered_and_ramps_end() -> None:
    px = torch.tensor(0.1)
    cover = soft_step(torch.tensor([-0.2, 0.0, 0.2]), px)
    assert torch.allclose(cover, torch.tensor([1.0, 0.5, 0.0]))
    assert torch.allclose(smooth(torch.tensor([-1.0, 0.5, 2.0])), torch.tensor([0.0, 0.5, 1.0]))
