"""The subjects' outlines as signed distances, and their light.

T frames, h and w rows and columns of a window around the subject. Local coordinates are in radii from the subject's
centre, x right and y down; a signed distance is in radii too, negative inside. Outlines: Quilez,
"2D distance functions".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi, sin

import torch
from torch import Tensor

from vitascope.world.scene import COLOURS, Subject

EXTENT: dict[str, float] = {"ball": 1.0, "box": 1.21, "triangle": 1.25, "star": 1.15, "ring": 1.0, "face": 1.0}
"""How far a subject reaches from its centre, in radii, however it is turned."""

_BOX_HALF_SIDE = 0.88
_BOX_ROUNDING = 0.1
_TRIANGLE_INSIDE = 0.62
_STAR_TIP = 1.15
_STAR_INNER = 0.58
_RING_MIDDLE = 0.76
_RING_HALF_WIDTH = 0.24


@dataclass(frozen=True)
class Local:
    """Where the pixels of a window are, in radii from the subject's centre.

    x, y (T, h, w) as seen; turned_x, turned_y in the axes of the subject, which spin with it; px (T, 1, 1), the size
    of a pixel.
    """

    x: Tensor
    y: Tensor
    turned_x: Tensor
    turned_y: Tensor
    px: Tensor


@dataclass(frozen=True)
class Paint:
    """Colour (T, 3, h, w) in 0..255 and cover (T, 1, h, w) in [0, 1] of a window."""

    colour: Tensor
    cover: Tensor


def ball(x: Tensor, y: Tensor) -> Tensor:
    """A disc of radius 1."""
    return torch.sqrt(x * x + y * y) - 1.0


def ring(x: Tensor, y: Tensor) -> Tensor:
    """A ring whose outer radius is 1."""
    return (torch.sqrt(x * x + y * y) - _RING_MIDDLE).abs_() - _RING_HALF_WIDTH


def box(x: Tensor, y: Tensor) -> Tensor:
    """A square with softly rounded corners."""
    half = _BOX_HALF_SIDE - _BOX_ROUNDING
    over_x, over_y = x.abs() - half, y.abs() - half
    outside = torch.hypot(over_x.clamp(min=0.0), over_y.clamp(min=0.0))
    return outside + torch.maximum(over_x, over_y).clamp_(max=0.0) - _BOX_ROUNDING


def triangle(x: Tensor, y: Tensor) -> Tensor:
    """An equilateral triangle, one corner up, with its centre of mass at the origin."""
    side = x.abs() * cos(pi / 6) - y * sin(pi / 6)
    return torch.maximum(side, y) - _TRIANGLE_INSIDE


def star(x: Tensor, y: Tensor) -> Tensor:
    """A five-pointed star, one point up: folded into half a point by mirrors, where its edge is one line."""
    x, y = x.abs(), -y
    for normal_x, normal_y in ((cos(pi / 5), -sin(pi / 5)), (-cos(pi / 5), -sin(pi / 5))):
        across = (x * normal_x + y * normal_y).clamp_(min=0.0) * 2.0
        x, y = x - across * normal_x, y - across * normal_y
    inner_x, inner_y = _STAR_INNER * sin(pi / 5), _STAR_INNER * cos(pi / 5)
    edge_x, edge_y = inner_x, inner_y - _STAR_TIP
    length = (edge_x * edge_x + edge_y * edge_y) ** 0.5
    return (x.abs() * -edge_y + (y - _STAR_TIP) * edge_x) / length


OUTLINES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ball": ball,
    "box": box,
    "triangle": triangle,
    "star": star,
    "ring": ring,
}
_RIM: dict[str, float] = {"ball": 0.14, "box": 0.13, "triangle": 0.12, "star": 0.11, "ring": 0.09}


def soft_step(distance: Tensor, px: Tensor) -> Tensor:
    """Cover of a pixel whose middle is `distance` outside an edge: 1 inside, 0 outside, a ramp 1.4 px wide between."""
    return (0.5 - distance / (1.4 * px)).clamp_(0.0, 1.0)


def smooth(value: Tensor) -> Tensor:
    """The cubic that eases 0..1 to 0..1, clamped."""
    value = value.clamp(0.0, 1.0)
    return value * value * (3.0 - 2.0 * value)


def palette(colour: str, like: Tensor) -> Tensor:
    """The colour as (1, 3, 1, 1) in 0..255."""
    return torch.tensor(COLOURS[colour], dtype=like.dtype, device=like.device).view(1, 3, 1, 1)


def shade(colour: Tensor, dark: Tensor, light: Tensor) -> Tensor:
    """The colour (1, 3, 1, 1), darkened by the share `dark` and moved towards white by the share `light`, (T, h, w)."""
    return colour * (1.0 - dark[:, None] - light[:, None]) + 255.0 * light[:, None]


def paint_shape(subject: Subject, local: Local) -> Paint:
    """The subject lit from the upper left: a darker rim, a glow, and a band of the pure colour between them that makes
    up the middle of its pixels. A ball or ring that spins carries a mark."""
    distance = OUTLINES[subject.shape](local.turned_x, local.turned_y)
    cover = soft_step(distance, local.px)
    rim = _RIM[subject.shape]
    dark = 0.3 * smooth(1.0 + distance / rim)
    slope = 0.45 * local.x + 0.75 * local.y
    dark = dark + 0.22 * (slope - 0.3).clamp_(0.0, 0.8)
    light = 0.22 * (-slope - 0.2).clamp_(0.0, 0.8)
    if subject.shape == "ball":
        light = light + 0.6 * torch.exp(-9.0 * ((local.x + 0.36) ** 2 + (local.y + 0.42) ** 2))
    if subject.motion == "spins" and subject.shape in ("ball", "ring"):
        dark = dark + _mark(subject.shape, local) * (0.6 - dark)
    return Paint(shade(palette(subject.colour, cover), dark, light), cover[:, None])


def _mark(shape: str, local: Local) -> Tensor:
    """What shows that something round spins: a stripe across a ball, a dark piece of a ring, with soft edges."""
    soft = local.px.clamp(min=0.06)
    if shape == "ball":
        return soft_step(local.turned_y.abs() - 0.13, soft)
    return soft_step((local.turned_y.abs() - 0.42).maximum(-local.turned_x), soft)
