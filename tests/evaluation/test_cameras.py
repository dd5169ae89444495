"""The camera move, from pixels alone."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from vitascope.core.shapes import ClipFormat
from vitascope.evaluation.cameras import BANDS, CameraModel, Drift, backdrop_drift, measure_drift, subject_drift
from vitascope.evaluation.footage import Footage
from vitascope.evaluation.judging import Detectors, look_at_camera
from vitascope.evaluation.prompts import Case, cases_of
from vitascope.evaluation.scoring import score_camera
from vitascope.world.camera import PAN_PER_S, ZOOM_PER_S
from vitascope.world.render import render
from vitascope.world.scene import CAMERAS, Scene

FMT = ClipFormat()
SMALL = ClipFormat(64, 64, num_frames=13)


@pytest.fixture(scope="module")
def detectors() -> Detectors:
    return Detectors()


def _drift(camera: str, background: str = "brick wall") -> np.ndarray:
    frames = render([Scene((), background, camera)], SMALL)[0]
    return backdrop_drift(frames, np.zeros((13, 64, 64), np.bool_), SMALL.fps)


def test_drift_of_the_backdrop_is_that_of_the_formulas() -> None:
    assert np.abs(_drift("static")).max() < 1e-3
    for part in _drift("pans right"):
        assert part == pytest.approx([-PAN_PER_S, 0, 0], abs=0.03)
    for part in _drift("pans up", "green hills"):
        assert part == pytest.approx([0, PAN_PER_S, 0], abs=0.03)
    # The fit is a growth a frame, the zoom exponential: exp(0.0196) - 1 is 1% above 0.0196.
    for part in _drift("zooms in"):
        assert part == pytest.approx([0, 0, ZOOM_PER_S], abs=0.03)


def test_near_and_far_differ_in_an_orbit_only() -> None:
    upper, lower = _drift("orbits right", "green hills")
    assert upper[0] > 1.4 * lower[0] > 0.2
    upper, lower = _drift("pans left", "green hills")
    assert upper[0] == pytest.approx(lower[0], abs=0.03)
    assert len(BANDS) == 2


def test_held_out_camera_prompts_are_read(detectors: Detectors) -> None:
    cases = cases_of("camera", 11, 4, FMT)
    clips = [Footage(clip, None, FMT.fps) for clip in render([case.scene for case in cases], FMT)]
    assert {case.scene.camera for case in cases} == set(CAMERAS)
    assert score_camera(cases, clips, detectors).measures["camera"]["value"] >= 10 / 11
    turned = [Case(c.group, c.number, c.prompt, c.seed, o.scene) for c, o in pairwise(cases)]
    assert score_camera(turned, clips[:-1], detectors).measures["camera"]["value"] <= 1 / 10


def test_noise_and_plain_backgrounds_have_no_camera(detectors: Detectors) -> None:
    noise = torch.randint(0, 256, (9, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert look_at_camera(Footage(noise, None, 12.0), detectors) == "none"
    plain = render([Scene((), "navy", "pans left")], SMALL)[0]
    assert look_at_camera(Footage(plain, None, 12.0), detectors) == "none"


def test_without_a_subject_the_backdrop_decides() -> None:
    assert np.isnan(subject_drift(None, 12.0)).all()
    rates = np.zeros((4, len(CAMERAS), 2, 3), np.float32)
    rates[:, CAMERAS.index("pans left"), :, 0] = PAN_PER_S
    model = CameraModel(rates)
    seen = measure_drift(render([Scene((), "brick wall", "pans left")], SMALL)[0], [], SMALL.fps)
    assert np.isnan(seen.subject).all()
    assert model.classify(seen, "brick wall") == "pans left"
    assert model.classify(Drift(np.zeros((2, 3), np.float32), seen.subject), "gray") == "none"
