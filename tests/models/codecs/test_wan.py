"""The Wan codec against diffusers on small random models; chunks against the whole; both key layouts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vitascope.core.errors import InputError, ShapeError
from vitascope.core.protocols import VideoCodec
from vitascope.models.codecs.wan.config import WanCodecConfig
from vitascope.models.codecs.wan.keys import diffusers_keys, original_keys
from vitascope.models.codecs.wan.model import WanCodec, double_and_convolve
from vitascope.weights.checkpoint import load_into
from vitascope.weights.keys import convert


def small(**changes: Any) -> WanCodecConfig:
    values: dict[str, Any] = {"base": 8, "latent_channels": 4, "latent_mean": (0.5, -0.2, 0.0, 1.0), "blocks": 1}
    return WanCodecConfig(**{**values, "latent_std": (1.5, 0.7, 2.0, 1.0), **changes})


@dataclass(frozen=True)
class Case:
    """A configuration and the frames (T, H, W) to try it on."""

    config: WanCodecConfig = field(default_factory=small)
    frames: tuple[int, int, int] = (9, 16, 24)
    num_clips: int = 1


CASES = {
    "plain": Case(),
    "a batch of pictures": Case(frames=(1, 24, 16), num_clips=2),
    "two frames of latents": Case(frames=(5, 8, 8), num_clips=2),
    "two blocks, uneven multiples": Case(small(blocks=2, multiples=(1, 2, 3, 3)), (5, 16, 16)),
    "another base in the decoder": Case(small(decoder_base=6), (5, 8, 16)),
    "a first level wider than the base": Case(small(multiples=(2, 2, 3, 4)), (5, 8, 8)),
    "no time": Case(small(halve_time=(False, False, False)), (3, 8, 16)),
    "time at once": Case(small(multiples=(1, 2), halve_time=(True,), base=6), (7, 6, 10)),
    "early time": Case(small(halve_time=(True, False, True)), (13, 8, 8)),
}
each_case = pytest.mark.parametrize("name", CASES)
# diffusers walks through a clip in steps of four frames, whatever the stride
each_peer_case = pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.config.strides.time == 4])


def their_codec(config: WanCodecConfig) -> Any:
    torch.manual_seed(0)
    codec = AutoencoderKLWan(
        base_dim=config.base,
        decoder_base_dim=config.decoder_base or None,
        z_dim=config.latent_channels,
        dim_mult=list(config.multiples),
        num_res_blocks=config.blocks,
        temperal_downsample=list(config.halve_time),
        latents_mean=list(config.latent_mean),
        latents_std=list(config.latent_std),
        scale_factor_temporal=config.strides.time,
        scale_factor_spatial=config.strides.height,
    )
    for name, parameter in codec.named_parameters():
        nn.init.normal_(parameter, 1.0 if "gamma" in name else 0.0, 0.2 if parameter.ndim < 4 else 0.1)
    return codec.eval().requires_grad_(False)


def our_codec(config: WanCodecConfig, theirs: nn.Module) -> WanCodec:
    codec = WanCodec(config).eval().requires_grad_(False)
    load_into(codec, convert(diffusers_keys(config), theirs.state_dict()))
    return codec


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@each_peer_case
def test_encoding_and_decoding_equal_those_of_diffusers(name: str) -> None:
    case = CASES[name]
    theirs = their_codec(case.config)
    ours: VideoCodec = our_codec(case.config, theirs)
    frames = draw(case.num_clips, 3, *case.frames).clamp(-1, 1)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (case.config.latent_mean, case.config.latent_std))
    expected = (theirs.encode(frames).latent_dist.mode() - mean) / std
    latents = ours.encode(frames)
    assert latents.shape == expected.shape
    assert relative_error(latents, expected) < 1e-5
    decoded = ours.decode(latents)
    assert decoded.shape == frames.shape
    assert relative_error(decoded.clamp(-1, 1), theirs.decode(expected * std + mean).sample) < 1e-5


@each_case
@pytest.mark.parametrize("chunk", [0, 2, 3])
def test_chunks_of_any_size_equal_one_latent_frame_at_a_time(name: str, chunk: int) -> None:
    case = CASES[name]
    codec = our_codec(case.config, their_codec(case.config))
    frames = draw(case.num_clips, 3, *case.frames)
    latents = codec.encode(frames)
    # the same sums in fp32; blocks of another size may add them in another order
    torch.testing.assert_close(codec.encode(frames, chunk), latents, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(codec.decode(latents, chunk), codec.decode(latents), rtol=1e-4, atol=1e-5)


def test_a_stream_gives_frames_as_soon_as_their_latents_are_there() -> None:
    case = CASES["plain"]
    codec = our_codec(case.config, their_codec(case.config))
    latents = codec.encode(draw(1, 3, *case.frames))
    parts = list(codec.stream(latents))
    assert [part.shape[2] for part in parts] == [1, 4, 4]
    changed = latents.clone()
    changed[:, :, 2] += 1.0
    for index, part in enumerate(codec.stream(changed)):
        assert torch.equal(part, parts[index]) == (index < 2)


@each_case
@pytest.mark.parametrize("layout", [diffusers_keys, original_keys])
def test_both_layouts_are_read_and_written_key_by_key(name: str, layout: Any) -> None:
    config = CASES[name].config
    ours = WanCodec(config).state_dict()
    theirs = convert(layout(config), ours, writing=True)
    back = convert(layout(config), theirs)
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[key], ours[key]) for key in ours)
    if layout is diffusers_keys:
        expected = their_codec(config).state_dict()
        assert {key: value.shape for key, value in theirs.items()} == {k: v.shape for k, v in expected.items()}


def test_the_published_layouts_at_full_size() -> None:
    config = WanCodecConfig()
    with torch.device("meta"):
        ours, theirs = WanCodec(config).state_dict(), AutoencoderKLWan().state_dict()
    written = convert(diffusers_keys(config), ours, writing=True)
    assert {key: value.shape for key, value in written.items()} == {key: value.shape for key, value in theirs.items()}
    original = convert(original_keys(config), ours, writing=True)
    # diffusers' own reading of the authors' names
    assert {k: v.shape for k, v in convert_wan_vae_to_diffusers(dict(original)).items()} == {
        k: v.shape for k, v in theirs.items()
    }


@settings(max_examples=10)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), st.integers(1, 3))
def test_four_small_convolutions_equal_doubling_and_a_large_one(rows: int, columns: int, inputs: int, out: int) -> None:
    convolution, x = nn.Conv2d(inputs, out, 3, padding=1), draw(2, inputs, rows, columns)
    expected = convolution(nn.functional.interpolate(x, scale_factor=2.0, mode="nearest-exact"))
    torch.testing.assert_close(double_and_convolve(convolution, x), expected, rtol=1e-5, atol=1e-6)


def test_sizes_that_do_not_fit_are_refused() -> None:
    codec = WanCodec(small())
    with pytest.raises(ShapeError, match=r"6 frames do not fit.* nearest: 5, 9"):
        codec.encode(draw(1, 3, 6, 16, 16))
    with pytest.raises(ShapeError, match=r"height 20 px .* nearest: 16, 24"):
        codec.encode(draw(1, 3, 5, 20, 16))
    with pytest.raises(ShapeError, match=r"latents must be \(B, 4, N, h, w\)"):
        codec.decode(draw(1, 3, 2, 2, 2))
    with pytest.raises(InputError, match="chunk must be 0"):
        codec.decode(draw(1, 4, 2, 2, 2), chunk=-1)


@each_case
def test_large_levels_hold_one_frame_at_a_time(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    codec, seen = WanCodec(case.config).eval().requires_grad_(False), {"read": [], "shown": []}
    codec.encoder.conv_in.register_forward_hook(lambda layer, given, out: seen["read"].append(out.shape[1]))
    codec.decoder.conv_out.register_forward_hook(lambda layer, given, out: seen["shown"].append(out.shape[1]))
    codec.decode(codec.encode(draw(case.num_clips, 3, *case.frames)))
    assert seen == {"read": [1] * case.frames[0], "shown": [1] * case.frames[0]}
