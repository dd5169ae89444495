"""When things hit: thuds in samples, impacts in a subject's path, and how far apart the two are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from vitascope.evaluation.footage import Floats
from vitascope.evaluation.subjects import SubjectTrack

ARM_S = 0.012
"""Length of the two windows, before and after, whose levels are compared."""
THUD_BAND_HZ = (40.0, 1500.0)
APART_S = 0.1
"""Two thuds are no closer than this."""
MATCH_S = 0.25
"""An impact and a thud farther apart than this have nothing to do with each other."""


@dataclass(frozen=True)
class Threshold:
    """What counts as a thud: the least rise of the level (mean of |x|, full scale 1), and the least share of the
    largest rise in the clip."""

    rise: float
    share: float


SURE = Threshold(0.10, 0.35)
"""Above gusts of wind and the onsets of syllables: for sounds of any kind."""
FAINT = Threshold(0.045, 0.22)
"""For clips with nothing but thuds in them, the first of which a codec may weaken."""


def thud_times(samples: Floats, sample_rate_hz: int, threshold: Threshold = SURE) -> list[float]:
    """Times in seconds of the thuds in samples (N,).

    The level (mean of |x| in the band 40 to 1500 Hz) over 12 ms after an instant less that over 12 ms before it peaks
    at the onset of anything that starts at once and dies away slowly; peaks above the threshold count.
    """
    arm = max(2, round(ARM_S * sample_rate_hz))
    if len(samples) < 4 * arm:
        return []
    spectrum = np.fft.rfft(samples.astype(np.float64), 2 * len(samples))
    frequency = np.fft.rfftfreq(2 * len(samples), 1 / sample_rate_hz)
    low, high = THUD_BAND_HZ
    spectrum *= 1 / (1 + (low / np.maximum(frequency, 1)) ** 4) / (1 + (frequency / high) ** 4)
    size = np.abs(np.fft.irfft(spectrum)[: len(samples)])
    total = np.concatenate([np.zeros(arm + 1), np.cumsum(size), np.full(arm, size.sum())])
    after = (total[2 * arm :] - total[arm:-arm]) / arm
    # Near the start there is less to look back on; in the first half window a thud and a beginning are alike.
    before = (total[arm:-arm] - total[: -2 * arm]) / np.clip(np.arange(len(after)), arm // 2, arm)
    rise = after - before
    rise[: arm // 2] = 0.0
    least = max(threshold.rise, threshold.share * float(rise.max()))
    return _peaks(rise, least, round(APART_S * sample_rate_hz), sample_rate_hz)


def _peaks(values: np.ndarray, least: float, apart: int, rate_hz: int) -> list[float]:
    """Times of peaks of at least `least`, the highest first, none within `apart` samples of a higher one."""
    left = values.copy()
    times: list[float] = []
    while float(left.max()) >= least:
        place = int(left.argmax())
        times.append(place / rate_hz)
        left[max(0, place - apart) : place + apart + 1] = -np.inf
    return sorted(times)


@dataclass(frozen=True)
class Impacts:
    """Times in seconds at which a subject is seen to hit the ground, and the span in which such times could be told."""

    times_s: tuple[float, ...]
    first_s: float
    last_s: float


def visual_impacts(track: SubjectTrack, fps: float) -> Impacts:
    """Impacts of a bouncing subject, to a fraction of a frame.

    The path of its lowest point is cut at its lowest places; each flight gets a parabola, all of one curvature
    (gravity, the median over flights of four frames or more); an impact is where the parabolas of two successive
    flights meet. The frames nearest to contact are left out of both where a flight has frames to spare.
    """
    seen = np.nonzero(track.present)[0]
    nothing = Impacts((), 0.0, 0.0)
    if len(seen) < 5:
        return nothing
    time, low = seen / fps, track.bottom[seen].astype(np.float64)
    reach = float(low.max() - low.min())
    turns = [
        i
        for i in range(1, len(low) - 1)
        if low[i] >= low[i - 1] and low[i] > low[i + 1] and low[i] > low.min() + 0.55 * reach
    ]
    flights = [np.arange(a, b + 1) for a, b in zip([0, *turns], [*turns, len(low) - 1], strict=True)]
    inner = [_without_contacts(flight, turns) for flight in flights]
    curvature = [np.polyfit(time[part], low[part], 2)[0] for part in inner if len(part) >= 4]
    if not curvature:
        return nothing
    gravity = float(np.median(curvature))
    lines = [
        np.polyfit(time[part], low[part] - gravity * time[part] ** 2, 1) if len(part) >= 2 else None for part in inner
    ]
    found = []
    for before, after in pairwise(lines):
        if before is not None and after is not None and abs(before[0] - after[0]) > 1e-6:
            found.append(float((after[1] - before[1]) / (before[0] - after[0])))
    told = [i for i, line in enumerate(lines) if line is not None]
    first, last = inner[told[0]], inner[told[-1]]
    return Impacts(tuple(found), float(time[first[min(1, len(first) - 1)]]), float(time[last[max(0, len(last) - 2)]]))


def _without_contacts(flight: np.ndarray, turns: list[int]) -> np.ndarray:
    inner = np.array([i for i in flight if i not in turns], dtype=np.int64)
    return inner if len(inner) >= 2 else flight


@dataclass(frozen=True)
class Pairing:
    """Signed offsets thud - impact in milliseconds (positive: the sound is late), and events without a partner."""

    offsets_ms: tuple[float, ...]
    num_missed: int
    num_extra: int


def pair_impacts(impacts_s: Sequence[float], thuds_s: Sequence[float], span_s: tuple[float, float]) -> Pairing:
    """Pair every impact with its nearest thud, nearest pairs first; each is used once.

    Missed: impacts without a thud within 250 ms. Extra: thuds within `span_s` (where impacts can be told) without an
    impact.
    """
    pairs = sorted((abs(t - i), a, b) for a, i in enumerate(impacts_s) for b, t in enumerate(thuds_s))
    used_impacts: set[int] = set()
    used_thuds: set[int] = set()
    offsets: list[tuple[int, float]] = []
    for distance, a, b in pairs:
        if distance > MATCH_S or a in used_impacts or b in used_thuds:
            continue
        used_impacts.add(a)
        used_thuds.add(b)
        offsets.append((a, 1000 * (thuds_s[b] - impacts_s[a])))
    extra = [t for b, t in enumerate(thuds_s) if b not in used_thuds and span_s[0] <= t <= span_s[1]]
    return Pairing(tuple(value for _, value in sorted(offsets)), len(impacts_s) - len(used_impacts), len(extra))
