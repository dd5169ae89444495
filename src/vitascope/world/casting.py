"""Casting: random scenes for training and for testing, and places for the subjects of a scene that a caption named.

What a caption does not say (where things are, how fast) varies little around canonical values, so that a small model
learns it soon. Everything follows from seeds alone.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, fields, replace
from math import cos, exp, sin, tau
from typing import Literal

from vitascope.core.errors import InputError, choice
from vitascope.core.random import derive_seed
from vitascope.core.shapes import ClipFormat
from vitascope.world.motion import BOTTOM, DIRECTIONS, GRAVITY
from vitascope.world.scene import (
    CAMERAS,
    COLOURS,
    DRAWN_BACKGROUNDS,
    FACE,
    MOTIONS,
    PLAIN_BACKGROUNDS,
    SHAPES,
    SIZES,
    SYLLABLES,
    Scene,
    Subject,
)

HELD_OUT_ONE_IN = 10
FACE_SCALE = 1.5
"""A face alone is larger than a shape of the same size word, so that its mouth can be seen."""


@dataclass(frozen=True)
class SceneMix:
    """How often things are drawn, as probabilities.

    two_subjects and face exclude each other. `camera`: the camera moves; `drawn_background`: of all scenes, while
    `camera_on_drawn` is the share of moving cameras that have one (over a plain one a pan can hardly be seen).
    """

    two_subjects: float = 0.25
    face: float = 0.12
    camera: float = 0.35
    drawn_background: float = 0.45
    camera_on_drawn: float = 0.85
    wind: float = 0.15
    rain: float = 0.15
    soft_music: float = 0.15
    silence: float = 0.15
    small: float = 0.25
    large: float = 0.25
    bounces: float = 0.18

    def __post_init__(self) -> None:
        for entry in fields(self):
            if not 0.0 <= getattr(self, entry.name) <= 1.0:
                raise InputError(f"{entry.name} must be in [0, 1], got {getattr(self, entry.name)}")
        for names in (("two_subjects", "face"), ("wind", "rain", "soft_music", "silence"), ("small", "large")):
            if sum(getattr(self, name) for name in names) > 1.0 + 1e-9:
                raise InputError(f"{' + '.join(names)} must not exceed 1")


DEFAULT_MIX = SceneMix()
POCKET_FORMAT = ClipFormat()
Split = Literal["train", "held_out"]


def draw_scene(
    seed: int, *, mix: SceneMix = DEFAULT_MIX, split: Split = "train", fmt: ClipFormat = POCKET_FORMAT
) -> Scene:
    """A random scene of the split, placed for clips of `fmt`. The same seed gives the same scene everywhere.

    Raises InputError for an unknown split.
    """
    wanted = choice("split", split, ("train", "held_out")) == "held_out"
    rng = random.Random(derive_seed(seed, "cast"))
    scene = _cast(rng, mix)
    while is_held_out(scene) != wanted:
        scene = _cast(rng, mix)
    return place(scene, seed, fmt)


def is_held_out(scene: Scene) -> bool:
    """Whether training never sees this combination: of colour, shape and motion of each subject, in any order, with
    the background. One combination in ten is held out, by a hash that is the same everywhere."""
    cast = sorted(f"{subject.colour} {subject.shape} {subject.motion}" for subject in scene.subjects)
    return derive_seed(0, "held out", *cast, scene.background) % HELD_OUT_ONE_IN == 0


# Who and what


def _cast(rng: random.Random, mix: SceneMix) -> Scene:
    """Subjects, background, camera and sound, not yet placed."""
    moving = rng.random() < mix.camera
    camera = rng.choice(CAMERAS[1:]) if moving else CAMERAS[0]
    still_share = max(0.0, mix.drawn_background - mix.camera * mix.camera_on_drawn) / max(1e-9, 1.0 - mix.camera)
    drawn = rng.random() < (mix.camera_on_drawn if moving else min(1.0, still_share))
    background = rng.choice(DRAWN_BACKGROUNDS if drawn else tuple(PLAIN_BACKGROUNDS))
    kind = rng.random()
    speaks = mix.two_subjects <= kind < mix.two_subjects + mix.face
    if speaks:
        subjects = (_cast_face(rng, mix),)
    elif kind < mix.two_subjects:
        subjects = (_cast_shape(rng, mix, camera), _cast_shape(rng, mix, camera))
        while (subjects[0].colour, subjects[0].shape) == (subjects[1].colour, subjects[1].shape):
            subjects = (subjects[0], _cast_shape(rng, mix, camera))
    else:
        subjects = (_cast_shape(rng, mix, camera),)
    return Scene(subjects, background, camera, ambience=_cast_ambience(rng, mix, speaks))


def _cast_ambience(rng: random.Random, mix: SceneMix, speaks: bool) -> str | None:
    """A speaking face is not cast into silence: its speech would not be heard."""
    shares = {"wind": mix.wind, "rain": mix.rain, "soft music": mix.soft_music, "silence": mix.silence}
    point = rng.random()
    for ambience, share in shares.items():
        if point < share:
            return None if speaks and ambience == "silence" else ambience
        point -= share
    return None


def _cast_size(rng: random.Random, mix: SceneMix) -> str:
    return rng.choices(("small", "large", "medium"), (mix.small, mix.large, 1.0 - mix.small - mix.large))[0]


def _cast_face(rng: random.Random, mix: SceneMix) -> Subject:
    syllables = tuple(rng.choice(SYLLABLES) for _ in range(rng.choice((2, 3, 3, 4, 4, 5))))
    return Subject(rng.choice(tuple(COLOURS)), FACE, _cast_size(rng, mix), syllables=syllables)


def _cast_shape(rng: random.Random, mix: SceneMix, camera: str) -> Subject:
    motion = rng.choices(MOTIONS, _motion_weights(mix.bounces, camera))[0]
    return Subject(rng.choice(tuple(COLOURS)), rng.choice(SHAPES), _cast_size(rng, mix), motion)


def _motion_weights(bounces: float, camera: str) -> list[float]:
    """How often each of MOTIONS is cast. Under a moving camera mostly motions that cannot be taken for the camera's:
    those along its way are rare, and so are growing and shrinking while it zooms or dollies."""
    if camera == "static":
        others = (1.0 - bounces) / (len(MOTIONS) - 1)
        return [bounces if motion == "bounces" else others for motion in MOTIONS]
    weights = dict.fromkeys(DIRECTIONS, 0.4) | {"bounces": 1.2 * bounces / 0.18, "circles": 0.8}
    weights |= {"spins": 2.0, "grows": 0.8, "shrinks": 0.8, "stays still": 2.8}
    verb, _, way = camera.partition(" ")
    if verb in ("zooms", "dollies"):
        weights |= {"grows": 0.2, "shrinks": 0.2}
    else:
        along = ("moves left", "moves right") if way in ("left", "right") else ("moves up", "moves down")
        weights |= dict.fromkeys(along, 0.1)
    return [weights[motion] for motion in MOTIONS]


# Where and how fast

_GROUND_Y = 0.8
_BOUNCE_PERIOD_S = (0.64, 0.82)
_FARTHEST_TRAVEL = 0.95
"""World units that a subject moves in a clip, so that long clips keep it in the frame."""
_MOST_GROWTH = 0.9


@dataclass(frozen=True)
class _Spot:
    """The part of the stage that a subject has for itself: the middle of its path, the random shift of that middle,
    speed of moves, radius of circles and growth a second. `ground_y` is where bounces land."""

    x: float
    y: float
    spread: float
    speed: float
    circle: float
    growth: float
    ground_y: float


def place(scene: Scene, seed: int, fmt: ClipFormat) -> Scene:
    """The scene with positions, radii, speeds and phases for clips of `fmt`; `seed` also fixes textures and noises.

    A subject alone is near the middle of the stage and moves through it; of two, the one named first has the left half.
    Moves cover at most about a frame, however long the clip.
    """
    rng = random.Random(derive_seed(seed, "place"))
    aspect = fmt.width_px / fmt.height_px
    fit = min(1.0, aspect)
    radii = [_radius(subject, len(scene.subjects), rng) for subject in scene.subjects]
    spots = _spots(scene, radii, rng)
    placed = tuple(
        _place_subject(replace(subject, radius=radius), spot, fmt.duration_s, rng)
        for subject, radius, spot in zip(scene.subjects, radii, spots, strict=True)
    )
    return replace(
        scene,
        subjects=tuple(_fitted(subject, fit) for subject in placed),
        camera_speed=_about(1.0, 0.1, rng),
        seed=derive_seed(seed, "scene"),
    )


def _about(value: float, share: float, rng: random.Random) -> float:
    return value * rng.uniform(1.0 - share, 1.0 + share)


def _radius(subject: Subject, num_subjects: int, rng: random.Random) -> float:
    scale = FACE_SCALE if subject.shape == FACE and num_subjects == 1 else 1.0
    return _about(SIZES[subject.size] * scale, 0.08, rng)


def _spots(scene: Scene, radii: list[float], rng: random.Random) -> list[_Spot]:
    ground_y = _GROUND_Y + rng.uniform(-0.03, 0.03)
    panning = scene.camera.startswith("pans")
    if len(scene.subjects) == 1:
        return [_Spot(0.0, 0.0, 0.08 if panning else 0.2, 0.45, 0.4, 0.42, ground_y)]
    half = max(0.40 if panning else 0.48, sum(radii) / 2 + 0.06)
    first, second = scene.subjects
    meeting = first.motion == "moves right" or second.motion == "moves left"
    lift = rng.choice((-0.24, 0.24)) if meeting else 0.0
    return [_Spot(side * half, side * lift, 0.05, 0.25, 0.18, 0.28, ground_y) for side in (-1.0, 1.0)]


def _place_subject(subject: Subject, spot: _Spot, duration_s: float, rng: random.Random) -> Subject:
    """Fill in what the motion needs, so that the middle of the path is at the spot halfway through the clip."""
    middle_x, middle_y = (
        spot.x + rng.uniform(-spot.spread, spot.spread),
        spot.y + rng.uniform(-spot.spread, spot.spread),
    )
    motion = subject.motion
    if motion in DIRECTIONS:
        speed = min(_about(spot.speed, 0.15, rng), _FARTHEST_TRAVEL * spot.speed / 0.45 / duration_s * 1.15)
        ways = DIRECTIONS[motion]
        x, y = (middle - way * speed * duration_s / 2 for middle, way in zip((middle_x, middle_y), ways, strict=True))
        return replace(subject, x=x, y=y, speed=speed)
    if motion == "bounces":
        return _place_bounce(subject, middle_x, spot.ground_y, rng)
    if motion == "circles":
        phase = rng.random()
        travel = _about(spot.circle, 0.1, rng)
        x = (middle_x + spot.x) / 2 + travel * cos(tau * phase)
        y = (middle_y + spot.y) / 2 + travel * sin(tau * phase)
        return replace(subject, x=x, y=y, travel=travel, speed=_about(0.5, 0.1, rng), phase=phase)
    if motion == "spins":
        return replace(subject, x=middle_x, y=middle_y, speed=_about(0.5, 0.1, rng), phase=rng.uniform(-0.04, 0.04))
    if motion in ("grows", "shrinks"):
        speed = min(_about(spot.growth, 0.1, rng), _MOST_GROWTH / duration_s)
        back = -1.0 if motion == "grows" else 1.0
        return replace(
            subject, x=middle_x, y=middle_y, speed=speed, radius=subject.radius * exp(back * speed * duration_s / 2)
        )
    return replace(subject, x=middle_x, y=middle_y)


def _place_bounce(subject: Subject, x: float, ground_y: float, rng: random.Random) -> Subject:
    """Free fall from a height that keeps the subject in the frame: a bounce `travel` high takes sqrt(8 travel / g)."""
    period_s = rng.uniform(*_BOUNCE_PERIOD_S)
    contact_y = ground_y - BOTTOM[subject.shape] * subject.radius
    travel = min(GRAVITY * period_s**2 / 8, contact_y - subject.radius + 0.98)
    phase = rng.random()
    y = contact_y - 4.0 * travel * phase * (1.0 - phase)
    return replace(subject, x=x, y=y, travel=travel, speed=(GRAVITY / (8.0 * travel)) ** 0.5, phase=phase)


def _fitted(subject: Subject, fit: float) -> Subject:
    """The subject on a stage narrower than high: everything smaller by `fit`, speeds of moves with it."""
    if fit == 1.0:
        return subject
    moves = subject.motion in DIRECTIONS
    return replace(
        subject,
        x=subject.x * fit,
        y=subject.y * fit,
        radius=subject.radius * fit,
        travel=subject.travel * fit,
        speed=subject.speed * fit if moves else subject.speed,
    )
