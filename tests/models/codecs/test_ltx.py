"""The LTX codec against diffusers on small random models of every generation; chunks and tiles against the whole; both
key layouts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ltx_vae_checkpoint_to_diffusers
from diffusers.models.autoencoders.autoencoder_kl_ltx import AutoencoderKLLTXVideo
from torch import Tensor, nn

from vitascope.core.errors import CheckpointError, InputError, ShapeError
from vitascope.core.protocols import VideoCodec
from vitascope.models.codecs.ltx.config import (
    PRESETS,
    DecoderStage,
    EncoderStage,
    LTXCodecConfig,
    from_diffusers,
    to_diffusers,
)
from vitascope.models.codecs.ltx.keys import diffusers_keys, original_keys
from vitascope.models.codecs.ltx.layers import NOTHING
from vitascope.models.codecs.ltx.model import LTXCodec, run_layers
from vitascope.models.codecs.ltx.tiling import decode_tiled, encode_tiled
from vitascope.nn.tiling import Tiling
from vitascope.weights.checkpoint import load_into
from vitascope.weights.config import config_from_dict, config_to_dict
from vitascope.weights.keys import convert

OLD_ENCODER = (EncoderStage(4, 1, "conv"), EncoderStage(6, 2, "conv"), EncoderStage(6, 1), EncoderStage(6, 1))
NEW_ENCODER = (EncoderStage(4, 1, "space"), EncoderStage(8, 1, "time"), EncoderStage(8, 2, "both"), EncoderStage(16, 1))
PLAIN = (DecoderStage(6, 1), DecoderStage(6, 1), DecoderStage(6, 1, "plain"), DecoderStage(4, 2, "plain"))
NARROWING = (DecoderStage(16, 1), DecoderStage(8, 1, "residual", 2, True), DecoderStage(4, 2, "residual", 2, True))
QUIET = tuple(replace(stage, inject_noise=False) for stage in NARROWING)
OLD = LTXCodecConfig(OLD_ENCODER, PLAIN, latent_channels=5, patch_px=2)
NOISY = LTXCodecConfig(OLD_ENCODER, NARROWING, latent_channels=5, patch_px=2, timestep_conditioning=True)
NEW = LTXCodecConfig(NEW_ENCODER, QUIET, latent_channels=6, patch_px=2, timestep_conditioning=True)
FULL_STRIDES = LTXCodecConfig(
    (EncoderStage(4, 1, "space"), EncoderStage(8, 1, "time"), EncoderStage(8, 1, "both"), EncoderStage(16, 1, "both"),
     EncoderStage(16, 1)),
    (DecoderStage(32, 1), *(DecoderStage(channels, 1, "residual", 2) for channels in (16, 8, 4))),
    latent_channels=8, timestep_conditioning=True, scaling=0.7,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A configuration and the frames (T, H, W) to try it on."""

    config: LTXCodecConfig
    frames: tuple[int, int, int]
    num_clips: int = 1


CASES = {
    "0.9.0": Case(OLD, (9, 16, 24)),
    "0.9.0, causal decoder": Case(replace(OLD, decoder_causal=True), (13, 8, 16), 2),
    "0.9.0, encoder that looks ahead": Case(replace(OLD, encoder_causal=False), (17, 8, 8), 2),
    "0.9.0, a batch of pictures": Case(OLD, (1, 24, 40), 3),
    "0.9.1": Case(NOISY, (13, 24, 8), 2),
    "0.9.1, causal": Case(replace(NOISY, decoder_causal=True, patch_px=3), (5, 12, 36), 2),
    "0.9.1, noise without timesteps": Case(replace(NOISY, timestep_conditioning=False), (5, 16, 16)),
    "0.9.5": Case(NEW, (9, 24, 16), 2),
    "0.9.5, all looks ahead": Case(replace(NEW, encoder_causal=False), (21, 8, 16)),
    "0.9.5, all causal": Case(replace(NEW, decoder_causal=True), (17, 8, 24)),
    "0.9.5, full strides": Case(FULL_STRIDES, (17, 32, 64), 2),
}
each_case = pytest.mark.parametrize("name", CASES)
each_generation = pytest.mark.parametrize("name", ["0.9.0", "0.9.1", "0.9.5"])


@cache
def their_codec(config: LTXCodecConfig) -> Any:
    torch.manual_seed(0)
    codec: Any = AutoencoderKLLTXVideo.from_config(to_diffusers(config))
    for name, parameter in codec.named_parameters():
        if "timestep_scale_multiplier" not in name:
            nn.init.normal_(parameter, 1.0 if "norm3.weight" in name else 0.0, 0.1 if "conv" in name else 0.3)
    nn.init.normal_(codec.latents_mean)
    nn.init.uniform_(codec.latents_std, 0.5, 2.0)
    return codec.eval().requires_grad_(False)


def our_codec(config: LTXCodecConfig) -> LTXCodec:
    codec = LTXCodec(config).eval().requires_grad_(False)
    load_into(codec, convert(diffusers_keys(config), their_codec(config).state_dict()))
    return codec


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in tensors.items()}


def their_decoding(theirs: Any, raw: Tensor, timestep: float, noise_scale: float) -> Tensor:
    """As their pipelines do: noise into the latents, then the timestep of every clip; all noise from seed 3."""
    torch.manual_seed(3)
    if not theirs.config.timestep_conditioning:
        return theirs.decode(raw).sample
    raw = (1 - noise_scale) * raw + noise_scale * torch.randn(raw.shape)
    return theirs.decode(raw, torch.full((len(raw),), timestep)).sample


@each_case
def test_encoding_and_decoding_equal_those_of_diffusers(name: str) -> None:
    case = CASES[name]
    theirs, scaling = their_codec(case.config), case.config.scaling
    ours: VideoCodec = our_codec(case.config)
    frames = draw(case.num_clips, 3, *case.frames).clamp(-1, 1)
    mean, std = (values.view(1, -1, 1, 1, 1) for values in (theirs.latents_mean, theirs.latents_std))
    expected = (theirs.encode(frames).latent_dist.mode() - mean) * scaling / std
    latents = ours.encode(frames)
    assert latents.shape == expected.shape
    # both sum in fp32 in another order
    assert relative_error(latents, expected) < 1e-5
    for timestep, noise_scale in ((0.05, 0.025), (0.3, 0.5)):
        wanted = their_decoding(theirs, expected * std / scaling + mean, timestep, noise_scale)
        generator = torch.Generator().manual_seed(3)
        decoded = our_codec(case.config).decode(expected, 1, timestep, noise_scale, generator)
        assert decoded.shape == frames.shape == wanted.shape
        assert wanted.std() > 0.1
        assert relative_error(decoded, wanted) < 1e-5


@each_case
@pytest.mark.parametrize("chunk", [1, 3])
def test_chunks_of_time_equal_the_whole_clip(name: str, chunk: int) -> None:
    case = CASES[name]
    codec = our_codec(case.config)
    frames = draw(case.num_clips, 3, *case.frames)
    latents = codec.encode(frames, 0)
    # the same sums in fp32; blocks of another size may add them in another order
    assert relative_error(codec.encode(frames, chunk), latents) < 1e-5
    assert relative_error(codec.decode(latents, chunk), codec.decode(latents, 0)) < 1e-5


def test_a_causal_stream_gives_frames_as_soon_as_their_latents_are_there() -> None:
    codec = our_codec(replace(OLD, decoder_causal=True))
    latents = draw(1, 5, 4, 2, 2)
    parts = list(codec.stream(latents))
    assert [part.shape[2] for part in parts] == [1, 4, 4, 4]
    changed = latents.clone()
    changed[:, :, 2] += 1.0
    for index, part in enumerate(codec.stream(changed)):
        assert torch.equal(part, parts[index]) == (index < 2)


def test_a_stream_that_looks_ahead_waits_no_longer_than_it_must_and_ends_in_small_parts() -> None:
    codec = our_codec(OLD)
    latents = draw(1, 5, 30, 1, 2)
    cells = (latents.movedim(1, -1)[:, index : index + 1] for index in range(30))
    fed = 0

    def feed() -> Iterator[Tensor]:
        nonlocal fed
        for part in cells:
            fed += 1
            yield part

    layers = codec.decoder.layers
    parts = [(fed, part) for part in run_layers(layers, [NOTHING] * len(layers), feed(), 1)]
    assert sum(part.shape[1] for _, part in parts) == 4 * 29 + 1
    # Frame 0 sees frames 0 to 5 (5 convolutions), so 0 to 8 at half the rate (5 more than 3), so 0 to 10 (6 more than
    # 4) of the latents.
    assert parts[0][0] == 11
    changed = latents.clone()
    changed[:, :, 10] += 1.0
    assert not torch.allclose(codec.decode(changed, 0)[:, :, 0], codec.decode(latents, 0)[:, :, 0], atol=1e-6)
    changed[:, :, 10] -= 1.0
    changed[:, :, 11] += 1.0
    assert torch.allclose(codec.decode(changed, 0)[:, :, 0], codec.decode(latents, 0)[:, :, 0], atol=1e-6)
    # what the layers hold back at the end comes in parts no larger than that of a chunk of one latent frame
    assert sum(part.shape[1] for seen, part in parts if seen == 30) > 40
    assert max(part.shape[1] for _, part in parts) == 4


@each_generation
def test_a_plain_call_is_deterministic_and_a_generator_changes_the_noise(name: str) -> None:
    case = CASES[name]
    codec = our_codec(case.config)
    latents = codec.encode(draw(1, 3, *case.frames))
    state = torch.get_rng_state()
    first = codec.decode(latents)
    torch.manual_seed(5)
    assert torch.equal(codec.decode(latents), first)
    torch.set_rng_state(state)
    other = codec.decode(latents, generator=torch.Generator().manual_seed(1))
    assert torch.equal(other, first) == (name == "0.9.0")
    quiet = codec.decode(latents, timestep=0.5, noise_scale=0.0)
    assert torch.equal(quiet, first) == (name == "0.9.0")


@each_generation
def test_tiles_whose_overlap_holds_the_reach_equal_the_whole(name: str) -> None:
    """Inside the outer third of an overlap a tile counts for nothing; a small decoder reaches no further."""
    case = CASES[name]
    codec = our_codec(case.config)
    strides, tiling = codec.strides, Tiling(40, 36)
    latents = draw(1, codec.latent_channels, 1, 44, 2)
    whole, tiled = codec.decode(latents), decode_tiled(codec, latents, tiling)
    assert relative_error(tiled, whole) < 1e-5
    frames = draw(1, 3, 1, 2 * strides.height, 44 * strides.width)
    assert relative_error(encode_tiled(codec, frames, tiling), codec.encode(frames)) < 1e-5


@each_generation
def test_a_larger_overlap_is_closer(name: str) -> None:
    codec = our_codec(CASES[name].config)
    latents = draw(1, codec.latent_channels, 1, 14, 5)
    frames = draw(1, 3, 1, 14 * codec.strides.height, 5 * codec.strides.width)
    decoded, encoded = codec.decode(latents), codec.encode(frames)
    # two tiles whose seam lies in the middle
    tilings = [Tiling(7 + n // 2, n) for n in (0, 4, 8)]
    for errors in (
        [relative_error(decode_tiled(codec, latents, tiling), decoded) for tiling in tilings],
        [relative_error(encode_tiled(codec, frames, tiling), encoded) for tiling in tilings],
    ):
        assert errors[2] < errors[1] < errors[0]
        # With random weights distant cells count for much; a third of this overlap is under three cells, the reach of
        # these codecs about ten.
        assert errors[2] < min(0.1, errors[0] / 4)


@each_case
@pytest.mark.parametrize("layout", [diffusers_keys, original_keys])
def test_both_layouts_are_read_and_written_key_by_key(name: str, layout: Any) -> None:
    config = CASES[name].config
    ours = our_codec(config).state_dict()
    theirs = convert(layout(config), ours, writing=True)
    back = convert(layout(config), theirs)
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[key], ours[key]) for key in ours)
    if layout is diffusers_keys:
        assert shapes(theirs) == shapes(their_codec(config).state_dict())
    short = {key: value for key, value in theirs.items() if key != "encoder.conv_in.conv.bias"}
    with pytest.raises(CheckpointError, match=r"1 missing \(encoder.layers.0.bias\)"):
        load_into(LTXCodec(config), convert(layout(config), short))
    with pytest.raises(CheckpointError, match=r"1 unknown \(decoder.extra\)"):
        convert(layout(config), {**theirs, "decoder.extra": torch.zeros(1)})


@pytest.mark.parametrize("version", PRESETS)
def test_the_published_layouts_at_full_size(version: str) -> None:
    config = PRESETS[version]
    with torch.device("meta"):
        ours = LTXCodec(config).state_dict()
        peer: Any = AutoencoderKLLTXVideo.from_config(to_diffusers(config))
    assert from_diffusers(peer.config) == config
    theirs = peer.state_dict()
    assert shapes(convert(diffusers_keys(config), ours, writing=True)) == shapes(theirs)
    assert shapes(convert(diffusers_keys(config), theirs)) == shapes(ours)
    original = convert(original_keys(config), ours, writing=True)
    unused = {f"per_channel_statistics.{name}": torch.zeros(128) for name in ("channel", "mean-of-stds")}
    # diffusers' own reading of the authors' names
    read = convert_ltx_vae_checkpoint_to_diffusers({f"vae.{key}": value for key, value in (original | unused).items()})
    assert shapes(read) == shapes(theirs)
    assert shapes(convert(original_keys(config), original | unused)) == shapes(ours)
    strides = config.strides
    assert (strides.time, strides.height, strides.width) == (8, 32, 32)


@each_case
def test_configurations_come_back_from_diffusers_and_from_plain_values(name: str) -> None:
    config = CASES[name].config
    assert from_diffusers(their_codec(config).config) == config
    assert config_from_dict(LTXCodecConfig, config_to_dict(config)) == config


def test_older_and_foreign_configurations() -> None:
    arguments = to_diffusers(PRESETS["0.9.0"])
    late = ("down_block_types", "decoder_inject_noise", "downsample_type", "upsample_residual", "upsample_factor")
    assert from_diffusers({k: v for k, v in arguments.items() if k not in late}) == PRESETS["0.9.0"]
    for changes, message in (
        ({"colour": 1}, "unknown keys.*colour"),
        ({"patch_size_t": 2}, "patch_size_t must be 1"),
        ({"down_block_types": ["DownBlock"] * 4}, "'DownBlock' is not known"),
        ({"layers_per_block": [1]}, "layers_per_block needs 5 values"),
        ({"upsample_factor": [2, 2, 2, 2]}, "cannot follow 512 channels"),
        ({"timestep_conditioning": True}, "neither noise nor timesteps"),
        ({"decoder_spatio_temporal_scaling": [True, False, False, False]}, "8 in time .* the decoder 2"),
    ):
        with pytest.raises(InputError, match=message):
            from_diffusers({**arguments, **changes})


def test_gradients_reach_every_weight() -> None:
    codec = our_codec(NOISY).requires_grad_(True)
    frames = draw(1, 3, 5, 8, 8)
    codec.decode(codec.encode(frames, 0), 0).square().sum().backward()
    for name, parameter in codec.named_parameters():
        assert parameter.grad is not None, name
        # the encoder's last output channel is the variance, which decoding the mean does not read
        assert parameter.grad.any(), name


def test_sizes_and_noise_that_do_not_fit_are_refused() -> None:
    codec = LTXCodec(FULL_STRIDES)
    with pytest.raises(ShapeError, match=r"12 frames do not fit.* nearest: 9, 17"):
        codec.encode(draw(1, 3, 12, 32, 32))
    with pytest.raises(ShapeError, match=r"width 40 px .* nearest: 32, 64"):
        encode_tiled(codec, draw(1, 3, 9, 32, 40), Tiling())
    with pytest.raises(ShapeError, match=r"latents must be \(B, 8, N, h, w\)"):
        codec.decode(draw(1, 3, 2, 2, 2))
    with pytest.raises(InputError, match=r"timestep must lie in \[0, 1\], got 50"):
        codec.decode(draw(1, 8, 2, 1, 1), timestep=50.0)
    with pytest.raises(InputError, match="chunk must be 0"):
        codec.decode(draw(1, 8, 2, 1, 1), chunk=-1)
