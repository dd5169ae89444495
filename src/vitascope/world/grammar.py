"""The phrases of the captions: for every word of the theatre the forms in which English says it.

In each tuple the first phrase is the core form; `captions.write_caption` uses all of them, `captions.parse_caption`
reads all of them and those of the `HEARD_*` tables, which are understood but never written. No phrase stands for two
things.
"""

from __future__ import annotations

from vitascope.world.scene import (
    AMBIENCES,
    BACKGROUNDS,
    CAMERAS,
    COLOURS,
    FACE,
    MOTIONS,
    PLAIN_BACKGROUNDS,
    SHAPES,
    SIZES,
)

Phrases = dict[str, tuple[str, ...]]

SIZE_WORDS: Phrases = {"small": ("small", "tiny", "little"), "medium": ("medium",), "large": ("large", "big", "huge")}
HEARD_SIZES: Phrases = {"medium": ("medium-sized", "medium sized"), "small": ("smaller",), "large": ("larger",)}

SHAPE_WORDS: Phrases = {**{shape: (shape,) for shape in SHAPES}, FACE: (FACE,), "box": ("box", "square")}
HEARD_SHAPES: Phrases = {"ball": ("sphere",), "box": ("cube",), "ring": ("hoop",)}

MOTION_PHRASES: Phrases = {
    **{
        f"moves {way}": (
            f"moves {way}",
            f"moves to the {way}",
            f"slides {way}",
            f"glides to the {way}",
            f"is moving {way}",
            f"moving {way}",
        )
        for way in ("left", "right")
    },
    "moves up": ("moves up", "rises", "moves upward", "floats up", "is moving up", "moving up"),
    "moves down": ("moves down", "sinks", "moves downward", "glides down", "is moving down", "moving down"),
    "bounces": ("bounces", "hops", "bounces up and down", "is bouncing", "bouncing"),
    "circles": ("circles", "moves in a circle", "goes round in circles", "is circling", "circling"),
    "spins": ("spins", "rotates", "turns around", "is spinning", "spinning"),
    "grows": ("grows", "gets bigger", "becomes larger", "is growing", "growing"),
    "shrinks": ("shrinks", "gets smaller", "becomes smaller", "is shrinking", "shrinking"),
    "stays still": ("stays still", "does not move", "stands still", "rests", "is still", "staying still"),
}
HEARD_MOTIONS: Phrases = {
    "moves left": ("goes left", "slides to the left", "glides left", "moves leftward", "moves leftwards"),
    "moves right": ("goes right", "slides to the right", "glides right", "moves rightward", "moves rightwards"),
    "moves up": ("goes up", "moves upwards", "is rising", "rising"),
    "moves down": ("goes down", "moves downwards", "is sinking", "sinking"),
    "bounces": ("jumps", "is hopping", "hopping"),
    "circles": ("goes in circles", "moves in circles", "goes around in circles"),
    "spins": ("is rotating", "rotating", "turns", "is turning"),
    "grows": ("gets larger", "becomes bigger"),
    "stays still": ("is not moving", "stays in place", "stays", "is at rest", "stays put", "standing still"),
}

_ON_PLAIN = ("on a {} background", "against a {} background", "with a {} background", "in front of a {} background")
BACKGROUND_PHRASES: Phrases = {
    **{name: tuple(form.format(name) for form in (*_ON_PLAIN, "on {}")) for name in PLAIN_BACKGROUNDS},
    "starry sky": ("under a starry sky", "under the stars", "under a sky full of stars"),
    "checkered floor": ("on a checkered floor", "on a checkerboard floor", "above a checkered floor"),
    "green hills": ("over green hills", "above green hills", "in front of green hills"),
    "brick wall": ("in front of a brick wall", "before a brick wall", "against a brick wall"),
}
HEARD_BACKGROUNDS: Phrases = {
    **{name: (f"before a {name} background", f"the background is {name}") for name in PLAIN_BACKGROUNDS},
    "starry sky": ("under the starry sky", "beneath a starry sky", "in front of a starry sky", "against a starry sky"),
    "checkered floor": ("on a chequered floor", "over a checkered floor", "on the checkered floor"),
    "green hills": ("over the green hills", "before green hills", "against green hills"),
    "brick wall": ("in front of the brick wall", "by a brick wall", "in front of a wall of bricks"),
}
GREY = "grey"
"""Read and written as "gray" is."""

CAMERA_PHRASES: Phrases = {
    "static": ("the camera is static", "static camera", "the camera does not move"),
    **{
        f"pans {way}": (
            f"the camera pans {way}",
            f"the camera is panning {way}",
            f"panning {way}",
            f"camera pans {way}",
        )
        for way in ("left", "right", "up", "down")
    },
    **{
        f"zooms {way}": (
            f"the camera zooms {way}",
            f"the camera is zooming {way}",
            f"zooming {way}",
            f"camera zooms {way}",
        )
        for way in ("in", "out")
    },
    **{
        f"orbits {way}": (f"the camera orbits {way}", f"the camera orbits to the {way}", f"camera orbits {way}")
        for way in ("left", "right")
    },
    **{
        f"dollies {way}": (f"the camera dollies {way}", f"the camera moves {way}", f"camera dollies {way}")
        for way in ("forward", "backward")
    },
}
HEARD_CAMERAS: Phrases = {
    "static": ("the camera stays still", "a static camera", "with a static camera", "camera static", "fixed camera"),
    **{
        f"pans {way}": (f"the camera pans to the {way}", f"the camera turns {way}", f"camera pan {way}")
        for way in ("left", "right", "up", "down")
    },
    **{f"zooms {way}": (f"camera zoom {way}", f"zoom {way}") for way in ("in", "out")},
    **{f"orbits {way}": (f"camera orbit {way}", f"orbiting {way}") for way in ("left", "right")},
    **{
        f"dollies {way}": (f"camera dolly {way}", f"dolly {way}", f"the camera dollies {way}s")
        for way in ("forward", "backward")
    },
}

SOUND_PHRASES: Phrases = {
    "wind": ("with wind", "with the sound of wind", "in the wind", "while the wind blows"),
    "rain": ("with rain", "with the sound of rain", "in the rain", "while rain falls"),
    "soft music": ("with soft music", "with the sound of soft music", "to soft music", "while soft music plays"),
    "silence": ("in silence", "without sound", "with no sound", "silently"),
}
HEARD_SOUNDS: Phrases = {
    "wind": ("the sound of wind", "wind blows", "the wind blows", "with wind blowing", "with wind noise", "wind"),
    "rain": ("the sound of rain", "it rains", "while it rains", "rain falls", "with rain falling", "rain"),
    "soft music": ("soft music plays", "with soft music playing", "with gentle music", "with music", "soft music"),
    "silence": ("no sound", "with silence", "silent", "in complete silence", "silence"),
}

NOUN_LINKS = ("that is", "which is")
"""Between a shape and its colour: "a ball that is red"."""
SPEAKING = ("says", "is saying", "speaks")
HEARD_SPEAKING = ("saying", "that says")
LEADS = ("there is", "a video of")
"""May open a caption and mean nothing."""
JOINTS = ("and", "while", "as", "then", "where", "that", "which", "but", "also")
"""May stand between the parts of a caption and mean nothing of their own."""


def merged(*tables: Phrases) -> dict[str, str]:
    """From phrase to what it means, over several tables; "grey" is added beside every "gray"."""
    meaning = {phrase: name for table in tables for name, phrases in table.items() for phrase in phrases}
    grey = {phrase.replace("gray", GREY): name for phrase, name in meaning.items() if "gray" in phrase}
    return meaning | grey


def vocabulary() -> str:
    """The grammar and its words in one line, for messages."""
    return (
        "a prompt reads: a [small|large] COLOUR SHAPE MOTION [and a ...] BACKGROUND, the camera MOVES, SOUND; "
        f"sizes: {', '.join(SIZES)}; colours: {', '.join(COLOURS)}; "
        f'shapes: {", ".join(SHAPES)}, or a COLOUR face says "ma o ee"; '
        f"motions: {', '.join(MOTIONS)}; backgrounds: {', '.join(BACKGROUND_PHRASES[b][0] for b in BACKGROUNDS)}; "
        f"camera: {', '.join(CAMERAS)}; sounds: {', '.join(SOUND_PHRASES[a][0] for a in AMBIENCES)}"
    )
