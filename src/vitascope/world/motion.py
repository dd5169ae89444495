"""How subjects move: closed forms in seconds, so that every frame rate sees the same motion.

T frames. World units and axes as in `scene.py` (y down). Frame i shows the instant i / fps.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor, sqrt, tau

import torch
from torch import Tensor

from vitascope.core.shapes import ClipFormat
from vitascope.world.scene import Subject

GRAVITY = 11.4
"""World units a second squared: a bounce 0.8 high takes 0.75 s."""

BOTTOM: dict[str, float] = {"ball": 1.0, "box": 0.88, "triangle": 0.62, "star": 0.93, "ring": 1.0, "face": 1.0}
"""Distance from the centre of an upright subject down to its lowest point, in radii."""

DIRECTIONS: dict[str, tuple[float, float]] = {
    "moves left": (-1.0, 0.0),
    "moves right": (1.0, 0.0),
    "moves up": (0.0, -1.0),
    "moves down": (0.0, 1.0),
}

SQUASH = 0.16
SQUASH_S = 0.1
"""At contact a bouncing subject is lower by the share SQUASH; it gives way over SQUASH_S seconds on either side."""


@dataclass(frozen=True)
class SubjectPath:
    """The path of one subject through a clip.

    position (T, 2) and velocity (T, 2) of the centre in world units and world units a second, radius (T,) in world
    units, angle (T,) in radians (positive is clockwise as seen), stretch (T, 2) factors of width and height,
    impacts_s: the exact times in seconds, within the clip, at which the subject hits the ground.
    """

    position: Tensor
    velocity: Tensor
    radius: Tensor
    angle: Tensor
    stretch: Tensor
    impacts_s: list[float]


def frame_times(fmt: ClipFormat) -> Tensor:
    """Instants of the frames in seconds, float64 (T,)."""
    return torch.arange(fmt.num_frames, dtype=torch.float64) / fmt.fps


def bounces_per_s(subject: Subject) -> float:
    """Bounces a second: the subject's speed, or where that is 0 the pace of free fall from the height `travel`."""
    if subject.speed > 0:
        return subject.speed
    return 1.0 / (2.0 * sqrt(2.0 * max(subject.travel, 1e-3) / GRAVITY))


def ground_y(subject: Subject) -> float:
    """Height (y) of the ground that a bouncing subject lands on; for the others, of their lowest point at time 0."""
    lift = 4.0 * subject.travel * (subject.phase % 1.0) * (1.0 - subject.phase % 1.0)
    return subject.y + (lift if subject.motion == "bounces" else 0.0) + BOTTOM[subject.shape] * subject.radius


def impact_times(subject: Subject, duration_s: float) -> list[float]:
    """Times in [0, duration_s) at which the subject hits the ground: (k - phase) / rate."""
    if subject.motion != "bounces":
        return []
    rate, phase = bounces_per_s(subject), subject.phase % 1.0
    last = floor(duration_s * rate + phase - 1e-9)
    return [(k - phase) / rate for k in range(ceil(phase), last + 1)]


def trajectory(subject: Subject, fmt: ClipFormat) -> SubjectPath:
    """The subject's path, float32.

    - moves: p = p0 + speed * direction * t
    - bounces: y = y_contact - 4 travel u (1 - u), u = frac(rate * t + phase)
    - circles: p = p0 + travel * (e(phase + speed t) - e(phase)), e(a) = (cos 2 pi a, sin 2 pi a)
    - spins: angle = 2 pi (phase + speed t)
    - grows, shrinks: radius = r0 exp(+-speed t)
    """
    t = frame_times(fmt)
    position = torch.tensor([subject.x, subject.y], dtype=torch.float64).repeat(len(t), 1)
    velocity = torch.zeros_like(position)
    stretch = torch.ones_like(position)
    radius = torch.full_like(t, subject.radius)
    angle = torch.zeros_like(t)
    if subject.motion in DIRECTIONS:
        velocity += subject.speed * torch.tensor(DIRECTIONS[subject.motion], dtype=torch.float64)
        position += velocity * t[:, None]
    elif subject.motion == "bounces":
        _bounce(subject, t, position, velocity, stretch)
    elif subject.motion == "circles":
        a0, a = tau * subject.phase, tau * (subject.phase + subject.speed * t)
        start = torch.tensor([a0], dtype=torch.float64)
        position += subject.travel * torch.stack([a.cos() - start.cos(), a.sin() - start.sin()], 1)
        velocity += subject.travel * tau * subject.speed * torch.stack([-a.sin(), a.cos()], 1)
    elif subject.motion == "spins":
        angle = tau * (subject.phase + subject.speed * t)
    elif subject.motion in ("grows", "shrinks"):
        radius = radius * torch.exp((subject.speed if subject.motion == "grows" else -subject.speed) * t)
    return SubjectPath(
        position.float(),
        velocity.float(),
        radius.float(),
        angle.float(),
        stretch.float(),
        impact_times(subject, fmt.duration_s),
    )


def _bounce(subject: Subject, t: Tensor, position: Tensor, velocity: Tensor, stretch: Tensor) -> None:
    """Fill in the parabola and the squash around contact, which keeps the lowest point where it was."""
    rate, phase = bounces_per_s(subject), subject.phase % 1.0
    u = (rate * t + phase) % 1.0
    position[:, 1] += 4.0 * subject.travel * (phase * (1.0 - phase) - u * (1.0 - u))
    velocity[:, 1] = -4.0 * subject.travel * rate * (1.0 - 2.0 * u)
    from_contact_s = torch.minimum(u, 1.0 - u) / rate
    give = SQUASH * (1.0 - from_contact_s / SQUASH_S).clamp(min=0.0) ** 2
    stretch[:, 0] += 0.6 * give
    stretch[:, 1] -= give
    position[:, 1] += BOTTOM[subject.shape] * subject.radius * give
