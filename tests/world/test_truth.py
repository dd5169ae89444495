"""Ground truth against the rendered pixels."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from vitascope.core.shapes import ClipFormat
from vitascope.world.render import render
from vitascope.world.scene import CAMERAS, DRAWN_BACKGROUNDS, FACE, MOTIONS, SHAPES, Scene, Subject
from vitascope.world.truth import Truth, ground_truth

FORMAT = ClipFormat(96, 96, 12.0, 5)


def scene_of(motion: str, shape: str = "ball", background: str = "gray", camera: str = "static") -> Scene:
    subject = Subject("red", shape, motion=motion, speed=0.5, travel=0.3, phase=0.35, y=0.0, radius=0.35)
    return Scene((subject,), background, camera, seed=3)


@pytest.mark.parametrize("motion", MOTIONS)
@pytest.mark.parametrize("camera", ["static", "pans right", "dollies forward"])
def test_the_mask_follows_the_position(motion: str, camera: str) -> None:
    truth = ground_truth(scene_of(motion, camera=camera), FORMAT)
    mask = truth.masks()[0]
    axis = torch.arange(96) + 0.5
    area = mask.sum((1, 2))
    centre = torch.stack([(mask.sum(1) * axis).sum(1), (mask.sum(2) * axis).sum(1)], 1) / area[:, None]
    assert (centre - truth.subjects[0].position_px).abs().max() < 0.25
    radius = (area / torch.pi / truth.subjects[0].pose.stretch.prod(1)).sqrt()
    assert (radius - truth.subjects[0].radius_px).abs().max() < 0.25


@pytest.mark.parametrize("shape", [*SHAPES, FACE])
def test_the_mask_is_where_the_picture_differs_from_the_background(shape: str) -> None:
    scene = scene_of("moves right", shape, "navy")
    changed = (render([scene], FORMAT)[0].int() - torch.tensor([15, 20, 70]).view(3, 1, 1)).abs().amax(1) > 0
    mask = ground_truth(scene, FORMAT).masks()[0]
    assert (changed <= (mask > 0)).all()
    assert (changed >= (mask > 0.1)).all()


def test_masks_share_the_pixels_between_subjects() -> None:
    scene = Scene((Subject("red", "box", radius=0.5), Subject("blue", "ball", radius=0.3)))
    behind, before = ground_truth(scene, FORMAT).masks()[:, 0]
    assert behind[48, 48] == 0
    assert before[48, 48] == 1
    assert behind[48, 30] == 1
    assert (behind + before).max() <= 1 + 1e-6


@pytest.mark.parametrize("camera", ["static", "pans up", "zooms in", "orbits left"])
def test_velocity_is_the_change_of_position(camera: str) -> None:
    fmt = ClipFormat(96, 96, 120.0, 30)
    truth = ground_truth(scene_of("circles", camera=camera), fmt).subjects[0]
    measured = (truth.position_px[2:] - truth.position_px[:-2]) * 60
    assert (measured - truth.velocity_px[1:-1]).abs().max() < 0.2


def warp_errors(truth: Truth, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Root mean square change from each frame to the next, along the flow and without it, over the pixels of the
    backdrop or of the subject that both frames show."""
    flow, mask = truth.flow(), truth.masks()[0]
    rows, columns = torch.meshgrid(torch.arange(96) + 0.5, torch.arange(96) + 0.5, indexing="ij")
    grid = torch.stack([columns + flow[:, 0], rows + flow[:, 1]], -1) / 48 - 1
    follow = torch.cat([frames, mask[:, None]], 1)[1:]
    warped = grid_sample(follow, grid, align_corners=False, padding_mode="border")
    same = ((warped[:, 3] - mask[:-1]).abs() < 0.05) & ((mask[1:] - mask[:-1]).abs() < 0.05)
    shown = (same & (grid.abs() < 0.98).all(-1))[:, None].float()
    along, without = (
        ((other - frames[:-1]) ** 2 * shown).sum() / shown.sum() / 3 for other in (warped[:, :3], frames[1:])
    )
    return along.sqrt(), without.sqrt()


@pytest.mark.parametrize("background", DRAWN_BACKGROUNDS)
@pytest.mark.parametrize("camera", [camera for camera in CAMERAS if camera != "static"])
def test_flow_of_the_backdrop_carries_each_frame_onto_the_next(background: str, camera: str) -> None:
    scene = scene_of("stays still", "star", background, camera)
    along, without = warp_errors(ground_truth(scene, FORMAT), render([scene], FORMAT)[0].float())
    assert along < 0.8 * without


@pytest.mark.parametrize("motion", ["moves left", "moves down", "bounces", "circles", "spins", "grows", "shrinks"])
def test_flow_of_the_subject_carries_each_frame_onto_the_next(motion: str) -> None:
    scene = scene_of(motion, "star", "navy")
    truth = ground_truth(scene, FORMAT)
    flow, mask = truth.flow(), truth.masks()[0]
    rows, columns = torch.meshgrid(torch.arange(96) + 0.5, torch.arange(96) + 0.5, indexing="ij")
    grid = torch.stack([columns + flow[:, 0], rows + flow[:, 1]], -1) / 48 - 1
    warped = grid_sample(mask[1:, None], grid, align_corners=False)[:, 0]
    on_subject = mask[:-1] > 0.5
    assert (warped - mask[:-1])[on_subject].abs().mean() < 0.03
    assert (flow[:, :, 0, 0] == 0).all(), "the background of a static camera does not move"
    assert flow.abs().amax() > 0.5


def test_a_still_scene_has_no_flow() -> None:
    assert ground_truth(scene_of("stays still", "box", "checkered floor"), FORMAT).flow().abs().max() < 1e-4


def test_pan_right_moves_the_scene_left_and_dolly_has_parallax() -> None:
    pan = ground_truth(scene_of("stays still", background="green hills", camera="pans right"), FORMAT).flow()
    assert torch.allclose(pan[:, 0], torch.full_like(pan[:, 0], -0.4 / 12 * 48), atol=1e-3)
    dolly = ground_truth(scene_of("stays still", background="brick wall", camera="dollies forward"), FORMAT).flow()
    zoom = ground_truth(scene_of("stays still", background="brick wall", camera="zooms in"), FORMAT).flow()
    stretch = [(f[:, 0, 48, [0, 40, 55, 95]] / torch.tensor([-47.5, -7.5, 7.5, 47.5])) for f in (dolly, zoom)]
    assert torch.allclose(stretch[1], stretch[1][:, :1].expand(-1, 4), atol=1e-4)
    assert (stretch[0][:, 1] > 1.3 * stretch[0][:, 0]).all()
    assert (stretch[0][:, 2] > 1.3 * stretch[0][:, 3]).all()


def test_impacts_and_speech_and_attributes() -> None:
    fmt = ClipFormat()
    bouncing = Subject("red", "ball", motion="bounces", travel=0.6, phase=0.5)
    talking = Subject("pink", FACE, syllables=("ma", "o", "ee"), x=0.6)
    truth = ground_truth(Scene((bouncing, talking), "navy", ambience="wind"), fmt)
    assert list(truth.impacts_s) == truth.subjects[0].path.impacts_s
    assert len(truth.impacts_s) >= 2
    lowest = truth.subjects[0].position_px[:, 1].argmax() / fmt.fps
    assert min(abs(float(lowest) - time) for time in truth.impacts_s) <= 1 / fmt.fps
    assert truth.subjects[0].speech is None
    assert truth.subjects[1].speech is not None
    words = json.loads(json.dumps(truth.attributes()))
    assert words["background"] == "navy"
    assert words["subjects"][1]["syllables"] == ["ma", "o", "ee"]


def test_one_frame_clip_has_truth_too() -> None:
    truth = ground_truth(scene_of("moves left", camera="pans left"), ClipFormat(32, 32, 12.0, 1))
    assert truth.flow().shape == (0, 2, 32, 32)
    assert truth.masks().shape == (1, 1, 32, 32)
    assert truth.subjects[0].velocity_px[0, 0] < 0
