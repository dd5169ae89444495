"""The prompts of an evaluation: named groups of sentences about combinations that training never sees.

Everything follows from one seed: the scene (which the model is not shown), the wording and the seed of the clip.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

from vitascope.core.errors import InputError, choice
from vitascope.core.random import derive_seed
from vitascope.core.shapes import ClipFormat
from vitascope.world.captions import write_caption
from vitascope.world.casting import SceneMix, draw_scene, is_held_out, place
from vitascope.world.scene import (
    CAMERAS,
    COLOURS,
    DRAWN_BACKGROUNDS,
    MOTIONS,
    PLAIN_BACKGROUNDS,
    SHAPES,
    Scene,
    Subject,
)

DIVERSITY_SEEDS = 4
"""Clips of one prompt in the group "diversity"."""
SOUND_KINDS = ("quiet", "wind", "rain", "soft music", "silence", "thuds", "speech")
_LONG_WAYS = ("moves left", "moves right", "moves up", "moves down", "circles")
_TRIES = 20_000


@dataclass(frozen=True)
class Case:
    """One clip to be judged: its group and number there, the prompt and the seed it is made from, and the scene that
    the prompt describes, as the world would place it."""

    group: str
    number: int
    prompt: str
    seed: int
    scene: Scene


@dataclass(frozen=True)
class Group:
    """How many clips a group has by default, and the scenes of it: from (count, seed, format).

    sound: it cannot be judged without sound. frames: some frames are given, and others are to be made.
    """

    num_prompts: int
    scenes: Callable[[int, int, ClipFormat], list[Scene]]
    sound: bool = False
    frames: bool = False


def cases_of(group: str, num_prompts: int | None, seed: int, fmt: ClipFormat) -> list[Case]:
    """The cases of a group, `num_prompts` of them (None: as many as usual). Raises InputError for an unknown group.

    The same group, number, seed and format give the same cases; a longer list begins with the shorter one, except in
    "single", which is balanced as a whole.
    """
    entry = GROUPS[choice("group", group, GROUPS)]
    count = entry.num_prompts if num_prompts is None else num_prompts
    if count < 1:
        raise InputError(f"a group needs at least one prompt, got {count}")
    scenes = entry.scenes(count, derive_seed(seed, "evaluation", group), fmt)
    return [_case(group, number, scene, seed) for number, scene in enumerate(scenes)]


def _case(group: str, number: int, scene: Scene, seed: int) -> Case:
    """In "diversity" the clips of one prompt share its words, not their seeds."""
    words = number // DIVERSITY_SEEDS if group == "diversity" else number
    prompt = write_caption(scene, derive_seed(seed, "evaluation wording", group, words))
    return Case(group, number, prompt, derive_seed(seed, "evaluation clip", group, number) % 2**31, scene)


def balanced_scenes(count: int, seed: int, fmt: ClipFormat) -> list[Scene]:
    """One subject before a plain background: held-out combinations in which every colour, shape, motion and background
    comes as often as the others, as nearly as the held-out set allows."""
    rng = random.Random(seed)
    every = [
        Scene((Subject(c, s, motion=m),), b) for c, s, m, b in product(COLOURS, SHAPES, MOTIONS, PLAIN_BACKGROUNDS)
    ]
    pool = [scene for scene in every if is_held_out(scene)]
    rng.shuffle(pool)
    uses: Counter[str] = Counter()
    chosen: list[Scene] = []
    left: list[Scene] = []
    for number in range(count):
        left = left or list(pool)
        best = min(left, key=lambda scene: sum(uses[word] * weight for word, weight in _words(scene)))
        left.remove(best)
        uses.update(word for word, _ in _words(best))
        size = rng.choices(("small", "medium", "large"), (1, 2, 1))[0]
        scene = replace(best, subjects=(replace(best.subjects[0], size=size),))
        chosen.append(place(scene, derive_seed(seed, number), fmt))
    return chosen


def _words(scene: Scene) -> list[tuple[str, int]]:
    """Attributes with how many values each can have: a repeat of a rare one weighs more."""
    subject = scene.subjects[0]
    return [
        (subject.colour, len(COLOURS)),
        (subject.shape, len(SHAPES)),
        (subject.motion, len(MOTIONS)),
        (scene.background, len(PLAIN_BACKGROUNDS)),
    ]


def _mix(**shares: float) -> SceneMix:
    """A mix of single shapes before plain backgrounds, static and without ambience, but for `shares`."""
    none = dict.fromkeys(("two_subjects", "face", "camera", "drawn_background", "camera_on_drawn"), 0.0)
    none |= dict.fromkeys(("wind", "rain", "soft_music", "silence"), 0.0)
    return SceneMix(**(none | shares))


def _drawn(mix: SceneMix, seed: int, fmt: ClipFormat, fits: Callable[[Scene], bool] = lambda scene: True) -> Scene:
    """The first held-out scene of the mix that fits."""
    for attempt in range(_TRIES):
        scene = draw_scene(derive_seed(seed, attempt), mix=mix, split="held_out", fmt=fmt)
        if fits(scene):
            return scene
    raise InputError(f"no held-out scene of {mix} fits")


def pair_scenes(count: int, seed: int, fmt: ClipFormat) -> list[Scene]:
    """Two subjects before a plain background."""
    return [_drawn(_mix(two_subjects=1.0), derive_seed(seed, i), fmt) for i in range(count)]


def camera_scenes(count: int, seed: int, fmt: ClipFormat) -> list[Scene]:
    """One subject before a drawn background; every camera move in turn, each with every background in turn."""
    scenes = []
    for number in range(count):
        turn, move = divmod(number, len(CAMERAS))
        camera, background = CAMERAS[move], DRAWN_BACKGROUNDS[(move + turn) % len(DRAWN_BACKGROUNDS)]
        mix = _mix(camera=float(camera != "static"), camera_on_drawn=1.0, drawn_background=1.0)
        wanted = (camera, background)
        scenes.append(_drawn(mix, derive_seed(seed, number), fmt, lambda s, w=wanted: (s.camera, s.background) == w))
    return scenes


def sound_scenes(count: int, seed: int, fmt: ClipFormat) -> list[Scene]:
    """Every kind of sound in turn: none, the four ambiences ("silence" with bounces that must not be heard), thuds, and
    a face that speaks."""
    scenes = []
    for number in range(count):
        kind = SOUND_KINDS[number % len(SOUND_KINDS)]
        bounces = float(kind in ("thuds", "silence"))
        scene = _drawn(_mix(face=float(kind == "speech"), bounces=bounces), derive_seed(seed, number), fmt)
        scenes.append(replace(scene, ambience=None if kind in ("quiet", "thuds", "speech") else kind))
    return scenes


def bounce_scenes(count: int, seed: int, fmt: ClipFormat) -> list[Scene]:
    """One bouncing subject before a plain background."""
    return [_drawn(_mix(bounces=1.0), derive_seed(seed, i), fmt) for i in range(count)]


def keyframe_scenes(count: int, seed: int, fmt: ClipFormat) -> list[Scene]:
    """One subject that gets from one place to another, before a plain background."""

    def goes(scene: Scene) -> bool:
        return scene.subjects[0].motion in _LONG_WAYS

    return [_drawn(_mix(), derive_seed(seed, i), fmt, goes) for i in range(count)]


def diversity_scenes(count: int, seed: int, fmt: ClipFormat) -> list[Scene]:
    """Four placings of every combination, one after another."""
    first = [_drawn(_mix(), derive_seed(seed, i), fmt) for i in range(-(-count // DIVERSITY_SEEDS))]
    return [place(first[i // DIVERSITY_SEEDS], derive_seed(seed, "place", i), fmt) for i in range(count)]


def codec_scenes(count: int, seed: int, fmt: ClipFormat) -> list[Scene]:
    """The mix of training, held out."""
    return [draw_scene(derive_seed(seed, i), split="held_out", fmt=fmt) for i in range(count)]


GROUPS: dict[str, Group] = {
    "single": Group(100, balanced_scenes),
    "pairs": Group(60, pair_scenes),
    "camera": Group(66, camera_scenes),
    "sounds": Group(70, sound_scenes, sound=True),
    "bounces": Group(40, bounce_scenes, sound=True),
    "audio_to_video": Group(40, bounce_scenes, sound=True),
    "video_to_audio": Group(40, bounce_scenes, sound=True),
    "keyframes": Group(30, keyframe_scenes, frames=True),
    "diversity": Group(6 * DIVERSITY_SEEDS, diversity_scenes),
    "codec": Group(40, codec_scenes),
}


def all_cases(groups: Sequence[str], num_prompts: int | None, seed: int, fmt: ClipFormat) -> dict[str, list[Case]]:
    """The cases of several groups by name; of all groups where none is named."""
    return {name: cases_of(name, num_prompts, seed, fmt) for name in (groups or tuple(GROUPS))}
