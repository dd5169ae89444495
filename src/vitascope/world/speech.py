"""What a drawn face says: when each sound is made (shared by the mouth and the voice), and the voice itself.

The voice is a source and a filter (Fant 1960; Klatt 1980, "Software for a cascade/parallel formant synthesizer"): pulses
of the glottis through resonances of the mouth, here applied frame by frame to the short-time spectrum of the pulses.
N samples, F short-time frames, K frequency bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vitascope.core.errors import choice
from vitascope.world.scene import CONSONANTS, SYLLABLES, VISEMES

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


@dataclass(frozen=True)
class _Voicing:
    """How a phoneme sounds: resonances in Hz, loudness of the pulses and of the breath (0..1)."""

    formants_hz: tuple[float, float, float]
    bandwidths_hz: tuple[float, float, float]
    voice: float
    breath: float = 0.0


_VOWEL_BANDWIDTHS_HZ = (70.0, 90.0, 130.0)
_VOICINGS: dict[str, _Voicing] = {
    "a": _Voicing((740.0, 1150.0, 2500.0), _VOWEL_BANDWIDTHS_HZ, 1.0),
    "o": _Voicing((500.0, 850.0, 2450.0), _VOWEL_BANDWIDTHS_HZ, 1.0),
    "ee": _Voicing((280.0, 2250.0, 2950.0), _VOWEL_BANDWIDTHS_HZ, 0.9),
    "oo": _Voicing((320.0, 700.0, 2250.0), _VOWEL_BANDWIDTHS_HZ, 0.9),
    "eh": _Voicing((540.0, 1800.0, 2500.0), _VOWEL_BANDWIDTHS_HZ, 1.0),
    "m": _Voicing((250.0, 1050.0, 2150.0), (60.0, 300.0, 300.0), 0.35),
    "b": _Voicing((200.0, 900.0, 2200.0), (80.0, 400.0, 400.0), 0.10),
    "p": _Voicing((500.0, 1200.0, 2400.0), (200.0, 250.0, 300.0), 0.0),
    REST: _Voicing((500.0, 1500.0, 2500.0), (200.0, 250.0, 300.0), 0.0),
}


def speech_formants(phoneme: str) -> tuple[float, float, float]:
    """The three resonances in Hz that the voice gives `phoneme`."""
    return _VOICINGS[choice("phoneme", phoneme, _VOICINGS)].formants_hz
