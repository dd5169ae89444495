"""What a conversion keeps beside the weights, and what it says that it loses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5EncoderModel

from vitascope.core.errors import CheckpointError, InputError
from vitascope.models.codecs.ltx.config import DecoderStage, EncoderStage, LTXCodecConfig
from vitascope.models.codecs.wan.config import WanCodecConfig
from vitascope.models.image.clip.encoder import PictureSettings, load_clip
from vitascope.models.image.clip.original import original_keys
from vitascope.models.ltx.config import LTXConfig
from vitascope.models.mochi.config import MochiConfig
from vitascope.models.parts import Part
from vitascope.models.text.t5.original import KEYS
from vitascope.models.wan.config import WanConfig
from vitascope.tasks.convert import LAYOUTS, Target, convert_model, left_out, place_of
from vitascope.tasks.discover import CODEC, DENOISER, Found, discover
from vitascope.tasks.inspection import inspect_model
from vitascope.tasks.load import Beside, load_pipeline
from vitascope.tasks.schedulers import defaults_of, defaults_written, schedule_of
from vitascope.weights.converted import Converted
from vitascope.weights.keys import Rename
from vitascope.weights.sources import MemorySource, open_source

WAN = WanConfig(width=24, depth=1, num_heads=2, hidden=40, text_width=16, frequency_width=32)
PICTURE = replace(WAN, in_channels=36, image_width=24)
LTX = LTXConfig(width=16, depth=1, num_heads=2, in_channels=8, out_channels=8, text_width=16)
LTX_CODEC = LTXCodecConfig(
    (EncoderStage(4, 1, "space"), EncoderStage(8, 1, "time"), EncoderStage(8, 1, "both"), EncoderStage(16, 1, "both"),
     EncoderStage(16, 1)),
    (DecoderStage(32, 1), *(DecoderStage(channels, 1, "residual", 2) for channels in (16, 8, 4))),
    latent_channels=8, timestep_conditioning=True,
)  # fmt: skip
MOCHI = MochiConfig(width=16, stream_width=12, depth=2, num_heads=2, text_width=16, frequency_width=32)
SD3 = {"_class_name": "RectifiedFlowScheduler", "shifting": "SD3", "target_shift_terminal": 0.1}


def part(family: str, config: Any) -> Part:
    """A model of ours in memory, as if our names were those of diffusers."""
    torch.manual_seed(0)
    empty = Part(family, "original", config, (), MemorySource({})).on_meta().state_dict()
    state = {
        name: torch.rand(tensor.shape) if tensor.is_floating_point() else torch.zeros(tensor.shape, dtype=tensor.dtype)
        for name, tensor in empty.items()
    }
    return Part(family, "diffusers", config, tuple(Rename(name, name) for name in state), MemorySource(state))


def ltx_file(place: Path, scheduler: dict[str, Any], causal: bool) -> Found:
    """A small model in a file of LTX-Video's authors."""
    notes = {"scheduler": scheduler, "transformer": {"causal_temporal_positioning": causal}}
    parts = {DENOISER: part("ltx", LTX), CODEC: part("ltx_codec", LTX_CODEC)}
    convert_model(Found(place.parent, "original", "LTXPipeline", parts, notes=notes), Target(place, "original"))
    return discover(place)


def wan_folder(place: Path, config: WanConfig = WAN) -> Found:
    """A small model in a folder of Wan's authors."""
    parts = {DENOISER: part("wan", config), CODEC: part("wan_codec", WanCodecConfig(base=8, blocks=1))}
    convert_model(Found(place.parent, "original", "WanPipeline", parts), Target(place, "original"))
    return discover(place)


@pytest.mark.parametrize(
    ("causal", "scheduler", "kept"),
    [
        (True, SD3, False),
        (True, {"sampler": "Constant", "shift": 1.0}, False),
        (True, {"sampler": "LinearQuadratic", **SD3}, False),
        (True, {"sampler": "LinearQuadratic"}, True),
        (False, {"sampler": "LinearQuadratic"}, False),
        (False, {"sampler": "Constant", "shift": 1.0}, True),
        (False, SD3, True),
    ],
)
def test_levels_are_kept_or_said_to_be_lost(
    causal: bool, scheduler: dict[str, Any], kept: bool, tmp_path: Path
) -> None:
    found = ltx_file(tmp_path / "model.safetensors", scheduler, causal)
    notes = left_out(found, "diffusers")
    convert_model(found, Target(tmp_path / "theirs", "diffusers"))
    again = discover(tmp_path / "theirs")
    before, after = (schedule_of(one).levels(5, 2000) for one in (found, again))
    assert (before == pytest.approx(after, abs=1e-9)) == kept
    assert defaults_of(again) == defaults_written(found, "diffusers")
    # as the pipeline of diffusers sets them: one gives timesteps and no size, the other levels with one
    theirs: Any = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "theirs" / "scheduler")
    theirs.set_timesteps(**({"timesteps": [1000.0, 500.0]} if causal else {"sigmas": [1.0, 0.5], "mu": 1.0}))
    if causal:
        assert theirs.sigmas.tolist() == [1.0, 0.5, 0.0]
    if kept:
        assert not notes
        return
    (note,) = notes
    for words in ("the model's levels (", "linear-quadratic", "--levels"):
        assert words in note
    assert ("shifted by the size of the clip, down to 0.1" in note) == ("shifting" in scheduler)


def test_levels_come_back_from_diffusers(tmp_path: Path) -> None:
    first = ltx_file(tmp_path / "model.safetensors", {"sampler": "Constant", "shift": 1.2}, causal=False)
    convert_model(first, Target(tmp_path / "theirs", "diffusers"))
    theirs = discover(tmp_path / "theirs")
    # the shift is a logarithm in the file, and its last bits may change
    assert left_out(theirs, "original") == []
    convert_model(theirs, Target(tmp_path / "back", "original"))
    back = discover(tmp_path / "back.safetensors")
    assert schedule_of(back).levels(7) == pytest.approx(schedule_of(first).levels(7), abs=1e-9)


def test_shift_and_steps_of_wan_that_are_lost_are_told(tmp_path: Path) -> None:
    found = wan_folder(tmp_path / "wan", PICTURE)
    assert inspect_model(found).defaults["num_inference_steps"] == 40
    (note,) = left_out(found, "diffusers")
    assert "the model's 40 steps" in note
    assert "--num-inference-steps 40" in note
    convert_model(found, Target(tmp_path / "theirs", "diffusers"))
    scheduler = tmp_path / "theirs" / "scheduler" / "scheduler_config.json"
    values = json.loads(scheduler.read_text())
    assert values["flow_shift"] == 3.0
    steps = left_out(discover(tmp_path / "theirs"), "original")
    assert [("50 steps" in note, "shifted" in note) for note in steps] == [(True, False)]
    scheduler.write_text(json.dumps(values | {"flow_shift": 8.0}))
    theirs = discover(tmp_path / "theirs")
    shift, _ = left_out(theirs, "original")
    assert "shifted by 8" in shift
    assert "shifted by 3" in shift
    convert_model(theirs, Target(tmp_path / "back", "original"))
    assert schedule_of(discover(tmp_path / "back")).shift == 3.0
    assert left_out(theirs, "diffusers") == left_out(found, "original") == []


def test_an_empty_prompt_that_is_encoded_is_told(tmp_path: Path) -> None:
    found = Found(tmp_path, "original", "MochiPipeline", {DENOISER: part("mochi", MOCHI)})
    convert_model(found, Target(tmp_path / "theirs", "diffusers"))
    index = tmp_path / "theirs" / "model_index.json"
    values = json.loads(index.read_text())
    assert left_out(discover(tmp_path / "theirs"), "original") == []
    index.write_text(json.dumps(values | {"force_zeros_for_empty_prompt": False}))
    (note,) = left_out(discover(tmp_path / "theirs"), "original")
    assert "the empty prompt is encoded" in note


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, text_folders: Path) -> Path:
    """A folder of Wan's authors with their T5 in fp32, their CLIP in fp16, and what belongs to both."""
    folder = tmp_path_factory.mktemp("authors") / "wan"
    wan_folder(folder, PICTURE)
    t5 = UMT5EncoderModel.from_pretrained(text_folders / "umt5" / "text_encoder").state_dict()
    t5.pop("encoder.embed_tokens.weight", None)
    config = CLIPVisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=1, image_size=224, patch_size=56,
        hidden_act="gelu",
    )  # fmt: skip
    model: Any = CLIPVisionModel(config)
    clip = model.half().state_dict()
    prefix = next(iter(clip)).partition("embeddings.")[0]
    for name, source, table, before in (
        ("models_t5_umt5-xxl-enc-bf16.pth", t5, KEYS, ""),
        ("models_clip_open-clip.pth", clip, original_keys(prefix), "visual."),
    ):
        seen = Converted(MemorySource(source), table, writing=True)
        torch.save({before + key: seen.get(key) for key in seen.names()}, folder / name)
    shutil.copytree(text_folders / "umt5" / "tokenizer", folder / "google" / "umt5-xxl")
    (folder / "xlm-roberta-large").mkdir()
    return folder


def dtypes(folder: Path) -> set[torch.dtype]:
    source = open_source(folder)
    return {source.info(name).dtype for name in source.names()}


def test_encoders_keep_their_dtype_or_have_the_one_that_is_given(whole: Path, tmp_path: Path) -> None:
    found = discover(whole, allow_pickle=True)
    convert_model(found, Target(tmp_path / "kept", "diffusers"))
    assert dtypes(tmp_path / "kept" / "text_encoder") == {torch.float32}
    assert dtypes(tmp_path / "kept" / "image_encoder") == {torch.float16}
    convert_model(found, Target(tmp_path / "rounded", "diffusers", torch.bfloat16))
    for name in ("transformer", "vae", "text_encoder", "image_encoder"):
        assert dtypes(tmp_path / "rounded" / name) == {torch.bfloat16}
    pickled = Beside(allow_pickle=True)
    ours, theirs = (
        load_pipeline(str(folder), "cpu", "fp32", pickled).text_encoder(["a red ball"]).embeddings
        for folder in (whole, tmp_path / "kept")
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_how_pictures_are_cut_is_written(whole: Path, tmp_path: Path) -> None:
    from transformers import CLIPImageProcessor

    convert_model(discover(whole, allow_pickle=True), Target(tmp_path / "theirs", "diffusers"))
    index = json.loads((tmp_path / "theirs" / "model_index.json").read_text())
    assert index["image_processor"] == ["transformers", "CLIPImageProcessor"]
    processor = CLIPImageProcessor.from_pretrained(tmp_path / "theirs" / "image_processor")
    assert tuple(processor.image_mean) == PictureSettings().mean
    assert load_clip(tmp_path / "theirs").settings == PictureSettings()


def test_what_the_authors_have_beside_stays_in_their_layout(whole: Path, tmp_path: Path) -> None:
    found = discover(whole, allow_pickle=True)
    assert left_out(found, "original") == []
    convert_model(found, Target(tmp_path / "again", "original", torch.bfloat16))
    names = {path.relative_to(whole) for path in whole.rglob("*")}
    assert {path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*")} == names
    assert discover(tmp_path / "again", allow_pickle=True).encoders.keys() == found.encoders.keys()
    # pickles that were not opened are no part of the model, which is told
    (note,) = left_out(discover(whole), "original")
    assert "models_clip_open-clip.pth, models_t5_umt5-xxl-enc-bf16.pth" in note
    assert "--allow-pickle" in note


def test_an_upsampler_beside_a_pipeline_stays_there(tmp_path: Path) -> None:
    convert_model(
        ltx_file(tmp_path / "model.safetensors", {"sampler": "LinearQuadratic"}, causal=True),
        Target(tmp_path / "one", "diffusers"),
    )
    (tmp_path / "one" / "latent_upsampler").mkdir()
    (tmp_path / "one" / "latent_upsampler" / "config.json").write_text("{}")
    index = tmp_path / "one" / "model_index.json"
    more = {"latent_upsampler": ["diffusers", "LTXLatentUpsamplerModel"], "image_encoder": [None, None]}
    index.write_text(json.dumps(json.loads(index.read_text()) | more))
    found = discover(tmp_path / "one")
    assert left_out(found, "diffusers") == []
    convert_model(found, Target(tmp_path / "two", "diffusers", torch.bfloat16))
    assert (tmp_path / "two" / "latent_upsampler" / "config.json").is_file()
    assert json.loads((tmp_path / "two" / "model_index.json").read_text()) == json.loads(index.read_text())
    (note,) = left_out(found, "original")
    assert "latent_upsampler" in note
    assert "--upsampler" in note


def test_pipelines_that_cannot_be_converted_are_refused_in_one_line(tmp_path: Path) -> None:
    file = ltx_file(tmp_path / "model.safetensors", {}, causal=False)
    convert_model(file, Target(tmp_path / "whole", "diffusers"))
    index = tmp_path / "whole" / "model_index.json"
    values = json.loads(index.read_text())
    for name, error, words in (
        ("CogVideoXPipeline", InputError, "valid values: WanPipeline, "),
        ("MochiPipeline", CheckpointError, "a model of family mochi belongs there"),
    ):
        index.write_text(json.dumps(values | {"_class_name": name}))
        for layout in LAYOUTS:
            with pytest.raises(error, match=words):
                left_out(discover(tmp_path / "whole"), layout)
            with pytest.raises(error, match=words):
                convert_model(discover(tmp_path / "whole"), Target(tmp_path / "new", layout))
    shutil.rmtree(tmp_path / "whole" / "transformer")
    index.write_text(json.dumps({"_class_name": "LTXPipeline"}))
    with pytest.raises(CheckpointError, match=r"a pipeline without transformer; what can be converted alone: .*vae$"):
        left_out(discover(tmp_path / "whole"), "original")
    with pytest.raises(CheckpointError, match="a pipeline without transformer"):
        convert_model(discover(tmp_path / "whole"), Target(tmp_path / "new", "original"))


def test_names_with_dots_keep_them(tmp_path: Path) -> None:
    found = Found(tmp_path, "original", "LTXPipeline", {DENOISER: part("ltx", LTX)})
    for name, expected in (
        ("ltxv-2b-0.9.8", "ltxv-2b-0.9.8.safetensors"),
        ("ltx.safetensors", "ltx.safetensors"),
        ("ltx", "ltx.safetensors"),
    ):
        assert place_of(found, Target(tmp_path / name, "original")) == tmp_path / expected
        assert place_of(found, Target(tmp_path / name, "diffusers")) == tmp_path / name
    (made,) = convert_model(found, Target(tmp_path / "ltxv-2b-0.9.8", "original"))
    assert made == tmp_path / "ltxv-2b-0.9.8.safetensors"
    assert made.is_file()
    for name in (".", "..", ""):
        with pytest.raises(CheckpointError, match="give the name of a file"):
            place_of(found, Target(Path(name), "original"))
