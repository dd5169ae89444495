"""Casting: proportions, the held-out split, and places that keep subjects in the frame."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from vitascope.core.errors import InputError
from vitascope.core.shapes import ClipFormat
from vitascope.world.captions import parse_caption
from vitascope.world.casting import SceneMix, draw_scene, is_held_out, place
from vitascope.world.motion import trajectory
from vitascope.world.scene import BACKGROUNDS, COLOURS, DRAWN_BACKGROUNDS, FACE, MOTIONS, SHAPES, Scene, Subject

FMT = ClipFormat()


@pytest.fixture(scope="module")
def drawn() -> list[Scene]:
    return [draw_scene(seed) for seed in range(2000)]


def share(scenes: list[Scene], of: object) -> float:
    return sum(map(of, scenes)) / len(scenes)  # type: ignore[arg-type]


def test_the_same_seed_draws_the_same_scene() -> None:
    assert [draw_scene(seed) for seed in range(30)] == [draw_scene(seed) for seed in range(30)]
    assert draw_scene(1) != draw_scene(2)
    assert draw_scene(3).seed != draw_scene(4).seed


def test_things_are_drawn_as_often_as_the_mix_says(drawn: list[Scene]) -> None:
    close = lambda value: pytest.approx(value, abs=0.035)  # noqa: E731
    mix = SceneMix()
    assert share(drawn, lambda s: len(s.subjects) == 2) == close(mix.two_subjects)
    assert share(drawn, lambda s: s.subjects[0].shape == FACE) == close(mix.face)
    assert share(drawn, lambda s: s.camera != "static") == close(mix.camera)
    assert share(drawn, lambda s: s.background in DRAWN_BACKGROUNDS) == close(mix.drawn_background)
    assert share(drawn, lambda s: s.ambience is None) == close(0.4)
    for ambience in ("wind", "rain", "soft music", "silence"):
        assert share(drawn, lambda s, a=ambience: s.ambience == a) == close(0.15)
    moving = [scene for scene in drawn if scene.camera != "static"]
    assert share(moving, lambda s: s.background in DRAWN_BACKGROUNDS) == close(mix.camera_on_drawn)
    subjects = [subject for scene in drawn for subject in scene.subjects]
    sizes = Counter(subject.size for subject in subjects)
    assert sizes["small"] / len(subjects) == close(mix.small)
    assert sizes["large"] / len(subjects) == close(mix.large)
    still = [s for scene in drawn if scene.camera == "static" for s in scene.subjects if s.shape != FACE]
    motions = Counter(subject.motion for subject in still)
    assert motions["bounces"] / len(still) == close(mix.bounces)
    assert set(motions) == set(MOTIONS)


def test_a_mix_can_ask_for_one_kind_alone() -> None:
    mix = SceneMix(two_subjects=0, face=0, camera=0, drawn_background=0, bounces=1, small=0, large=1)
    with pytest.raises(InputError, match="must not exceed 1"):
        replace(mix, wind=0.7)
    with pytest.raises(InputError, match=r"face must be in \[0, 1\]"):
        SceneMix(face=1.5)
    for seed in range(20):
        scene = draw_scene(seed, mix=replace(mix, wind=0, rain=1, soft_music=0, silence=0))
        assert (scene.camera, scene.ambience, len(scene.subjects)) == ("static", "rain", 1)
        assert (scene.subjects[0].motion, scene.subjects[0].size) == ("bounces", "large")


def test_training_never_sees_what_is_held_out(drawn: list[Scene]) -> None:
    held = [draw_scene(seed, split="held_out") for seed in range(150)]
    assert not any(map(is_held_out, drawn))
    assert all(map(is_held_out, held))
    kinds = Counter((len(scene.subjects), scene.subjects[0].shape == FACE) for scene in held)
    assert set(kinds) == {(1, False), (1, True), (2, False)}
    with pytest.raises(InputError, match="train, held_out"):
        draw_scene(0, split="test")  # type: ignore[arg-type]


def test_a_tenth_of_the_combinations_is_held_out_whatever_else_the_scene_has() -> None:
    grid = [
        Scene((Subject(colour, shape, motion=motion),), background)
        for colour in COLOURS
        for shape in SHAPES
        for motion in MOTIONS
        for background in BACKGROUNDS
    ]
    assert 0.08 < share(grid, is_held_out) < 0.12
    for scene in grid[::37]:
        other = replace(place(scene, 9, FMT), camera="zooms in", ambience="rain")
        assert is_held_out(other) == is_held_out(scene)
    pair = Scene((grid[0].subjects[0], grid[999].subjects[0]), "navy")
    assert is_held_out(pair) == is_held_out(replace(pair, subjects=pair.subjects[::-1]))


def test_subjects_stay_in_the_frame_and_apart() -> None:
    still = SceneMix(camera=0.0)
    outside, close = 0, 0
    scenes = [draw_scene(seed, mix=still) for seed in range(250)]
    for scene in scenes:
        paths = [trajectory(subject, FMT) for subject in scene.subjects]
        reach = torch.cat([path.position.abs() + path.radius[:, None] for path in paths])
        outside += bool(reach.max() > 1.1)
        assert max(float(path.position.abs().max()) for path in paths) < 0.9
        if len(paths) == 2:
            assert paths[0].position[0, 0] < paths[1].position[0, 0]
            gap = (paths[0].position - paths[1].position).norm(dim=1) - paths[0].radius - paths[1].radius
            close += bool(gap.min() < -0.05)
    assert outside / len(scenes) < 0.05
    assert close / len(scenes) < 0.02


@pytest.mark.parametrize("fmt", [ClipFormat(num_frames=121), ClipFormat(width_px=64), ClipFormat(width_px=256)])
@pytest.mark.parametrize("motion", MOTIONS)
def test_other_formats_keep_a_subject_in_the_frame_too(fmt: ClipFormat, motion: str) -> None:
    aspect = fmt.width_px / fmt.height_px
    for seed in range(5):
        scene = place(parse_caption(f"a red ball {motion}"), seed, fmt)
        path = trajectory(scene.subjects[0], fmt)
        assert float((path.position[:, 0].abs() + path.radius).max()) < aspect + 0.1
        assert float((path.position[:, 1].abs() + path.radius).max()) < 1.1


def test_placing_keeps_what_the_caption_said_and_varies_little() -> None:
    scene = parse_caption("a large red ball moves left on a navy background, the camera zooms in, with rain")
    placed = [place(scene, seed, FMT) for seed in range(50)]
    for other in placed:
        (subject,) = other.subjects
        assert (subject.colour, subject.shape, subject.size, subject.motion) == ("red", "ball", "large", "moves left")
        assert (other.background, other.camera, other.ambience) == ("navy", "zooms in", "rain")
        assert subject.x == pytest.approx(0.47, abs=0.3)
        assert abs(subject.y) <= 0.25
        assert subject.speed == pytest.approx(0.45, rel=0.16)
        assert subject.radius == pytest.approx(0.42, rel=0.09)
        assert other.camera_speed == pytest.approx(1.0, abs=0.11)
    assert len({other.subjects[0].x for other in placed}) == 50


def test_a_bounce_is_free_fall_at_any_phase() -> None:
    scene = parse_caption("a red ball bounces")
    subjects = [place(scene, seed, FMT).subjects[0] for seed in range(60)]
    for subject in subjects:
        assert 0.6 <= 1 / subject.speed <= 0.9
        assert subject.travel == pytest.approx(11.4 / subject.speed**2 / 8)
        assert len(trajectory(subject, FMT).impacts_s) in (2, 3, 4)
    phases = torch.tensor([subject.phase for subject in subjects])
    assert phases.min() < 0.15
    assert phases.max() > 0.85
