"""Pipelines as diffusers writes them, small and random: same noise and words, same clip."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_ltx import AutoencoderKLLTXVideo
from diffusers.models.autoencoders.autoencoder_kl_mochi import AutoencoderKLMochi
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_ltx import LTXVideoTransformer3DModel
from diffusers.models.transformers.transformer_mochi import MochiTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.pipelines.ltx.pipeline_ltx import LTXPipeline
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXConditionPipeline
from diffusers.pipelines.mochi.pipeline_mochi import MochiPipeline
from diffusers.pipelines.wan import pipeline_wan_i2v
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from diffusers.pipelines.wan.pipeline_wan_i2v import WanImageToVideoPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPVisionConfig, CLIPVisionModel, T5EncoderModel, UMT5EncoderModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vitascope.core.errors import CapabilityError, CheckpointError, InputError, ShapeError
from vitascope.core.memory import held_bytes
from vitascope.core.random import generator
from vitascope.core.shapes import ClipFormat
from vitascope.core.tracks import VIDEO
from vitascope.diffusion.samplers import Step
from vitascope.models.codecs.decoding import decode_frames
from vitascope.models.offload.offloaded import Layers
from vitascope.tasks.fitting import Fitted, MemoryLimit
from vitascope.tasks.generate import generate, generate_batch
from vitascope.tasks.load import Beside, load_pipeline
from vitascope.tasks.pipeline import Pipeline
from vitascope.tasks.preview import preview_frames
from vitascope.tasks.request import GenerateRequest, Given, Keyframe

PROMPT = "a red ball bounces"


@dataclass(frozen=True)
class Case:
    """A class of pipelines with its scheduler and small parts, the clip to make, and how latents are laid out there."""

    pipeline: Any
    encoder: str
    scheduler: Any
    transformer: Callable[[], nn.Module]
    codec: Callable[[], nn.Module]
    format: ClipFormat
    steps: int = 4
    options: tuple[tuple[str, Any], ...] = ()


def unipc(shift: float) -> Any:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


def wan_transformer() -> nn.Module:
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=16, freq_dim=32, ffn_dim=40, num_layers=2
    )


def wan_codec() -> nn.Module:
    return AutoencoderKLWan(base_dim=8, num_res_blocks=1)


def ltx_transformer() -> nn.Module:
    return LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=2, caption_channels=16,
    )  # fmt: skip


def ltx_codec() -> nn.Module:
    return AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
    )  # fmt: skip


def mochi_transformer() -> nn.Module:
    return MochiTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, pooled_projection_dim=16, text_embed_dim=16,
        time_embed_dim=8,
    )  # fmt: skip


def mochi_codec() -> nn.Module:
    channels: Any = (32, 32, 32, 32)
    return AutoencoderKLMochi(
        encoder_block_out_channels=channels, decoder_block_out_channels=channels, layers_per_block=(1, 1, 1, 1, 1)
    )


def image_transformer(positions: int | None) -> nn.Module:
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=16, freq_dim=32, ffn_dim=40, num_layers=2,
        in_channels=36, out_channels=16, image_dim=24, added_kv_proj_dim=24, pos_embed_seq_len=positions,
    )  # fmt: skip


def image_parts() -> dict[str, Any]:
    config = CLIPVisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=7
    )
    encoder = CLIPVisionModel(config)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.2)
    size = {"height": 28, "width": 28}
    return {
        "image_encoder": encoder,
        "image_processor": CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=size),
    }


DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.95, "max_shift": 2.05, "base_image_seq_len": 1024}
DYNAMIC |= {"max_image_seq_len": 4096, "shift_terminal": 0.1}
CASES = {
    "wan": Case(WanPipeline, "umt5", unipc(3.0), wan_transformer, wan_codec, ClipFormat(48, 32, 16.0, 9), 6),
    "wan, one step, no shift": Case(
        WanPipeline, "umt5", unipc(1.0), wan_transformer, wan_codec, ClipFormat(16, 32, 8.0, 5), 1
    ),
    "wan, which reads T5": Case(
        WanPipeline, "t5", unipc(2.0), wan_transformer, wan_codec, ClipFormat(32, 16, 8.0, 5), 2
    ),
    "wan image": Case(
        WanImageToVideoPipeline, "umt5", unipc(3.0), lambda: image_transformer(None), wan_codec,
        ClipFormat(48, 32, 16.0, 9), 3,
    ),
    "wan first and last": Case(
        WanImageToVideoPipeline, "umt5", unipc(3.0), lambda: image_transformer(34), wan_codec,
        ClipFormat(32, 48, 16.0, 9), 3,
    ),
    "ltx": Case(
        LTXPipeline, "t5", FlowMatchEulerDiscreteScheduler(**DYNAMIC), ltx_transformer, ltx_codec,
        ClipFormat(96, 64, 25.0, 17), 5, (("frame_rate", 25), ("decode_timestep", 0.05), ("decode_noise_scale", 0.025)),
    ),
    "ltx with conditions": Case(
        LTXConditionPipeline, "t5", FlowMatchEulerDiscreteScheduler(), ltx_transformer, ltx_codec,
        ClipFormat(64, 96, 25.0, 17), 5, (("frame_rate", 25),),
    ),
    "mochi": Case(
        MochiPipeline, "t5", FlowMatchEulerDiscreteScheduler(invert_sigmas=True), mochi_transformer, mochi_codec,
        ClipFormat(32, 48, 30.0, 13), 5,
    ),
}  # fmt: skip
of_text = pytest.mark.parametrize("name", [name for name in CASES if "image" not in name and "last" not in name])


def build(case: Case, texts: Path) -> Any:
    """The pipeline of diffusers with random weights; encoders and tokenisers from `texts`."""
    encoder = {"t5": T5EncoderModel, "umt5": UMT5EncoderModel}[case.encoder]
    torch.manual_seed(0)
    parts: dict[str, Any] = {"transformer": case.transformer(), "vae": case.codec()}
    for part in parts.values():
        for parameter in part.parameters():
            nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.5)
        part.eval()
    if case.pipeline is WanImageToVideoPipeline:
        parts |= image_parts()
    if case.pipeline is MochiPipeline:
        parts["force_zeros_for_empty_prompt"] = True  # as the published folder says
    folder = texts / case.encoder
    return case.pipeline(
        scheduler=case.scheduler,
        text_encoder=encoder.from_pretrained(folder / "text_encoder"),
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        **parts,
    )


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory, text_folders: Path) -> Callable[[str], tuple[Path, Any]]:
    """A case's folder and the pipeline of diffusers that wrote it; each is made once."""
    made: dict[str, tuple[Path, Any]] = {}

    def get(name: str) -> tuple[Path, Any]:
        if name not in made:
            folder = tmp_path_factory.mktemp("pipeline")
            theirs = build(CASES[name], text_folders)
            theirs.save_pretrained(folder)
            made[name] = folder, theirs
        return made[name]

    return get


@pytest.fixture
def load(folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Pipeline]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return lambda name: load_pipeline(str(folders(name)[0]), "cpu", "fp32")


def their_latents(theirs: Any, case: Case, noise: Tensor, prompt: str, scale: float) -> Tensor:
    """The latents (1, C, N, h, w), normalised, that the pipeline of diffusers arrives at."""
    theirs.set_progress_bar_config(disable=True)
    fmt, packed = case.format, case.pipeline is LTXPipeline
    latents = theirs._pack_latents(noise) if packed else noise
    out = theirs(
        prompt=prompt, negative_prompt="", width=fmt.width_px, height=fmt.height_px, num_frames=fmt.num_frames,
        num_inference_steps=case.steps, guidance_scale=scale, latents=latents, output_type="latent",
        generator=generator(3, VIDEO), **dict(case.options),  # what LTXConditionPipeline draws its noise from
    ).frames  # fmt: skip
    return theirs._unpack_latents(out, *noise.shape[2:]) if packed else out


@pytest.mark.filterwarnings("ignore:In CPU autocast")  # Mochi in diffusers
@pytest.mark.parametrize("scale", [1.0, 4.0])
@of_text
def test_a_clip_equals_that_of_diffusers(name: str, scale: float, folders: Any, load: Any) -> None:
    case, (_, theirs), ours = CASES[name], folders(name), load(name)
    steps: list[Step] = []
    request = GenerateRequest(PROMPT, format=case.format, seed=3, num_inference_steps=case.steps, guidance_scale=scale)
    made = generate(ours, request, steps.append)
    assert len(steps) == case.steps
    latents = steps[-1].tracks[VIDEO].values
    noise = torch.randn(latents.shape, generator=generator(3, VIDEO))
    expected = their_latents(theirs, case, noise, PROMPT, scale)
    assert ((latents - expected).norm() / expected.norm()) < 1e-4
    fmt = case.format
    assert made.clip.frames.shape == (fmt.num_frames, 3, fmt.height_px, fmt.width_px)
    assert made.clip.samples is None
    assert made.clip.frames.float().std() > 1


@pytest.mark.filterwarnings("ignore:In CPU autocast")  # Mochi in diffusers
def test_the_empty_prompt_of_mochi_is_read_as_the_folder_says(folders: Any, tmp_path: Path) -> None:
    case, (folder, theirs) = CASES["mochi"], folders("mochi")
    results = []
    for zeros in (True, False):
        copy = tmp_path / str(zeros)
        shutil.copytree(folder, copy)
        change(copy / "model_index.json", force_zeros_for_empty_prompt=zeros)
        steps: list[Step] = []
        request = GenerateRequest(PROMPT, format=case.format, seed=3, num_inference_steps=2, guidance_scale=4.0)
        generate(load_pipeline(str(copy), "cpu", "fp32"), request, steps.append)
        results.append(steps[-1].tracks[VIDEO].values)
        noise = torch.randn(results[-1].shape, generator=generator(3, VIDEO))
        theirs.register_to_config(force_zeros_for_empty_prompt=zeros)
        expected = their_latents(theirs, replace(case, steps=2), noise, PROMPT, 4.0)
        assert (results[-1] - expected).norm() / expected.norm() < 1e-4
    theirs.register_to_config(force_zeros_for_empty_prompt=True)
    assert (results[0] - results[1]).norm() / results[0].norm() > 1e-4


@pytest.mark.parametrize("name", ["wan image", "ltx"])
def test_a_folder_of_one_variant_is_read_with_its_encoders(
    name: str, folders: Any, load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, (_, theirs) = CASES[name], folders(name)
    theirs.save_pretrained(tmp_path / "variant", variant="fp16", max_shard_size="12KB")
    assert all(".fp16" in file.name for file in (tmp_path / "variant").rglob("*.safetensors"))
    shown = Given((Keyframe(0.0, picture(case.format, 1)),)) if "image" in name else Given()
    request = GenerateRequest(PROMPT, format=case.format, num_inference_steps=2, given=shown)
    expected = generate(load(name), request).clip.frames
    for memory in (None, MemoryLimit(held_bytes(torch.device("cpu")) + 10**9)):
        own = load_pipeline(str(tmp_path / "variant"), "cpu", "fp32", Beside(variant="fp16"), memory=memory)
        assert torch.equal(generate(own, request).clip.frames, expected)
    with pytest.raises(CheckpointError, match=r"holds no .*fp16"):
        load_pipeline(str(folders(name)[0]), "cpu", "fp32", Beside(variant="fp16"))


def picture(fmt: ClipFormat, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, fmt.height_px, fmt.width_px), generator=draw, dtype=torch.uint8)


@pytest.mark.parametrize("name", ["wan image", "wan first and last"])
def test_a_clip_that_starts_from_a_picture_equals_that_of_diffusers(
    name: str, folders: Any, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # diffusers asks for ftfy here without looking whether it is there
    monkeypatch.setattr(pipeline_wan_i2v, "ftfy", SimpleNamespace(fix_text=str), raising=False)
    case, (_, theirs) = CASES[name], folders(name)
    fmt, both = case.format, name == "wan first and last"
    pictures = [picture(fmt, seed) for seed in range(2 if both else 1)]
    last_s = (fmt.num_frames - 1) / fmt.fps
    given = Given(keyframes=tuple(Keyframe(time_s, p) for time_s, p in zip((0.0, last_s), pictures, strict=False)))
    steps: list[Step] = []
    request = GenerateRequest(PROMPT, format=fmt, seed=3, num_inference_steps=case.steps, given=given)
    generate(load(name), request, steps.append)
    latents = steps[-1].tracks[VIDEO].values
    shown = [Image.fromarray(p.movedim(0, -1).numpy()) for p in pictures]
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        image=shown[0], last_image=shown[1] if both else None, prompt=PROMPT, negative_prompt="", width=fmt.width_px,
        height=fmt.height_px, num_frames=fmt.num_frames, num_inference_steps=case.steps, guidance_scale=5.0,
        latents=torch.randn(latents.shape, generator=generator(3, VIDEO)), output_type="latent",
    ).frames  # fmt: skip
    assert (latents - expected).norm() / expected.norm() < 1e-4
    with pytest.raises(InputError, match="starts from a picture"):
        generate(load(name), GenerateRequest(PROMPT, format=fmt))
    weak = Given(keyframes=(Keyframe(0.0, pictures[0], 0.5),))
    with pytest.raises(CapabilityError, match="strength 1 only"):
        generate(load(name), GenerateRequest(PROMPT, format=fmt, given=weak))


@pytest.mark.filterwarnings("ignore:In CPU autocast")  # Mochi in diffusers
@pytest.mark.parametrize("name", ["wan", "mochi"])
def test_frames_are_those_of_diffusers(name: str, folders: Any, load: Any) -> None:
    case, (_, theirs) = CASES[name], folders(name)
    fmt = case.format
    steps: list[Step] = []
    request = GenerateRequest(PROMPT, format=fmt, seed=5, num_inference_steps=3, guidance_scale=1.0)
    made = generate(load(name), request, steps.append)
    noise = torch.randn(steps[0].tracks[VIDEO].values.shape, generator=generator(5, VIDEO))
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        prompt=PROMPT, width=fmt.width_px, height=fmt.height_px, num_frames=fmt.num_frames, num_inference_steps=3,
        guidance_scale=1.0, latents=noise, output_type="pt",
    ).frames[0]  # fmt: skip
    levels = (expected.clamp(0, 1) * 255).round()
    assert (made.clip.frames.float() - levels).abs().max() <= 1  # a value may lie on the edge between two levels


def test_a_clip_does_not_depend_on_its_batch(load: Any) -> None:
    request = GenerateRequest(PROMPT, format=CASES["ltx"].format, seed=1, num_inference_steps=2)
    other = replace(request, prompt="wind", seed=2)
    alone = generate(load("ltx"), request).clip.frames
    together = generate_batch(load("ltx"), [other, request])[1].clip.frames
    assert (alone.int() - together.int()).abs().max() <= 1


def test_keyframes_go_where_a_level_a_cell_is_known(load: Any) -> None:
    fmt = CASES["ltx"].format
    picture = torch.randint(0, 256, (3, fmt.height_px, fmt.width_px), dtype=torch.uint8)
    given = Given(keyframes=(Keyframe(0.0, picture),))
    steps: list[Step] = []
    ltx = load("ltx")
    generate(ltx, GenerateRequest(PROMPT, format=fmt, given=given, num_inference_steps=2), steps.append)
    latent = ltx.video_codec.encode(picture[None, :, None].float() / 127.5 - 1)
    track = steps[-1].tracks[VIDEO]
    torch.testing.assert_close(track.values[:, :, :1], latent, rtol=1e-4, atol=1e-4)
    assert track.noise.max() == 0
    with pytest.raises(CapabilityError, match="one noise level a clip"):
        generate(load("wan"), GenerateRequest(PROMPT, format=CASES["wan"].format, given=given))


def test_what_a_model_without_sound_cannot_do_is_refused(load: Any) -> None:
    fmt = CASES["wan"].format
    with pytest.raises(CapabilityError, match="without sound"):
        generate(load("wan"), GenerateRequest(PROMPT, format=fmt, given=Given(audio=torch.zeros(fmt.num_samples))))
    with pytest.raises(ShapeError, match="nearest: 32, 48"):
        generate(load("wan"), GenerateRequest(PROMPT, format=replace(fmt, width_px=40)))


@pytest.mark.parametrize("name", CASES)
def test_under_a_limit_of_memory_the_clip_is_the_same(name: str, folders: Any, load: Any) -> None:
    limit = MemoryLimit(held_bytes(torch.device("cpu")) + 10**9)
    under = load_pipeline(str(folders(name)[0]), "cpu", "fp32", memory=limit)
    assert isinstance(under.denoiser, nn.Module)
    assert all(value.is_meta for value in under.denoiser.state_dict().values())
    picture = torch.full((3, 32, 48), 90, dtype=torch.uint8)
    last = (CASES[name].format.num_frames - 1) / CASES[name].format.fps
    shown = (Keyframe(0.0, picture),) if "image" in name else (Keyframe(0.0, picture), Keyframe(last, picture))
    plain = load(name)
    given = Given(shown) if plain.image_encoder is not None else Given()
    request = GenerateRequest(PROMPT, format=CASES[name].format, num_inference_steps=2, given=given)
    expected = generate(plain, request).clip.frames
    for layers in (None, Layers(0)):
        if layers is not None:
            assert isinstance(under.memory, Fitted)
            under.memory.parts["denoiser"].change(layers)
        assert torch.equal(generate(under, request).clip.frames, expected)
    assert under.memory is not None
    assert under.memory.use is not None
    stages = [stage.name for stage in under.memory.use.plan.stages]
    assert stages == ["text", *(["encode"] if given.keyframes else []), "denoise", "decode"]


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("model_index.json", {"_class_name": "FluxPipeline"}, "FluxPipeline.*valid values: WanPipeline"),
        (
            "model_index.json",
            {"transformer_2": ["diffusers", "WanTransformer3DModel"]},
            "with transformer_2 is not known; known parts: transformer",
        ),
        ("model_index.json", {"boundary_ratio": 0.9}, "boundary_ratio is 0.9; only None"),
        ("model_index.json", {"expand_timesteps": True}, "expand_timesteps is True; only False"),
        ("model_index.json", {"colour": 1}, "unknown keys: colour"),
        ("transformer/config.json", {"_class_name": "Flux"}, "holds a Flux; valid here: WanTransformer3DModel"),
        ("transformer/config.json", {"colour": 1}, "unknown keys: colour"),
        ("transformer/config.json", {"num_layers": "2"}, "num_layers must be a whole number"),
        ("transformer/config.json", {"num_layers": 3}, "missing"),
        ("transformer/config.json", {"ffn_dim": 48}, "has the shape"),
        ("transformer/config.json", {"text_dim": 24}, "has the shape|do not fit"),
        ("vae/config.json", {"is_residual": True}, "is_residual is True; only False"),
        ("scheduler/scheduler_config.json", {"solver_order": 3}, "solver_order is 3; only 2"),
        ("scheduler/scheduler_config.json", {"colour": 1}, "unknown keys: colour"),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "only 'UniPCMultistepScheduler'"),
    ],
)
def test_folders_that_do_not_fit_are_refused_in_one_line(
    file: str, values: dict[str, Any], message: str, folders: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(folders("wan")[0], folder)
    change(folder / file, **values)
    with pytest.raises((CheckpointError, InputError), match=message) as caught:
        load_pipeline(str(folder), "cpu", "fp32")
    assert "\n" not in str(caught.value)


def test_missing_and_cut_files_are_named(folders: Any, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(folders("wan")[0], folder)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model\.safetensors"):
        load_pipeline(str(folder), "cpu", "fp32")
    weights.unlink()
    with pytest.raises(CheckpointError, match="holds no diffusion_pytorch_model"):
        load_pipeline(str(folder), "cpu", "fp32")
    weights.write_bytes(data)
    (folder / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no scheduler_config\.json"):
        load_pipeline(str(folder), "cpu", "fp32")


def test_in_bf16_the_matrices_take_half_the_memory_and_the_clip_is_nearly_the_same(folders: Any, load: Any) -> None:
    half = load_pipeline(str(folders("ltx")[0]), "cpu", "bf16")
    assert isinstance(half.denoiser, nn.Module)
    kinds = {name: value.dtype for name, value in half.denoiser.state_dict().items()}
    assert kinds["blocks.0.attention.qkv.weight"] == torch.bfloat16
    assert kinds["blocks.0.offsets"] == torch.float32
    request = GenerateRequest(PROMPT, format=CASES["ltx"].format, num_inference_steps=3)
    last: list[Step] = []
    generate(half, request, last.append)
    generate(load("ltx"), request, last.append)
    rounded, exact = (last[i].tracks[VIDEO].values for i in (2, 5))
    # bf16 has 8 bits: a few per cent after three steps of random weights, far from the distance of two seeds
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.1


@pytest.mark.parametrize("name", ["wan image", "ltx", "mochi"])
def test_in_bf16_a_codec_reads_in_fp32_and_shows_in_bf16(name: str, folders: Any, load: Any) -> None:
    half, exact = load_pipeline(str(folders(name)[0]), "cpu", "bf16"), load(name)
    codec: Any = half.video_codec
    of = {
        part: {value.dtype for value in getattr(codec, part).state_dict().values()} for part in ("encoder", "decoder")
    }
    assert of["encoder"] == {torch.float32}
    assert torch.bfloat16 in of["decoder"]
    request = GenerateRequest(PROMPT, format=CASES[name].format, num_inference_steps=2)
    if name == "wan image":
        picture = torch.full((3, 32, 32), 99, dtype=torch.uint8)
        request = replace(request, given=Given((Keyframe(0.0, picture),)))
    seen: list[Step] = []
    made = generate(half, request, seen.append)
    # what a stored weight is rounded to is what autocast would round it to
    values = seen[-1].tracks[VIDEO].values
    with half.autocast():
        expected = decode_frames(exact.video_codec, values.float(), exact.decoding)[0]
    assert (made.clip.frames.int() - expected.int()).abs().max() <= 2
    assert torch.equal(preview_frames(half, seen[-1])[0], made.clip.frames)  # the last estimate, outside the run
