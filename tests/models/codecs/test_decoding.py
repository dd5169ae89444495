"""Decoding in chunks and tiles, straight to 8 bits, against the plain way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitascope.core.errors import CapabilityError, InputError
from vitascope.core.shapes import VideoStrides
from vitascope.models.codecs.causal_video.config import CausalVideoConfig, Level
from vitascope.models.codecs.causal_video.model import CausalVideoCodec
from vitascope.models.codecs.decoding import Decoding, Streams, Tiles, decode_frames
from vitascope.models.codecs.ltx.config import DecoderStage, EncoderStage, LTXCodecConfig
from vitascope.models.codecs.ltx.model import LTXCodec
from vitascope.models.codecs.mochi.config import MochiCodecConfig
from vitascope.models.codecs.mochi.model import MochiCodec
from vitascope.models.codecs.wan.config import WanCodecConfig
from vitascope.models.codecs.wan.model import WanCodec
from vitascope.nn.footprint import footprint, hollow, without_values
from vitascope.nn.tiling import Tiling

STAGES = (EncoderStage(4, 1, "space"), EncoderStage(8, 1, "time"), EncoderStage(8, 1, "both"), EncoderStage(16, 1))
GROWING = (DecoderStage(16, 1), DecoderStage(8, 1, "residual", 2, True), DecoderStage(4, 1, "residual", 2, True))
CODECS: dict[str, Callable[[], Any]] = {
    "causal_video": lambda: CausalVideoCodec(
        CausalVideoConfig(4, (Level(8, 1, 1), Level(16, 1, 1, (2, 2, 2))), 2, preview_channels=8, preview_px=2)
    ),
    "wan": lambda: WanCodec(
        WanCodecConfig(8, (1, 2, 2), (True, True), 1, 4, latent_mean=(0.5, -0.2, 0, 1), latent_std=(1.5, 0.7, 2, 1))
    ),
    "ltx": lambda: LTXCodec(
        LTXCodecConfig(STAGES, GROWING, latent_channels=4, patch_px=2, timestep_conditioning=True)
    ),
    "mochi": lambda: MochiCodec(
        MochiCodecConfig(
            (32, 32, 32, 32), (32, 32, 32, 32), blocks=(1, 1, 1, 1, 1), latent_channels=4,
            latent_mean=(0.5, -0.2, 0.0, 1.0), latent_std=(1.5, 0.7, 2.0, 1.0),
        )
    ),
}  # fmt: skip
each = pytest.mark.parametrize("name", CODECS)


def codec_of(name: str) -> Any:
    torch.manual_seed(0)
    codec = CODECS[name]().eval().requires_grad_(False)
    for parameter in codec.parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.ndim < 2 else parameter[0].numel() ** -0.5)
    return codec


def latents_of(codec: Any, size: tuple[int, int, int] = (5, 4, 6), batch: int = 2) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(batch, codec.latent_channels, *size, generator=draw)


def plain(codec: Any, latents: Tensor) -> Tensor:
    pixels = codec.decode(latents).float()
    return ((pixels.clamp(-1, 1) + 1.0) * 127.5).round().to(torch.uint8).movedim(1, 2)


@each
def test_by_itself_a_codec_gives_the_frames_of_decode_bit_for_bit(name: str) -> None:
    codec = codec_of(name)
    latents = latents_of(codec)
    frames = decode_frames(codec, latents)
    assert frames.dtype == torch.uint8
    assert torch.equal(frames, plain(codec, latents))
    assert frames.float().std() > 5


@each
@pytest.mark.parametrize("chunk", [0, 1, 2, 3, 9])
def test_any_chunk_gives_the_same_frames(name: str, chunk: int) -> None:
    codec = codec_of(name)
    offers: object = codec
    assert isinstance(offers, Streams)
    latents = latents_of(codec)
    frames = decode_frames(codec, latents, Decoding(chunk))
    # sums in another order may fall on the other side of a rounding to 8 bits
    assert (frames.int() - plain(codec, latents).int()).abs().max() <= 1


@pytest.mark.parametrize("name", [name for name in CODECS if name != "mochi"])
def test_tiles_come_close_to_the_whole_frame_and_equal_it_where_one_covers_it(name: str) -> None:
    codec = codec_of(name)
    offers: object = codec
    assert isinstance(offers, Tiles)
    latents = latents_of(codec, (3, 12, 20), 1)
    whole = plain(codec, latents).float()
    one = decode_frames(codec, latents, Decoding(1, Tiling(20, 6)))
    assert (one.int() - whole.int()).abs().max() <= 1
    tiled = decode_frames(codec, latents, Decoding(1, Tiling(12, 9))).float()
    # close, not equal: these codecs reach further than a third of the overlap
    assert (tiled - whole).abs().mean() < 0.05 * whole.std()


@each
def test_a_chunk_takes_less_memory_than_the_clip_and_a_tile_less_than_a_frame(name: str) -> None:
    codec = codec_of(name)
    latents = latents_of(codec, (13, 4, 8), 1)

    def peak(how: Decoding) -> int:
        with without_values():
            bare: Any = hollow(lambda: type(codec)(codec.config), codec.state_dict(keep_vars=True))
            empty = torch.empty(latents.shape)
            return footprint(lambda: decode_frames(bare, empty, how)).peak

    whole, chunked = peak(Decoding(0)), peak(Decoding(1))
    assert chunked < 0.8 * whole
    offers: object = codec
    if isinstance(offers, Tiles):
        # beside what a tile takes, the clip's pixels stand in fp32
        frames = 1 + 12 * codec.strides.time
        pixels = frames * 3 * 4 * 4 * 8 * codec.strides.height * codec.strides.width
        assert peak(Decoding(1, Tiling(4, 0))) - pixels < 0.75 * chunked


class OnlyWhole:
    """A codec that offers nothing but `decode`."""

    strides = VideoStrides(4, 2, 2)
    latent_channels = 4

    def encode(self, frames: Tensor) -> Tensor:
        raise AssertionError("decoding does not encode")

    def decode(self, latents: Tensor) -> Tensor:
        frames = 1 + 4 * (latents.shape[2] - 1)
        return latents[:, :3, :1].repeat(1, 1, frames, 2, 2)


def test_what_a_codec_does_not_offer_is_refused() -> None:
    whole = OnlyWhole()
    assert decode_frames(whole, torch.zeros(1, 4, 2, 3, 3)).shape == (1, 5, 3, 6, 6)
    with pytest.raises(CapabilityError, match="OnlyWhole decodes whole clips only"):
        decode_frames(whole, torch.zeros(1, 4, 2, 3, 3), Decoding(1))
    with pytest.raises(CapabilityError, match="MochiCodec decodes whole frames only"):
        decode_frames(codec_of("mochi"), torch.zeros(1, 4, 1, 2, 2), Decoding(1, Tiling(8, 2)))
    with pytest.raises(InputError, match="chunk must be 0"):
        Decoding(-1)


@pytest.mark.parametrize("tiling", [None, Tiling(30, 6)])
def test_a_conditioned_decoder_is_told_what_is_asked_for(tiling: Tiling | None) -> None:
    codec = codec_of("ltx")
    latents = latents_of(codec)
    for timestep, scale, told in ((0.3, 0.1, (0.3, 0.1)), (0.3, None, (0.3, 0.3)), (None, 0.5, (0.05, 0.5))):
        frames = decode_frames(codec, latents, Decoding(2, tiling, timestep, scale))
        pixels = codec.decode(latents, 2, *told).clamp(-1, 1)
        # one tile is the whole frame; rounding may fall on the other side where a weight of 1 is multiplied
        assert (frames - ((pixels + 1) * 127.5).round().movedim(1, 2)).abs().max() <= 1
        assert not torch.equal(frames, decode_frames(codec, latents, Decoding(2, tiling)))
    for name in ("wan", "mochi", "causal_video"):
        with pytest.raises(CapabilityError, match="not conditioned on noise"):
            decode_frames(codec_of(name), latents_of(codec_of(name)), Decoding(timestep=0.1))


def test_the_noise_of_a_decoder_does_not_depend_on_the_batch() -> None:
    codec = codec_of("ltx")
    latents = latents_of(codec)
    together = codec.decode(latents)
    torch.testing.assert_close(codec.decode(latents[1:]), together[1:], rtol=1e-4, atol=1e-5)
