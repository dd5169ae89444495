"""What is heard: wind, rain, soft music or nothing, with or without speech, with or without thuds.

A clip's sound is boiled down to levels in four bands (quiet, middle and loud moments), how tonal it is and how much its
level moves. The densities of these figures (Gaussian, one covariance) are measured on the world's own sounds, at varied
loudness, smeared, dulled and with some hiss; the likeliest of the eight mixtures is what is heard.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import numpy as np

from vitascope.core.random import derive_seed
from vitascope.core.shapes import ClipFormat
from vitascope.evaluation.footage import Floats
from vitascope.evaluation.onsets import thud_times
from vitascope.world.casting import SceneMix, draw_scene
from vitascope.world.sound import synthesise

BANDS_HZ = ((90.0, 350.0), (350.0, 1000.0), (1000.0, 2200.0), (2200.0, 7500.0))
SILENT_DB = -62.0
"""Levels below this (root mean square in a band, full scale 0 dB) count as silence."""
AMBIENCE_HEARD = ("none", "wind", "rain", "soft music")
THUD_LASTS_S = 0.32
_WINDOW_S, _HOP_S = 0.064, 0.016
_PER_MIXTURE = 32
_SMEAR_S, _MOST_SMEAR = 0.02, 0.9
UNKNOWN = "unknown"
FARTHEST = 160.0
"""Squared distance (Mahalanobis) from the nearest mixture beyond which a sound is none of them."""


@dataclass(frozen=True)
class Heard:
    """The ambience ("none", "wind", "rain" or "soft music"; "unknown" for a sound that is none of the world's), whether
    somebody speaks, and the times of the thuds in seconds."""

    ambience: str
    speech: bool
    thuds_s: tuple[float, ...]

    @property
    def silent(self) -> bool:
        """Nothing at all."""
        return self.ambience == "none" and not self.speech and not self.thuds_s


def sound_features(samples: Floats, rate_hz: int, thuds_s: list[float]) -> Floats:
    """Fifteen figures: level in dB at the 10th, 50th and 90th percentile over time in each band, tonality of quiet and
    of all moments, and standard deviation of the overall level in dB. Moments within 0.32 s after a thud are
    left out (within less where thuds are too close for that).

    Tonality is the mean over moments of the level difference in dB between the highest and the median bin from 90 to
    1500 Hz, counted only where there is something to hear.
    """
    size, hop = round(_WINDOW_S * rate_hz), round(_HOP_S * rate_hz)
    padded = np.pad(samples.astype(np.float64), (0, max(0, size - len(samples))))
    starts = np.arange(0, len(padded) - size + 1, hop)
    middle_s = (starts + size / 2) / rate_hz
    free = [
        _clear_of(thuds_s, middle_s, lasts_s) for lasts_s in (THUD_LASTS_S, 0.75 * THUD_LASTS_S, 0.5 * THUD_LASTS_S)
    ]
    starts = starts[next((part for part in free if part.sum() >= 6), np.ones(len(starts), np.bool_))]
    window = np.hanning(size)
    pieces = np.stack([padded[start : start + size] for start in starts]) * window
    power = np.abs(np.fft.rfft(pieces)) ** 2 * 2 / (size * (window**2).sum())
    frequency = np.fft.rfftfreq(size, 1 / rate_hz)
    levels = []
    for low, high in BANDS_HZ:
        band = power[:, (frequency >= low) & (frequency < high)].sum(1)
        levels.append(np.maximum(10 * np.log10(band + 1e-12), SILENT_DB))
    overall = 10 * np.log10(sum(10 ** (level / 10) for level in levels))
    near = np.maximum(10 * np.log10(power[:, (frequency >= 90) & (frequency < 1500)] + 1e-12), SILENT_DB - 20)
    tonal = np.where(overall > SILENT_DB + 10, near.max(1) - np.median(near, axis=1), 15.0)
    quiet = overall <= np.percentile(overall, 30)
    figures = [np.percentile(level, share) for level in levels for share in (10, 50, 90)]
    return np.array([*figures, tonal[quiet].mean(), tonal.mean(), overall.std()], np.float32)


def _clear_of(thuds_s: list[float], middle_s: np.ndarray, lasts_s: float) -> np.ndarray:
    """Which moments (window middles in seconds) no thud is heard in."""
    free = np.ones(len(middle_s), np.bool_)
    for thud_s in thuds_s:
        free &= (middle_s < thud_s - 0.5 * _WINDOW_S) | (middle_s > thud_s + lasts_s)
    return free


@dataclass(frozen=True)
class SoundModel:
    """Mean figures of the eight mixtures (8, 15), the inverse of their common covariance (15, 15), and for every
    ambience that of its two mixtures, without and with speech (4, 15, 15)."""

    means: Floats
    precision: Floats
    speech_precision: Floats

    def hear(self, samples: Floats, rate_hz: int) -> Heard:
        """What is heard in samples (N,) in [-1, 1]."""
        thuds = thud_times(samples, rate_hz)
        figures = sound_features(samples, rate_hz, thuds)
        gap = figures - self.means
        distances = np.einsum("ki,ij,kj->k", gap, self.precision, gap)
        nearest = int(np.argmin(distances))
        if distances[nearest] > FARTHEST:
            return Heard(UNKNOWN, False, tuple(thuds))
        ambience = nearest % len(AMBIENCE_HEARD)
        pair = gap[[ambience, ambience + len(AMBIENCE_HEARD)]]
        without, with_speech = np.einsum("ki,ij,kj->k", pair, self.speech_precision[ambience], pair)
        speech = bool(with_speech < without)
        return Heard(AMBIENCE_HEARD[ambience], speech, () if speech else tuple(thuds))


def build_sound_model(seed: int = 0, per_mixture: int = _PER_MIXTURE) -> SoundModel:
    """Measure the densities on the world's sounds, `per_mixture` of each kind (seconds of work)."""
    fmt = ClipFormat()
    means, spreads = [], []
    for speech in (False, True):
        for ambience in AMBIENCE_HEARD:
            figures = np.stack([_example(seed, ambience, speech, index, fmt) for index in range(per_mixture)])
            means.append(figures.mean(0))
            spreads.append(np.cov(figures.T))
    pairs = [_precision(spreads[i :: len(AMBIENCE_HEARD)]) for i in range(len(AMBIENCE_HEARD))]
    return SoundModel(np.stack(means).astype(np.float32), _precision(spreads), np.stack(pairs))


def _precision(spreads: list[np.ndarray]) -> Floats:
    """Inverse of the mean of covariances, widened so that no figure counts for more than 1 dB."""
    covariance = np.mean(spreads, axis=0)
    covariance += np.diag(0.1 * np.diag(covariance) + 1.0)
    return np.linalg.inv(covariance).astype(np.float32)


def _example(seed: int, ambience: str, speech: bool, index: int, fmt: ClipFormat) -> Floats:
    """Figures of one sound of the world, made louder or quieter, smeared, dulled, and with hiss."""
    name = derive_seed(seed, "sound", ambience, str(speech), index)
    mix = SceneMix(two_subjects=0.0, face=float(speech), bounces=0.4, wind=0, rain=0, soft_music=0, silence=0)
    scene = replace(draw_scene(name, mix=mix), ambience=None if ambience == "none" else ambience)
    rng, draw = random.Random(name), np.random.default_rng(name % 2**32)
    samples = synthesise(scene, fmt).numpy() * 10 ** (rng.uniform(-4, 4) / 20)
    smear = rng.uniform(0, _MOST_SMEAR)
    samples = (1 - smear) * samples + smear * _smeared(samples, draw, fmt.sample_rate_hz)
    samples = samples + draw.normal(size=len(samples)) * 10 ** (rng.uniform(-80, -52) / 20)
    dull = rng.choice((0.0, 0.2, 0.4))
    samples = (1 - dull) * samples + dull * np.concatenate([samples[:1], samples[:-1]])
    sound = samples.astype(np.float32)
    return sound_features(sound, fmt.sample_rate_hz, thud_times(sound, fmt.sample_rate_hz))


def _smeared(samples: np.ndarray, draw: np.random.Generator, rate_hz: int) -> np.ndarray:
    """The samples with new phases in their short-time spectrum: what a coder that keeps levels alone gives."""
    size = round(_SMEAR_S * rate_hz) // 4 * 4
    hop, window = size // 4, np.hanning(size + 1)[:-1]
    padded = np.pad(samples, (size, 2 * size))
    pieces = np.lib.stride_tricks.sliding_window_view(padded, size)[::hop] * window
    spectrum = np.abs(np.fft.rfft(pieces)) * np.exp(2j * np.pi * draw.random((len(pieces), size // 2 + 1)))
    again = np.fft.irfft(spectrum, size) * window
    total = np.zeros(len(padded))
    for quarter in range(4):
        part = again[quarter::4].ravel()
        total[quarter * hop : quarter * hop + len(part)] += part
    # Four squared Hann windows a place add up to 1.5; their random phases add in power.
    return total[size : size + len(samples)] / np.sqrt(1.5)
