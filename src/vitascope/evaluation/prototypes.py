"""Pictures of single subjects as the world paints them, for detectors to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vitascope.core.shapes import ClipFormat
from vitascope.evaluation.footage import Floats
from vitascope.world.render import render
from vitascope.world.scene import PLAIN_BACKGROUNDS, Scene, Subject

RADIUS = 0.6
"""Half frame heights, so that the tips of every shape stay in the frame."""
_BEHIND = ("black", "gray")


@dataclass(frozen=True)
class Prototype:
    """A still subject of radius 0.6 in the middle of a square frame: rgb (H, W, 3) in [0, 255], valid where the cover
    (H, W) in [0, 1] is high."""

    rgb: Floats
    cover: Floats


def prototypes(subjects: Sequence[Subject], size_px: int = 96) -> list[Prototype]:
    """Prototypes of the subjects, each rendered before two plain backgrounds: what shines through tells the cover.

    A subject that "spins" carries its mark; whatever its motion, it is shown at rest.
    """
    placed = [
        replace(
            s,
            motion=s.motion if s.motion == "spins" else "stays still",
            x=0.0,
            y=0.0,
            radius=RADIUS,
            speed=0.0,
            travel=0.0,
            phase=0.0,
        )
        for s in subjects
    ]
    fmt = ClipFormat(size_px, size_px, num_frames=1)
    scenes = [Scene((subject,), name) for subject in placed for name in _BEHIND]
    frames = render(scenes, fmt)[:, 0].permute(0, 2, 3, 1).float().numpy()
    first, second = (np.asarray(PLAIN_BACKGROUNDS[name], np.float32) for name in _BEHIND)
    found = []
    for dark, light in zip(frames[::2], frames[1::2], strict=True):
        through = ((light - dark) / (second - first)).mean(-1)
        found.append(Prototype(dark, (1 - through).clip(0, 1).astype(np.float32)))
    return found
