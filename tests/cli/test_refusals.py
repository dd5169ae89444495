"""Bad input to `vitascope generate`: one line on stderr, exit code 2, nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitascope.cli.app import main
from vitascope.media.writing import ClipWriter

Run = Callable[..., int]


def refused(capsys: pytest.CaptureFixture[str], code: int, words: str) -> None:
    output, error = capsys.readouterr()
    assert words in error
    assert code == 2
    assert output == ""
    assert error.count("\n") == 1
    assert error.startswith("vitascope generate: ")
    assert "Traceback" not in error


FLOATS = {"--seconds": "a number of seconds above 0", "--fps": "fps", "--guidance-scale": "guidance scale lies in"}
INTEGERS = {
    "--num-frames": "frames",
    "--width": "width",
    "--height": "height",
    "--num-inference-steps": "inference steps lies in",
    "--seed": "seed lies in",
}


@pytest.mark.parametrize("flag", FLOATS)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1", "1e308"])
def test_numbers_out_of_range(run: Run, tmp_path: Path, capsys: Any, flag: str, value: str) -> None:
    refused(capsys, run("--output", tmp_path / "clip.mp4", f"{flag}={value}"), FLOATS[flag])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", INTEGERS)
@pytest.mark.parametrize("value", ["-8", "nan", "1.5", "99999999999999999999999"])
def test_whole_numbers_out_of_range(run: Run, tmp_path: Path, capsys: Any, flag: str, value: str) -> None:
    code = run("--output", tmp_path / "clip.mp4", f"{flag}={value}")
    refused(capsys, code, INTEGERS[flag] if value[0] in "-9" else f"'{flag}'")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seconds", "0"], "a number of seconds above 0"),
        (["--width", "0"], "width_px must be positive"),
        (["--num-frames", "0"], "num_frames must be positive"),
        (["--num-inference-steps", "0"], "lies in 1..1000, got 0"),
        (["--num-frames", "7"], "7 frames do not fit: the codec takes 1 + 4k frames; nearest: 5, 9"),
        (["--width", "33"], "width 33 px does not fit: it must be a multiple of 8; nearest: 32, 40"),
        (["--seconds", "0.55"], "0.55 s at 12 fps do not fit"),
        (["--seconds", "1", "--num-frames", "9"], "--seconds or --num-frames, not both"),
        (["--sampler", "magic"], "valid values: euler, heun, dpmpp_2m, unipc, few_step"),
        (["--sampler", ""], "sampler '' is not known"),
        (["--camera", "flies"], "camera 'flies' is not known; valid values:"),
        (["--device", "tpu"], "device 'tpu' is not known"),
        (["--precision", "fp4"], "precision 'fp4' is not known"),
        (["--model", "nowhere"], "there is no model at nowhere"),
        (["--keyframe", "ball.png"], "is not TIME:FILE[:STRENGTH]"),
        (["--keyframe", "0:gone.png"], "gone.png does not exist"),
        (["--keyframe", "nan:{files}/picture.png"], "the time of a keyframe"),
        (["--keyframe", "inf:{files}/picture.png"], "the time of a keyframe"),
        (["--keyframe=-1:{files}/picture.png"], "the time of a keyframe"),
        (["--keyframe", "9:{files}/picture.png"], "lies after the last frame"),
        (["--keyframe", "0:{files}/picture.png:nan"], "the strength of a keyframe"),
        (["--keyframe", "0:{files}/picture.png:2"], "the strength of a keyframe"),
        (["--image", "{files}/picture.png", "--keyframe", "0:{files}/picture.png"], "fall on one latent frame"),
        (["--audio", "{files}/sound.mkv", "--video", "{files}/fast.mkv"], "a given audio is known whole"),
        (["--image", "{files}/picture.png", "--video", "{files}/fast.mkv"], "a video whose sound is made is known"),
        (["--extend", "{files}/clip.mp4", "--camera", "pans left"], "a clip to extend goes with keyframes and audio"),
        (["--extend", "{files}/clip.mp4", "--width", "36"], "width 36 px does not fit"),
        (["--seconds", "2", "--camera", "pans left"], "a camera path works for clips of at most 9 frames"),
        (["--video", "{files}/fast.mkv", "--seconds", "1"], "the given video has 0.500 s"),
        (["--output-dir", "{files}"], "--output-dir goes with --prompts"),
        (["--unknown"], "--unknown"),
        (["--seconds", "two"], "'--seconds'"),
    ],
)
def test_wrong_values(run: Run, tmp_path: Path, files: Path, capsys: Any, arguments: list[str], words: str) -> None:
    filled = [argument.format(files=files) for argument in arguments]
    refused(capsys, run("--output", tmp_path / "clip.mp4", *filled), words)
    assert list(tmp_path.iterdir()) == [files]


@pytest.mark.parametrize("prompt", ["", "  ", "\n", "ball \udcff"])
def test_prompts_that_are_none(run: Run, tmp_path: Path, capsys: Any, prompt: str) -> None:
    refused(capsys, run("--output", tmp_path / "clip.mp4", prompt=prompt), "the prompt is")
    refused(capsys, run("--output", tmp_path / "clip.mp4", prompt=None), "give a prompt")
    refused(capsys, run("--output", tmp_path / "clip.mp4", prompt="ball " * 100), "at most 64 fit")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["--image", "--audio", "--video", "--extend"])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gone.x", "does not exist"),
        ("", "is a folder, not a file"),
        ("empty.wav", "is empty"),
        ("half.png", "files"),
        ("noise.mp4", "cannot be read as"),
    ],
)
def test_files_that_cannot_be_read(
    run: Run, tmp_path: Path, files: Path, capsys: Any, flag: str, name: str, words: str
) -> None:
    refused(capsys, run("--output", tmp_path / "clip.mp4", flag, files / name), words)
    assert list(tmp_path.iterdir()) == [files]


def test_files_that_are_too_large(run: Run, tmp_path: Path, capsys: Any) -> None:
    Image.fromarray(np.zeros((4, 9000), dtype=np.uint8)).save(tmp_path / "wide.png")
    Image.fromarray(np.zeros((20000, 10000), dtype=bool)).save(tmp_path / "bomb.png")
    arguments = ["--output", tmp_path / "clip.mp4", "--image"]
    refused(capsys, run(*arguments, tmp_path / "wide.png"), "is too large: 9000 x 4 px")
    refused(capsys, run(*arguments, tmp_path / "bomb.png"), "is too large")
    assert {path.name for path in tmp_path.iterdir()} == {"wide.png", "bomb.png"}


def test_places_that_cannot_be_written(run: Run, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "folder.mp4").mkdir()
    for name, words in (
        ("clip.txt", "valid suffixes: .mp4, .mov, .mkv, .webm, .gif"),
        ("clip", "valid suffixes"),
        ("gone/clip.mp4", "does not exist"),
        ("folder.mp4", "is a folder"),
        ("a" * 300 + ".mp4", "File name too long"),
    ):
        refused(capsys, run("--output", tmp_path / name), words)
    refused(capsys, run("--output", "/dev/full"), "valid suffixes")
    refused(capsys, run("--output", "/proc/clip.mp4"), "/proc")
    preview = ["--output", tmp_path / "clip.mp4", "--preview"]
    refused(capsys, run(*preview, tmp_path / "now.gif"), "valid suffixes: .png")
    refused(capsys, run(*preview, tmp_path / "gone" / "now.png"), "does not exist")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.mp4"]


def test_lists_of_prompts_that_cannot_be_used(run: Run, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "none.txt").write_text("\n \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    clips = ["--output-dir", tmp_path / "clips"]
    for name, words in (
        ("none.txt", "holds no prompts"),
        ("bytes.txt", "cannot be read"),
        ("gone.txt", "No such file"),
    ):
        refused(capsys, run("--prompts", tmp_path / name, *clips, prompt=None), words)
    refused(capsys, run("--prompts", tmp_path, *clips, prompt=None), "Is a directory")
    refused(capsys, run("--prompts", tmp_path / "none.txt", prompt=None), "goes with --output-dir")
    (tmp_path / "good.txt").write_text("a ball\n")
    arguments = ["--prompts", tmp_path / "good.txt", "--output-dir", tmp_path / "good.txt"]
    refused(capsys, run(*arguments, prompt=None), "cannot be made")
    assert not (tmp_path / "clips").exists()


@pytest.mark.parametrize("part", ["denoiser", "video_codec"])
def test_damaged_models(run: Run, tmp_path: Path, tiny_model: Path, capsys: Any, part: str) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    path = folder / f"{part}.safetensors"
    whole = path.read_bytes()
    for data in (whole[: len(whole) // 2], b"", (folder / "audio_codec.safetensors").read_bytes()):
        path.write_bytes(data)
        refused(capsys, run("--output", tmp_path / "clip.mp4", "--model", folder), path.name)
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("moment", ["write_frames", "write_samples", "finish"])
def test_a_full_disk(run: Run, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if moment == "finish":
        monkeypatch.setattr(os, "fsync", full)
    else:
        inner = getattr(ClipWriter, moment)

        def half(writer: ClipWriter, data: Any) -> None:
            inner(writer, data[: len(data) // 2])
            full()

        monkeypatch.setattr(ClipWriter, moment, half)
    refused(capsys, run("--output", tmp_path / "clip.mp4", "--num-inference-steps", 1), "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_an_older_clip_survives_a_failure(
    run: Run, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"older")
    refused(capsys, run("--output", tmp_path / "clip.mp4", "--seconds", "0"), "seconds")

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ClipWriter, "write_samples", interrupt)
    assert run("--output", tmp_path / "clip.mp4", "--num-inference-steps", 1) == 130
    assert capsys.readouterr().err == "vitascope generate: interrupted\n"
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]
    assert (tmp_path / "clip.mp4").read_bytes() == b"older"


def command(tiny_model: Path, *arguments: object) -> list[str]:
    words = ["generate", "a red ball", "--model", tiny_model, "--device", "cpu", *arguments]
    return [sys.executable, "-m", "vitascope", *map(str, words)]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_stdout(tiny_model: Path, tmp_path: Path) -> None:
    arguments = ["--json", "--output", tmp_path / "clip.mp4", "--num-inference-steps", 1]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command(tiny_model, *arguments), stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 2
    assert done.stderr == "vitascope generate: the result cannot be written to stdout: No space left on device\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_between_steps_leaves_nothing(
    tiny_model: Path, tmp_path: Path, number: int, code: int, word: str
) -> None:
    # The process sends itself the signal from its second step: no waiting, no chance.
    script = f"""
        import os, signal, sys
        from vitascope.cli import app
        from vitascope.tasks import preview

        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background

        def stop(pipeline, step, path):
            if step.index == 1:
                os.kill(os.getpid(), {int(number)})

        preview.write_preview = stop
        app.run()
    """
    arguments = command(tiny_model, "--output", tmp_path / "clip.mp4", "--preview", tmp_path / "now.png")[3:]
    process = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    done = subprocess.run(process, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, f"vitascope generate: {word}\n")
    assert list(tmp_path.iterdir()) == []


def test_bad_input_in_a_process_of_its_own(tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "vitascope", "generate", "", "--output", str(tmp_path / "clip.mp4")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("vitascope generate: the prompt is empty")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_verb_imports_little_before_it_is_called() -> None:
    script = """
        import sys
        from vitascope.cli.app import main
        assert main(["generate", "--help"]) == 0 and main(["rerun", "--help"]) == 0 and main(["presets", "--help"]) == 0
        heavy = {"torch", "numpy", "av", "PIL"} & set(sys.modules)
        assert not heavy, heavy
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, capture_output=True)


def test_presets_print_counts(capsys: pytest.CaptureFixture[str]) -> None:
    from vitascope.models.factorised.cost import num_parameters
    from vitascope.models.factorised.presets import PRESETS

    assert main(["presets"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown[2:]] == list(PRESETS)
    assert f"{num_parameters(PRESETS['small']):,}" in shown[3]
    assert main(["presets", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in table["common_size"]] == list(PRESETS)
    assert table["own_size"][1]["num_parameters"] == num_parameters(PRESETS["small"])
