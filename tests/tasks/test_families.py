"""Folders of ours whose denoiser is of another family and makes no sound."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vitascope.core.errors import CapabilityError, CheckpointError
from vitascope.core.shapes import ClipFormat
from vitascope.models import FAMILIES
from vitascope.models.mochi.model import MochiBlock, MochiDenoiser
from vitascope.tasks.fitting import MemoryLimit
from vitascope.tasks.generate import generate, generate_batch
from vitascope.tasks.load import load_pipeline
from vitascope.tasks.pipeline import Pipeline
from vitascope.tasks.request import GenerateRequest, Given, Keyframe
from vitascope.weights.checkpoint import load_checkpoint, save_checkpoint

FMT = ClipFormat(32, 32, num_frames=9)
each_model = pytest.mark.parametrize("name", ["mochi", "mochi_text", "wan", "ltx"])
Load = Callable[[str], Pipeline]


@pytest.fixture
def load(silent_models: dict[str, Path]) -> Load:
    return lambda name: load_pipeline(str(silent_models[name]), "cpu", "fp32")


@each_model
def test_a_clip_without_sound_does_not_depend_on_the_others_of_its_batch(name: str, load: Load) -> None:
    pipeline = load(name)
    assert pipeline.audio_codec is None
    assert pipeline.tracks == ("video",)
    words = ("a red ball", "a large blue box bounces on a gray background with wind and more words than the other")
    requests = [GenerateRequest(text, format=FMT, seed=seed) for seed, text in enumerate(words)]
    together = generate_batch(pipeline, requests)
    for made, request in zip(together, requests, strict=True):
        alone = generate(pipeline, request)
        assert alone.clip.samples is None
        # pixels of sums in another order: a value next to a half is rounded to either side
        assert (made.clip.frames.int() - alone.clip.frames.int()).abs().max() <= 1
    assert not torch.equal(together[0].clip.frames, together[1].clip.frames)


@pytest.mark.parametrize(("name", "per_clip"), [("mochi", 0), ("mochi_text", 2 * 2)])
def test_text_that_sees_text_alone_is_read_once_for_a_clip(name: str, per_clip: int, load: Load) -> None:
    """By both branches, in both layers, however many steps; keys and values of words are not projected again."""
    pipeline = load(name)
    model = pipeline.denoiser
    assert isinstance(model, MochiDenoiser)
    alone, projected = [], []
    for block in model.blocks:
        assert isinstance(block, MochiBlock)
        block.text.register_forward_hook(lambda *given: alone.append(0))
        block.text.qkv.register_forward_hook(lambda *given: projected.append(0))
    for steps in (2, 5):
        alone.clear()
        projected.clear()
        generate(pipeline, GenerateRequest("a red ball", format=FMT, num_inference_steps=steps))
        assert len(alone) == per_clip
        assert len(projected) == (per_clip or 2 * steps)


def test_an_audio_codec_is_not_needed_and_not_read(silent_models: dict[str, Path], tmp_path: Path, load: Load) -> None:
    folder = Path(shutil.copytree(silent_models["ltx"], tmp_path / "model"))
    (folder / "audio_codec.safetensors").write_bytes(b"nothing")
    pipeline = load_pipeline(str(folder), "cpu", "fp32")
    assert pipeline.audio_codec is None
    assert pipeline.fingerprint == load("ltx").fingerprint


def test_what_such_a_model_cannot_do_is_refused(load: Load) -> None:
    sound = Given(audio=torch.zeros(12000))
    picture = Given((Keyframe(0.0, torch.zeros(3, 32, 32, dtype=torch.uint8)),))
    with pytest.raises(CapabilityError, match="makes pictures without sound"):
        generate(load("wan"), GenerateRequest("a ball", format=FMT, given=sound))
    with pytest.raises(CapabilityError, match="takes one noise level a clip"):
        generate(load("mochi"), GenerateRequest("a ball", format=FMT, given=picture))
    with pytest.raises(CapabilityError, match="takes no camera path"):
        generate(load("ltx"), GenerateRequest("a ball", format=FMT, given=Given(camera=torch.zeros(9, 7))))
    made = generate(load("wan"), GenerateRequest("a ball", format=FMT, given=picture))  # it has a level for each frame
    assert made.clip.frames.shape == (9, 3, 32, 32)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("mochi", {"video_channels": 6}, "the denoiser has 6 video_channels, the video codec 4"),
        ("wan", {"in_channels": 11}, "the denoiser has 11 in_channels, the video codec 12"),
        ("ltx", {"text_width": 24}, "the denoiser has 24 text_width, the text encoder 16"),
        ("wan", {"image_width": 8}, "reads pictures by an image encoder"),
    ],
)
def test_a_denoiser_for_other_parts_is_refused(
    name: str, changes: dict[str, int], words: str, silent_models: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(silent_models[name], tmp_path / "model"))
    own = load_checkpoint(folder / "denoiser.safetensors")
    model = FAMILIES[own.family].build({**own.config, **changes})
    save_checkpoint(folder / "denoiser.safetensors", model.state_dict(), own.family, {**own.config, **changes})
    with pytest.raises(CheckpointError, match=words):
        load_pipeline(str(folder), "cpu")


def test_a_limit_of_memory_gives_the_same_clip(silent_models: dict[str, Path], load: Load) -> None:
    request = GenerateRequest("a red ball", format=FMT)
    limited = load_pipeline(str(silent_models["mochi_text"]), "cpu", "fp32", memory=MemoryLimit(32 * 10**9))
    made, expected = (generate(pipeline, request) for pipeline in (limited, load("mochi_text")))
    assert torch.equal(made.clip.frames, expected.clip.frames)
    assert made.memory is not None
