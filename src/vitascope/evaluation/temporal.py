"""Measures over time and over seeds, each with its exact definition. They are this project's own; the names say so."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from torch import Tensor

from vitascope.core.errors import ShapeError
from vitascope.evaluation.footage import Floats, Mask

MOVES_ABOVE = 0.10
"""Novelty above which the frames between two keyframes count as motion; a dissolve with coding noise stays below."""


def background_flicker(frames: Tensor, foreground: Mask | None = None) -> float:
    """Frame-to-frame noise of what should be still, in levels of [0, 255].

    Root mean square of the second difference over time, x[t-1] - 2 x[t] + x[t+1], divided by sqrt(6), over the pixels
    that `foreground` (T, H, W) leaves free in all three frames: white noise of deviation s gives s, a linear change 0.
    """
    if len(frames) < 3:
        raise ShapeError(f"flicker needs 3 frames or more, got {len(frames)}")
    values = frames.detach().cpu().float().numpy()
    bend = (values[:-2] - 2 * values[1:-1] + values[2:]) / np.sqrt(6)
    power = (bend**2).mean(1)
    if foreground is None:
        return float(np.sqrt(power.mean()))
    free = ~(foreground[:-2] | foreground[1:-1] | foreground[2:])
    return float(np.sqrt(power[free].mean())) if free.any() else float("nan")


@dataclass(frozen=True)
class Between:
    """What happens between two keyframes: novelty of each frame, and its largest value.

    `novelty` near 0 means that each frame is a blend of the two keyframes (a dissolve, a hold or a cut); a shape that
    crosses to a place apart from both gives 0.75.
    """

    novelty: tuple[float, ...]

    @property
    def peak(self) -> float:
        """The largest novelty."""
        return max(self.novelty)

    @property
    def moves(self) -> bool:
        """Whether there is motion rather than a dissolve."""
        return self.peak > MOVES_ABOVE


def novelty_between(frames: Tensor, first: int, last: int) -> Between:
    """Novelty of the frames strictly between the keyframes `first` and `last` of frames (T, 3, H, W).

    For frame f and keyframes a, b: min over w of |f - (1 - w) a - w b|^2 / |b - a|^2, with w in [0, 1].
    """
    if not 0 <= first < last - 1 < len(frames) - 1:
        raise ShapeError(f"keyframes {first} and {last} leave no frame between them in {len(frames)} frames")
    flat = frames[first : last + 1].detach().cpu().double().flatten(1).numpy()
    start, change = flat[0], flat[-1] - flat[0]
    energy = float(change @ change)
    if energy <= 0:
        raise ShapeError("the two keyframes are the same picture: a dissolve cannot be told from motion")
    moved = flat[1:-1] - start
    weight = np.clip(moved @ change / energy, 0, 1)
    left = ((moved - weight[:, None] * change) ** 2).sum(1)
    return Between(tuple(float(value) for value in left / energy))


@dataclass(frozen=True)
class Steadiness:
    """How well one subject stays itself: all 0 (drifts) or 1 (share) in a perfect clip.

    `colour_drift`: largest RGB distance of a frame's subject colour from the clip's median colour, in levels.
    `path_jerk_px`: root mean square third difference of the centre's path. `present`: share of frames with a subject.
    """

    present: float
    colour_drift: float
    path_jerk_px: float


def steadiness(colours: Floats, centres: Floats, present: Mask) -> Steadiness:
    """Steadiness from per-frame subject colour (T, 3), centre (T, 2) in px and presence (T,)."""
    share = float(present.mean()) if len(present) else 0.0
    if present.sum() < 4:
        return Steadiness(share, float("nan"), float("nan"))
    seen = colours[present]
    drift = float(np.linalg.norm(seen - np.median(seen, axis=0), axis=1).max())
    jerk = np.diff(centres[present], n=3, axis=0)
    return Steadiness(share, drift, float(np.sqrt((jerk**2).sum(1).mean())))


def seed_diversity(clips: list[Tensor]) -> float:
    """Mean over pairs of clips of one prompt of the root mean square pixel difference, in levels of [0, 255].

    0 when every seed gives the same clip. To be read against the same figure of the world's own renders.
    """
    if len(clips) < 2:
        raise ShapeError(f"diversity needs 2 clips or more, got {len(clips)}")
    values = [clip.detach().cpu().float() for clip in clips]
    return float(np.mean([(a - b).square().mean().sqrt().item() for a, b in combinations(values, 2)]))
