"""What a clip shows, in the words of the grammar: all detectors put together, told nothing of what was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vitascope.core.errors import choice
from vitascope.evaluation.cameras import CameraModel, build_camera_model, measure_drift
from vitascope.evaluation.colours import ColourModel, build_colour_model
from vitascope.evaluation.footage import Floats, Footage
from vitascope.evaluation.motions import MotionEvidence, classify_motion
from vitascope.evaluation.outlines import NO_SHAPE, OutlineModel, build_outline_model, classify_shape
from vitascope.evaluation.prototypes import RADIUS, prototypes
from vitascope.evaluation.sounds import SoundModel, build_sound_model
from vitascope.evaluation.subjects import SubjectTrack, find_background, find_subjects
from vitascope.world.casting import FACE_SCALE
from vitascope.world.scene import FACE, SHAPES, SIZES, Subject

NOTHING = "none"


class Detectors:
    """The calibrated detectors, each built when it is first needed (up to seconds of work)."""

    @cached_property
    def colours(self) -> ColourModel:
        """Densities of colours of backgrounds and subjects."""
        return build_colour_model()

    @cached_property
    def outlines(self) -> OutlineModel:
        """The five outlines."""
        return build_outline_model()

    @cached_property
    def cameras(self) -> CameraModel:
        """What every camera move does to every drawn backdrop."""
        return build_camera_model()

    @cached_property
    def sounds(self) -> SoundModel:
        """Densities of the world's sounds."""
        return build_sound_model()

    @cached_property
    def fill(self) -> dict[str, float]:
        """Radius of the disc of equal area, in radii, of every shape."""
        shapes = (*SHAPES, FACE)
        painted = prototypes([Subject("white", shape) for shape in shapes])
        unit_px = RADIUS * len(painted[0].cover) / 2
        return {s: float(np.sqrt(p.cover.sum() / np.pi) / unit_px) for s, p in zip(shapes, painted, strict=True)}


@dataclass(frozen=True)
class SeenSubject:
    """One subject: its attributes ("none" where they are none of the grammar's), and the evidence."""

    colour: str
    shape: str
    size: str
    motion: str
    track: SubjectTrack
    evidence: MotionEvidence


@dataclass(frozen=True)
class Seen:
    """The background ("none" for a picture that has none of the eight) and the subjects, largest first."""

    background: str
    subjects: tuple[SeenSubject, ...]

    def value(self, attribute: str) -> str:
        """Background, or colour, shape, size or motion of the largest subject; "none" without one."""
        choice("attribute", attribute, ("background", "colour", "shape", "size", "motion"))
        if attribute == "background":
            return self.background
        return str(getattr(self.subjects[0], attribute)) if self.subjects else NOTHING


def look(footage: Footage, detectors: Detectors) -> Seen:
    """Background and subjects of a clip under a static camera."""
    pixels = footage.pixels
    background = find_background(pixels, detectors.colours)
    tracks = find_subjects(pixels, background, detectors.colours)
    return Seen(background, tuple(_subject(track, pixels, detectors) for track in tracks))


def _subject(track: SubjectTrack, pixels: Floats, detectors: Detectors) -> SeenSubject:
    shape, _ = classify_shape(track, pixels, detectors.outlines)
    evidence = classify_motion(track, pixels)
    return SeenSubject(track.colour, shape, _size(track, shape, detectors), evidence.motion, track, evidence)


def _size(track: SubjectTrack, shape: str, detectors: Detectors) -> str:
    """The size word nearest to the clip's median radius; subjects that grow or shrink have their own size halfway."""
    seen = track.whole if track.whole.any() else track.present
    if shape == NO_SHAPE or not seen.any():
        return NOTHING
    radius = float(np.median(track.radius[seen])) / detectors.fill[shape] / (FACE_SCALE if shape == FACE else 1.0)
    return min(SIZES, key=lambda name: abs(np.log(SIZES[name] / radius)))


def look_at_camera(footage: Footage, detectors: Detectors) -> str:
    """The camera move of a clip before a drawn backdrop; "none" before any other."""
    pixels = footage.pixels
    background = find_background(pixels, detectors.colours)
    tracks = find_subjects(pixels, background, detectors.colours)
    return detectors.cameras.classify(measure_drift(footage.frames.cpu(), tracks, footage.fps), background)
