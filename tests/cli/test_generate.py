"""`vitascope generate`: what it writes, from what it is given, and its recipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import pytest
import torch

from vitascope.cli.app import main
from vitascope.cli.generate import RECIPE_TAG
from vitascope.cli.sources import parse_keyframe
from vitascope.core.errors import InputError
from vitascope.media.reading import read_image, read_metadata, read_video
from vitascope.tasks.generate import generate
from vitascope.tasks.load import load_pipeline
from vitascope.tasks.request import GenerateRequest

Run = Callable[..., int]


def recipe_of(path: Path) -> dict[str, Any]:
    return json.loads(read_metadata(path)[RECIPE_TAG])


def brightness(frames: torch.Tensor) -> torch.Tensor:
    return (frames.float() * torch.tensor([0.2126, 0.7152, 0.0722])[:, None, None]).sum(1)


def test_a_sentence_becomes_h264_and_aac_with_its_recipe(
    run: Run, tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ball.mp4"
    assert run("--output", path, "--seed", 7) == 0
    output, error = capsys.readouterr()
    assert output == ""
    assert error.startswith(f"{path}: 32x32, 9 frames, 0.75 s (encode ")
    assert error.count("\n") == 1
    with av.open(path) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        assert container.streams.audio[0].codec_context.name == "aac"
    clip = read_video(path)
    assert clip.frames.shape == (9, 3, 32, 32)
    assert clip.fps == 12
    pipeline = load_pipeline(str(tiny_model), "cpu")
    made = generate(pipeline, GenerateRequest("a red ball bounces", format=pipeline.defaults.clip, seed=7))
    # H.264 halves the colour of every second pixel but keeps brightness to a few levels; another clip is off by tens.
    assert (brightness(clip.frames) - brightness(made.clip.frames)).abs().mean() < 4
    recipe = recipe_of(path)
    assert recipe.pop("sources") == {
        "image": "", "keyframes": [], "audio": "", "video": "", "extend": "", "camera": "", "shots": []
    }  # fmt: skip
    assert recipe.pop("beside") == {"text_encoder": "", "codec": "", "allow_pickle": False, "variant": ""}
    assert recipe.pop("second") == {"upsampler": "", "levels": "", "adain": 1.0, "tone_map": 0.0}
    assert recipe == made.recipe
    assert [entry.name for entry in tmp_path.iterdir()] == ["ball.mp4"]


def test_every_setting_arrives_in_the_recipe(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ball.mkv"
    settings = ["--negative-prompt", "blue", "--num-frames", 5, "--width", 40, "--height", 24, "--fps", 8, "--seed", 9]
    settings += ["--num-inference-steps", 2, "--guidance-scale", 1.5, "--sampler", "euler", "--camera", "zooms in"]
    assert run("--output", path, "--json", "--precision", "bf16", *settings) == 0
    output, error = capsys.readouterr()
    assert error == ""
    result = json.loads(output)
    assert result["output"] == str(path)
    assert set(result["seconds"]) == {"encode", "text", "denoise", "decode"}
    recipe = recipe_of(path)
    assert result["recipe"] == recipe
    expected = {
        "prompt": "a red ball bounces", "negative_prompt": "blue", "num_frames": 5, "width": 40, "height": 24, "fps": 8,
        "seed": 9, "num_inference_steps": 2, "guidance_scale": 1.5, "sampler": "euler", "precision": "bf16",
    }  # fmt: skip
    assert {key: recipe[key] for key in expected} == expected
    assert recipe["sources"]["camera"] == "zooms in"
    clip = read_video(path)
    assert clip.frames.shape == (5, 3, 24, 40)
    assert clip.fps == 8


def test_seconds_become_frames_and_long_clips_windows(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "long.mp4"
    assert run("--output", path, "--seconds", 1, "--num-inference-steps", 1) == 0
    assert len(read_video(path).frames) == 13


def test_an_image_and_keyframes(run: Run, tmp_path: Path, files: Path) -> None:
    path, picture = tmp_path / "ball.mp4", files / "picture.png"
    assert run("--output", path, "--image", picture, "--keyframe", f"0.6:{picture}:0.5") == 0
    assert recipe_of(path)["sources"]["keyframes"] == [f"0.6:{picture}:0.5"]
    assert run("--output", tmp_path / "plain.mp4") == 0
    first, plain = (read_video(p).frames for p in (path, tmp_path / "plain.mp4"))
    assert not torch.equal(first[0], plain[0])


def test_a_given_sound_decides_the_length(run: Run, tmp_path: Path, files: Path, capsys: Any) -> None:
    path = tmp_path / "heard.mp4"
    assert run("--output", path, "--audio", files / "fast.mkv") == 2
    assert "has no sound" in capsys.readouterr().err
    # 1 s is 12 frames; the model's own 9 are used, which is said, unless more are asked for.
    assert run("--output", path, "--audio", files / "sound.mkv") == 0
    assert "note: the first 0.750 s of the sound are used" in capsys.readouterr().err
    assert len(read_video(path).frames) == 9
    assert run("--output", path, "--audio", files / "sound.mkv", "--seconds", 1, "--num-inference-steps", 1) == 0
    assert "note" not in capsys.readouterr().err
    heard = read_video(path, sample_rate_hz=16000).samples
    assert heard is not None
    tone = torch.sin(torch.arange(16000) * 0.1) * 0.5
    # Twice through AAC: the tone is there within a few hundredths, and what follows it is silence.
    assert (heard[2000:14000] - tone[2000:14000]).abs().mean() < 0.05
    assert heard[16500:].abs().max() < 0.05


def test_a_clip_is_given_sound_and_keeps_its_frames(run: Run, tmp_path: Path, files: Path) -> None:
    path = tmp_path / "heard.mkv"
    assert run("--output", path, "--video", files / "fast.mkv", "--num-inference-steps", 1) == 0
    given, made = read_video(files / "fast.mkv"), read_video(path)
    assert made.frames.shape == given.frames.shape == (12, 3, 24, 40)
    assert made.fps == 24
    assert made.samples is not None
    assert made.samples.abs().max() > 0
    assert (made.frames.float() - given.frames.float()).abs().mean() < 8
    # Half a second at 12 fps is 6 frames, in whole latent frames 9.
    assert recipe_of(path)["num_frames"] == 9


def test_a_clip_is_extended(run: Run, tmp_path: Path, files: Path, capsys: Any) -> None:
    path = tmp_path / "more.mp4"
    assert run("--output", path, "--extend", files / "clip.mp4", "--num-frames", 5) == 0
    assert "note" not in capsys.readouterr().err
    before, after = read_video(files / "clip.mp4"), read_video(path)
    assert len(after.frames) == 14 + 4
    assert (after.frames[:14].float() - before.frames.float()).abs().mean() < 8
    assert run("--output", path, "--extend", files / "fast.mkv", "--seconds", 0.33, "--num-inference-steps", 1) == 0
    assert "note: the clip to extend is brought from 24 to 12 fps" in capsys.readouterr().err
    assert read_video(path).frames.shape == (6 + 4, 3, 24, 40)


def test_prompts_from_a_file(run: Run, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "prompts.txt").write_text("a red ball\n\n  a blue box [/bold]\n", encoding="utf-8-sig")
    arguments = ["--prompts", tmp_path / "prompts.txt", "--output-dir", tmp_path / "clips", "--json"]
    assert run(*arguments, "--num-inference-steps", 1, prompt=None) == 0
    made = json.loads(capsys.readouterr().out)
    assert [entry["recipe"]["prompt"] for entry in made] == ["a red ball", "a blue box [/bold]"]
    assert sorted(path.name for path in (tmp_path / "clips").iterdir()) == ["0001.mp4", "0002.mp4"]
    assert recipe_of(tmp_path / "clips" / "0002.mp4")["prompt"] == "a blue box [/bold]"


def test_the_bar_and_the_time_left_on_a_terminal(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    assert run("--output", tmp_path / "ball.mp4", prompt="a [/red] ball") == 0
    output, error = capsys.readouterr()
    assert output == ""
    assert "a [/red] ball" in error
    assert "3/3" in error
    assert "0:00:0" in error or "-:--:--" in error


def test_the_preview_is_a_picture(run: Run, tmp_path: Path) -> None:
    assert run("--output", tmp_path / "ball.mp4", "--preview", tmp_path / "now.png") == 0
    assert read_image(tmp_path / "now.png").shape[0] == 3


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("1.5:ball.png", (1.5, "ball.png", 1.0)),
        ("0:ball.png:0.25", (0.0, "ball.png", 0.25)),
        ("2:C:/pictures/ball.png:1", (2.0, "C:/pictures/ball.png", 1.0)),
        ("2:a:b.png", (2.0, "a:b.png", 1.0)),
    ],
)
def test_keyframes_are_parsed(text: str, parts: tuple[float, str, float]) -> None:
    assert parse_keyframe(text) == parts


@pytest.mark.parametrize("text", ["", "1", "1:", "ball.png", "one:ball.png", ":ball.png"])
def test_keyframes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="is not TIME:FILE"):
        parse_keyframe(text)


def test_a_folder_whose_denoiser_is_of_another_family_gives_a_silent_clip(
    silent_models: dict[str, Path], tmp_path: Path
) -> None:
    arguments = ["generate", "a red ball", "--model", str(silent_models["mochi_text"]), "--device", "cpu"]
    assert main([*arguments, "--output", str(tmp_path / "ball.mp4")]) == 0
    with av.open(tmp_path / "ball.mp4") as container:
        assert container.streams.video[0].frames == 9
        assert not container.streams.audio
