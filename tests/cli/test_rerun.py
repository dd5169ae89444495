"""`vitascope rerun`: the same frames and samples from the recipe alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vitascope.cli.app import main
from vitascope.media.reading import read_metadata, read_video
from vitascope.media.writing import write_clip

Run = Callable[..., int]


@pytest.mark.parametrize("kind", ["text", "image", "audio", "video", "extend", "camera"])
def test_rerun_makes_the_same_clip(run: Run, tmp_path: Path, files: Path, kind: str) -> None:
    arguments: dict[str, list[Any]] = {
        "text": ["--negative-prompt", "blue", "--guidance-scale", 3, "--sampler", "few_step", "--precision", "bf16"],
        "image": ["--image", files / "picture.png", "--keyframe", f"0.6:{files / 'picture.png'}:0.5"],
        "audio": ["--audio", files / "sound.mkv"],
        "video": ["--video", files / "fast.mkv"],
        "extend": ["--extend", files / "fast.mkv", "--num-frames", 5],
        "camera": ["--camera", "orbits left", "--num-frames", 5, "--fps", 10],
    }
    path = tmp_path / "clip.mp4"
    assert run("--output", path, "--seed", 3, *arguments[kind]) == 0
    assert main(["rerun", str(path), "--device", "cpu"]) == 0
    again = tmp_path / "clip.rerun.mp4"
    # The encoder gives the same bytes for the same frames, samples and recipe.
    assert again.read_bytes() == path.read_bytes()


def test_rerun_writes_where_it_is_told(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, target = tmp_path / "clip.webm", tmp_path / "other.mkv"
    assert run("--output", path, "--num-frames", 5) == 0
    capsys.readouterr()
    assert main(["rerun", str(path), "--output", str(target), "--json", "--device", "cpu"]) == 0
    output, error = capsys.readouterr()
    assert error == ""
    assert json.loads(output)["recipe"] == json.loads(read_metadata(path)["vitascope"])
    assert len(read_video(target).frames) == 5


def tagged(path: Path, tags: dict[str, str]) -> Path:
    write_clip(path, torch.zeros(2, 3, 16, 16, dtype=torch.uint8), 12, metadata=tags)
    return path


def test_other_weights_are_told(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "clip.mp4"
    assert run("--output", path, "--num-frames", 5) == 0
    recipe = json.loads(read_metadata(path)["vitascope"]) | {"weights": "0" * 16}
    tagged(tmp_path / "old.mp4", {"vitascope": json.dumps(recipe)})
    capsys.readouterr()
    assert main(["rerun", str(tmp_path / "old.mp4"), "--device", "cpu"]) == 0
    assert "was made with other weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": "one"}, "is damaged"),
        ({"width": -1}, "width_px must be positive"),
        ({"num_frames": 5.0}, "is damaged: ClipFormat.num_frames must be a value of type int, got 5.0"),
        ({"num_frames": 1e99}, "is damaged: ClipFormat.num_frames must be"),
        ({"width": 32.0}, "is damaged: ClipFormat.width_px must be"),
        ({"height": 32.0}, "is damaged: ClipFormat.height_px must be"),
        ({"fps": float("inf")}, "fps must be positive and finite"),
        (
            {"sources": {"extend": "a.mp4"}, "second": {"upsampler": "b"}},
            "--extend goes on from a clip in one pass: leave --upsampler away",
        ),
        ({"sources": {"file": "x"}}, "is damaged: Sources has unknown keys: file"),
        ({"sources": []}, "is damaged"),
        ({"prompt": None}, "is damaged"),
        ({"weights": ...}, "is damaged: 'weights'"),
        ({"precision": "fp9"}, "precision 'fp9' is not known"),
        ({"model": "nowhere"}, "there is no model at nowhere"),
        ({"sources": {"image": "gone.png"}}, "gone.png does not exist"),
    ],
)
def test_damaged_recipes_are_refused(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], words: str
) -> None:
    recipe: dict[str, Any] = {
        "prompt": "a ball", "negative_prompt": "", "width": 32, "height": 32, "fps": 12, "num_frames": 5, "seed": 0,
        "num_inference_steps": 1, "guidance_scale": 1.0, "sampler": "euler", "model": str(tiny_model), "weights": "0",
        "precision": "fp32", "sources": {},
    }  # fmt: skip
    changed = {key: value for key, value in (recipe | change).items() if value is not ...}
    path = tagged(tmp_path / "clip.mp4", {"vitascope": json.dumps(changed)})
    assert main(["rerun", str(path), "--device", "cpu"]) == 2
    error = capsys.readouterr().err.splitlines()
    assert words in error[-1]
    assert all(line.startswith("note: ") for line in error[:-1])
    assert [entry.name for entry in tmp_path.iterdir()] == ["clip.mp4"]


def test_files_without_a_recipe_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, words in (
        (tagged(tmp_path / "a.mp4", {}), "holds no recipe"),
        (tagged(tmp_path / "b.mp4", {"vitascope": "{"}), "is damaged"),
        (tagged(tmp_path / "c.mp4", {"vitascope": "[]"}), "is no object"),
        (tmp_path / "d.mp4", "does not exist"),
        (tmp_path, "is a folder"),
    ):
        assert main(["rerun", str(path)]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
