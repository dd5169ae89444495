"""Making, keeping and finding clips again; scores of keyframes, diversity and codecs; the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from vitascope.core.shapes import ClipFormat
from vitascope.evaluation.footage import Footage
from vitascope.evaluation.judging import Detectors
from vitascope.evaluation.producing import ClipStore, WorldSource, given_for, middle_frame, true_clip
from vitascope.evaluation.prompts import Case, cases_of
from vitascope.evaluation.scoring import score_codec, score_diversity, score_keyframes
from vitascope.evaluation.suite import Target, collect, run_suite, table_rows, write_report

FMT = ClipFormat(64, 64, num_frames=13)


@dataclass
class CountingSource:
    """The world's clips, noting which cases were made."""

    fmt: ClipFormat = FMT
    identity: str = "counting"
    made: list[int] = field(default_factory=list)

    def make(self, cases: Sequence[Case]) -> list[Footage]:
        self.made += [case.number for case in cases]
        return WorldSource(self.fmt).make(cases)


def test_clips_are_kept_whole_and_made_once(tmp_path: Path) -> None:
    cases, store, source = cases_of("bounces", 10, 0, FMT), ClipStore(tmp_path), CountingSource()
    steps: list[tuple[str, int, int]] = []
    first = collect(source, cases[:3], store)
    again = collect(source, cases, store, lambda *step: steps.append(step))
    assert source.made == list(range(10))
    assert steps == [("bounces", 3, 10), ("bounces", 10, 10)]
    true = true_clip(cases[1], FMT)
    for clip in (first[1], again[1]):
        assert torch.equal(clip.frames, true.frames)
        assert clip.audio is not None
        assert true.audio is not None
        assert (clip.audio - true.audio).abs().max() <= 0.5 / 32767 + 1e-7  # rounded to 16 bits


def test_another_source_or_prompt_or_a_damaged_file_is_made_anew(tmp_path: Path) -> None:
    case = cases_of("bounces", 1, 0, FMT)[0]
    store, source = ClipStore(tmp_path), CountingSource()
    collect(source, [case], store)
    source.identity = "other weights"
    collect(source, [case], store)
    other = Case(case.group, case.number, "another prompt", case.seed, case.scene)
    collect(source, [other], store)
    assert source.made == [0, 0, 0]
    store.path(case, "counting").write_bytes(b"half a file")
    assert store.load(case, "counting") is None


def test_what_the_model_is_given() -> None:
    cases = {name: cases_of(name, 1, 0, FMT)[0] for name in ("single", "audio_to_video", "video_to_audio", "keyframes")}
    clips = {name: true_clip(case, FMT) for name, case in cases.items()}
    assert given_for(cases["single"], FMT).audio is None
    sound, video = given_for(cases["audio_to_video"], FMT), given_for(cases["video_to_audio"], FMT)
    assert sound.audio is not None
    assert sound.video is None
    assert torch.equal(sound.audio, clips["audio_to_video"].audio)  # pyright: ignore[reportArgumentType]
    assert video.video is not None
    assert torch.equal(video.video, clips["video_to_audio"].frames)
    first, middle = given_for(cases["keyframes"], FMT).keyframes
    assert (first.time_s, middle.time_s) == (0.0, pytest.approx(6 / 12))
    assert torch.equal(middle.picture, clips["keyframes"].frames[middle_frame(FMT)])


def test_keyframes_tell_a_cross_fade_and_a_wrong_picture() -> None:
    cases = cases_of("keyframes", 3, 1, FMT)
    true = [true_clip(case, FMT) for case in cases]
    detectors = Detectors()
    perfect = score_keyframes(cases, true, detectors).measures
    assert perfect["at least 25 dB"]["value"] == perfect["moves between"]["value"] == 1.0
    middle = middle_frame(FMT)
    faded, wrong = [], []
    for clip in true:
        weight = (torch.arange(len(clip.frames)) / middle).clamp(max=1).view(-1, 1, 1, 1)
        blend = (1 - weight) * clip.frames[0] + weight * clip.frames[middle]
        faded.append(Footage(blend.round().to(torch.uint8), None, FMT.fps))
        wrong.append(Footage(clip.frames.flip(2), None, FMT.fps))
    dissolve = score_keyframes(cases, faded, detectors).measures
    assert dissolve["at least 25 dB"]["value"] == 1.0
    assert dissolve["moves between"]["value"] == 0.0
    assert score_keyframes(cases, wrong, detectors).measures["at least 25 dB"]["value"] < 1.0


def test_diversity_is_read_against_the_world() -> None:
    cases = cases_of("diversity", 8, 1, FMT)
    clips = [true_clip(case, FMT) for case in cases]
    assert score_diversity(cases, clips, Detectors()).measures["ratio to the world's"]["value"] == pytest.approx(1.0)
    copies = [clips[4 * (i // 4)] for i in range(8)]
    assert score_diversity(cases, copies, Detectors()).measures["ratio to the world's"]["value"] == 0.0


def test_codec_fidelity_of_a_known_error() -> None:
    cases = cases_of("codec", 2, 1, FMT)
    clips = [true_clip(case, FMT) for case in cases]
    off = [Footage((c.frames.int() ^ 1).to(torch.uint8), c.audio, c.fps) for c in clips]
    measures = score_codec(cases, off, Detectors()).measures
    assert measures["video PSNR dB"]["value"] == pytest.approx(48.13, abs=0.01)  # every value off by one: 20 log10 255
    assert measures["audio log-spectral distance dB"]["value"] == 0.0


def test_a_run_writes_report_sheet_and_plots(tmp_path: Path) -> None:
    groups = {name: cases_of(name, 2, 0, FMT) for name in ("single", "bounces", "keyframes")}
    results = run_suite(WorldSource(FMT), groups, tmp_path)
    report = write_report(results, {"seed": 0}, tmp_path)
    assert json.loads((tmp_path / "evaluation.json").read_text())["settings"] == {"seed": 0}
    clip = report["groups"]["single"]["clips"][0]
    assert (clip["prompt"], clip["seed"]) == (groups["single"][0].prompt, groups["single"][0].seed)
    assert report["groups"]["bounces"]["measures"]["bounces"]["n"] == 2
    assert {path.name for path in tmp_path.iterdir()} >= {"contact_sheet.png", "shares.png", "evaluation.json"}
    rows = table_rows(results)
    assert {row[0] for row in rows} == set(groups)
    assert ("single", "colour", "100.0%") in {row[:3] for row in rows}


def test_targets() -> None:
    assert Target("value", 0.9).met({"value": 0.9})
    assert not Target("value", 0.9).met({"value": 0.89})
    assert Target("p95", 120, at_most=True).met({"p95": 100})
    assert Target("p95", 120, at_most=True).met({"p95": None}) is None
