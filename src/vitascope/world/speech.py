"""What a drawn face says: when each sound is made (shared by the mouth and the voice), and the voice itself.

The voice is a source and a filter (Fant 1960; Klatt 1980, "Software for a cascade/parallel formant synthesizer"):
pulses of the glottis through resonances of the mouth, here applied frame by frame to the short-time spectrum of the
pulses. N samples, F short-time frames, K frequency bins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vitascope.core.errors import choice
from vitascope.core.random import generator
from vitascope.world.scene import CONSONANTS, SYLLABLES, VISEMES, VOWELS

SYLLABLE_S = 0.32
"""Usual length of a syllable; shorter where a clip could not hold them all."""
CONSONANT_S = 0.09
PAUSE_S = 0.06
LEAD_S = 0.16
"""Closed mouth before the first and, at least, after the last syllable."""
REST = ""
"""Phoneme of a closed, silent mouth."""

_VISEME_OF = {phoneme: viseme for viseme, phonemes in VISEMES.items() for phoneme in phonemes}


@dataclass(frozen=True)
class Segment:
    """One sound: from `start_s` to `end_s` the mouth has the shape `viseme` (a key of VISEMES) and says `phoneme`.

    A phoneme is a consonant or vowel of the vocabulary; "" is silence with the mouth closed.
    """

    start_s: float
    end_s: float
    viseme: str
    phoneme: str


@dataclass(frozen=True)
class SpeechTimeline:
    """The sounds of a clip in order, without holes: the first starts with the clip, the last ends with it."""

    segments: tuple[Segment, ...]

    def at(self, time_s: float) -> Segment:
        """The segment that is sounding at `time_s`; before the first or after the last, that one."""
        for segment in self.segments:
            if time_s < segment.end_s:
                return segment
        return self.segments[-1]


def split_syllable(syllable: str) -> tuple[str, str]:
    """Consonant ("" if none) and vowel. Raises InputError for a syllable outside the vocabulary."""
    choice("syllable", syllable, SYLLABLES)
    consonant = syllable[0] if syllable[0] in CONSONANTS else ""
    return consonant, syllable[len(consonant) :]


def speech_timeline(syllables: tuple[str, ...], duration_s: float, start_s: float = 0.0) -> SpeechTimeline:
    """When each sound of `syllables` is made in a clip that lasts from `start_s` for `duration_s` seconds.

    They are said once, 0.32 s each after a closed mouth of 0.16 s (all of it faster where the clip is too short), then
    the mouth stays closed. m, b and p close the mouth for 0.09 s; a bare vowel after another syllable follows a pause
    of 0.06 s, so that two syllables always come apart.
    """
    usual_s = 2 * LEAD_S + SYLLABLE_S * len(syllables)
    pace = min(1.0, duration_s / usual_s)
    pieces: list[tuple[float, str]] = [(LEAD_S, REST)]
    for index, syllable in enumerate(syllables):
        consonant, vowel = split_syllable(syllable)
        closure_s = CONSONANT_S if consonant else PAUSE_S if index else 0.0
        if closure_s:
            pieces.append((closure_s, consonant))
        pieces.append((SYLLABLE_S - closure_s, vowel))
    end_s = start_s + duration_s
    now_s = start_s
    segments: list[Segment] = []
    for length_s, phoneme in pieces if syllables else []:
        segments.append(Segment(now_s, now_s + pace * length_s, _viseme(phoneme), phoneme))
        now_s += pace * length_s
    segments.append(Segment(now_s, end_s, "closed", REST))
    return SpeechTimeline(tuple(segments))


def _viseme(phoneme: str) -> str:
    return _VISEME_OF[phoneme] if phoneme else "closed"


# The voice


@dataclass(frozen=True)
class _Voicing:
    """How a phoneme sounds: resonances in Hz, their bandwidths, and the loudness of the voice (0..1)."""

    formants_hz: tuple[float, float, float]
    bandwidths_hz: tuple[float, float, float]
    voice: float


_VOWEL_BANDWIDTHS_HZ = (70.0, 90.0, 130.0)
_VOICINGS: dict[str, _Voicing] = {
    "a": _Voicing((740.0, 1150.0, 2500.0), _VOWEL_BANDWIDTHS_HZ, 1.0),
    "o": _Voicing((500.0, 850.0, 2450.0), _VOWEL_BANDWIDTHS_HZ, 1.0),
    "ee": _Voicing((280.0, 2250.0, 2950.0), _VOWEL_BANDWIDTHS_HZ, 1.0),
    "oo": _Voicing((320.0, 700.0, 2250.0), _VOWEL_BANDWIDTHS_HZ, 1.0),
    "eh": _Voicing((540.0, 1800.0, 2500.0), _VOWEL_BANDWIDTHS_HZ, 1.0),
    "m": _Voicing((250.0, 1050.0, 2150.0), (60.0, 300.0, 300.0), 0.4),
    "b": _Voicing((200.0, 900.0, 2200.0), (80.0, 400.0, 400.0), 0.12),
    "p": _Voicing((500.0, 1200.0, 2400.0), (200.0, 250.0, 300.0), 0.0),
    REST: _Voicing((500.0, 1500.0, 2500.0), (200.0, 250.0, 300.0), 0.0),
}
_BURSTS: dict[str, tuple[float, float]] = {"b": (0.012, 0.02), "p": (0.035, 0.045)}
"""When the lips open: how long breath rushes out, and how long the voice takes to set in again, in seconds."""

PITCH_HZ = 120.0
_HOP_S = 0.008
_WINDOW_S = 0.032
_GLIDE_S = 0.04
"""How long the resonances take from one phoneme to the next."""
_SWELL_S = 0.02
"""How long the voice takes to swell or fade."""


def vowel_formants(vowel: str) -> tuple[float, float, float]:
    """The three resonances in Hz that the voice gives `vowel`. Raises InputError for anything else."""
    return _VOICINGS[choice("vowel", vowel, VOWELS)].formants_hz


def speak(timeline: SpeechTimeline, num_samples: int, sample_rate_hz: int, rms: float, seed: int = 0) -> Tensor:
    """The timeline as sound, (num_samples,) float32, which starts where its first segment does.

    `rms` is the root mean square of the vowels; a mouth that is closed and rests is silent. `seed` makes the breath.
    """
    spoken = [segment.end_s for segment in timeline.segments if segment.phoneme != REST]
    if not spoken:
        return torch.zeros(num_samples)
    hop, window_size = round(_HOP_S * sample_rate_hz), round(_WINDOW_S * sample_rate_hz)
    spoken_s = spoken[-1] - timeline.segments[0].start_s
    num_spoken = min(num_samples, round(spoken_s * sample_rate_hz) + window_size)
    voice_N, breath_N = _loudness(timeline, num_spoken, sample_rate_hz)
    noise_N = torch.randn(num_spoken, generator=generator(seed, "breath"))
    source_N = voice_N * _pulses(num_spoken, sample_rate_hz) + 0.06 * breath_N * noise_N
    window = torch.hann_window(window_size)
    spectrum_KF = torch.stft(source_N, window_size, hop, window=window, return_complex=True)
    formants_F3, bandwidths_F3 = _resonances(timeline, spectrum_KF.shape[1], hop / sample_rate_hz)
    frequency_K = torch.linspace(0.0, sample_rate_hz / 2, spectrum_KF.shape[0])
    spectrum_KF = spectrum_KF * _mouth(frequency_K, formants_F3, bandwidths_F3)
    sound_N = torch.istft(spectrum_KF, window_size, hop, window=window, length=num_spoken)
    voiced_N = voice_N > 0.6
    level = sound_N[voiced_N].square().mean().sqrt() if bool(voiced_N.any()) else sound_N.square().mean().sqrt()
    return torch.nn.functional.pad(sound_N * (rms / level.clamp(min=1e-8)), (0, num_samples - num_spoken))


def _pulses(num_samples: int, sample_rate_hz: int) -> Tensor:
    """One pulse of the glottis for every turn of a phase whose pitch sways by 5% and falls slowly, (N,)."""
    time_N = torch.arange(num_samples, dtype=torch.float64) / sample_rate_hz
    pitch_N = PITCH_HZ * (1.0 + 0.05 * torch.sin(2.0 * math.pi * 1.4 * time_N) + 0.06 * torch.exp(-time_N))
    turns_N = (pitch_N / sample_rate_hz).cumsum(0)
    starts = torch.nonzero(turns_N[1:].floor() > turns_N[:-1].floor())[:, 0]
    late = ((turns_N[1:].floor() - turns_N[:-1]) / (turns_N[1:] - turns_N[:-1]))[starts].float()
    pulses_N = torch.zeros(num_samples)
    pulses_N[starts] = 1.0 - late
    pulses_N[starts + 1] = late
    return pulses_N


def _loudness(timeline: SpeechTimeline, num_samples: int, sample_rate_hz: int) -> tuple[Tensor, Tensor]:
    """Loudness of voice and breath at every sample, (N,) each; they swell and fade within the segments."""
    start_s = timeline.segments[0].start_s
    time_N = torch.arange(num_samples) / sample_rate_hz + start_s
    voice_N, breath_N = torch.zeros(num_samples), torch.zeros(num_samples)
    before = REST
    for segment in timeline.segments:
        rush_s, onset_s = _BURSTS.get(before, (0.0, 0.0)) if segment.phoneme in VOWELS else (0.0, 0.0)
        after_N, left_N = time_N - segment.start_s, segment.end_s - time_N
        swell_N = ((after_N - onset_s) / _SWELL_S).clamp(0.0, 1.0) * (left_N / _SWELL_S).clamp(0.0, 1.0)
        voice_N += _VOICINGS[segment.phoneme].voice * swell_N
        if rush_s:
            breath_N += (after_N >= 0) * torch.exp(-after_N.clamp(min=0.0) / (0.5 * rush_s)) * (left_N > 0)
        before = segment.phoneme
    return voice_N, breath_N


def _resonances(timeline: SpeechTimeline, num_frames: int, hop_s: float) -> tuple[Tensor, Tensor]:
    """Formants and bandwidths in Hz at every frame, (F, 3) each; a silence takes those of the sound that follows."""
    time_F = torch.arange(num_frames) * hop_s + timeline.segments[0].start_s
    targets: list[_Voicing] = []
    following = _VOICINGS[REST]
    for segment in reversed(timeline.segments):
        if segment.phoneme not in (REST, "p"):
            following = _VOICINGS[segment.phoneme]
        targets.insert(0, following)
    values = torch.tensor([target.formants_hz + target.bandwidths_hz for target in targets])
    track_F6 = values[0].repeat(num_frames, 1)
    for segment, value in zip(timeline.segments[1:], values[1:], strict=True):
        arrived_F = ((time_F - segment.start_s) / _GLIDE_S + 0.5).clamp(0.0, 1.0)
        track_F6 += arrived_F[:, None] * (value - track_F6)
    return track_F6[:, :3], track_F6[:, 3:]


def _mouth(frequency_K: Tensor, formants_F3: Tensor, bandwidths_F3: Tensor) -> Tensor:
    """Transfer function (K, F), complex: the product of the resonances f0^2 / (f0^2 - f^2 + i f b), and the fall of
    about 6 dB an octave that is left of the pulses after they radiate from the lips."""
    inverse_KF = torch.complex(torch.ones(()), frequency_K / 600.0)[:, None]
    for formant_F, bandwidth_F in zip(formants_F3.unbind(1), bandwidths_F3.unbind(1), strict=True):
        ratio_KF = frequency_K[:, None] / formant_F
        inverse_KF = inverse_KF * torch.complex(1.0 - ratio_KF**2, ratio_KF * (bandwidth_F / formant_F))
    return inverse_KF.reciprocal()
