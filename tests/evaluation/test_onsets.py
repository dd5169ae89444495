"""Thuds in samples, impacts in pixels, and the offset between them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from vitascope.core.shapes import ClipFormat
from vitascope.evaluation.footage import Footage
from vitascope.evaluation.judging import Detectors
from vitascope.evaluation.onsets import pair_impacts, thud_times, visual_impacts
from vitascope.evaluation.prompts import Case, bounce_scenes
from vitascope.evaluation.scoring import score_bounces
from vitascope.evaluation.subjects import find_subjects
from vitascope.world.render import render
from vitascope.world.sound import synthesise
from vitascope.world.truth import ground_truth

FMT = ClipFormat()


@pytest.fixture(scope="module")
def detectors() -> Detectors:
    return Detectors()


@pytest.mark.parametrize("ambience", [None, "wind", "rain", "soft music"])
def test_thuds_are_heard_within_10_ms_of_the_truth(ambience: str | None) -> None:
    for scene in bounce_scenes(3, 11, FMT):
        scene = replace(scene, ambience=ambience)
        heard = thud_times(synthesise(scene, FMT).numpy(), FMT.sample_rate_hz)
        true = [time for time in ground_truth(scene, FMT).impacts_s if 0.01 < time < FMT.duration_s - 0.03]
        assert len(heard) >= len(true)
        assert max(min(abs(t - h) for h in heard) for t in true) < 0.010


def test_no_thuds_in_silence_noise_or_a_tone() -> None:
    draw = np.random.default_rng(0)
    time = np.arange(32000) / 16000
    for samples in (np.zeros(32000), draw.normal(0, 0.1, 32000), 0.3 * np.sin(2 * np.pi * 300 * time), np.zeros(3)):
        assert thud_times(samples.astype(np.float32), 16000) == []


def test_impacts_are_seen_between_frames(detectors: Detectors) -> None:
    """A frame lasts 83 ms; impacts are told to 20 ms."""
    for scene in bounce_scenes(4, 12, FMT):
        pixels = Footage(render([scene], FMT)[0], None, FMT.fps).pixels
        seen = visual_impacts(find_subjects(pixels, scene.background, detectors.colours)[0], FMT.fps)
        true = [t for t in ground_truth(scene, FMT).impacts_s if seen.first_s <= t <= seen.last_s]
        assert len(true) >= 1
        assert max(min(abs(t - s) for s in seen.times_s) for t in true) < 0.020


@pytest.mark.parametrize("shift_ms", [-100, 0, 70])
def test_shifted_thuds_give_the_shifted_offset(detectors: Detectors, shift_ms: int) -> None:
    scenes = bounce_scenes(3, 13, FMT)
    clips = []
    for scene in scenes:
        shifted = torch.roll(synthesise(scene, FMT), shift_ms * FMT.sample_rate_hz // 1000)
        clips.append(Footage(render([scene], FMT)[0], shifted, FMT.fps))
    cases = [Case("bounces", i, "a prompt", 0, scene) for i, scene in enumerate(scenes)]
    result = score_bounces(cases, clips, detectors)
    timing = result.measures["offset ms"]
    assert timing["n"] >= 3
    # 20 ms for impacts that are seen and 10 ms for thuds that are heard are the limits of a single event.
    assert timing["median_signed_ms"] == pytest.approx(shift_ms, abs=10)
    assert result.measures["bounces"]["value"] == 1.0
    assert (result.measures["within 40 ms"]["value"] > 0.9) == (shift_ms == 0)


def test_missing_thuds_count_as_missed(detectors: Detectors) -> None:
    scene = bounce_scenes(1, 14, FMT)[0]
    clip = Footage(render([scene], FMT)[0], torch.zeros(FMT.num_samples), FMT.fps)
    measures = score_bounces([Case("bounces", 0, "a prompt", 0, scene)], [clip], detectors).measures
    assert measures["offset ms"]["value"] is None
    assert measures["offset ms"]["num_missed"] >= 1
    assert measures["within 40 ms"]["value"] == 0.0


def test_pairing_uses_each_event_once_and_nearest_first() -> None:
    pairing = pair_impacts([0.5, 1.0], [0.52, 0.6, 1.9], (0.0, 1.5))
    assert pairing.offsets_ms == pytest.approx((20.0,))
    assert (pairing.num_missed, pairing.num_extra) == (1, 1)
    both = pair_impacts([0.5, 0.7], [0.55, 0.68], (0.0, 2.0))
    assert both.offsets_ms == pytest.approx((50.0, -20.0))
