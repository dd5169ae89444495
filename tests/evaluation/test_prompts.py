"""The prompts: held out, balanced, the same every time."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest

from vitascope.core.errors import InputError
from vitascope.core.shapes import ClipFormat
from vitascope.evaluation.prompts import DIVERSITY_SEEDS, GROUPS, SOUND_KINDS, all_cases, cases_of
from vitascope.world.captions import parse_caption
from vitascope.world.casting import is_held_out
from vitascope.world.scene import CAMERAS, COLOURS, DRAWN_BACKGROUNDS, MOTIONS, PLAIN_BACKGROUNDS, SHAPES

FMT = ClipFormat()


@pytest.mark.parametrize("group", GROUPS)
def test_every_scene_is_held_out_and_its_prompt_says_it(group: str) -> None:
    cases = cases_of(group, 8, 3, FMT)
    assert len(cases) == 8
    for number, case in enumerate(cases):
        assert (case.group, case.number) == (group, number)
        assert is_held_out(case.scene)
        read = parse_caption(case.prompt)
        names = ("colour", "shape", "size", "motion", "syllables")
        for mine, theirs in zip(case.scene.subjects, read.subjects, strict=True):
            assert all(getattr(mine, name) == getattr(theirs, name) for name in names)
        assert (read.background, read.camera) == (case.scene.background, case.scene.camera)
        assert read.ambience == case.scene.ambience


def test_the_same_seed_gives_the_same_cases_and_another_seed_others() -> None:
    assert cases_of("bounces", 4, 1, FMT) == cases_of("bounces", 4, 1, FMT)
    assert cases_of("bounces", 6, 1, FMT)[:4] == cases_of("bounces", 4, 1, FMT)
    assert cases_of("bounces", 4, 2, FMT) != cases_of("bounces", 4, 1, FMT)
    seeds = [case.seed for case in cases_of("single", 50, 0, FMT)]
    assert len(set(seeds)) == 50


def test_single_prompts_are_in_balance() -> None:
    scenes = [case.scene for case in cases_of("single", 100, 0, FMT)]
    for values, words in (
        (COLOURS, [s.subjects[0].colour for s in scenes]),
        (SHAPES, [s.subjects[0].shape for s in scenes]),
        (MOTIONS, [s.subjects[0].motion for s in scenes]),
        (PLAIN_BACKGROUNDS, [s.background for s in scenes]),
    ):
        counts = Counter(words)
        assert set(counts) == set(values)
        assert max(counts.values()) - min(counts.values()) <= 2
    assert len({(s.subjects[0].colour, s.subjects[0].shape, s.subjects[0].motion, s.background) for s in scenes}) == 100


def test_cameras_and_sounds_come_in_turn() -> None:
    assert [case.scene.camera for case in cases_of("camera", 11, 0, FMT)] == list(CAMERAS)
    kinds = [case.scene.ambience for case in cases_of("sounds", len(SOUND_KINDS), 0, FMT)]
    assert kinds == [None, "wind", "rain", "soft music", "silence", None, None]


def test_clips_of_one_prompt_share_its_words() -> None:
    cases = cases_of("diversity", 2 * DIVERSITY_SEEDS, 0, FMT)
    assert len({case.prompt for case in cases}) == 2
    assert len({case.seed for case in cases}) == 2 * DIVERSITY_SEEDS


def test_bad_groups_are_refused() -> None:
    with pytest.raises(InputError, match="single, pairs"):
        cases_of("double", 1, 0, FMT)
    with pytest.raises(InputError, match="at least one prompt"):
        cases_of("single", 0, 0, FMT)
    assert set(all_cases([], 1, 0, FMT)) == set(GROUPS)


def test_every_camera_move_meets_every_drawn_background() -> None:
    cases = cases_of("camera", len(CAMERAS) * len(DRAWN_BACKGROUNDS), 0, FMT)
    pairs = {(case.scene.camera, case.scene.background) for case in cases}
    assert pairs == set(product(CAMERAS, DRAWN_BACKGROUNDS))
