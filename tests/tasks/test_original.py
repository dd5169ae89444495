"""Models in the files of their authors: found, sampled, inspected, and converted into the layout of diffusers and back.

Small models of ours with random weights are written in the authors' layout; what diffusers makes of a folder is checked
in test_published.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_ltx import AutoencoderKLLTXVideo
from diffusers.models.autoencoders.autoencoder_kl_mochi import AutoencoderKLMochi
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_ltx import LTXVideoTransformer3DModel
from diffusers.models.transformers.transformer_mochi import MochiTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5EncoderModel

from vitascope.core.errors import CheckpointError, InputError
from vitascope.core.shapes import ClipFormat
from vitascope.core.tracks import VIDEO
from vitascope.diffusion.samplers import Step
from vitascope.models.codecs.ltx.config import PRESETS, DecoderStage, EncoderStage, LTXCodecConfig
from vitascope.models.codecs.ltx.original import read_config as read_ltx_codec
from vitascope.models.codecs.ltx.original import write_config as write_ltx_codec
from vitascope.models.codecs.mochi.config import MochiCodecConfig
from vitascope.models.codecs.wan.config import WanCodecConfig
from vitascope.models.ltx.config import LTXConfig
from vitascope.models.mochi.config import MochiConfig
from vitascope.models.parts import Part
from vitascope.models.wan.config import WanConfig
from vitascope.tasks.convert import Target, convert_model
from vitascope.tasks.discover import CODEC, DENOISER, Found, discover
from vitascope.tasks.generate import generate
from vitascope.tasks.inspection import inspect_model
from vitascope.tasks.load import Beside, load_pipeline
from vitascope.tasks.request import GenerateRequest, Given, Keyframe
from vitascope.weights.keys import KeyTable, Rename
from vitascope.weights.shapes import Shapes
from vitascope.weights.sources import MemorySource

PROMPT = "a red ball bounces"
WAN = WanConfig(width=24, depth=2, num_heads=2, hidden=40, text_width=16, frequency_width=32)
LTX = LTXConfig(width=16, depth=2, num_heads=2, in_channels=8, out_channels=8, text_width=16)
LTX_CODEC = LTXCodecConfig(
    (EncoderStage(4, 1, "space"), EncoderStage(8, 1, "time"), EncoderStage(8, 1, "both"), EncoderStage(16, 1, "both"),
     EncoderStage(16, 1)),
    (DecoderStage(32, 1), *(DecoderStage(channels, 1, "residual", 2) for channels in (16, 8, 4))),
    latent_channels=8, timestep_conditioning=True,
)  # fmt: skip
MOCHI_CODEC = MochiCodecConfig((32, 32, 64, 64), (32, 64, 32, 64), blocks=(1, 2, 1, 1, 1))


@dataclass(frozen=True)
class Case:
    """Our configurations, pipeline, text encoder and clip, diffusers' parts, and the notes beside the weights."""

    denoiser: tuple[str, Any]
    codec: tuple[str, Any]
    pipeline: str
    encoder: str
    format: ClipFormat
    peers: tuple[Any, Any]
    notes: tuple[tuple[str, Any], ...] = ()
    steps: int | None = 3


SMALL = ClipFormat(48, 32, 16.0, 9)
WAN_PEERS = (WanTransformer3DModel, AutoencoderKLWan)
LTX_PEERS = (LTXVideoTransformer3DModel, AutoencoderKLLTXVideo)
WAN_CODEC = ("wan_codec", WanCodecConfig(base=8, blocks=1))
CASES = {
    "wan": Case(("wan", WAN), WAN_CODEC, "WanPipeline", "umt5", SMALL, WAN_PEERS),
    "wan image": Case(
        ("wan", replace(WAN, in_channels=36, image_width=24)), WAN_CODEC, "WanImageToVideoPipeline", "umt5", SMALL,
        WAN_PEERS,
    ),
    "wan first and last": Case(
        ("wan", replace(WAN, in_channels=36, image_width=24, image_positions=34)), WAN_CODEC,
        "WanImageToVideoPipeline", "umt5", SMALL, WAN_PEERS,
    ),
    "ltx": Case(
        ("ltx", LTX), ("ltx_codec", LTX_CODEC), "LTXPipeline", "t5", ClipFormat(96, 64, 25.0, 17), LTX_PEERS,
        (("scheduler", {"_class_name": "RectifiedFlowScheduler", "num_train_timesteps": 1000, "shifting": "SD3",
                        "base_resolution": None, "target_shift_terminal": 0.1}),),
    ),
    "ltx, later": Case(
        ("ltx", LTX), ("ltx_codec", LTX_CODEC), "LTXConditionPipeline", "t5", ClipFormat(64, 96, 25.0, 17), LTX_PEERS,
        (("scheduler", {"sampler": "LinearQuadratic"}), ("transformer", {"causal_temporal_positioning": True})),
    ),
    "ltx, distilled": Case(
        ("ltx", LTX), ("ltx_codec", LTX_CODEC), "LTXConditionPipeline", "t5", ClipFormat(64, 96, 25.0, 17), LTX_PEERS,
        (("allowed_inference_steps", [0.725, 1.0, 0.9]), ("transformer", {"causal_temporal_positioning": True})), None,
    ),
    "mochi": Case(
        ("mochi", MochiConfig(width=16, stream_width=12, depth=2, num_heads=2, text_width=16, frequency_width=32)),
        ("mochi_codec", MOCHI_CODEC), "MochiPipeline", "t5", ClipFormat(32, 48, 30.0, 13),
        (MochiTransformer3DModel, AutoencoderKLMochi),
    ),
}  # fmt: skip
each = pytest.mark.parametrize("name", CASES)
# levels that are listed have no place in the folder of diffusers, so a distilled model does not come back as it was
twice = pytest.mark.parametrize("name", [name for name in CASES if name != "ltx, distilled"])


def part(family: str, config: Any, seed: int) -> Part:
    """A model of ours in memory, as if our names were those of diffusers."""
    torch.manual_seed(seed)
    empty = Part(family, "original", config, (), MemorySource({}))
    state = {
        name: torch.randn(tensor.shape) * (0.2 if tensor.ndim > 1 else 0.5)
        if tensor.is_floating_point() else torch.zeros(tensor.shape, dtype=tensor.dtype)
        for name, tensor in empty.on_meta().state_dict().items()
    }  # fmt: skip
    if family == "ltx_codec":
        state["latent_std"] = state["latent_std"].abs() + 0.5
    as_is: KeyTable = tuple(Rename(name, name) for name in state)
    return Part(family, "diffusers", config, as_is, MemorySource(state))


@pytest.fixture(scope="session")
def authors(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The file or folder of a case, in the authors' layout; each is made once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            case, root = CASES[name], tmp_path_factory.mktemp("authors")
            parts = {DENOISER: part(*case.denoiser, seed=1), CODEC: part(*case.codec, seed=2)}
            target = root / ("model.safetensors" if "ltx" in name else "model")
            convert_model(
                Found(root, "original", case.pipeline, parts, notes=dict(case.notes)), Target(target, "original")
            )
            made[name] = target
        return made[name]

    return get


def weights(found: Found) -> dict[str, dict[str, Any]]:
    return {role: part.load().state_dict() for role, part in found.parts.items()}


@each
def test_what_the_authors_files_hold_is_found(name: str, authors: Any) -> None:
    case, found = CASES[name], discover(authors(name))
    assert (found.kind, found.pipeline) == ("original", case.pipeline)
    for role, (family, config) in ((DENOISER, case.denoiser), (CODEC, case.codec)):
        assert found.parts[role].family == family
        assert found.parts[role].config == config
    expected = {DENOISER: part(*case.denoiser, seed=1), CODEC: part(*case.codec, seed=2)}
    for role, state in weights(found).items():
        assert all(torch.equal(value, expected[role].source.get(key)) for key, value in state.items())


@each
def test_diffusers_reads_what_was_converted_for_it(name: str, authors: Any, tmp_path: Path) -> None:
    case, target = CASES[name], tmp_path / "theirs"
    # shards smaller than most tensors, so that there are many and an index
    convert_model(discover(authors(name)), Target(target, "diffusers", max_shard_bytes=20_000))
    assert len(list((target / DENOISER).glob("*.safetensors"))) > 1
    for role, peer in zip((DENOISER, CODEC), case.peers, strict=True):
        model, info = peer.from_pretrained(target / role, output_loading_info=True)
        assert not any(info.values()), info
        again = discover(target).parts[role]
        read = again.load().state_dict()
        first = discover(authors(name)).parts[role].load().state_dict()
        assert read.keys() == first.keys()
        assert all(torch.equal(read[key], first[key]) for key in first)
        config = discover(authors(name)).parts[role].config
        # diffusers drops surplus frames of Mochi elsewhere than the authors, and each layout is decoded as its own
        assert again.config == (replace(config, lead="end") if isinstance(config, MochiCodecConfig) else config)
        assert isinstance(model, nn.Module)


@twice
def test_a_clip_is_the_same_from_either_layout(
    name: str, authors: Any, text_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    case, target = CASES[name], tmp_path / "theirs"
    convert_model(discover(authors(name)), Target(target, "diffusers"))
    folders = [authors(name), target]
    given = Given()
    if "image" in name or "last" in name:
        images = pictures_encoder(tmp_path)
        folders[0] = shutil.copytree(authors(name), tmp_path / "authors")
        for folder in folders:
            shutil.copytree(images, folder / "image_encoder")
        draw = torch.Generator().manual_seed(0)
        shape = (3, case.format.height_px, case.format.width_px)
        shots = [torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8) for _ in range(2)]
        last_s = (case.format.num_frames - 1) / case.format.fps
        given = Given(keyframes=(Keyframe(0.0, shots[0]), Keyframe(last_s, shots[1]))[: 2 if "last" in name else 1])
    request = GenerateRequest(PROMPT, format=case.format, num_inference_steps=case.steps, given=given)
    beside = Beside(text_encoder=str(text_folders / case.encoder))
    steps: list[Step] = []
    clips = [
        generate(load_pipeline(str(folder), "cpu", "fp32", beside), request, steps.append).clip.frames
        for folder in folders
    ]
    ends = [step.tracks[VIDEO].values for step in steps if step.index == step.num_steps - 1]
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-4)
    if name == "mochi":  # whose first frames differ between the layouts
        return
    # weights are where their files have them, and products in fp32 depend on how they lie in memory by their last bits
    assert (clips[0].int() - clips[1].int()).abs().max() <= 1
    assert clips[0].float().std() > 1


def pictures_encoder(root: Path) -> Path:
    """A folder with a small CLIP, whose processor is the usual one."""
    config = CLIPVisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=1, image_size=224, patch_size=56,
        hidden_act="gelu",
    )  # fmt: skip
    model = CLIPVisionModel(config)
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(root / "clip")
    return root / "clip"


def test_levels_are_those_of_the_authors(authors: Any, text_folders: Path) -> None:
    def levels(name: str) -> list[float]:
        beside = Beside(text_encoder=str(text_folders / CASES[name].encoder))
        own = load_pipeline(str(authors(name)), "cpu", "fp32", beside).defaults
        return own.schedule.levels(own.schedule.num_steps or 4, 4096)

    assert levels("ltx, distilled") == [1.0, 0.9, 0.725, 0.0]
    assert levels("ltx")[-2] == pytest.approx(0.1)  # target_shift_terminal
    # the first half of the steps of Mochi and of later LTX removes 0.025 of the noise
    assert levels("ltx, later")[:3] == pytest.approx([1.0, 1 - 0.0125, 1 - 0.025])
    assert levels("mochi")[:3] == pytest.approx([1.0, 1 - 0.0125, 1 - 0.025])
    # three quarters, shifted by 5
    assert levels("wan")[1] == pytest.approx(5 * 0.75 / (1 + 4 * 0.75), abs=1e-3)


def test_encoders_of_wans_authors_are_those_of_transformers(authors: Any, text_folders: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(authors("wan image"), tmp_path / "wan")
    t5 = UMT5EncoderModel.from_pretrained(text_folders / "umt5" / "text_encoder")
    torch.save(authors_t5(t5.state_dict()), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    clip = CLIPVisionModel.from_pretrained(pictures_encoder(tmp_path))
    torch.save(authors_clip(clip.state_dict()), folder / "models_clip_open-clip.pth")
    shutil.copytree(text_folders / "umt5" / "tokenizer", folder / "google" / "umt5-xxl")
    with pytest.raises(CheckpointError, match="give --text-encoder"):
        load_pipeline(str(folder), "cpu", "fp32")
    made = load_pipeline(str(folder), "cpu", "fp32", Beside(allow_pickle=True))
    plain = load_pipeline(str(folder), "cpu", "fp32", Beside(str(text_folders / "umt5"), allow_pickle=True))
    for text in (PROMPT, ""):
        ours, theirs = (one.text_encoder([text]).embeddings for one in (made, plain))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert made.image_encoder is not None
    picture = torch.rand(1, 3, 50, 70, generator=torch.Generator().manual_seed(0)) * 2 - 1
    tokens = made.image_encoder(picture)
    assert isinstance(made.image_encoder, nn.Module)
    made.image_encoder.model = clip
    torch.testing.assert_close(tokens, made.image_encoder(picture), rtol=1e-5, atol=1e-5)
    # converted, they are folders as transformers writes them
    convert_model(discover(folder, allow_pickle=True), Target(tmp_path / "whole", "diffusers"))
    whole = load_pipeline(str(tmp_path / "whole"), "cpu", "fp32")
    torch.testing.assert_close(
        whole.text_encoder([PROMPT]).embeddings, made.text_encoder([PROMPT]).embeddings, rtol=1e-5, atol=1e-5
    )


def authors_t5(state: dict[str, Any]) -> dict[str, Any]:
    """The names of transformers as Wan's authors have them."""
    names = {"SelfAttention.relative_attention_bias": "pos_embedding.embedding", "SelfAttention": "attn"}
    names |= {"DenseReluDense.wi_0": "ffn.gate.0", "DenseReluDense.wi_1": "ffn.fc1", "DenseReluDense.wo": "ffn.fc2"}
    names |= {"0.layer_norm": "norm1", "1.layer_norm": "norm2", "encoder.block": "blocks"}
    names |= {"encoder.final_layer_norm": "norm", "shared": "token_embedding"}
    out = {}
    for name, value in state.items():
        if name != "encoder.embed_tokens.weight":
            for theirs, ours in names.items():
                name = name.replace(theirs, ours)
            out[name.replace("layer.0.", "").replace("layer.1.", "").replace("layer.", "")] = value
    return out


def authors_clip(state: dict[str, Any]) -> dict[str, Any]:
    """The names of transformers as in the CLIP of Wan's authors, with its other half beside it."""
    names = {"embeddings.patch_embedding": "patch_embedding", "encoder.layers": "transformer", "layer_norm": "norm"}
    names |= {"pre_layrnorm": "pre_norm", "post_layernorm": "post_norm", "self_attn.out_proj": "attn.proj"}
    names |= {"mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2"}
    out: dict[str, Any] = {"log_scale": torch.zeros(()), "textual.token_embedding.weight": torch.zeros(3, 4)}
    out["visual.head"] = torch.zeros(24, 8)
    for name, value in state.items():
        if "q_proj" in name:
            parts = [state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            value, name = torch.cat(parts), name.replace("self_attn.q_proj", "attn.to_qkv")
        elif "k_proj" in name or "v_proj" in name:
            continue
        elif name.endswith("class_embedding"):
            value, name = value[None, None], "cls_embedding"
        elif "position_embedding" in name:
            value, name = value[None], "pos_embedding"
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        out[f"visual.{name}"] = value.contiguous()
    return out


@pytest.mark.parametrize("version", PRESETS)
def test_blocks_of_the_codecs_of_ltx_come_back(version: str) -> None:
    config = PRESETS[version]
    shapes = Shapes(MemorySource({"encoder.conv_in.conv.weight": torch.empty(128, 48, 3, 3, 3, device="meta")}))
    assert read_ltx_codec(shapes, write_ltx_codec(config)) == config
    # as the first file lists them, the number of layers alone
    old = [["res_x", 4], ["compress_all", 1], ["res_x_y", 1], ["res_x", 3], ["compress_all", 1], ["res_x_y", 1],
           ["res_x", 3], ["compress_all", 1], ["res_x", 3], ["res_x", 4]]  # fmt: skip
    if version == "0.9.0":
        assert read_ltx_codec(shapes, {"blocks": old}) == config
    with pytest.raises(CheckpointError, match="'attn_res_x' of the LTX codec is not known"):
        read_ltx_codec(shapes, {"encoder_blocks": [["attn_res_x", {"num_layers": 2}]]})


@each
def test_an_inspection_tells_parts_sizes_and_what_fits(name: str, authors: Any) -> None:
    case, report = CASES[name], inspect_model(discover(authors(name)))
    assert [found.family for found in report.parts] == [case.denoiser[0], case.codec[0]]
    for found in report.parts:
        model = discover(authors(name)).parts[found.role].load()
        assert found.num_parameters == sum(value.numel() for value in model.state_dict().values())
        assert found.weights_bytes["fp32"] == sum(v.numel() * v.element_size() for v in model.state_dict().values())
        assert found.weights_bytes["bf16"] < found.weights_bytes["fp32"]
        assert not found.problem
    assert report.defaults["width"] > 0


@twice
def test_a_model_comes_back_from_diffusers(name: str, authors: Any, tmp_path: Path) -> None:
    convert_model(discover(authors(name)), Target(tmp_path / "theirs", "diffusers"))
    target = tmp_path / ("back.safetensors" if "ltx" in name else "back")
    convert_model(discover(tmp_path / "theirs"), Target(target, "original", torch.bfloat16))
    first, back = discover(authors(name)), discover(target)
    assert back.pipeline == first.pipeline
    for role, state in weights(first).items():
        again = back.parts[role]
        assert again.config == first.parts[role].config
        for key, value in again.load().state_dict().items():
            assert torch.equal(value, state[key].to(torch.bfloat16).to(value.dtype)), key


def test_what_cannot_be_read_is_told_in_one_line(authors: Any, text_folders: Path, tmp_path: Path) -> None:
    beside = Beside(text_encoder=str(text_folders / "umt5"))
    folder = shutil.copytree(authors("wan"), tmp_path / "wan")
    codec = folder / "Wan2.1_VAE.safetensors"
    state = {
        name: discover(codec).parts[CODEC].source.get(name) for name in discover(codec).parts[CODEC].source.names()
    }
    codec.unlink()
    torch.save(state, folder / "Wan2.1_VAE.pth")
    with pytest.raises(CheckpointError, match=r"holds no codec.*Wan2.1_VAE.pth is a pickle: --allow-pickle"):
        load_pipeline(str(folder), "cpu", "fp32", beside)
    load_pipeline(str(folder), "cpu", "fp32", replace(beside, allow_pickle=True))
    other = Beside(str(text_folders / "umt5"), str(authors("mochi")))
    with pytest.raises(CheckpointError, match="family mochi_codec as its vae; a model of family wan_codec belongs"):
        load_pipeline(str(folder), "cpu", "fp32", other)
    with pytest.raises(CheckpointError, match="one part of a model"):
        load_pipeline(str(folder / "Wan2.1_VAE.pth"), "cpu", "fp32", Beside(allow_pickle=True))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"ffn_dim": 48}))
    with pytest.raises(CheckpointError, match="ffn_dim is 48; only 40"):
        discover(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no heads of 128: its config.json is missing"):
        discover(folder)


def test_conversions_that_cannot_be_are_refused(authors: Any, tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(CheckpointError, match="is there already"):
        convert_model(discover(authors("wan")), Target(authors("mochi"), "diffusers"))
    with pytest.raises(CheckpointError, match="one layout only"):
        convert_model(discover(tiny_model), Target(tmp_path / "new", "diffusers"))
    with pytest.raises(CheckpointError, match="one part of a model of this package"):
        discover(tiny_model / "denoiser.safetensors")
    with pytest.raises(InputError, match="valid values: diffusers, original"):
        convert_model(discover(authors("wan")), Target(tmp_path / "new", "onnx"))  # type: ignore[arg-type]
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match=r"neither pipeline.json nor model_index.json nor known weights"):
        discover(empty)
    with pytest.raises(CheckpointError, match="there is no model at"):
        discover(tmp_path / "nowhere")
