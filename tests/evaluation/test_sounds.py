"""What is heard in the world's sounds, and in sounds that are not the world's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vitascope.core.shapes import ClipFormat
from vitascope.evaluation.footage import Footage
from vitascope.evaluation.judging import Detectors
from vitascope.evaluation.prompts import SOUND_KINDS, Case, cases_of
from vitascope.evaluation.scoring import score_sounds
from vitascope.evaluation.sounds import SoundModel, build_sound_model
from vitascope.world.sound import synthesise

FMT = ClipFormat()


@pytest.fixture(scope="module")
def model() -> SoundModel:
    return build_sound_model(per_mixture=12)  # fewer than usual: less sharp, but faster


def _detectors(model: SoundModel) -> Detectors:
    detectors = Detectors()
    detectors.__dict__["sounds"] = model
    return detectors


def _score(cases: list[Case], sources: list[Case], model: SoundModel) -> dict[str, float]:
    frames = torch.zeros(FMT.num_frames, 3, 8, 8, dtype=torch.uint8)
    clips = [Footage(frames, synthesise(case.scene, FMT), FMT.fps) for case in sources]
    measures = score_sounds(cases, clips, _detectors(model)).measures
    return {name: measure["value"] for name, measure in measures.items()}


def test_sounds_of_every_kind_are_told_apart(model: SoundModel) -> None:
    cases = cases_of("sounds", 3 * len(SOUND_KINDS), 5, FMT)
    assert _score(cases, cases, model)["sound"] >= 20 / 21


def test_another_sound_than_the_one_asked_for_is_wrong(model: SoundModel) -> None:
    cases = cases_of("sounds", len(SOUND_KINDS), 5, FMT)
    by_kind: dict[str, Case] = dict(zip(SOUND_KINDS, cases, strict=True))
    for asked, made in (("wind", "rain"), ("soft music", "quiet"), ("thuds", "silence"), ("speech", "wind")):
        assert _score([by_kind[asked]], [by_kind[made]], model)["sound"] == 0.0


def test_garbage_is_unknown_and_silence_is_none(model: SoundModel) -> None:
    draw = np.random.default_rng(0)
    time = np.arange(FMT.num_samples) / FMT.sample_rate_hz
    for samples in (draw.normal(0, 0.3, FMT.num_samples), 0.1 * np.sin(2 * np.pi * 440 * time)):
        assert model.hear(samples.astype(np.float32), FMT.sample_rate_hz).ambience == "unknown"
    assert model.hear(np.zeros(FMT.num_samples, np.float32), FMT.sample_rate_hz).silent
