"""What each camera move does to layers at different depths."""

from __future__ import annotations

import pytest
import torch

from vitascope.core.shapes import ClipFormat
from vitascope.world.camera import camera_path, layer_transform, rest_scale
from vitascope.world.scene import CAMERAS, Scene

FORMAT = ClipFormat()
NEAR, STAGE, FAR = 0.0, 2.0, 12.0


def seen(camera: str, depth: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale relative to rest (T,), and shift (T, 2), of a layer."""
    scale, shift = layer_transform(camera_path(Scene((), camera=camera), FORMAT), depth)
    return scale / rest_scale(depth), shift


@pytest.mark.parametrize("camera", CAMERAS)
def test_every_move_passes_the_rest_position_after_one_second(camera: str) -> None:
    for depth in (NEAR, FAR):
        scale, shift = seen(camera, depth)
        assert scale[12] == pytest.approx(1.0, abs=1e-5)
        assert torch.allclose(shift[12], torch.zeros(2), atol=1e-5)


@pytest.mark.parametrize(
    ("camera", "axis", "sign"),
    [("pans right", 0, -1), ("pans left", 0, 1), ("pans up", 1, 1), ("pans down", 1, -1)],
)
def test_a_pan_moves_all_layers_alike_against_its_direction(camera: str, axis: int, sign: int) -> None:
    (near_scale, near), (far_scale, far) = seen(camera, NEAR), seen(camera, FAR)
    assert torch.allclose(near, far, atol=1e-6)
    assert torch.allclose(near_scale, torch.ones(25), atol=1e-5)
    assert torch.allclose(far_scale, near_scale, atol=1e-5)
    assert sign * (near[-1, axis] - near[0, axis]) == pytest.approx(0.8, abs=0.01)
    assert near[:, 1 - axis].abs().max() < 1e-6


@pytest.mark.parametrize(("camera", "sign"), [("zooms in", 1), ("zooms out", -1)])
def test_a_zoom_has_no_parallax(camera: str, sign: int) -> None:
    near, far = seen(camera, NEAR)[0], seen(camera, FAR)[0]
    assert torch.allclose(near, far, atol=1e-5)
    assert (near[-1] / near[0]) ** sign == pytest.approx(1.6, rel=0.01)


@pytest.mark.parametrize(("camera", "sign"), [("dollies forward", 1), ("dollies backward", -1)])
def test_a_dolly_has_parallax(camera: str, sign: int) -> None:
    near, far = seen(camera, NEAR)[0], seen(camera, FAR)[0]
    assert (near[-1] / near[0]) ** sign == pytest.approx(1.5, rel=0.01)
    assert 1.0 < (far[-1] / far[0]) ** sign < 1.2


@pytest.mark.parametrize(("camera", "sign"), [("orbits right", 1), ("orbits left", -1)])
def test_an_orbit_holds_the_stage_and_moves_what_is_behind_it(camera: str, sign: int) -> None:
    assert torch.allclose(seen(camera, 0.0)[1], torch.zeros(25, 2), atol=1e-5)
    behind, before = seen(camera, FAR)[1][:, 0], seen(camera, -1.0)[1][:, 0]
    assert sign * (behind[-1] - behind[0]) > 0.5
    assert sign * (before[-1] - before[0]) < -0.2


def test_camera_speed_scales_the_move_and_longer_clips_go_farther() -> None:
    usual, quick = (camera_path(Scene((), camera="pans left", camera_speed=s), FORMAT).rotation for s in (1.0, 1.5))
    assert torch.allclose(torch.tan(quick), 1.5 * torch.tan(usual), atol=1e-6)
    longer = camera_path(Scene((), camera="pans left"), ClipFormat(num_frames=49)).rotation
    assert torch.equal(longer[:25], usual)
    assert longer[-1, 0] < usual[-1, 0]


def test_near_layers_stay_before_the_camera_for_four_seconds() -> None:
    scene = Scene((), camera="dollies forward", camera_speed=1.5)
    scale, _ = layer_transform(camera_path(scene, ClipFormat(num_frames=48)), 0.0)
    assert (scale > 0).all()
    assert scale.max() < 3
