"""Speech: when each sound is made, and that the voice has the right resonances at the right time."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from vitascope.core.errors import InputError
from vitascope.world.scene import SYLLABLES, VISEMES, VOWELS
from vitascope.world.speech import REST, speak, speech_timeline, vowel_formants

RATE_HZ = 16000


def envelope_peaks(sound: Tensor, low_hz: float, high_hz: float) -> float:
    """The frequency in Hz, within a band, where the spectrum smoothed over the pitch has most energy."""
    power = torch.fft.rfft(sound * torch.hann_window(len(sound))).abs().square()
    width = max(1, round(130 * len(sound) / RATE_HZ)) | 1
    smooth = torch.nn.functional.avg_pool1d(power[None], width, 1, width // 2)[0]
    frequency = torch.arange(len(smooth)) * RATE_HZ / len(sound)
    smooth = smooth * ((frequency >= low_hz) & (frequency <= high_hz))
    return float(frequency[smooth.argmax()])


def test_a_timeline_covers_the_clip_without_holes() -> None:
    segments = speech_timeline(("ma", "o", "ee"), 2.0, start_s=1.0).segments
    assert segments[0].start_s == 1.0
    assert segments[-1].end_s == 3.0
    for before, after in pairwise(segments):
        assert before.end_s == after.start_s
        assert before.start_s < before.end_s
    assert [segment.phoneme for segment in segments] == [REST, "m", "a", REST, "o", REST, "ee", REST]
    assert [segment.viseme for segment in segments[1:3]] == ["closed", "open"]


@pytest.mark.parametrize("syllable", SYLLABLES)
def test_visemes_are_those_of_the_phonemes(syllable: str) -> None:
    for segment in speech_timeline((syllable,), 2.0).segments:
        wanted = "closed" if segment.phoneme == REST else segment.phoneme
        assert segment.viseme == "closed" if wanted == "closed" else segment.phoneme in VISEMES[segment.viseme]


def test_syllables_are_said_once_at_the_usual_pace_and_faster_if_they_must() -> None:
    segments = speech_timeline(("ma", "ba"), 5.0).segments
    assert segments[-1].start_s == pytest.approx(0.16 + 2 * 0.32)
    many = speech_timeline(("ma",) * 12, 2.0)
    assert len([s for s in many.segments if s.phoneme == "a"]) == 12
    assert many.segments[-1].end_s == 2.0
    assert many.segments[-1].start_s < 2.0


def test_a_silent_face_keeps_its_mouth_closed() -> None:
    (segment,) = speech_timeline((), 2.0).segments
    assert (segment.start_s, segment.end_s, segment.viseme, segment.phoneme) == (0.0, 2.0, "closed", REST)
    assert not speak(speech_timeline((), 2.0), 100, RATE_HZ, 0.1).any()


def test_the_segment_at_a_time() -> None:
    timeline = speech_timeline(("ma",), 2.0)
    assert [timeline.at(t).phoneme for t in (-1.0, 0.0, 0.2, 0.3, 1.0, 9.0)] == [REST, REST, "m", "a", REST, REST]


def test_unknown_syllables_and_vowels_are_refused() -> None:
    with pytest.raises(InputError, match=r"'xa'.*ma, mo"):
        speech_timeline(("xa",), 2.0)
    with pytest.raises(InputError, match="a, o, ee, oo, eh"):
        vowel_formants("u")


@pytest.mark.parametrize("vowel", VOWELS)
def test_vowels_have_their_first_two_resonances(vowel: str) -> None:
    timeline = speech_timeline((vowel,), 1.0)
    segment = next(s for s in timeline.segments if s.phoneme == vowel)
    sound = speak(timeline, RATE_HZ, RATE_HZ, 0.1)
    steady = sound[round((segment.start_s + 0.05) * RATE_HZ) : round((segment.end_s - 0.04) * RATE_HZ)]
    first, second, _ = vowel_formants(vowel)
    split = (first + second) / 2
    assert envelope_peaks(steady, 180.0, split) == pytest.approx(first, abs=110)
    assert envelope_peaks(steady, split, 3500.0) == pytest.approx(second, abs=160)


def test_the_voice_sounds_where_the_timeline_says() -> None:
    timeline = speech_timeline(("pa", "ma"), 2.0)
    sound = speak(timeline, 2 * RATE_HZ, RATE_HZ, 0.1)

    def level(segment_index: int) -> float:
        segment = timeline.segments[segment_index]
        trim = 0.02
        part = sound[round((segment.start_s + trim) * RATE_HZ) : round((segment.end_s - trim) * RATE_HZ)]
        return float(part.square().mean().sqrt())

    rest, p, first_a, m, second_a, end = map(level, range(6))
    assert max(rest, p, end) < 0.01
    assert first_a == pytest.approx(0.1, rel=0.25)
    assert second_a == pytest.approx(0.1, rel=0.25)
    assert 0.005 < m < 0.6 * first_a


def test_the_voice_is_the_same_every_time() -> None:
    timeline = speech_timeline(("pa", "o"), 1.0)
    first, again = (speak(timeline, RATE_HZ, RATE_HZ, 0.1, seed=3) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, speak(timeline, RATE_HZ, RATE_HZ, 0.1, seed=4))
