"""The Mochi codec against diffusers on small random models; chunks and streams against the whole; both key layouts."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, get_args

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_mochi import AutoencoderKLMochi, MochiUpBlock3D
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vitascope.core.errors import CheckpointError, InputError, ShapeError
from vitascope.core.protocols import VideoCodec
from vitascope.models.codecs.mochi.config import Lead, MochiCodecConfig
from vitascope.models.codecs.mochi.keys import ChannelsInnermost, KernelToMatrix, diffusers_keys, original_keys
from vitascope.models.codecs.mochi.model import FourierLift, MochiCodec
from vitascope.nn.edge_conv import EdgeCache, EdgeConv3d
from vitascope.weights.checkpoint import load_into
from vitascope.weights.keys import convert


def small(**changes: Any) -> MochiCodecConfig:
    values: dict[str, Any] = {
        "encoder_channels": (32, 32, 64, 64), "decoder_channels": (32, 64, 32, 64), "blocks": (1, 1, 1, 1, 1),
        "latent_channels": 4, "latent_mean": (0.5, -0.2, 0.0, 1.0), "latent_std": (1.5, 0.7, 2.0, 1.0), "lead": "end",
    }  # fmt: skip
    return MochiCodecConfig(**{**values, **changes})


@dataclass(frozen=True)
class Case:
    """A configuration and the frames (T, H, W) to try it on."""

    config: MochiCodecConfig = field(default_factory=small)
    frames: tuple[int, int, int] = (13, 24, 8)
    num_clips: int = 1


TWO_STEPS: dict[str, Any] = {"encoder_channels": (32, 64, 96), "decoder_channels": (32, 32, 64)}
CASES = {
    "plain, odd sizes": Case(),
    "a batch of pictures": Case(frames=(1, 24, 16), num_clips=2),
    "two cells, a batch": Case(frames=(19, 8, 16), num_clips=2),
    "uneven blocks": Case(small(blocks=(2, 1, 2, 1, 3)), (7, 8, 24)),
    "no attention": Case(small(attention=(False,) * 5), (13, 8, 24)),
    "attention everywhere": Case(small(attention=(True,) * 5), (7, 8, 16), 2),
    "other steps": Case(small(time_steps=(3, 1, 2)), (13, 8, 16)),
    "two steps": Case(
        small(**TWO_STEPS, time_steps=(2, 2), blocks=(1,) * 4, attention=(False, True, True, False)), (9, 12, 8)
    ),
}
each_case = pytest.mark.parametrize("name", CASES)
FULL_DEPTH = small(blocks=MochiCodecConfig().blocks)


@cache
def their_codec(config: MochiCodecConfig) -> Any:
    torch.manual_seed(0)
    make: Any = AutoencoderKLMochi  # its annotations say that there is one level
    codec = make(
        encoder_block_out_channels=config.encoder_channels,
        decoder_block_out_channels=config.decoder_channels,
        latent_channels=config.latent_channels,
        layers_per_block=config.blocks,
        temporal_expansions=config.time_steps,
        spatial_expansions=(2,) * len(config.time_steps),
        add_attention_block=config.attention,
    )
    for name, parameter in codec.named_parameters():
        nn.init.normal_(parameter, 1.0 if "norm" in name and "weight" in name else 0.0, 0.3)
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return codec.eval().requires_grad_(False)


def our_codec(config: MochiCodecConfig) -> MochiCodec:
    codec = MochiCodec(config).eval().requires_grad_(False)
    load_into(codec, convert(diffusers_keys(config), their_codec(replace(config, lead="end")).state_dict()))
    return codec


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def frames_of(case: Case) -> Tensor:
    return draw(case.num_clips, 3, *case.frames).mul(0.5).clamp(-1, 1)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@each_case
def test_encoding_and_decoding_equal_those_of_diffusers(name: str) -> None:
    case = CASES[name]
    theirs, frames = their_codec(case.config), frames_of(case)
    ours: VideoCodec = our_codec(case.config)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (case.config.latent_mean, case.config.latent_std))
    expected = (theirs.encode(frames).latent_dist.mode() - mean) / std
    latents = ours.encode(frames)
    assert latents.shape == expected.shape
    assert relative_error(latents, expected) < 1e-5
    decoded, their_frames = ours.decode(expected), theirs.decode(expected * std + mean).sample
    assert decoded.shape == their_frames.shape == frames.shape
    assert relative_error(decoded, their_frames) < 1e-5


@each_case
def test_decoding_as_the_authors_do_drops_the_lead_on_every_step(name: str) -> None:
    case = CASES[name]
    theirs, raw = their_codec(case.config), draw(case.num_clips, case.config.latent_channels, 3, 2, 3)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (case.config.latent_mean, case.config.latent_std))

    def drop(block: MochiUpBlock3D, _: Any, out: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        return out[0][:, :, block.temporal_expansion - 1 :], out[1]

    hooks = [block.register_forward_hook(drop) for block in theirs.decoder.up_blocks]
    expected = theirs.decoder(raw)[0]
    for hook in hooks:
        hook.remove()
    decoded = our_codec(replace(case.config, lead="step")).decode((raw - mean) / std)
    assert decoded.shape == expected.shape
    assert relative_error(decoded, expected) < 1e-5
    # the two ways are two results
    assert relative_error(decoded, our_codec(case.config).decode((raw - mean) / std)) > 1e-2


@each_case
def test_chunks_of_any_size_equal_the_whole(name: str) -> None:
    case, frames = CASES[name], frames_of(CASES[name])
    codecs: dict[Lead, MochiCodec] = {lead: our_codec(replace(case.config, lead=lead)) for lead in get_args(Lead)}
    latents = codecs["end"].encode(frames, 0)
    # the same sums in fp32; blocks of another size may add them in another order
    for chunk in (1, 4):
        torch.testing.assert_close(codecs["end"].encode(frames, chunk), latents, rtol=1e-4, atol=1e-5)
    for chunk, codec in ((1, codecs["step"]), (3, codecs["step"]), (2, codecs["end"])):
        torch.testing.assert_close(codec.decode(latents, chunk), codec.decode(latents, 0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["two cells, a batch", "attention everywhere", "two steps"])
def test_a_clip_that_comes_in_parts_has_the_latents_of_the_whole(name: str) -> None:
    case = CASES[name]
    codec, frames, time = our_codec(case.config), frames_of(case), case.config.strides.time
    whole = codec.encode(frames, 0)
    for cuts in ([1], list(range(1, case.frames[0], time))):
        latents = torch.cat(list(codec.encode_stream(frames.tensor_split(cuts, 2))), 2)
        torch.testing.assert_close(latents, whole, rtol=1e-4, atol=1e-5)


def test_attention_in_bands_of_rows_equals_attention_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["plain, odd sizes"]
    codec, frames = our_codec(case.config), frames_of(case)
    whole = codec.encode(frames)
    monkeypatch.setattr("vitascope.models.codecs.mochi.model.CELLS", 9)
    for bands in (codec.encode(frames), torch.cat(list(codec.encode_stream(frames.tensor_split([1, 7], 2))), 2)):
        torch.testing.assert_close(bands, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lead", ["step", "end"])
def test_a_stream_gives_frames_as_soon_as_their_latents_are_there(lead: Any) -> None:
    codec, latents = our_codec(small(lead=lead)), draw(1, 4, 3, 2, 3)
    parts = list(codec.stream(latents))
    assert [part.shape[2] for part in parts] == [1] * 13
    assert [part.shape[2] for part in codec.stream(latents, 6)] == ([6, 5, 2] if lead == "step" else [1, 6, 6])
    changed = latents.clone()
    changed[:, :, 2] += 1.0
    for index, part in enumerate(codec.stream(changed)):
        assert torch.equal(part, parts[index]) == (index < 7)


def test_what_a_decoder_keeps_does_not_grow_with_the_clip() -> None:
    codec, held = our_codec(small()), EdgeCache()
    sizes = []
    for latent in draw(1, 2, 2, 3, 4).split(1, 1):
        list(codec.decoder.push(latent, held))
        sizes.append(held.num_bytes())
    # two frames before each of ten convolutions: 64 channels at 2 x 3 cells, 64 there, 32, 64 and 32 larger ones
    cells = 2 * 3 * (2 * 64 + 2 * 64 + 2 * 32 * 4 + 2 * 64 * 16 + 2 * 32 * 64)
    assert sizes == [2 * cells * 4] * 2


@each_case
def test_both_layouts_are_read_and_written_key_by_key(name: str) -> None:
    config = CASES[name].config
    ours, theirs = our_codec(config).state_dict(), their_codec(config).state_dict()
    for layout in (diffusers_keys, original_keys):
        written = convert(layout(config), ours, writing=True)
        back = convert(layout(config), written)
        assert back.keys() == ours.keys()
        assert all(torch.equal(back[key], ours[key]) for key in ours)
        if layout is diffusers_keys:
            assert written.keys() == theirs.keys()
            assert all(torch.equal(written[key], theirs[key]) for key in theirs)


# How diffusers' scripts/convert_mochi_to_diffusers.py reads the authors' names, at the published number of blocks.
STACK = {"0": "norm1.norm_layer", "2": "conv1.conv", "3": "norm2.norm_layer", "5": "conv2.conv"}
READING: list[tuple[str, Any]] = [
    (r"decoder\.blocks\.0\.0\.", "decoder.conv_in."),
    (r"(de|en)coder\.output_proj\.", r"\1coder.proj_out."),
    (r"decoder\.blocks\.0\.(\d)\.stack", lambda m: f"decoder.block_in.resnets.{int(m[1]) - 1}.stack"),
    (r"decoder\.blocks\.([123])\.blocks", lambda m: f"decoder.up_blocks.{int(m[1]) - 1}.resnets"),
    (r"decoder\.blocks\.([123])\.proj", lambda m: f"decoder.up_blocks.{int(m[1]) - 1}.proj"),
    (r"decoder\.blocks\.4\.(\d)", r"decoder.block_out.resnets.\1"),
    (r"encoder\.layers\.0\.", "encoder.proj_in."),
    (r"encoder\.output_norm\.", "encoder.norm_out.norm_layer."),
    (r"encoder\.layers\.([123])\.", lambda m: f"encoder.block_in.resnets.{int(m[1]) - 1}."),
    (r"encoder\.layers\.([456])\.layers\.0", lambda m: f"encoder.down_blocks.{int(m[1]) - 4}.conv_in.conv"),
    (r"encoder\.layers\.([456])\.layers\.(\d)", lambda m: f"encoder.down_blocks.{int(m[1]) - 4}.{int(m[2]) - 1}"),
    (r"encoder\.layers\.([789])\.", lambda m: f"encoder.block_out.{int(m[1]) - 7}."),
    (r"\.(\d)\.attn_block\.norm", r".norms.\1.norm_layer"),
    (r"\.(\d)\.attn_block\.attn\.out", r".attentions.\1.to_out.0"),
    (r"\.(\d)\.attn_block\.attn\.qkv", r".attentions.\1.to_qkv"),
    (r"(block_out|down_blocks\.\d)\.(\d)\.stack", r"\1.resnets.\2.stack"),
    (r"stack\.(\d)", lambda m: STACK[m[1]]),
]


def read_by_diffusers(original: dict[str, Tensor]) -> dict[str, Tensor]:
    read: dict[str, Tensor] = {}
    for name, tensor in original.items():
        for pattern, replacement in READING:
            name = re.sub(pattern, replacement, name)
        names = [name.replace("to_qkv", f"to_{part}") for part in "qkv"] if "to_qkv" in name else [name]
        read.update(zip(names, tensor.chunk(len(names)), strict=True))
    return read


def test_the_authors_names_mean_what_diffusers_reads_in_them() -> None:
    ours = our_codec(FULL_DEPTH).state_dict()
    read = read_by_diffusers(convert(original_keys(FULL_DEPTH), ours, writing=True))
    expected = their_codec(FULL_DEPTH).state_dict()
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[key], expected[key]) for key in expected)


def test_the_published_layouts_at_full_size() -> None:
    config = MochiCodecConfig()
    with torch.device("meta"):
        codec, theirs = MochiCodec(config), AutoencoderKLMochi().state_dict()
    ours, shapes = codec.state_dict(), {key: value.shape for key, value in theirs.items()}
    written = convert(diffusers_keys(config), ours, writing=True)
    assert {key: value.shape for key, value in written.items()} == shapes
    original = convert(original_keys(config), ours, writing=True)
    assert {key: value.shape for key, value in read_by_diffusers(original).items()} == shapes
    assert original["encoder.layers.4.layers.1.attn_block.attn.qkv.weight"].shape == (384, 128)
    # the authors have a file for each part
    for part in ("encoder", "decoder"):
        alone = {k.removeprefix(f"{part}."): v for k, v in original.items() if k.startswith(part)}
        back = convert(original_keys(config, part), alone)
        assert {k: v.shape for k, v in back.items()} == {
            k: v.shape for k, v in codec.get_submodule(part).state_dict().items()
        }


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_the_convolution_repeats_its_edges_and_runs_in_chunks(
    rows: int, columns: int, channels: int, chunks: list[int]
) -> None:
    torch.manual_seed(0)
    convolution = EdgeConv3d(channels, 2)
    x = draw(2, sum(chunks), rows, columns, channels)
    padded = nn.functional.pad(x.movedim(-1, 1).contiguous(), (1, 1, 1, 1, 2, 0), mode="replicate")
    expected = nn.functional.conv3d(padded, convolution.weight, convolution.bias).movedim(1, -1)
    for gradients in (True, False):  # without them what is padded lies in memory that is used anew
        held = EdgeCache()
        with torch.set_grad_enabled(gradients):
            torch.testing.assert_close(convolution(x), expected, rtol=1e-5, atol=1e-6)
            parts = [convolution(part, held) for part in x.split(chunks, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-5, atol=1e-6)


def test_half_precision_keeps_its_dtype_and_its_fourier_features_are_worked_out_in_fp32() -> None:
    frames = frames_of(Case(frames=(7, 8, 16))).bfloat16()
    codec = our_codec(small())
    latents = codec.encode(frames.float())
    halved = codec.bfloat16().encode(frames)
    assert halved.dtype == codec.decode(halved).dtype == torch.bfloat16
    assert relative_error(halved.float(), latents) < 0.05
    lift = FourierLift(15).bfloat16().requires_grad_(False)
    lift.weight.copy_(torch.eye(15))
    lift.bias.zero_()
    # 2^6 and 2^7 periods of a value are a quarter and a half turn past whole ones; in half precision they are lost
    x = torch.full((1, 1, 1, 1, 3), 0.5 + 2.0**-8, dtype=torch.bfloat16)
    waves_SCO = lift(x).float().flatten()[3:].view(2, 3, 2)
    expected = torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    torch.testing.assert_close(waves_SCO, expected.unsqueeze(1).expand(2, 3, 2), atol=1e-3, rtol=0)


def test_inputs_and_configurations_that_do_not_fit_are_refused() -> None:
    codec = MochiCodec(small())
    with pytest.raises(ShapeError, match=r"9 frames do not fit.* nearest: 7, 13"):
        codec.encode(draw(1, 3, 9, 16, 16))
    with pytest.raises(ShapeError, match=r"height 20 px .* nearest: 16, 24"):
        codec.encode(draw(1, 3, 7, 20, 16))
    with pytest.raises(ShapeError, match=r"frames must be \(B, 3, T, H, W\)"):
        codec.encode(draw(1, 4, 7, 16, 16))
    for shape in ((1, 3, 2, 2, 2), (1, 4, 0, 2, 2)):
        with pytest.raises(ShapeError, match=r"latents must be \(B, 4, N, h, w\)"):
            codec.decode(draw(*shape))
    for act in (lambda: codec.encode(draw(1, 3, 7, 16, 16), -1), lambda: codec.decode(draw(1, 4, 2, 2, 2), -1)):
        with pytest.raises(InputError, match="chunk must be 0"):
            act()
    with pytest.raises(ShapeError, match=r"7 frames do not fit: later parts have 6k; nearest: 6, 12"):
        list(codec.encode_stream([draw(1, 3, 1, 8, 8), draw(1, 3, 7, 8, 8)]))
    wrong: list[dict[str, Any]] = [
        {"time_steps": (1, 2)}, {"blocks": (1,) * 4}, {"blocks": (0,) * 5}, {"encoder_channels": (32, 48, 64, 64)},
        {"latent_std": (0.0,) * 4}, {"latent_mean": (0.0,) * 3}, {"lead": "late"},
    ]  # fmt: skip
    for changes in wrong:
        with pytest.raises(InputError):
            small(**changes)
    with pytest.raises(CheckpointError, match=r"not a multiple of 8"):
        ChannelsInnermost("proj.weight", "linear.weight", 8).read([draw(12, 4)])
    with pytest.raises(CheckpointError, match=r"conv\.weight has the shape"):
        KernelToMatrix("conv.weight", "linear.weight", (2, 2, 2)).read([draw(4, 4, 3, 2, 2)])
