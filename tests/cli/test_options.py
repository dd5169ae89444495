"""Options of `vitascope generate` beside prompt and format: how to sample, what the model is changed by, what it may
take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vitascope.cli.app import main
from vitascope.media.reading import read_metadata, read_video

PROMPT = "a red ball bounces"


def made(folder: Path, model: Path, name: str, *arguments: str) -> dict[str, Any]:
    """The recipe of a clip."""
    path = folder / name
    assert main(["generate", PROMPT, "--model", str(model), "--output", str(path), "--device", "cpu", *arguments]) == 0
    return json.loads(read_metadata(path)["vitascope"])


def frames(path: Path) -> torch.Tensor:
    return read_video(path).frames


SAMPLING = [
    "--levels", "1,0.7,0.3", "--guidance-rescale", "0.5", "--guidance-interval", "0.2,0.9", "--stg-scale", "1.5",
    "--stg-layers", "0", "--stg-by", "block", "--step-cache", "first_block:0.5",
    "--image-cond-noise-scale", "0.2",
]  # fmt: skip


def test_how_to_sample_arrives_in_the_recipe_and_in_the_rerun(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = made(tmp_path, tiny_model, "one.mp4", *SAMPLING)
    assert recipe["levels"] == [1.0, 0.7, 0.3]
    assert recipe["num_inference_steps"] == 3
    assert (recipe["guidance_rescale"], recipe["guidance_interval"]) == (0.5, [0.2, 0.9])
    assert (recipe["stg_scale"], recipe["stg_layers"], recipe["stg_by"]) == (1.5, [0], "block")
    assert (recipe["step_cache"]["threshold"], recipe["image_cond_noise_scale"]) == (0.5, 0.2)
    plain = made(tmp_path, tiny_model, "plain.mp4")
    assert plain["levels"] is None
    assert not torch.equal(frames(tmp_path / "one.mp4"), frames(tmp_path / "plain.mp4"))
    assert main(["rerun", str(tmp_path / "one.mp4"), "--output", str(tmp_path / "again.mp4"), "--device", "cpu"]) == 0
    assert (tmp_path / "again.mp4").read_bytes() == (tmp_path / "one.mp4").read_bytes()


def test_a_lora_changes_the_clip_and_is_in_the_recipe(tiny_model: Path, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    factors = {"down": torch.randn(2, 32, generator=draw), "up": torch.randn(96, 2, generator=draw)}
    file = tmp_path / "style.safetensors"
    save_file({f"layers.0.video.space.qkv.lora_{name}.weight": value for name, value in factors.items()}, file)
    plain = made(tmp_path, tiny_model, "plain.mp4")
    recipe = made(tmp_path, tiny_model, "styled.mp4", "--lora", f"{file}:0.5")
    assert recipe["loras"] == [f"{file}:0.5"]
    assert recipe["weights"] != plain["weights"]
    assert not torch.equal(frames(tmp_path / "styled.mp4"), frames(tmp_path / "plain.mp4"))
    made(tmp_path, tiny_model, "nothing.mp4", "--lora", f"{file}:0")
    assert torch.equal(frames(tmp_path / "nothing.mp4"), frames(tmp_path / "plain.mp4"))
    assert main(["rerun", str(tmp_path / "styled.mp4"), "--output", str(tmp_path / "b.mp4"), "--device", "cpu"]) == 0
    assert (tmp_path / "b.mp4").read_bytes() == (tmp_path / "styled.mp4").read_bytes()


def test_a_limit_of_memory_is_planned_for_and_measured(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(tmp_path, tiny_model, "plain.mp4")
    capsys.readouterr()
    made(tmp_path, tiny_model, "limited.mp4", "--memory", "64GB")
    told = capsys.readouterr().err
    for stage in ("text", "denoise", "decode"):
        assert stage in told
    assert "measured" in told
    assert torch.equal(frames(tmp_path / "limited.mp4"), frames(tmp_path / "plain.mp4"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--levels", "0.5,0.9"], "fall"),
        (["--levels", "ltx"], "one of ltx-distilled, ltx-distilled-second"),
        (["--guidance-interval", "0.2"], "LOW,HIGH"),
        (["--stg-layers", "a"], "numbers from 0"),
        (["--stg-scale", "1"], "needs the layers to disable"),
        (["--step-cache", "magic"], "valid values: first_block, tea"),
        (["--lora", ""], "FILE[:SCALE]"),
        (["--lora", "nothing.safetensors"], "nothing.safetensors"),
        (["--memory", "12"], "such as 12GB"),
        (["--memory", "1MB"], "is too little"),
        (["--lossy"], "--lossy goes with --memory"),
        (["--image-cond-noise-scale", "2"], "noise on known frames lies in [0, 1]"),
        (["--adain", "0.5"], "go with --upsampler"),
        (["--upsampler", "nowhere"], "nowhere"),
        (
            ["--upsampler", "nowhere", "--extend", "no.mp4"],
            "--extend goes on from a clip in one pass: leave --upsampler away",
        ),
        (["--parallel", "ulysses"], "started by torchrun"),
        (["--parallel", "ulysses", "--memory", "1GB"], "--memory is for one process"),
        (["--parallel", "ring", "--lora", "a"], "--lora is for one process"),
        (["--shot", "nonsense"], "TIME:FILE"),
    ],
)
def test_refusals_are_one_line(
    arguments: list[str],
    message: str,
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    output = tmp_path / "no.mp4"
    assert main(["generate", PROMPT, "--model", str(tiny_model), "--output", str(output), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not output.exists()
