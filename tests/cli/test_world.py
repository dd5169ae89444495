"""`vitascope world`: files that agree with each other, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vitascope.cli.app import main
from vitascope.media.reading import read_image, read_metadata, read_video

SMALL = ["--width", "48", "--height", "32", "--seconds", "0.5"]


def test_world_writes_clips_truth_arrays_and_a_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "a red ball bounces on a gray background"
    arguments = ["world", "--output-dir", str(tmp_path / "new"), *SMALL, "--arrays", "--json"]
    assert main([*arguments, "--prompt", prompt, "--prompt", "a blue box stays still under a starry sky"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [clip["caption"] for clip in result["clips"]] == [prompt, "a blue box stays still under a starry sky"]

    clip = read_video(tmp_path / "new" / "0001.mp4", sample_rate_hz=16000)
    assert clip.frames.shape == (6, 3, 32, 48)
    assert clip.samples is not None
    assert clip.samples.shape == (8000,)
    assert read_metadata(tmp_path / "new" / "0001.mp4")["comment"] == prompt

    truth = json.loads((tmp_path / "new" / "0001.json").read_text())
    assert truth["attributes"]["background"] == "gray"
    assert truth["attributes"]["subjects"][0]["colour"] == "red"
    assert len(truth["subjects"][0]["position_px"]) == 6
    arrays = np.load(tmp_path / "new" / "0001.npz")
    assert arrays["masks"].shape == (1, 6, 32, 48)
    assert arrays["flow"].shape == (5, 2, 32, 48)
    centre = np.argwhere(arrays["masks"][0, 0] > 127).mean(0)[::-1] + 0.5
    assert np.abs(centre - truth["subjects"][0]["position_px"][0]).max() < 1.5
    assert read_image(tmp_path / "new" / "contact_sheet.png").shape[2] == 6 * 48 + 5 * 4 + 8


def test_the_same_seed_gives_the_same_clips(tmp_path: Path) -> None:
    for name in ("first", "second"):
        assert main(["world", "--output-dir", str(tmp_path / name), *SMALL, "--num-clips", "2", "--seed", "5"]) == 0
    for name in ("0001.mp4", "0002.mp4", "0001.json", "contact_sheet.png"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    assert (tmp_path / "first" / "0001.json").read_bytes() != (tmp_path / "first" / "0002.json").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--width", "47"], "width 47 px cannot be encoded: it must be even; nearest: 46, 48"),
        (["--seconds", "0.53"], "nearest: 0.5 s (6 frames) or 0.5833 s (7 frames)"),
        (["--fps", "0"], "the frame rate must be positive"),
        (["--fps", "inf"], "the frame rate must be positive and finite, got 0.5 s at inf fps"),
        (["--fps", "1000"], "the frame rate lies in 1..240 fps, got 1000"),
        (["--seconds", "inf"], "must be positive and finite, got inf s at 12.0 fps"),
        (["--seconds", "1e308"], "1e+308 s at 12 fps are too many frames; at most 1000000"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "a red dragon"], "dragon"),
        (["--split", "test"], "valid values: train, held_out"),
        (["--num-clips", "0"], "--num-clips"),
    ],
)
def test_bad_input_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["world", "--output-dir", str(tmp_path), *SMALL, *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_rate_that_is_not_finite_is_refused_without_a_length(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["world", "--output-dir", str(tmp_path), "--fps", "inf"]) == 2
    assert capsys.readouterr().err == "vitascope world: fps must be positive and finite, got inf\n"


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    for folder in ("file", "file/below"):
        assert main(["world", "--output-dir", str(tmp_path / folder), *SMALL]) == 2
        assert str(tmp_path / folder) in capsys.readouterr().err
