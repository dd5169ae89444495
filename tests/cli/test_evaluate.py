"""`vitascope evaluate`: the ceiling on a few clips, resuming, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vitascope.cli.app import main
from vitascope.evaluation.producing import ModelSource
from vitascope.evaluation.prompts import GROUPS
from vitascope.evaluation.sounds import build_sound_model
from vitascope.tasks.load import load_pipeline


def test_ground_truth_scores_and_is_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", "--ground-truth", "--num-prompts", "2", "--output-dir", str(tmp_path / "new")]
    assert main([*arguments, "--group", "single", "--group", "keyframes", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report["groups"]) == ["single", "keyframes"]
    single = report["groups"]["single"]
    assert single["measures"]["colour"]["value"] == 1.0
    assert single["measures"]["colour"]["n"] == 2
    assert single["targets_met"]["colour"] == [True]
    assert all(clip["prompt"] and clip["seed"] for clip in single["clips"])
    assert report == json.loads((tmp_path / "new" / "evaluation.json").read_text())

    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "new" / "clips").rglob("*.npz")}
    assert len(kept) == 4
    assert main([*arguments, "--group", "single"]) == 0
    printed = capsys.readouterr().out
    assert "all four" in printed
    assert "100.0%" in printed
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "new" / "clips").rglob("*.npz")} == kept


def test_a_model_without_training_goes_through_every_group_and_fails(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sounds = build_sound_model(per_mixture=6)
    monkeypatch.setattr("vitascope.evaluation.judging.build_sound_model", lambda: sounds)
    arguments = ["evaluate", "--model", str(tiny_model), "--device", "cpu", "--num-inference-steps", "2", "--json"]
    assert main([*arguments, "--num-prompts", "2", "--output-dir", str(tmp_path)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["settings"]["num_inference_steps"] == 2
    measures = {name: group["measures"] for name, group in report["groups"].items()}
    assert set(measures) == set(GROUPS)
    assert measures["single"]["all four"]["value"] == 0.0
    assert measures["camera"]["camera"]["value"] == 0.0
    assert measures["audio_to_video"]["bounces"]["value"] == 0.0
    assert measures["codec"]["video PSNR dB"]["value"] < 30
    assert measures["diversity"]["ratio to the world's"]["n"] == 1


def test_a_model_without_sound_is_judged_by_what_needs_none(
    silent_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(silent_models["mochi_text"])
    arguments = ["evaluate", "--model", model, "--device", "cpu", "--num-inference-steps", "1", "--json"]
    for group in ("bounces", "keyframes"):
        assert main([*arguments, "--group", "single", "--group", group, "--output-dir", str(tmp_path / "new")]) == 2
        error = capsys.readouterr().err
        assert f"group '{group}' cannot be judged; valid: single, pairs, camera, diversity, codec" in error
        assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()
    few = ["--group", "pairs", "--group", "codec", "--num-prompts", "1", "--output-dir", str(tmp_path)]
    assert main([*arguments, *few]) == 0
    told = capsys.readouterr()
    assert "left out" not in told.err
    groups = json.loads(told.out)["groups"]
    assert groups["pairs"]["measures"]["all of both"]["n"] == 1
    assert groups["codec"]["measures"]["audio log-spectral distance dB"]["n"] == 0  # not that of the world's own sound
    chosen: list[str] = []
    monkeypatch.setattr("vitascope.evaluation.suite.run_suite", lambda source, cases, *more: chosen.extend(cases) or {})
    assert main([*arguments, "--output-dir", str(tmp_path)]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert chosen == ["single", "pairs", "camera", "diversity", "codec"]
    assert "makes no sound: left out sounds, bounces, audio_to_video, video_to_audio" in told
    assert "keeps no frames: left out keyframes" in told


def test_groups_that_are_left_out_follow_from_what_the_model_can_do(silent_models: dict[str, Path]) -> None:
    left_out = {}
    for name in ("mochi", "wan"):
        pipeline = load_pipeline(str(silent_models[name]), "cpu")
        left_out[name] = ModelSource(pipeline, pipeline.defaults.clip).left_out()
    assert "keyframes" in left_out["mochi"]
    assert list(left_out["wan"]) == ["sounds", "bounces", "audio_to_video", "video_to_audio"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ground-truth", "--group", "doubles"], "group 'doubles' is not known; valid values: single, pairs"),
        (["--through-codec"], "--through-codec goes with --ground-truth"),
        (["--ground-truth", "--sampler", "euler"], "do not go with --ground-truth"),
        (["--ground-truth", "--num-prompts", "0"], "--num-prompts"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--sampler", "magic"], "magic"),
    ],
)
def test_bad_input_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["evaluate", "--output-dir", str(tmp_path / "new"), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    arguments = ["evaluate", "--ground-truth", "--group", "single", "--num-prompts", "1"]
    assert main([*arguments, "--output-dir", str(tmp_path / "file")]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err
