"""A pipeline from a folder: what fits, and one clear refusal for what does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitascope.core.errors import CheckpointError, InputError, ShapeError
from vitascope.core.shapes import ClipFormat
from vitascope.diffusion.guidance import Guidance
from vitascope.tasks.load import PARTS, choose_device, choose_precision, load_pipeline
from vitascope.tasks.pipeline import Defaults, Pipeline
from vitascope.weights.config import config_from_dict, config_to_dict


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def edit(folder: Path, **values: Any) -> None:
    path = folder / "pipeline.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_folder_becomes_a_pipeline(tiny_model: Path, pipeline: Pipeline) -> None:
    assert pipeline.name == str(tiny_model)
    assert pipeline.patch == (2, 2)
    assert pipeline.audio_patch == 4
    assert pipeline.precision == torch.float32
    expected = Defaults(ClipFormat(32, 32, num_frames=9), 3, Guidance(2.0), overlap_frames=5)
    assert pipeline.defaults == expected
    assert config_from_dict(Defaults, json.loads(json.dumps(config_to_dict(expected)))) == expected


def test_the_fingerprint_is_that_of_the_weights(copy: Path, pipeline: Pipeline) -> None:
    edit(copy, num_inference_steps=4)
    assert load_pipeline(str(copy), "cpu").fingerprint == pipeline.fingerprint
    path = copy / "denoiser.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert load_pipeline(str(copy), "cpu").fingerprint != pipeline.fingerprint


@pytest.mark.parametrize("part", PARTS)
def test_damaged_parts_are_refused_by_name(copy: Path, part: str) -> None:
    path = copy / f"{part}.safetensors"
    whole = path.read_bytes()
    other = next(copy / f"{name}.safetensors" for name in PARTS if name != part)
    for data in (whole[:-5], whole[:100], b"", other.read_bytes()):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=path.name):
            load_pipeline(str(copy), "cpu")
    path.unlink()
    with pytest.raises(CheckpointError, match=f"no checkpoint file at .*{path.name}"):
        load_pipeline(str(copy), "cpu")


def test_settings_that_do_not_fit_are_refused(copy: Path) -> None:
    for values, words in (
        ({"overlap_frames": 9}, "overlap_frames must be less"),
        ({"clip": {"num_frames": 10}}, "10 frames do not fit"),
        ({"steps": 3}, "unknown keys: steps"),
        ({"guidance": {"rescale": 2.0}}, "rescale must lie between 0 and 1"),
    ):
        text = (copy / "pipeline.json").read_text()
        edit(copy, **values)
        with pytest.raises(CheckpointError, match=words):
            load_pipeline(str(copy), "cpu")
        (copy / "pipeline.json").write_text(text)
    for text in ("{", "[]", "\udc80"):
        (copy / "pipeline.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(CheckpointError, match=r"pipeline\.json"):
            load_pipeline(str(copy), "cpu")
    with pytest.raises(CheckpointError, match="there is no model at nowhere"):
        load_pipeline("nowhere", "cpu")


def test_parts_of_different_models_are_refused(copy: Path) -> None:
    from vitascope.models import FAMILIES
    from vitascope.weights.checkpoint import save_checkpoint

    config = {"width": 24, "depth": 1, "num_heads": 2}
    text = FAMILIES["bytes"].build(config)
    save_checkpoint(copy / "text_encoder.safetensors", text.state_dict(), "bytes", config)
    with pytest.raises(CheckpointError, match="the denoiser has 16 text_width, the text encoder 24"):
        load_pipeline(str(copy), "cpu")


def test_devices_and_precisions() -> None:
    assert choose_device("cpu").type == "cpu"
    assert choose_device("auto").type in ("cpu", "cuda")
    for name in ("gpu", "meta", "", "cuda:99", "cpu:x"):
        with pytest.raises(InputError, match=f"device '{name}' is not"):
            choose_device(name)
    assert choose_precision("bf16", torch.device("cpu")) == torch.bfloat16
    assert choose_precision("auto", torch.device("cuda")) == torch.bfloat16
    with pytest.raises(InputError, match="precision 'fp8' is not known; valid values: auto, fp32, bf16"):
        choose_precision("fp8", torch.device("cpu"))


@given(st.integers(0, 100), st.sampled_from([8.0, 12.0, 24.0, 29.97]))
def test_lengths_in_seconds_find_their_frames(pipeline: Pipeline, steps: int, fps: float) -> None:
    frames = 1 + 4 * steps
    assert pipeline.frames_for(frames / fps, fps) == frames
    assert not steps or pipeline.frames_for((frames - 1) / fps, fps) == frames


def test_lengths_between_frames_are_refused_with_their_neighbours(pipeline: Pipeline) -> None:
    assert pipeline.frames_for(2.0, 12) == 25
    with pytest.raises(ShapeError, match=r"2.2 s at 12 fps do not fit: .*nearest: 2.000, 2.333 s"):
        pipeline.frames_for(2.2, 12)
    for seconds in (0.0, -1.0, float("nan"), float("inf"), 1e308):
        with pytest.raises(ShapeError, match="must be a number of seconds above 0"):
            pipeline.frames_for(seconds, 12)
