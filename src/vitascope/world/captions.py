"""English for scenes, and scenes from English.

The core grammar (each part after the subjects may be left out):

    SUBJECT MOTION [and SUBJECT MOTION] BACKGROUND, the camera MOVES, SOUND
    SUBJECT = a [small|large] COLOUR SHAPE,  or  a COLOUR face says "ma o ee"
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache

from vitascope.core.errors import PromptError
from vitascope.core.random import derive_seed
from vitascope.world import grammar
from vitascope.world.scene import COLOURS, FACE, SIZES, SYLLABLES, Scene, Subject

CORE_SHARE = 0.5
"""Share of captions in the core form."""
MOST_SUBJECTS = 2


def core_caption(scene: Scene) -> str:
    """The scene in the plain grammar, every part in its usual place; what is default (camera, sound) goes unsaid."""
    parts = [f"{' and '.join(map(_core_clause, scene.subjects))} {grammar.BACKGROUND_PHRASES[scene.background][0]}"]
    if scene.camera != "static":
        parts.append(grammar.CAMERA_PHRASES[scene.camera][0])
    if scene.ambience:
        parts.append(grammar.SOUND_PHRASES[scene.ambience][0])
    return ", ".join(parts)


def _core_clause(subject: Subject) -> str:
    size = f"{subject.size} " if subject.size != "medium" else ""
    return f"{_article(size + subject.colour)} {_says(subject, grammar.SPEAKING[0])}{subject.motion}".removesuffix(" and ")


def _article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _says(subject: Subject, verb: str) -> str:
    """Shape and speech; the motion that follows is left to the caller, unless it goes without saying."""
    return f'{subject.shape} {verb} "{" ".join(subject.syllables)}" and ' if subject.syllables else f"{subject.shape} "
