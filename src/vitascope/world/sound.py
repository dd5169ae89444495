"""What a scene sounds like: thuds of impacts, speech, and the ambience around them. Nothing is recorded.

N samples. Every sound is made in closed form or from white noise shaped in the frequency domain, and depends on the
scene (with its seed) and the clip format alone.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vitascope.core.random import derive_seed, generator
from vitascope.core.shapes import ClipFormat
from vitascope.world.motion import impact_times
from vitascope.world.scene import Scene, Subject
from vitascope.world.speech import speak, speech_timeline

THUD_PEAK = 0.7
SPEECH_RMS = 0.12
AMBIENCE_RMS: dict[str, float] = {"wind": 0.075, "rain": 0.06, "soft music": 0.06}
THUD_S = 0.4
"""Samples of a thud are computed for so long; by then it has fallen to about a thousandth."""

_KNEE = 0.8
"""Above this the sum of sounds is bent so that it stays below 1."""


def synthesise(scene: Scene, fmt: ClipFormat) -> Tensor:
    """The sound of the scene, (fmt.num_samples,) float32 in (-1, 1).

    Thuds start at the exact times of `motion.impact_times` and speech follows `speech.speech_timeline`; wind, rain or
    soft music lie under them. "silence" is all zeros.
    """
    num_samples, rate_hz = fmt.num_samples, fmt.sample_rate_hz
    sound_N = torch.zeros(num_samples)
    if scene.ambience == "silence":
        return sound_N
    if scene.ambience is not None:
        sound_N += ambience(scene.ambience, num_samples, rate_hz, scene.seed)
    for index, subject in enumerate(scene.subjects):
        for impact_s in impact_times(subject, fmt.duration_s):
            _add_thud(sound_N, subject, impact_s, rate_hz, derive_seed(scene.seed, "thud", index))
        if subject.syllables:
            timeline = speech_timeline(subject.syllables, fmt.duration_s)
            sound_N += speak(timeline, num_samples, rate_hz, SPEECH_RMS, derive_seed(scene.seed, "voice", index))
    return _limited(sound_N)


def synthesise_batch(scenes: Sequence[Scene], fmt: ClipFormat) -> Tensor:
    """The sounds of several scenes, (B, fmt.num_samples) float32."""
    return torch.stack([synthesise(scene, fmt) for scene in scenes])


def ambience(name: str, num_samples: int, sample_rate_hz: int, seed: int) -> Tensor:
    """Wind, rain or soft music (a key of AMBIENCE_RMS) at its usual loudness, (N,) float32."""
    makers = {"wind": _wind, "rain": _rain, "soft music": _music}
    sound_N = makers[name](num_samples, sample_rate_hz, seed)
    return sound_N * (AMBIENCE_RMS[name] / sound_N.square().mean().sqrt().clamp(min=1e-8))


def thud_pitch_hz(subject: Subject) -> float:
    """The larger the thing, the deeper the thud: 70 to 120 Hz."""
    return min(120.0, max(70.0, 95.0 * math.sqrt(0.3 / subject.radius)))


def _add_thud(sound_N: Tensor, subject: Subject, impact_s: float, rate_hz: int, seed: int) -> None:
    """Add a thud that starts at `impact_s`: a low tone that falls in pitch and a short burst of noise."""
    first = math.ceil(impact_s * rate_hz)
    last = min(len(sound_N), first + round(THUD_S * rate_hz))
    if first >= last:
        return
    time = torch.arange(round(THUD_S * rate_hz)) / rate_hz + (first / rate_hz - impact_s)
    pitch_hz, fall, fall_s = thud_pitch_hz(subject), 0.7, 0.02
    turns = pitch_hz * (time + fall * fall_s * (1.0 - torch.exp(-time / fall_s)))
    attack = (time / 0.0008).clamp(max=1.0)
    tone = torch.sin(2.0 * math.pi * (turns + 0.08)) * torch.exp(-time / 0.055)
    noise = _noise(len(time), seed, lambda f: 1.0 / (1.0 + (f / 2500.0) ** 4), rate_hz)
    thud = attack * (tone + 0.45 * noise / noise.abs().amax() * torch.exp(-time / 0.006))
    sound_N[first:last] += (THUD_PEAK / thud.abs().amax()) * thud[: last - first]


def _noise(num_samples: int, seed: int, shape: Callable[[Tensor], Tensor], rate_hz: int) -> Tensor:
    """Gaussian noise whose amplitude spectrum is `shape` of the frequency in Hz, (N,)."""
    size = math.ceil(num_samples / 512) * 512
    spectrum = torch.view_as_complex(torch.randn(size // 2 + 1, 2, generator=generator(seed, "noise")))
    return _shaped(spectrum, shape, rate_hz)[:num_samples]


def _shaped(spectrum: Tensor, shape: Callable[[Tensor], Tensor], rate_hz: int) -> Tensor:
    frequency = torch.linspace(0.0, rate_hz / 2, len(spectrum))
    return torch.fft.irfft(spectrum * shape(frequency))


def _band(low_hz: float, high_hz: float, order: int) -> Callable[[Tensor], Tensor]:
    """A band with Butterworth-like flanks of 6 `order` dB an octave."""

    def shape(frequency: Tensor) -> Tensor:
        low = (low_hz / frequency.clamp(min=1.0)) ** (2 * order)
        high = (frequency / high_hz) ** (2 * order)
        return ((1.0 + low) * (1.0 + high)).rsqrt()

    return shape


def _wind(num_samples: int, rate_hz: int, seed: int) -> Tensor:
    """Dark noise in gusts; the brighter part comes and goes more than the rumble."""
    rng = random.Random(derive_seed(seed, "gusts"))
    time_N = torch.arange(num_samples) / rate_hz
    gust_N = torch.zeros(num_samples)
    for pace_hz, share in ((0.45, 0.6), (1.1, 0.4)):
        gust_N += share * torch.sin(math.tau * (pace_hz * rng.uniform(0.85, 1.15) * time_N + rng.random()))
    rumble_N = _noise(num_samples, derive_seed(seed, "rumble"), _band(120.0, 320.0, 2), rate_hz)
    howl_N = _noise(num_samples, derive_seed(seed, "howl"), _band(380.0, 700.0, 3), rate_hz)
    return (1.0 + 0.45 * gust_N) * rumble_N + (0.6 + 0.6 * gust_N).clamp(min=0.0) * howl_N


def _rain(num_samples: int, rate_hz: int, seed: int) -> Tensor:
    """A bright hiss that crackles with drops: about 90 a second, each a flash of noise of a few milliseconds."""
    hiss_N = _noise(num_samples, derive_seed(seed, "hiss"), _band(1800.0, 12000.0, 2), rate_hz)
    draw = generator(seed, "drops")
    falls_N = torch.rand(num_samples, generator=draw) < 90.0 / rate_hz
    drops_N = falls_N * torch.rand(num_samples, generator=draw)
    size = math.ceil(num_samples / 512 + 1) * 512
    fading = torch.exp(-torch.arange(round(0.02 * rate_hz)) / (0.003 * rate_hz))
    drops_N = torch.fft.irfft(torch.fft.rfft(drops_N, n=size) * torch.fft.rfft(fading, n=size))[:num_samples]
    return hiss_N * (0.5 + 3.0 * drops_N)


_CHORDS = ((0, 4, 7, 12), (-3, 0, 4, 9), (-7, -3, 0, 5), (-5, -1, 2, 7))
"""Semitones from the key: first, sixth, fourth and fifth degree."""
_NOTE_S = 0.25
_NOTES_PER_CHORD = 4


def _music(num_samples: int, rate_hz: int, seed: int) -> Tensor:
    """Broken chords over a soft sustained one, in a key between A3 and E4; a note every quarter of a second."""
    rng = random.Random(derive_seed(seed, "music"))
    key_hz = 220.0 * 2.0 ** (rng.randrange(8) / 12.0)
    first_chord = rng.randrange(len(_CHORDS))
    order = rng.choice(((0, 1, 2, 3), (0, 2, 1, 3), (3, 2, 1, 0)))
    sound_N = torch.zeros(num_samples)
    for number in range(math.ceil(num_samples / rate_hz / _NOTE_S)):
        chord = _CHORDS[(first_chord + number // _NOTES_PER_CHORD) % len(_CHORDS)]
        first = round(number * _NOTE_S * rate_hz)
        pitch_hz = key_hz * 2.0 ** (chord[order[number % _NOTES_PER_CHORD]] / 12.0)
        _add_tone(sound_N, first, pitch_hz, rate_hz, 0.9)
        if number % _NOTES_PER_CHORD == 0:
            for step in chord[:3]:
                _add_pad(sound_N, first, key_hz * 2.0 ** (step / 12.0), rate_hz)
    return sound_N


def _add_tone(sound_N: Tensor, first: int, pitch_hz: float, rate_hz: int, length_s: float) -> None:
    """A plucked note: three partials, the higher ones fading sooner."""
    last = min(len(sound_N), first + round(length_s * rate_hz))
    time = torch.arange(last - first) / rate_hz
    envelope = (time / 0.012).clamp(max=1.0) * torch.exp(-time / 0.3) * ((length_s - time) / 0.1).clamp(max=1.0)
    sine, double = torch.sin(math.tau * pitch_hz * time), torch.cos(math.tau * pitch_hz * time).mul_(2.0)
    second = double * sine
    third = double * second - sine
    sound_N[first:last] += envelope * (sine + 0.35 * second + 0.15 * envelope * third)


def _add_pad(sound_N: Tensor, first: int, pitch_hz: float, rate_hz: int) -> None:
    """One voice of the sustained chord, which swells and fades."""
    length_s = _NOTE_S * _NOTES_PER_CHORD + 0.1
    last = min(len(sound_N), first + round(length_s * rate_hz))
    time = torch.arange(last - first) / rate_hz
    envelope = (time / 0.1).clamp(max=1.0) * ((length_s - time) / 0.1).clamp(max=1.0)
    sound_N[first:last] += 0.16 * envelope * torch.sin(math.tau * 0.5 * pitch_hz * time)


def _limited(sound_N: Tensor) -> Tensor:
    """The sound as it is up to 0.8; above, bent so that it never reaches 1."""
    size = sound_N.abs()
    if float(size.amax()) <= _KNEE:
        return sound_N
    room = 1.0 - _KNEE
    bent = _KNEE + room * torch.tanh((size - _KNEE) / room)
    return torch.where(size > _KNEE, bent.copysign(sound_N), sound_N)
