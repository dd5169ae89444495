"""Which motion a subject makes, from its path, its size and its picture over time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vitascope.evaluation.footage import Floats
from vitascope.evaluation.outlines import turning
from vitascope.evaluation.subjects import SubjectTrack

GROWTH_ABOVE = 0.13
"""Change of the logarithm of the radius over the clip that counts as growing or shrinking."""
PATH_ABOVE = 0.10
"""Reach of the path, in half frame heights, that counts as going somewhere."""
TURNING_ABOVE = 5.0
"""Change of the subject's picture, in levels, that counts as spinning."""
STRAIGHT_BELOW = 0.07
"""Deviation from uniform straight motion, as a share of the way, that still counts as straight."""
UPRIGHT_BELOW = 0.4
"""Sideways reach over vertical reach of a path that goes up and down."""


@dataclass(frozen=True)
class MotionEvidence:
    """The motion and what it was told by.

    growth: change of log radius over the clip; reach_x, reach_y: extent of the path and way_x, way_y: its fitted
    uniform displacement, in half frame heights; bend: deviation from it as a share of its reach; turning: see
    `turning`.
    """

    motion: str
    growth: float
    reach_x: float
    reach_y: float
    way_x: float
    way_y: float
    bend: float
    turning: float


def classify_motion(track: SubjectTrack, pixels: Floats) -> MotionEvidence:
    """The motion of a subject before a static camera in pixels (T, H, W, 3).

    In this order: its radius changes (grows, shrinks); it stays where it is (spins, or stays still); it goes straight
    at a uniform speed (moves); its path is upright (bounces); else it circles.
    """
    time = np.arange(len(track.present)) / max(1, len(track.present) - 1)
    seen = track.present
    used = track.whole if track.whole.sum() >= max(4, 0.4 * seen.sum()) else seen
    if used.sum() < 3:
        return MotionEvidence("stays still", 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    growth = _slope(time[used], np.log(np.maximum(track.radius[used], 1e-3)))
    place = track.centre[used].astype(np.float64)
    reach = np.percentile(place, 97, axis=0) - np.percentile(place, 3, axis=0)
    way = np.array([_slope(time[used], place[:, axis]) for axis in range(2)])
    straight = place.mean(0) + (time[used] - time[used].mean())[:, None] * way
    bend = float(np.sqrt(((place - straight) ** 2).sum(1).mean()) / max(float(np.hypot(*reach)), 1e-6))
    turn = turning(track, pixels)
    near = max(PATH_ABOVE, 0.4 * float(np.median(track.radius[used])) if turn > TURNING_ABOVE else 0.0)
    name = _decide(growth, reach, way, bend, turn, near)
    return MotionEvidence(name, growth, float(reach[0]), float(reach[1]), float(way[0]), float(way[1]), bend, turn)


def _decide(growth: float, reach: np.ndarray, way: np.ndarray, bend: float, turn: float, near: float) -> str:
    far = float(reach.max())
    if abs(growth) > GROWTH_ABOVE and far < 0.35:
        return "grows" if growth > 0 else "shrinks"
    if far < near:
        return "spins" if turn > TURNING_ABOVE else "stays still"
    if bend < STRAIGHT_BELOW:
        if abs(way[0]) >= abs(way[1]):
            return "moves right" if way[0] > 0 else "moves left"
        return "moves down" if way[1] > 0 else "moves up"
    return "bounces" if reach[0] < UPRIGHT_BELOW * reach[1] else "circles"


def _slope(time: np.ndarray, value: np.ndarray) -> float:
    """Least-squares slope."""
    centred = time - time.mean()
    return float(centred @ (value - value.mean()) / max(float(centred @ centred), 1e-9))
