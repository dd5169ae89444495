"""Scores of each group of an evaluation, from its clips alone. What was asked for is only compared with what was seen.

A measure is a dictionary of plain values with `n`; shares carry their 95% Wilson interval.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

import numpy as np
import torch

from vitascope.core.shapes import ClipFormat
from vitascope.evaluation.fidelity import log_spectral_distance_db, psnr_db, snr_per_band_db, ssim
from vitascope.evaluation.footage import Footage
from vitascope.evaluation.judging import NOTHING, Detectors, Seen, look, look_at_camera
from vitascope.evaluation.onsets import FAINT, Pairing, pair_impacts, thud_times, visual_impacts
from vitascope.evaluation.producing import middle_frame, true_clip
from vitascope.evaluation.prompts import DIVERSITY_SEEDS, Case
from vitascope.evaluation.statistics import OffsetSummary, Share
from vitascope.evaluation.temporal import Between, background_flicker, novelty_between, seed_diversity, steadiness
from vitascope.world.motion import impact_times

Measures = dict[str, dict[str, Any]]
CORE_ATTRIBUTES = ("colour", "shape", "motion", "background")
CLOSE_MS = 40.0
_EDGE_S = 0.06
"""A thud so near the end of a clip need not be heard."""


@dataclass(frozen=True)
class GroupResult:
    """Measures of a group and a row for every clip, both as JSON values; offsets_ms: thud - impact, where measured."""

    measures: Measures
    rows: list[dict[str, Any]]
    offsets_ms: list[float] = field(default_factory=list)


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean, median, 5th and 95th percentile and n of the finite values."""
    finite = np.asarray([v for v in values if np.isfinite(v)], np.float64)
    if not len(finite):
        return {"value": None, "median": None, "p5": None, "p95": None, "n": 0}
    low, middle, high = np.percentile(finite, (5, 50, 95))
    return {
        "value": float(finite.mean()),
        "median": float(middle),
        "p5": float(low),
        "p95": float(high),
        "n": len(finite),
    }


def _row(case: Case, **values: object) -> dict[str, Any]:
    return {"number": case.number, "prompt": case.prompt, "seed": case.seed, **values}


def score_single(cases: Sequence[Case], clips: Sequence[Footage], detectors: Detectors) -> GroupResult:
    """Attributes of one subject, all four of the core ones at once, and how steady clip and subject are."""
    rows, outcomes, steady = [], {name: [] for name in (*CORE_ATTRIBUTES, "size")}, []
    for case, clip in zip(cases, clips, strict=True):
        seen = look(clip, detectors)
        asked = _asked(case)
        found = {name: seen.value(name) for name in outcomes}
        for name, values in outcomes.items():
            values.append(found[name] == asked[name])
        steady.append(_steadiness(clip, seen))
        rows.append(_row(case, asked=asked, seen=found, num_subjects=len(seen.subjects), **steady[-1]))
    measures = {name: Share.of(values).as_dict() for name, values in outcomes.items()}
    together = [all(outcomes[name][i] for name in CORE_ATTRIBUTES) for i in range(len(rows))]
    measures["all four"] = Share.of(together).as_dict()
    measures["one subject"] = Share.of([row["num_subjects"] == 1 for row in rows]).as_dict()
    for name in steady[0]:
        measures[name] = summary([each[name] for each in steady])
    return GroupResult(measures, rows)


def _asked(case: Case) -> dict[str, str]:
    subject = case.scene.subjects[0]
    names = ("colour", "shape", "motion", "size")
    return {name: getattr(subject, name) for name in names} | {"background": case.scene.background}


def _steadiness(clip: Footage, seen: Seen) -> dict[str, float]:
    """Flicker of the still background (levels); presence, colour drift (levels), jerk (px) of the largest subject."""
    if not seen.subjects:
        return {
            "flicker": background_flicker(clip.frames),
            "present": 0.0,
            "colour_drift": np.nan,
            "path_jerk_px": np.nan,
        }
    track = seen.subjects[0].track
    height = clip.frames.shape[-2]
    steady = steadiness(track.rgb, track.centre * np.float32(height / 2), track.present)
    reach = max(1, height // 10)
    foreground = np.zeros_like(track.mask)
    for subject in seen.subjects:
        foreground |= _boxes(subject.track.mask, reach)
    flicker = background_flicker(clip.frames, foreground)
    return {
        "flicker": flicker,
        "present": steady.present,
        "colour_drift": steady.colour_drift,
        "path_jerk_px": steady.path_jerk_px,
    }


def _boxes(mask: np.ndarray, margin: int) -> np.ndarray:
    """Bounding boxes, wider by `margin`, of the mask (T, H, W) in every frame: blur and shadows lie within."""
    boxes = np.zeros_like(mask)
    for box, frame in zip(boxes, mask, strict=True):
        ys, xs = np.nonzero(frame)
        if len(ys):
            top, left = max(0, ys.min() - margin), max(0, xs.min() - margin)
            box[top : ys.max() + 2 * margin, left : xs.max() + margin + 1] = True
    return boxes


def score_pairs(cases: Sequence[Case], clips: Sequence[Footage], detectors: Detectors) -> GroupResult:
    """Both subjects with colour, shape and motion; which detection is which subject is left to the best match."""
    rows = []
    for case, clip in zip(cases, clips, strict=True):
        seen = look(clip, detectors)
        wanted = [(s.colour, s.shape, s.motion) for s in case.scene.subjects]
        found = [(s.colour, s.shape, s.motion) for s in seen.subjects]
        padded = found + [(NOTHING,) * 3] * max(0, len(wanted) - len(found))
        matches = [list(zip(wanted, order, strict=True)) for order in permutations(padded, len(wanted))]
        best = max(matches, key=lambda match: sum(a == b for pair in match for a, b in zip(*pair, strict=True)))
        right = {name: all(w[i] == f[i] for w, f in best) for i, name in enumerate(("colour", "shape", "motion"))}
        right |= {"count": len(found) == len(wanted), "background": seen.background == case.scene.background}
        rows.append(_row(case, asked=wanted, seen=found, right=right, all_right=all(right.values())))
    measures = {f"both {name}": Share.of([row["right"][name] for row in rows]).as_dict() for name in rows[0]["right"]}
    measures["all of both"] = Share.of([row["all_right"] for row in rows]).as_dict()
    return GroupResult(measures, rows)


def score_camera(cases: Sequence[Case], clips: Sequence[Footage], detectors: Detectors) -> GroupResult:
    """Agreement of the camera move."""
    rows = []
    for case, clip in zip(cases, clips, strict=True):
        rows.append(_row(case, asked=case.scene.camera, seen=look_at_camera(clip, detectors)))
    measures: Measures = {"camera": Share.of([row["asked"] == row["seen"] for row in rows]).as_dict()}
    for verb in sorted({row["asked"].split()[0] for row in rows}):
        chosen = [row for row in rows if row["asked"].split()[0] == verb]
        measures[f"camera {verb}"] = Share.of([row["asked"] == row["seen"] for row in chosen]).as_dict()
    return GroupResult(measures, rows)


def score_sounds(cases: Sequence[Case], clips: Sequence[Footage], detectors: Detectors) -> GroupResult:
    """Ambience, speech and thuds heard as asked for."""
    rows = []
    for case, clip in zip(cases, clips, strict=True):
        heard = detectors.sounds.hear(clip.samples, clip.sample_rate_hz)
        found = {"ambience": heard.ambience, "speech": heard.speech, "thuds": bool(heard.thuds_s)}
        asked = _asked_sound(case, len(clip.frames) / clip.fps)
        rows.append(_row(case, asked=asked, seen=found, right=asked == found))
    measures: Measures = {"sound": Share.of([row["right"] for row in rows]).as_dict()}
    for name in ("ambience", "speech", "thuds"):
        measures[name] = Share.of([row["asked"][name] == row["seen"][name] for row in rows]).as_dict()
    return GroupResult(measures, rows)


def _asked_sound(case: Case, duration_s: float) -> dict[str, str | bool]:
    scene = case.scene
    silent = scene.ambience == "silence"
    impacts = [t for s in scene.subjects for t in impact_times(s, duration_s - _EDGE_S)]
    return {
        "ambience": NOTHING if scene.ambience in (None, "silence") else scene.ambience,
        "speech": not silent and any(s.syllables for s in scene.subjects),
        "thuds": not silent and bool(impacts),
    }


def score_bounces(cases: Sequence[Case], clips: Sequence[Footage], detectors: Detectors) -> GroupResult:
    """How far thuds are from the impacts that are seen. A clip without a subject that bounces counts as no bounce."""
    rows, offsets = [], []
    missed = extra = 0
    for case, clip in zip(cases, clips, strict=True):
        seen = look(clip, detectors)
        bounces = seen.value("motion") == "bounces"
        pairing = _pairing(clip, seen) if bounces else Pairing((), 0, 0)
        offsets += pairing.offsets_ms
        missed, extra = missed + pairing.num_missed, extra + pairing.num_extra
        rows.append(_row(case, bounces=bounces, offsets_ms=list(pairing.offsets_ms), missed=pairing.num_missed))
    told = OffsetSummary.of(offsets, missed, extra)
    timing = {
        "value": told.median_ms,
        "median_signed_ms": told.median_signed_ms,
        "p95": told.p95_ms,
        "n": told.num_matched,
        "num_missed": missed,
        "num_extra": extra,
    }
    within = [abs(value) <= CLOSE_MS for value in offsets] + [False] * (missed + extra)
    measures = {
        "bounces": Share.of([row["bounces"] for row in rows]).as_dict(),
        "offset ms": timing,
        "within 40 ms": Share.of(within).as_dict(),
    }
    return GroupResult(measures, rows, offsets)


def _pairing(clip: Footage, seen: Seen) -> Pairing:
    impacts = visual_impacts(seen.subjects[0].track, clip.fps)
    thuds = thud_times(clip.samples, clip.sample_rate_hz, FAINT)
    return pair_impacts(impacts.times_s, thuds, (impacts.first_s, impacts.last_s))


def score_keyframes(cases: Sequence[Case], clips: Sequence[Footage], detectors: Detectors) -> GroupResult:
    """PSNR at both given pictures, and whether what lies between them is motion rather than a cross-fade."""
    rows = []
    for case, clip in zip(cases, clips, strict=True):
        fmt = _format_of(clip)
        middle, true = middle_frame(fmt), true_clip(case, fmt).frames
        still = torch.equal(clip.frames[0], clip.frames[middle])
        between = Between((0.0,)) if still else novelty_between(clip.frames, 0, middle)
        first, second = (psnr_db(true[index], clip.frames[index]) for index in (0, middle))
        rows.append(_row(case, first_db=first, middle_db=second, novelty=between.peak, moves=between.moves))
    measures: Measures = {
        "first frame dB": summary([row["first_db"] for row in rows]),
        "middle keyframe dB": summary([row["middle_db"] for row in rows]),
        "at least 25 dB": Share.of([min(row["first_db"], row["middle_db"]) >= 25 for row in rows]).as_dict(),
        "moves between": Share.of([row["moves"] for row in rows]).as_dict(),
        "novelty": summary([row["novelty"] for row in rows]),
    }
    return GroupResult(measures, rows)


def _format_of(clip: Footage) -> ClipFormat:
    height, width = clip.frames.shape[-2:]
    return ClipFormat(width, height, clip.fps, len(clip.frames), clip.sample_rate_hz)


def score_diversity(cases: Sequence[Case], clips: Sequence[Footage], detectors: Detectors) -> GroupResult:
    """How much clips of one prompt differ, beside what the world's own placings of it differ."""
    rows = []
    for start in range(0, len(cases) - 1, DIVERSITY_SEEDS):
        chosen, shown = cases[start : start + DIVERSITY_SEEDS], clips[start : start + DIVERSITY_SEEDS]
        if len(chosen) > 1:
            mine = seed_diversity([clip.frames for clip in shown])
            world = seed_diversity([true_clip(c, _format_of(k)).frames for c, k in zip(chosen, shown, strict=True)])
            rows.append(_row(chosen[0], levels=mine, world_levels=world, ratio=mine / max(world, 1e-6)))
    measures = {
        "difference (levels)": summary([row["levels"] for row in rows]),
        "ratio to the world's": summary([row["ratio"] for row in rows]),
    }
    return GroupResult(measures, rows)


def score_codec(cases: Sequence[Case], clips: Sequence[Footage], detectors: Detectors) -> GroupResult:
    """How near clips that went through the codecs are to those that went in."""
    rows = []
    for case, clip in zip(cases, clips, strict=True):
        true = true_clip(case, _format_of(clip))
        values: dict[str, Any] = {
            "psnr_db": psnr_db(true.frames, clip.frames),
            "ssim": ssim(true.frames, clip.frames),
            "bands_db": snr_per_band_db(true.frames, clip.frames),
        }
        if true.audio is not None and clip.audio is not None:
            values["spectral_db"] = log_spectral_distance_db(true.audio, clip.audio)
        rows.append(_row(case, **values))
    names = {"psnr_db": "video PSNR dB", "ssim": "video SSIM", "spectral_db": "audio log-spectral distance dB"}
    measures = {label: summary([row.get(key, np.nan) for row in rows]) for key, label in names.items()}
    return GroupResult(measures, rows)


Scorer = Callable[[Sequence[Case], Sequence[Footage], Detectors], GroupResult]
SCORERS: dict[str, Scorer] = {
    "single": score_single,
    "pairs": score_pairs,
    "camera": score_camera,
    "sounds": score_sounds,
    "bounces": score_bounces,
    "audio_to_video": score_bounces,
    "video_to_audio": score_bounces,
    "keyframes": score_keyframes,
    "diversity": score_diversity,
    "codec": score_codec,
}
