"""The detectors of pictures on rendered clips: right ones are read, wrong ones marked wrong, garbage is nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vitascope.core.errors import InputError
from vitascope.core.shapes import ClipFormat
from vitascope.evaluation.footage import Footage
from vitascope.evaluation.judging import Detectors, Seen, look
from vitascope.evaluation.prompts import Case, balanced_scenes
from vitascope.evaluation.scoring import score_pairs, score_single
from vitascope.world.casting import SceneMix, draw_scene, place
from vitascope.world.render import render
from vitascope.world.scene import BACKGROUNDS, SIZES, Scene, Subject

FMT = ClipFormat()


@pytest.fixture(scope="module")
def detectors() -> Detectors:
    return Detectors()


def _clip(scene: Scene) -> Footage:
    return Footage(render([scene], FMT)[0], None, FMT.fps)


def _case(scene: Scene) -> Case:
    return Case("single", 0, "a prompt", 0, scene)


def test_every_attribute_of_balanced_scenes_is_read(detectors: Detectors) -> None:
    scenes = balanced_scenes(10, 7, FMT)
    result = score_single([_case(scene) for scene in scenes], [_clip(scene) for scene in scenes], detectors)
    for name in ("colour", "shape", "motion", "background", "size", "all four", "one subject"):
        assert result.measures[name]["value"] == 1.0, (name, result.rows)


def test_what_was_asked_for_does_not_change_what_is_seen(detectors: Detectors) -> None:
    scene = place(Scene((Subject("red", "box", motion="moves left"),), "navy"), 1, FMT)
    wrong = {
        "colour": replace(scene, subjects=(replace(scene.subjects[0], colour="blue"),)),
        "shape": replace(scene, subjects=(replace(scene.subjects[0], shape="ball"),)),
        "motion": replace(scene, subjects=(replace(scene.subjects[0], motion="moves right"),)),
        "background": replace(scene, background="black"),
    }
    for name, asked in wrong.items():
        measures = score_single([_case(asked)], [_clip(scene)], detectors).measures
        assert measures[name]["value"] == 0.0
        assert measures["all four"]["value"] == 0.0
        assert all(measures[other]["value"] == 1.0 for other in wrong if other != name)


@pytest.mark.parametrize("size", SIZES)
def test_sizes(detectors: Detectors, size: str) -> None:
    for shape in ("star", "ring"):
        scene = place(Scene((Subject("green", shape, size),), "gray"), 5, FMT)
        assert look(_clip(scene), detectors).value("size") == size


def test_noise_and_empty_frames_are_nothing(detectors: Detectors) -> None:
    draw = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (9, 3, 128, 128), generator=draw, dtype=torch.uint8)
    soft = torch.nn.functional.interpolate(
        torch.rand(9, 3, 8, 8, generator=draw) * 255, size=(128, 128), mode="bilinear"
    )
    magenta = torch.tensor([255, 0, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(9, 3, 128, 128)
    for frames in (noise, soft.to(torch.uint8), magenta):
        seen = look(Footage(frames, None, 12.0), detectors)
        assert seen == Seen("none", ())
        assert seen.value("colour") == "none"
    for background in ("black", "navy", "starry sky", "brick wall"):
        seen = look(_clip(Scene((), background, seed=3)), detectors)
        assert seen == Seen(background, ())


def test_a_blob_without_an_outline_has_no_shape(detectors: Detectors) -> None:
    frames = torch.tensor([110, 110, 115], dtype=torch.uint8).view(1, 3, 1, 1).repeat(9, 1, 128, 128)
    red = torch.tensor([220, 40, 40], dtype=torch.uint8).view(1, 3, 1, 1)
    for left in (20, 50, 80):  # a comb
        frames[:, :, 30:100, left : left + 10] = red
    frames[:, :, 90:100, 20:90] = red
    assert look(Footage(frames, None, 12.0), detectors).value("shape") == "none"


def test_drawn_backgrounds_and_faces(detectors: Detectors) -> None:
    for background in BACKGROUNDS[4:]:
        scene = place(Scene((Subject("purple", "triangle", motion="moves down"),), background), 2, FMT)
        seen = look(_clip(scene), detectors)
        assert [seen.value(name) for name in ("background", "colour", "shape", "motion")] == [
            background,
            "purple",
            "triangle",
            "moves down",
        ]
    face = place(Scene((Subject("yellow", "face", syllables=("ma", "o")),), "brown"), 2, FMT)
    assert look(_clip(face), detectors).value("shape") == "face"


def test_two_subjects_are_matched_whatever_their_order(detectors: Detectors) -> None:
    mix = SceneMix(two_subjects=1, face=0, camera=0, drawn_background=0)
    scenes = [draw_scene(seed, mix=mix, split="held_out") for seed in range(4)]
    clips = [_clip(scene) for scene in scenes]
    result = score_pairs([_case(scene) for scene in scenes], clips, detectors)
    assert result.measures["all of both"]["value"] == 1.0, result.rows
    swapped = [_case(replace(scene, subjects=scene.subjects[::-1])) for scene in scenes]
    assert score_pairs(swapped, clips, detectors).measures["all of both"]["value"] == 1.0
    lonely = [_case(replace(scene, subjects=scene.subjects[:1] * 2)) for scene in scenes]
    assert score_pairs(lonely, clips, detectors).measures["all of both"]["value"] == 0.0


def test_seen_refuses_unknown_attributes() -> None:
    with pytest.raises(InputError, match="colour, shape"):
        Seen("black", ()).value("weight")
