"""What the audio codec is measured by, on sounds whose answer is known."""

from __future__ import annotations

from math import pi

import pytest
import torch

from vitascope.training.stages.audio_codec_validation import (
    CLASSES,
    NOISY,
    PURE,
    TONAL,
    ClassSounds,
    average_error_db,
    classes_told_apart,
    fluctuation_db,
    mel_error_db,
    onset_errors_ms,
    onset_s,
    si_sdr_db,
    validation_sounds,
)

RATE_HZ = 16_000


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tone(hz: float, num_samples: int = 16_000) -> torch.Tensor:
    return 0.3 * torch.sin(2 * pi * hz * torch.arange(num_samples) / RATE_HZ)[None]


def test_si_sdr_is_the_ratio_of_powers_and_does_not_hear_loudness() -> None:
    target, error = noise(2, 20_000), noise(2, 20_000, seed=1)
    error -= (error * target).sum(1, keepdim=True) / target.square().sum(1, keepdim=True) * target
    error *= (target.norm(dim=1) / error.norm(dim=1) / 10)[:, None]
    expected = torch.tensor([20.0, 20.0])
    torch.testing.assert_close(si_sdr_db(target, target + error), expected, rtol=0, atol=0.01)
    torch.testing.assert_close(si_sdr_db(target, 0.2 * (target + error)), expected, rtol=0, atol=0.01)


def test_errors_in_db_are_zero_for_equal_and_the_gain_for_a_gain() -> None:
    sound = noise(2, 16_000)
    for error_db in (mel_error_db, average_error_db):
        assert error_db(sound, sound, RATE_HZ) == 0
        assert error_db(sound, 2 * sound, RATE_HZ) == pytest.approx(6.02, abs=0.1)
    other = noise(2, 16_000, seed=1)  # another draw of the same noise: nothing to hear once it is averaged
    assert average_error_db(sound, other, RATE_HZ) < 0.6 * mel_error_db(sound, other, RATE_HZ)


def test_noise_fluctuates_by_itself_however_loud_and_frozen_noise_does_not() -> None:
    sound = noise(4, 30_720)
    assert fluctuation_db(sound) == pytest.approx(5.6, abs=0.4)
    assert fluctuation_db(3 * sound) == pytest.approx(fluctuation_db(sound), abs=0.05)
    frozen = sound[:, :512].repeat(1, 60)  # the same spectrum in every window, but for the padded ends
    assert fluctuation_db(frozen) < 1.5


def test_onsets_are_found_to_the_millisecond() -> None:
    group = ClassSounds(torch.zeros(2, 8000), ((0.2,), (0.3, 0.01)))
    decoded = torch.zeros(2, 8000)
    for row, start in ((0, 3200), (1, 4800)):
        group.samples[row, start : start + 500] = tone(400.0, 500)[0]
        decoded[row, start + 80 * row : start + 80 * row + 500] = tone(400.0, 500)[0]
    assert onset_s(group.samples[0], RATE_HZ) == pytest.approx(0.2, abs=1.1e-3)
    errors = onset_errors_ms(group, decoded, RATE_HZ)
    assert errors.tolist() == pytest.approx([0.0, 5.0], abs=0.1)  # the impact at 10 ms is too near the start to measure


def test_originals_are_told_apart_and_swapped_classes_are_not() -> None:
    assert set(PURE) == {*TONAL, *NOISY, "silence"} < set(CLASSES)
    sounds = validation_sounds(3, seed=0, hop=320)
    assert {name: group.samples.shape[0] for name, group in sounds.items()} == dict.fromkeys(CLASSES, 3)
    assert all(group.samples.shape[1] % 320 == 0 for group in sounds.values())
    assert not sounds["silence"].samples.any()
    assert all(len(times) for times in sounds["thud"].impacts_s)
    originals = {name: group.samples for name, group in sounds.items()}
    assert classes_told_apart(sounds, originals, RATE_HZ) > 0.8
    wrong = {**originals, "wind": originals["silence"], "silence": originals["wind"]}
    assert classes_told_apart(sounds, wrong, RATE_HZ) < classes_told_apart(sounds, originals, RATE_HZ)
