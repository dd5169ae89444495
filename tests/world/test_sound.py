"""Sound: thuds on time, ambiences told apart by their spectra, and levels that never clip."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vitascope.core.shapes import ClipFormat
from vitascope.world.captions import parse_caption
from vitascope.world.casting import draw_scene, place
from vitascope.world.motion import impact_times
from vitascope.world.scene import AMBIENCES, Scene
from vitascope.world.sound import AMBIENCE_RMS, THUD_PEAK, ambience, synthesise, synthesise_batch, thud_pitch_hz

FMT = ClipFormat()
RATE_HZ = FMT.sample_rate_hz


def scene_of(text: str, seed: int = 0) -> Scene:
    return place(parse_caption(text), seed, FMT)


def centroid_hz(sound: Tensor) -> float:
    power = torch.fft.rfft(sound).abs().square()
    return float((torch.linspace(0, RATE_HZ / 2, len(power)) * power).sum() / power.sum())


def peakiness(sound: Tensor) -> float:
    """Share of the energy in the strongest hundredth of the spectrum."""
    power = torch.fft.rfft(sound).abs().square().sort(descending=True).values
    return float(power[: len(power) // 100].sum() / power.sum())


@pytest.mark.parametrize("seed", range(8))
def test_a_thud_starts_at_its_impact(seed: int) -> None:
    scene = scene_of("a red ball bounces", seed)
    sound = synthesise(scene, FMT).abs()
    impacts = impact_times(scene.subjects[0], FMT.duration_s)
    assert len(impacts) >= 2
    for impact_s in impacts:
        first = round(impact_s * RATE_HZ)
        after = sound[first : first + round(0.15 * RATE_HZ)]
        if len(after) < 200:
            continue
        rise = int((after > 0.3 * THUD_PEAK).nonzero()[0])
        assert rise / RATE_HZ < 0.003
        assert float(sound[max(0, first - 80) : first].amax() if first else 0.0) < 0.05
    first = round(impacts[0] * RATE_HZ)
    assert float(sound[first : first + 800].amax()) == pytest.approx(THUD_PEAK, abs=0.02)
    assert float(sound[first + 3200 : first + 4000].amax()) < 0.05


def test_larger_things_thud_deeper() -> None:
    pitches = [
        thud_pitch_hz(scene_of(f"a {size} red ball bounces").subjects[0]) for size in ("small", "medium", "large")
    ]
    assert 120 >= pitches[0] > pitches[1] > pitches[2] >= 70


def test_without_impacts_speech_or_ambience_there_is_no_sound() -> None:
    assert not synthesise(scene_of("a red ball spins"), FMT).any()


@pytest.mark.parametrize("text", ["a red ball bounces, in silence", 'a red face says "ma o", in silence'])
def test_silence_removes_everything(text: str) -> None:
    assert not synthesise(scene_of(text), FMT).any()


def test_ambiences_are_told_apart_by_their_spectra() -> None:
    for seed in range(5):
        wind, rain, music = (ambience(name, FMT.num_samples, RATE_HZ, seed) for name in AMBIENCE_RMS)
        assert centroid_hz(wind) < 700
        assert centroid_hz(rain) > 3000
        assert centroid_hz(music) < 1000
        assert peakiness(music) > 0.75
        assert peakiness(wind) < 0.6
        assert peakiness(rain) < 0.2


@pytest.mark.parametrize("name", list(AMBIENCE_RMS))
def test_ambiences_have_their_loudness_and_depend_on_the_seed(name: str) -> None:
    sounds = [ambience(name, FMT.num_samples, RATE_HZ, seed) for seed in (1, 1, 2)]
    assert float(sounds[0].square().mean().sqrt()) == pytest.approx(AMBIENCE_RMS[name], rel=1e-3)
    assert torch.equal(sounds[0], sounds[1])
    assert not torch.equal(sounds[0], sounds[2])


@pytest.mark.parametrize("sound", ["with wind", "with rain", "with soft music"])
def test_thuds_stand_out_of_every_ambience(sound: str) -> None:
    scene = scene_of(f"a red ball bounces, {sound}", 3)
    impact = round(impact_times(scene.subjects[0], FMT.duration_s)[0] * RATE_HZ)
    clip = synthesise(scene, FMT)
    power = torch.stft(clip, 1024, 256, window=torch.hann_window(1024), return_complex=True).abs().square()
    low = power[2:11].sum(0)
    assert abs(int(low[: (impact + 4000) // 256].argmax()) * 256 - impact) < 1200
    assert float(clip[impact : impact + 400].abs().amax()) > 0.5


def test_sounds_fit_every_clip_and_never_clip() -> None:
    for fmt in (FMT, ClipFormat(num_frames=1), ClipFormat(fps=24, num_frames=61, sample_rate_hz=24000)):
        for seed in range(12):
            sound = synthesise(draw_scene(seed, fmt=fmt), fmt)
            assert sound.shape == (fmt.num_samples,)
            assert sound.dtype == torch.float32
            assert float(sound.abs().amax()) < 1.0


def test_a_batch_is_its_scenes() -> None:
    scenes = [
        scene_of("a red ball bounces", 1),
        *(scene_of(f'a blue face says "ma o" with {a}') for a in AMBIENCES[:2]),
    ]
    batch = synthesise_batch(scenes, FMT)
    assert batch.shape == (3, FMT.num_samples)
    for row, scene in zip(batch, scenes, strict=True):
        assert torch.equal(row, synthesise(scene, FMT))
