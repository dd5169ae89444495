"""English for scenes, and scenes from English.

The core grammar (each part after the subjects may be left out):

    SUBJECT MOTION [and SUBJECT MOTION] BACKGROUND, the camera MOVES, SOUND
    SUBJECT = a [small|large] COLOUR SHAPE,  or  a COLOUR face says "ma o ee"
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

from vitascope.core.errors import PromptError
from vitascope.core.random import derive_seed
from vitascope.world import grammar
from vitascope.world.scene import COLOURS, FACE, SIZES, SYLLABLES, Scene, Subject

CORE_SHARE = 0.5
"""Share of captions in the core form."""
MAX_SUBJECTS = 2
DEFAULT_BACKGROUND = "gray"
DEFAULT_MOTION = "stays still"


def core_caption(scene: Scene) -> str:
    """The scene in the plain grammar, every part in its usual place; a static camera and no ambience go unsaid."""
    clauses = [_clause(_noun(subject), subject, subject.motion) for subject in scene.subjects]
    parts = [f"{' and '.join(clauses)} {grammar.BACKGROUND_PHRASES[scene.background][0]}"]
    if scene.camera != "static":
        parts.append(grammar.CAMERA_PHRASES[scene.camera][0])
    if scene.ambience:
        parts.append(grammar.SOUND_PHRASES[scene.ambience][0])
    return ", ".join(parts)


def _noun(subject: Subject) -> str:
    size = f"{subject.size} " if subject.size != "medium" else ""
    return _with_article(f"{size}{subject.colour} {subject.shape}")


def _with_article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _clause(noun: str, subject: Subject, motion: str, verb: str = grammar.SPEAKING[0]) -> str:
    """A noun and what it does; that a speaker stays still goes unsaid."""
    if not subject.syllables:
        return f"{noun} {motion}"
    speech = f'{noun} {verb} "{" ".join(subject.syllables)}"'
    return speech if subject.motion == DEFAULT_MOTION else f"{speech} and {motion}"


def write_caption(scene: Scene, seed: int) -> str:
    """A caption for the scene, one of many that `seed` chooses from: half of them in the core form, the others with
    other words, other orders, and with or without capital and full stop. `parse_caption` reads every one."""
    rng = random.Random(derive_seed(seed, "caption"))
    core = rng.random() < CORE_SHARE
    text = core_caption(scene) if core else _arrange(scene, rng)
    if rng.random() < 0.25:
        text = text.replace("an orange", "a orange")
    if core:
        return text
    if rng.random() < 0.15:
        text = text.replace("gray", grammar.GREY)
    if rng.random() < 0.3:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.3 else text


def _arrange(scene: Scene, rng: random.Random) -> str:
    """The parts of a paraphrase in one of their orders."""
    joint = rng.choice((" and ", " and ", ", and ", " while ", ", "))
    action = joint.join(_paraphrased_clause(subject, rng) for subject in scene.subjects)
    background = _choose(grammar.BACKGROUND_PHRASES[scene.background], rng)
    if scene.background == DEFAULT_BACKGROUND and rng.random() < 0.08:
        background = ""
    extras: list[str] = []
    if scene.camera != "static" or rng.random() < 0.1:
        camera = _choose(grammar.CAMERA_PHRASES[scene.camera], rng)
        extras.append(
            rng.choice((", ", ", ", " while ", " as ", " and ") if camera.startswith("the") else (", ",)) + camera
        )
    if scene.ambience:
        extras.append(rng.choice((", ", " ")) + _choose(grammar.SOUND_PHRASES[scene.ambience], rng))
    rng.shuffle(extras)
    place = rng.random()
    if background and place < 0.15:
        return "".join((background, ", ", action, *extras))
    action = f"{action} {background}".rstrip()
    if extras and place > 0.85:
        first = re.sub(r"^(,? (while|as|and) |, | )", "", extras.pop())
        link = rng.choice((" while ", " as ", ", ")) if first.startswith("the camera") else ", "
        return "".join((first, link, action, *extras))
    return "".join((action, *extras))


def _paraphrased_clause(subject: Subject, rng: random.Random) -> str:
    size = _choose(grammar.SIZE_WORDS[subject.size], rng)
    if subject.size == "medium" and rng.random() < 0.9:
        size = ""
    shape = _choose(grammar.SHAPE_WORDS[subject.shape], rng)
    turned = rng.random() < 0.12
    words = [size, shape, rng.choice(grammar.NOUN_LINKS), subject.colour] if turned else [size, subject.colour, shape]
    noun = " ".join(word for word in words if word)
    if rng.random() > 0.1:
        noun = _with_article(noun)
    motion = _choose(grammar.MOTION_PHRASES[subject.motion], rng)
    return _clause(noun, subject, motion, _choose(grammar.SPEAKING, rng))


def _choose(forms: tuple[str, ...], rng: random.Random) -> str:
    """The core form two times in five, else any form."""
    return forms[0] if rng.random() < 0.4 else rng.choice(forms)


# Reading


@dataclass
class _Heard:
    """What has been understood so far."""

    subjects: list[dict[str, object]] = field(default_factory=list)
    parts: dict[str, str] = field(default_factory=dict)


@cache
def _meanings() -> dict[str, dict[str, str]]:
    """For each kind of part, from phrase to what it means."""
    return {
        "motion": grammar.merged(grammar.MOTION_PHRASES, grammar.HEARD_MOTIONS),
        "background": grammar.merged(grammar.BACKGROUND_PHRASES, grammar.HEARD_BACKGROUNDS),
        "camera": grammar.merged(grammar.CAMERA_PHRASES, grammar.HEARD_CAMERAS),
        "sound": grammar.merged(grammar.SOUND_PHRASES, grammar.HEARD_SOUNDS),
        "size": grammar.merged(grammar.SIZE_WORDS, grammar.HEARD_SIZES),
        "shape": grammar.merged(grammar.SHAPE_WORDS, grammar.HEARD_SHAPES),
    }


@cache
def _patterns() -> dict[str, re.Pattern[str]]:
    """For each kind of part, what it looks like; of two phrases that start alike the longer comes first."""
    size, shape, colour = (_any(words) for words in (_meanings()["size"], _meanings()["shape"], dict.fromkeys(COLOURS)))
    links, speaking = (_any(dict.fromkeys(w)) for w in (grammar.NOUN_LINKS, grammar.SPEAKING + grammar.HEARD_SPEAKING))
    article = r"(?:(?:a|an|the|one|another) )?"
    subject = (
        rf"{article}(?:(?P<size>{size}) )?(?:(?P<colour>{colour}) (?P<shape>{shape})"
        rf"|(?P<late_shape>{shape}) (?:{links}) (?P<late_colour>{colour}))"
    )
    syllable = _any(dict.fromkeys(SYLLABLES))
    said = rf'(?:{speaking}):? (?:"(?P<quoted>[^"]*)"|(?P<bare>\b(?:{syllable})\b(?:[ ,-]+(?:{syllable})\b)*))'
    phrases = {kind: _any(_meanings()[kind]) for kind in ("motion", "background", "camera", "sound")}
    empty = _any(dict.fromkeys(grammar.LEADS + grammar.JOINTS))
    sources = {"subject": subject, "said": said, **phrases, "nothing": empty}
    return {kind: re.compile(rf"(?:{source})(?![\w])") for kind, source in sources.items()}


def _any(words: Mapping[str, object]) -> str:
    return "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))


def parse_caption(text: str) -> Scene:
    """The scene that a caption describes, with the attributes it names and defaults for the rest (stays still, gray
    background, static camera); `casting.place` gives it positions and speeds.

    Reads the core grammar and every paraphrase of `write_caption`, parts in any order. Raises PromptError, with the
    vocabulary named, for a text that is empty, names no subject or more than two, names something twice, or has words
    outside the grammar.
    """
    quotes = str.maketrans({"“": '"', "”": '"', "„": '"', "’": "'", "‘": "'"})
    words = re.sub(r"\s+", " ", text.lower().translate(quotes)).strip()
    words = re.sub(r"'([a-z ,-]+)'", r'"\1"', words)
    if not words:
        raise PromptError(f"the prompt is empty; {grammar.vocabulary()}")
    heard = _Heard()
    position = 0
    while rest := words[position:].lstrip(" ,.;:!"):
        position = len(words) - len(rest)
        matches = {kind: pattern.match(words, position) for kind, pattern in _patterns().items()}
        found = {kind: match for kind, match in matches.items() if match}
        if not found:
            near = " ".join(rest.split()[:4])
            raise PromptError(f"cannot read {near!r} in the prompt; {grammar.vocabulary()}")
        kind = max(found, key=lambda name: found[name].end())
        _take(heard, kind, found[kind])
        position = found[kind].end()
    return _scene(heard)


def _take(heard: _Heard, kind: str, match: re.Match[str]) -> None:
    """Note one part of a caption."""
    if kind == "nothing":
        return
    if kind == "subject":
        size = _meanings()["size"][match["size"]] if match["size"] else "medium"
        shape = _meanings()["shape"][match["shape"] or match["late_shape"]]
        heard.subjects.append({"size": size, "colour": match["colour"] or match["late_colour"], "shape": shape})
    elif kind in ("motion", "said"):
        if not heard.subjects:
            raise PromptError(f"{match[0]!r} comes before anything that could do it; {grammar.vocabulary()}")
        subject = heard.subjects[-1]
        name = "motion" if kind == "motion" else "syllables"
        if name in subject:
            one = f"{subject['colour']} {subject['shape']}"
            raise PromptError(f"the {one} is given {match[0]!r} beside another {kind}; each subject has one")
        subject[name] = _meanings()["motion"][match[0]] if kind == "motion" else _syllables(match, subject)
    else:
        meaning = _meanings()[kind][match[0]]
        if heard.parts.setdefault(kind, meaning) != meaning:
            raise PromptError(f"the prompt gives two of {kind}: {heard.parts[kind]} and {meaning}; one clip has one")


def _syllables(match: re.Match[str], subject: dict[str, object]) -> tuple[str, ...]:
    if subject["shape"] != FACE:
        raise PromptError(f"a {subject['shape']} cannot speak; only a face says something")
    speech = match["quoted"] if match["bare"] is None else match["bare"]
    syllables = tuple(re.split(r"[\s,.!?-]+", speech.strip(" ,.!?-")))
    for syllable in syllables:
        if syllable not in SYLLABLES:
            raise PromptError(f"a face cannot say {syllable!r}; it says syllables: {', '.join(SYLLABLES)}")
    return syllables


def _scene(heard: _Heard) -> Scene:
    if not 1 <= len(heard.subjects) <= MAX_SUBJECTS:
        found = "no subject" if not heard.subjects else f"{len(heard.subjects)} subjects"
        raise PromptError(f"the prompt names {found}, a clip has one or two; {grammar.vocabulary()}")
    subjects = tuple(_subject(attributes) for attributes in heard.subjects)
    return Scene(
        subjects,
        background=heard.parts.get("background", DEFAULT_BACKGROUND),
        camera=heard.parts.get("camera", "static"),
        ambience=heard.parts.get("sound"),
    )


def _subject(attributes: dict[str, object]) -> Subject:
    size = str(attributes["size"])
    syllables = attributes.get("syllables", ())
    return Subject(
        colour=str(attributes["colour"]),
        shape=str(attributes["shape"]),
        size=size,
        motion=str(attributes.get("motion", DEFAULT_MOTION)),
        syllables=syllables if isinstance(syllables, tuple) else (),
        radius=SIZES[size],
    )
