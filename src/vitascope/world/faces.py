"""Drawn faces whose mouth follows a speech timeline.

T frames, h and w rows and columns of the window; lengths are in radii of the head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitascope.core.shapes import ClipFormat
from vitascope.world.motion import frame_times
from vitascope.world.scene import Subject
from vitascope.world.shapes2d import Local, Paint, ball, palette, shade, smooth, soft_step
from vitascope.world.speech import speech_timeline

MOUTHS: dict[str, tuple[float, float]] = {
    "closed": (0.36, 0.028),
    "wide": (0.52, 0.13),
    "open": (0.40, 0.32),
    "round": (0.20, 0.22),
    "mid": (0.36, 0.19),
}
"""Half width and half height of the mouth for each viseme."""

BLEND_S = 0.09
"""A mouth takes this long to change from one shape into the next, half of it before the sound changes."""

MOUTH_Y = 0.40
MOUTH_EXTENT = 0.58
"""Where the middle of the mouth is below the middle of the head, and how far the mouth reaches from there."""

_EYE_X, _EYE_Y = 0.36, -0.22
_CAVITY = (70.0, 14.0, 24.0)
_TONGUE = (206.0, 84.0, 92.0)
_INK = (28.0, 24.0, 32.0)
_EYE_WHITE = (250.0, 250.0, 250.0)


def mouth_shape(subject: Subject, fmt: ClipFormat) -> Tensor:
    """Half width and half height of the mouth at every frame, (T, 2) in radii of the head."""
    time = frame_times(fmt)
    mouth = torch.tensor(MOUTHS["closed"], dtype=torch.float64).repeat(len(time), 1)
    if not subject.syllables:
        return mouth.float()
    for segment in speech_timeline(subject.syllables, fmt.duration_s).segments:
        arrived = smooth((time - segment.start_s) / BLEND_S + 0.5)
        mouth += arrived[:, None] * (torch.tensor(MOUTHS[segment.viseme], dtype=torch.float64) - mouth)
    return mouth.float()


def paint_head(subject: Subject, local: Local) -> Paint:
    """A round head in the subject's colour with two eyes."""
    distance = ball(local.x, local.y)
    cover = soft_step(distance, local.px)
    slope = 0.45 * local.x + 0.75 * local.y
    dark = 0.28 * smooth(1.0 + distance / 0.14) + 0.16 * (slope - 0.3).clamp_(0.0, 0.8)
    colour = shade(palette(subject.colour, cover), dark, 0.2 * (-slope - 0.25).clamp_(0.0, 0.8))
    beside, y = local.turned_x.abs() - _EYE_X, local.turned_y - _EYE_Y
    for radius_x, radius_y, lower, ink in ((0.175, 0.215, 0.0, _EYE_WHITE), (0.095, 0.125, 0.05, _INK)):
        eye = soft_step(_ellipse(beside, y - lower, radius_x, radius_y), local.px)
        colour = colour.lerp_(_ink(ink, colour), eye[:, None])
    return Paint(colour, cover[:, None])


def paint_mouth(local: Local, mouth: Tensor) -> Paint:
    """A mouth of the given shape (T, 2): lips, and when it opens a dark inside and a tongue."""
    x, y = local.turned_x, local.turned_y - MOUTH_Y
    half_width, half_height = mouth[:, 0].view(-1, 1, 1), mouth[:, 1].view(-1, 1, 1)
    lips = 0.55 * soft_step(_ellipse(x, y, half_width + 0.045, half_height + 0.045), local.px)
    inside = soft_step(_ellipse(x, y, half_width, half_height), local.px)
    tongue = soft_step(_ellipse(x, y - 0.95 * half_height, 0.75 * half_width, 0.6 * half_height), local.px)
    tongue = tongue * smooth((half_height - 0.08) / 0.1)
    hole = torch.lerp(_ink(_CAVITY, x), _ink(_TONGUE, x), tongue[:, None])
    cover = lips + inside - lips * inside
    share = inside / cover.clamp(min=1e-3)
    return Paint(torch.lerp(_ink(_INK, x), hole, share[:, None]), cover[:, None])


def _ellipse(x: Tensor, y: Tensor, half_width: Tensor | float, half_height: Tensor | float) -> Tensor:
    """Signed distance to an ellipse, first-order: (|p/h| - 1) |p/h| / |p/h^2|, kept finite in the middle."""
    scaled_x, scaled_y = x / half_width, y / half_height
    norm = torch.sqrt(scaled_x * scaled_x + scaled_y * scaled_y).clamp_(min=1e-3)
    slope = torch.hypot(scaled_x / half_width, scaled_y / half_height)
    return (norm - 1.0) * norm / slope.clamp(min=1e-3)


def _ink(colour: tuple[float, float, float], like: Tensor) -> Tensor:
    """The colour as (1, 3, 1, 1)."""
    return like.new_tensor(colour).view(1, 3, 1, 1)
