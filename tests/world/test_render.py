"""What the pictures show: exact colours, places, determinism, and no edges whatever the camera does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vitascope.core.shapes import ClipFormat
from vitascope.world.render import render
from vitascope.world.scene import (
    BACKGROUNDS,
    CAMERAS,
    COLOURS,
    DRAWN_BACKGROUNDS,
    FACE,
    MOTIONS,
    PLAIN_BACKGROUNDS,
    SHAPES,
    Scene,
    Subject,
)
from vitascope.world.truth import ground_truth

FORMAT = ClipFormat(num_frames=5)
SMALL = ClipFormat(48, 32, 8.0, 5)


def median_inside(scene: Scene, fmt: ClipFormat) -> Tensor:
    """Median colour over the pixels that the (only) subject covers wholly."""
    frames = render([scene], fmt)[0].float()
    inside = ground_truth(scene, fmt).masks()[0] > 0.99
    return frames.permute(1, 0, 2, 3)[:, inside].median(1).values


@pytest.mark.parametrize("name", PLAIN_BACKGROUNDS)
@pytest.mark.parametrize("camera", ["static", "dollies forward"])
def test_plain_backgrounds_are_exact(name: str, camera: str) -> None:
    frames = render([Scene((), name, camera=camera)], SMALL)[0]
    assert torch.equal(frames, torch.tensor(PLAIN_BACKGROUNDS[name], dtype=torch.uint8).view(3, 1, 1).expand_as(frames))


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("shape", [*SHAPES, FACE])
def test_a_subject_has_its_palette_colour(colour: str, shape: str) -> None:
    motion = "spins" if shape in ("ball", "ring") else "stays still"
    scene = Scene((Subject(colour, shape, motion=motion, speed=0.4),))
    assert (median_inside(scene, FORMAT) - torch.tensor(COLOURS[colour])).abs().max() <= 8


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_a_clip_depends_on_its_scene_alone(background: str) -> None:
    scenes = [
        Scene((Subject("red", "star", motion="spins", speed=0.4),), background, camera="pans left", seed=4),
        Scene((Subject("pink", FACE, syllables=("ma", "o")), Subject("blue", "box", x=0.7)), background, seed=5),
    ]
    both = render(scenes, SMALL)
    assert torch.equal(both[1:], render(scenes[1:], SMALL))
    assert torch.equal(both[:1], render(scenes[:1], SMALL))
    other = render([replace(scenes[1], seed=6)], SMALL)[0]
    assert torch.equal(other, both[1]) == (background in PLAIN_BACKGROUNDS or background == "checkered floor")


@pytest.mark.parametrize("motion", MOTIONS)
def test_frame_rate_does_not_change_the_pictures(motion: str) -> None:
    scene = Scene(
        (Subject("green", "ring", motion=motion, speed=0.5, travel=0.4, phase=0.2),), "brick wall", "orbits left"
    )
    slow, fast = (
        render([scene], replace(SMALL, num_frames=4))[0],
        render([scene], replace(SMALL, fps=16, num_frames=7))[0],
    )
    assert (slow.float() - fast[::2].float()).abs().max() <= 1


@pytest.mark.parametrize("background", DRAWN_BACKGROUNDS)
@pytest.mark.parametrize("camera", CAMERAS)
def test_any_size_renders_without_a_gap(background: str, camera: str) -> None:
    fmt = ClipFormat(72, 40, 4.0, 17)
    frames = render([Scene((), background, camera=camera, camera_speed=1.5, seed=2)], fmt)[0].float()
    assert frames.shape == (17, 3, 40, 72)
    assert (frames.sum(1) > 6).all(), "the darkest thing that is drawn is a night ridge of 5 + 8 + 16"
    assert (frames[:, :, 1:].std(dim=(1, 2, 3)) > 2).all()


def test_the_same_scene_at_twice_the_size_is_the_same_picture() -> None:
    scene = Scene((Subject("yellow", "triangle", x=0.2, radius=0.5),), "green hills", "zooms in", seed=1)
    small, large = (render([scene], ClipFormat(s, s, 2.0, 3))[0].float() for s in (64, 128))
    shrunk = torch.nn.functional.avg_pool2d(large, 2)
    assert (small - shrunk).abs().mean() < 1.5


def test_a_subject_outside_the_frame_leaves_the_background() -> None:
    subject = Subject("red", "ball", motion="moves left", x=-2.0, speed=1.0)
    assert torch.equal(render([Scene((subject,), "navy")], SMALL), render([Scene((), "navy")], SMALL))


def test_a_later_subject_hides_an_earlier_one_wherever_it_moves() -> None:
    still, moving = Subject("red", "box", radius=0.4), Subject("blue", "box", motion="circles", radius=0.3, speed=0.1)
    for subjects, colour in (((still, moving), "blue"), ((moving, still), "red")):
        frames = render([Scene(subjects)], SMALL)[0].float()
        middle = frames[:, :, 14:18, 22:26].mean(dim=(2, 3))
        assert (middle - torch.tensor(COLOURS[colour])).abs().max() < 20


def test_a_round_thing_shows_that_it_spins() -> None:
    for shape in ("ball", "ring"):
        frames = render([Scene((Subject("orange", shape, motion="spins", speed=0.4),))], SMALL)[0].float()
        assert (frames[1:] - frames[:-1]).abs().amax(dim=(1, 2, 3)).min() > 20


def test_a_mouth_opens_for_an_open_vowel_and_stays_shut_in_silence() -> None:
    fmt = replace(FORMAT, num_frames=25)
    says, silent = (Scene((Subject("yellow", FACE, radius=0.6, syllables=s),)) for s in (("ma",), ()))
    dark_says, dark_silent = (
        ((render([scene], fmt)[0][:, 1, 64:110, 40:90] < 40).sum(dim=(1, 2))) for scene in (says, silent)
    )
    assert dark_silent.min() == dark_silent.max()
    speech = ground_truth(says, fmt).subjects[0].speech
    assert speech is not None
    open_s = next((s.start_s + s.end_s) / 2 for s in speech.segments if s.viseme == "open")
    assert dark_says[round(open_s * fmt.fps)] > dark_silent[0] + 100
