"""What a scene of the theatre holds: the vocabulary of the grammar and the description of one clip.

Coordinates: x to the right, y down, z away from the camera, in units of half the frame height as seen on the stage
plane (z = 0), where the subjects are. The frame is y in [-1, 1], x in [-aspect, aspect]. Times are in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vitascope.core.errors import choice

RGB = tuple[int, int, int]

COLOURS: dict[str, RGB] = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (240, 220, 50),
    "green": (40, 190, 70),
    "cyan": (60, 200, 220),
    "blue": (50, 80, 230),
    "purple": (160, 60, 200),
    "pink": (250, 140, 190),
    "white": (240, 240, 240),
}
SHAPES = ("ball", "box", "triangle", "star", "ring")
FACE = "face"
SIZES: dict[str, float] = {"small": 0.20, "medium": 0.30, "large": 0.42}
"""Radius of the subject in world units; "medium" is what a caption without a size word means."""

MOTIONS = (
    "moves left",
    "moves right",
    "moves up",
    "moves down",
    "bounces",
    "circles",
    "spins",
    "grows",
    "shrinks",
    "stays still",
)
PLAIN_BACKGROUNDS: dict[str, RGB] = {
    "black": (10, 10, 10),
    "gray": (110, 110, 115),
    "navy": (15, 20, 70),
    "brown": (90, 55, 30),
}
DRAWN_BACKGROUNDS = ("starry sky", "checkered floor", "green hills", "brick wall")
BACKGROUNDS = (*PLAIN_BACKGROUNDS, *DRAWN_BACKGROUNDS)
CAMERAS = (
    "static",
    "pans left",
    "pans right",
    "pans up",
    "pans down",
    "zooms in",
    "zooms out",
    "orbits left",
    "orbits right",
    "dollies forward",
    "dollies backward",
)
AMBIENCES = ("wind", "rain", "soft music", "silence")
VISEMES: dict[str, tuple[str, ...]] = {
    "closed": ("m", "b", "p"),
    "wide": ("ee",),
    "open": ("a",),
    "round": ("o", "oo"),
    "mid": ("eh",),
}
CONSONANTS = ("m", "b", "p", "")
VOWELS = ("a", "o", "ee", "oo", "eh")
SYLLABLES = tuple(consonant + vowel for consonant in CONSONANTS for vowel in VOWELS)
"""What a face can say; "" + vowel is a bare vowel."""

SubjectKind = Literal["shape", "face"]


@dataclass(frozen=True)
class Subject:
    """One thing on the stage.

    `x`, `y` position of the centre at time 0 and `radius` in world units (grows, shrinks: radius at time 0). What
    `speed`, `travel` and `phase` mean depends on the motion (`motion.trajectory` has the formulas):

    - moves: `speed` in world units a second.
    - bounces: `travel` is the height of the bounce, `speed` the bounces a second (0: free fall under
      `motion.GRAVITY`), `phase` the fraction of a bounce already over at time 0 (0 leaving the ground, 0.5 the top). As
      (x, y) is where the centre is at time 0, the ground follows from these: `motion.ground_y`.
    - circles: `travel` is the radius of the circle, `speed` turns a second (positive is clockwise as seen), `phase` the
      place on the circle at time 0 in turns (0 right, 0.25 bottom), from which its centre follows.
    - spins: `speed` turns a second (positive is clockwise as seen), `phase` the turn at time 0.
    - grows, shrinks: the radius is multiplied, or divided, by exp(`speed`) every second.
    """

    colour: str
    shape: str
    size: str = "medium"
    motion: str = "stays still"
    syllables: tuple[str, ...] = ()
    x: float = 0.0
    y: float = 0.0
    radius: float = SIZES["medium"]
    speed: float = 0.0
    travel: float = 0.0
    phase: float = 0.0

    def __post_init__(self) -> None:
        choice("colour", self.colour, COLOURS)
        choice("shape", self.shape, (*SHAPES, FACE))
        choice("size", self.size, SIZES)
        choice("motion", self.motion, MOTIONS)
        for syllable in self.syllables:
            choice("syllable", syllable, SYLLABLES)


@dataclass(frozen=True)
class Scene:
    """One clip: one or two subjects, a background, a camera move and the sound around them.

    `ambience` None means the sound of the scene alone (thuds of impacts, speech); "silence" removes those too.
    `camera_speed` scales the move (1 is the grammar's usual pace). `seed` fixes textures and noises.
    """

    subjects: tuple[Subject, ...]
    background: str = "gray"
    camera: str = "static"
    camera_speed: float = 1.0
    ambience: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        choice("background", self.background, BACKGROUNDS)
        choice("camera", self.camera, CAMERAS)
        if self.ambience is not None:
            choice("ambience", self.ambience, AMBIENCES)
