"""Captions: the core form, that every paraphrase is read back, and what is refused."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitascope.core.errors import PromptError
from vitascope.world import grammar
from vitascope.world.captions import core_caption, parse_caption, write_caption
from vitascope.world.casting import SceneMix, draw_scene
from vitascope.world.scene import (
    AMBIENCES,
    BACKGROUNDS,
    CAMERAS,
    COLOURS,
    FACE,
    MOTIONS,
    SHAPES,
    SIZES,
    SYLLABLES,
    Scene,
    Subject,
)


def attributes(scene: Scene) -> tuple[object, ...]:
    """All that a caption can say of a scene."""
    subjects = tuple((s.colour, s.shape, s.size, s.motion, s.syllables) for s in scene.subjects)
    return subjects, scene.background, scene.camera, scene.ambience


shapes = st.builds(
    Subject,
    st.sampled_from(list(COLOURS)),
    st.sampled_from(SHAPES),
    st.sampled_from(list(SIZES)),
    st.sampled_from(MOTIONS),
)
faces = st.builds(
    Subject,
    st.sampled_from(list(COLOURS)),
    st.just(FACE),
    st.sampled_from(list(SIZES)),
    st.sampled_from(MOTIONS),
    st.lists(st.sampled_from(SYLLABLES), max_size=5).map(tuple),
)
scenes = st.builds(
    Scene,
    st.lists(st.one_of(shapes, faces), min_size=1, max_size=2).map(tuple),
    st.sampled_from(BACKGROUNDS),
    st.sampled_from(CAMERAS),
    ambience=st.sampled_from((None, *AMBIENCES)),
)


@pytest.mark.parametrize(
    ("scene", "caption"),
    [
        (Scene((Subject("red", "ball", "small", "bounces"),)), "a small red ball bounces on a gray background"),
        (
            Scene(
                (Subject("red", "ball", motion="moves left"), Subject("blue", "box")),
                "starry sky",
                "pans right",
                ambience="rain",
            ),
            "a red ball moves left and a blue box stays still under a starry sky, the camera pans right, with rain",
        ),
        (
            Scene((Subject("blue", "face", syllables=("ma", "o", "ee")),), "navy"),
            'a blue face says "ma o ee" on a navy background',
        ),
        (
            Scene((Subject("orange", "star", motion="grows"),), "brick wall", ambience="silence"),
            "an orange star grows in front of a brick wall, in silence",
        ),
    ],
)
def test_core_captions_follow_the_grammar_to_the_letter(scene: Scene, caption: str) -> None:
    assert core_caption(scene) == caption
    assert attributes(parse_caption(caption)) == attributes(scene)


@settings(max_examples=80, deadline=None)
@given(scenes, st.integers(0, 2**31))
def test_every_caption_is_read_back(scene: Scene, seed: int) -> None:
    text = write_caption(scene, seed)
    assert attributes(parse_caption(text)) == attributes(scene), text


def test_captions_depend_on_the_seed_alone_and_vary() -> None:
    scene = draw_scene(5, mix=SceneMix(camera=1.0))
    texts = [write_caption(scene, seed) for seed in range(200)]
    assert texts == [write_caption(scene, seed) for seed in range(200)]
    assert len(set(texts)) > 60
    assert 0.4 < sum(text == core_caption(scene) for text in texts) / len(texts) < 0.6


@pytest.mark.parametrize(
    "text",
    [
        "A small RED ball bounces under a starry sky, the camera pans right, with rain.",
        "under a starry sky, a small red ball bounces with rain, the camera pans right",
        "with rain, a small red ball bounces under a starry sky and the camera pans right",
        "while rain falls a tiny red ball hops under the stars as the camera is panning right",
    ],
)
def test_parts_may_come_in_any_order(text: str) -> None:
    wanted = ((("red", "ball", "small", "bounces", ()),), "starry sky", "pans right", "rain")
    assert attributes(parse_caption(text)) == wanted


def test_what_goes_unsaid_has_its_default() -> None:
    scene = parse_caption("a red ball")
    assert attributes(scene) == ((("red", "ball", "medium", "stays still", ()),), "gray", "static", None)
    assert scene.subjects[0].radius == SIZES["medium"]


def test_speech_is_read_with_and_without_quotes() -> None:
    for text in ('a blue face says "Ma, o ee"', "a blue face says ma o ee on gray", "a blue face is saying “ma o ee”"):
        assert parse_caption(text).subjects[0].syllables == ("ma", "o", "ee")


def test_grey_is_gray() -> None:
    assert parse_caption("a red ball spins against a grey background").background == "gray"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty.*colours: red"),
        (" \n ", "empty"),
        ("a red dog bounces", "'a red dog bounces'.*shapes: ball, box"),
        ("a red ball bounces on a white background", "'on a white background'.*backgrounds: on a black"),
        ("a red ball floats", "'floats'.*motions: moves left"),
        ("under a starry sky", "no subject"),
        ("bounces", "before anything"),
        ("a red ball and a blue box and a green star", "3 subjects"),
        ("a red ball bounces and spins", "'spins'.*each subject has one"),
        ("a red ball on a gray background in front of a brick wall", "gray and brick wall"),
        ("a red ball with rain, with wind", "rain and wind"),
        ('a red ball says "ma"', "only a face"),
        ('a red face says "hello"', "'hello'.*ma, mo"),
    ],
)
def test_what_is_not_understood_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(PromptError, match=message) as caught:
        parse_caption(text)
    assert "\n" not in str(caught.value)


def test_no_phrase_means_two_things() -> None:
    tables = [
        table
        for name, table in vars(grammar).items()
        if name.startswith("HEARD_") or name.endswith(("_WORDS", "_PHRASES"))
    ]
    tables = [table for table in tables if isinstance(table, dict)]
    meanings: dict[str, set[str]] = {}
    for table in tables:
        for name, phrases in table.items():
            for phrase in phrases:
                meanings.setdefault(phrase, set()).add(name)
    assert len(tables) == 12
    assert {phrase: names for phrase, names in meanings.items() if len(names) > 1} == {}
    assert all(re.fullmatch(r"[a-z' -]+", phrase) for phrase in meanings)
