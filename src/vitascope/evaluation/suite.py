"""The evaluation as a whole: make (or find) the clips of every group, judge them, write down what was found."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitascope.core.errors import MediaError
from vitascope.evaluation.footage import Footage
from vitascope.evaluation.judging import Detectors
from vitascope.evaluation.producing import ClipSource, ClipStore
from vitascope.evaluation.prompts import Case
from vitascope.evaluation.scoring import SCORERS, GroupResult
from vitascope.media.files import atomic_file
from vitascope.media.pictures import contact_sheet, write_picture
from vitascope.media.plots import PlotStyle, bar_plot, line_plot

BATCH = 8
SHEET_CLIPS = 3
"""Clips of each group on the contact sheet."""
Progress = Callable[[str, int, int], None]
"""Called with the group, the clips done and all clips of it."""


@dataclass(frozen=True)
class Target:
    """What the pocket model is to reach: at least, or at most, so much of a key of a measure."""

    key: str
    bound: float
    at_most: bool = False

    def met(self, measure: Mapping[str, Any]) -> bool | None:
        """Whether a measure reaches it; None where nothing was measured."""
        value = measure.get(self.key)
        if value is None:
            return None
        return value <= self.bound if self.at_most else value >= self.bound


_TIMING = (Target("value", 40.0, at_most=True), Target("p95", 120.0, at_most=True))
TARGETS: dict[tuple[str, str], tuple[Target, ...]] = {
    **{("single", name): (Target("value", 0.95),) for name in ("colour", "shape", "motion", "background")},
    ("single", "all four"): (Target("value", 0.90),),
    ("pairs", "all of both"): (Target("value", 0.75),),
    ("camera", "camera"): (Target("value", 0.90),),
    ("sounds", "sound"): (Target("value", 0.90),),
    **{(group, "offset ms"): _TIMING for group in ("bounces", "audio_to_video", "video_to_audio")},
    ("keyframes", "at least 25 dB"): (Target("value", 0.95),),
    ("keyframes", "moves between"): (Target("value", 0.95),),
    ("codec", "video PSNR dB"): (Target("value", 30.0),),
}


def collect(
    source: ClipSource, cases: Sequence[Case], store: ClipStore, progress: Progress = lambda group, done, total: None
) -> list[Footage]:
    """The clips of the cases: those in the store, and the others made in batches and stored."""
    found = {case.number: clip for case in cases if (clip := store.load(case, source.identity)) is not None}
    missing = [case for case in cases if case.number not in found]
    for start in range(0, len(missing), BATCH):
        progress(cases[0].group, len(found), len(cases))
        batch = missing[start : start + BATCH]
        for case, clip in zip(batch, source.make(batch), strict=True):
            found[case.number] = store.save(case, source.identity, clip)
    progress(cases[0].group, len(found), len(cases))
    return [found[case.number] for case in cases]


def run_suite(
    source: ClipSource,
    groups: Mapping[str, Sequence[Case]],
    output_dir: Path,
    progress: Progress = lambda group, done, total: None,
) -> dict[str, GroupResult]:
    """Judge every group and write contact_sheet.png to `output_dir`; clips are kept in `output_dir`/clips."""
    store, detectors = ClipStore(output_dir / "clips"), Detectors()
    results, shown = {}, []
    for name, cases in groups.items():
        clips = collect(source, cases, store, progress)
        results[name] = SCORERS[name](cases, clips, detectors)
        pairs = list(zip(cases, clips, strict=True))
        step = max(1, len(pairs) // SHEET_CLIPS)
        shown += pairs[::step][:SHEET_CLIPS]
    sheet = contact_sheet(
        [clip.frames for _, clip in shown],
        [f"{case.group}: {case.prompt}" for case, _ in shown],
        [clip.audio for _, clip in shown],
        sample_rate_hz=source.fmt.sample_rate_hz,
    )
    write_picture(output_dir / "contact_sheet.png", sheet)
    return results


def document(results: Mapping[str, GroupResult], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Everything as JSON values: settings, and for each group measures, targets met or not, and a row a clip."""
    groups = {}
    for name, result in results.items():
        targets = {
            measure: [target.met(result.measures[measure]) for target in TARGETS[name, measure]]
            for measure in result.measures
            if (name, measure) in TARGETS
        }
        groups[name] = {"measures": result.measures, "targets_met": targets, "clips": result.rows}
    return {"settings": dict(settings), "groups": groups}


def table_rows(results: Mapping[str, GroupResult]) -> list[tuple[str, str, str, str, str, str]]:
    """Group, measure, value, interval or spread, n, and target with whether it is met."""
    rows = []
    for group, result in results.items():
        for name, measure in result.measures.items():
            targets = TARGETS.get((group, name), ())
            rows.append((group, name, _value(measure), _spread(measure), str(measure["n"]), _verdict(targets, measure)))
    return rows


def _value(measure: Mapping[str, Any]) -> str:
    value = measure["value"]
    if value is None:
        return "-"
    return f"{100 * value:.1f}%" if "successes" in measure else f"{value:.4g}"


def _spread(measure: Mapping[str, Any]) -> str:
    if "successes" in measure:
        return f"{100 * measure['low']:.1f} to {100 * measure['high']:.1f}%"
    if measure.get("p95") is None:
        return ""
    if "num_missed" in measure:
        return f"p95 {measure['p95']:.4g}, {measure['num_missed']} missed, {measure['num_extra']} extra"
    return f"p5 {measure['p5']:.4g}, p95 {measure['p95']:.4g}"


def _verdict(targets: Sequence[Target], measure: Mapping[str, Any]) -> str:
    words = []
    for target in targets:
        sign, met = "<=" if target.at_most else ">=", target.met(measure)
        bound = f"{100 * target.bound:g}%" if "successes" in measure else f"{target.bound:g}"
        words.append(
            f"{'p95 ' if target.key == 'p95' else ''}{sign} {bound} {'-' if met is None else 'yes' if met else 'NO'}"
        )
    return ", ".join(words)


def write_report(results: Mapping[str, GroupResult], settings: Mapping[str, Any], output_dir: Path) -> dict[str, Any]:
    """Write evaluation.json, shares.png and, where offsets were measured, offsets.png; returns the document."""
    report = document(results, settings)
    try:
        with atomic_file(output_dir / "evaluation.json") as file:
            file.write((json.dumps(report, ensure_ascii=False, indent=1, allow_nan=True) + "\n").encode())
    except OSError as error:
        raise MediaError(f"{output_dir / 'evaluation.json'} cannot be written: {error.strerror}") from error
    _write_plots(results, output_dir)
    return report


def _write_plots(results: Mapping[str, GroupResult], output_dir: Path) -> None:
    shares = {
        f"{group[:8]} {name}" if group != "single" else name: 100 * result.measures[name]["value"]
        for group, result in results.items()
        for name in result.measures
        if (group, name) in TARGETS and "successes" in result.measures[name]
    }
    if shares:
        style = PlotStyle(
            "agreement with the prompt", y_label="%", width_px=max(640, 110 * len(shares)), y_range=(0, 105)
        )
        write_picture(output_dir / "shares.png", bar_plot(shares, style))
    curves = {}
    for group, result in results.items():
        size = sorted(abs(value) for value in result.offsets_ms)
        if size:
            curves[group] = (size, [100 * (index + 1) / len(size) for index in range(len(size))])
    if curves:
        style = PlotStyle("thud to impact", "offset in ms, at most", "% of impacts", y_range=(0, 100))
        write_picture(output_dir / "offsets.png", line_plot(curves, style))
