"""The causal video codec: shapes, causality, and that chunks, streams and tiles equal the whole clip."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitascope.core.errors import InputError, ShapeError
from vitascope.models.codecs.causal_video.config import PRESETS, CausalVideoConfig, Level
from vitascope.models.codecs.causal_video.model import CausalVideoCodec
from vitascope.models.codecs.causal_video.stream import DecoderStream, EncoderStream, decode_progressively
from vitascope.models.codecs.causal_video.tiling import decode_tiled, encode_tiled
from vitascope.nn.tiling import Tiling

TINY = CausalVideoConfig(
    latent_channels=6,
    patch_px=2,
    levels=(Level(8, 1, 1), Level(16, 1, 1, (2, 2, 2)), Level(16, 1, 1, (2, 1, 1))),
    preview_channels=8,
    preview_px=2,
)


def tiny_codec(config: CausalVideoConfig = TINY) -> CausalVideoCodec:
    """A codec with random weights throughout, zero-initialised ones and latent statistics included."""
    torch.manual_seed(0)
    codec = CausalVideoCodec(config).eval()
    for parameter in codec.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    codec.latent_mean.normal_()
    codec.latent_std.uniform_(0.5, 2.0)
    return codec.requires_grad_(False)


def clip(num_frames: int = 17, height: int = 16, width: int = 12) -> Tensor:
    return torch.rand(2, 3, num_frames, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(
    ("name", "strides", "channels", "compression"),
    [
        ("pocket", (4, 8, 8), 16, 48),
        ("reference-4x8x8x16", (4, 8, 8), 16, 48),
        ("reference-4x8x8x4", (4, 8, 8), 4, 192),
        ("reference-8x32x32x128", (8, 32, 32), 128, 192),
    ],
)
def test_presets_have_the_strides_and_channels_of_their_names(name, strides, channels, compression) -> None:
    config = PRESETS[name]
    assert (config.strides.time, config.strides.height, config.strides.width) == strides
    assert config.latent_channels == channels
    assert config.compression == compression
    with torch.device("meta"):
        codec = CausalVideoCodec(config)
        frames = torch.empty(1, 3, 1 + 2 * strides[0], 2 * strides[1], 3 * strides[2])
        latents = codec.encode(frames)
        assert latents.shape == (1, channels, 3, 2, 3)
        assert codec.decode(latents).shape == frames.shape


def test_configurations_that_contradict_themselves_are_refused() -> None:
    with pytest.raises(InputError, match="at least one level"):
        CausalVideoConfig(4, ())
    with pytest.raises(InputError, match=r"8 channels times the stride \(1, 1, 1\) must be a multiple of 12"):
        CausalVideoConfig(4, (Level(8, 1, 1), Level(12, 1, 1)))


@settings(max_examples=12, deadline=None)
@given(k=st.integers(0, 3), rows=st.integers(1, 3), columns=st.integers(1, 3))
def test_valid_sizes_round_trip_in_shape(k: int, rows: int, columns: int) -> None:
    codec = tiny_codec()
    frames = clip(1 + 4 * k, rows * 4, columns * 4)
    latents = codec.encode(frames)
    assert latents.shape == (2, 6, 1 + k, rows, columns)
    assert codec.decode(latents).shape == frames.shape
    assert codec.preview(latents).shape == (2, 3, 1 + 4 * k, rows * 2, columns * 2)


@pytest.mark.parametrize(
    ("shape", "words"),
    [((6, 16, 12), "5, 9"), ((5, 18, 12), "16, 20"), ((5, 16, 3), "nearest: 4")],
)
def test_sizes_that_do_not_fit_are_refused_with_the_nearest(shape: tuple[int, int, int], words: str) -> None:
    with pytest.raises(ShapeError, match=words):
        tiny_codec().encode(clip(*shape))
    with pytest.raises(ShapeError, match=r"\(B, 6, N, h, w\)"):
        tiny_codec().decode(torch.zeros(1, 5, 1, 2, 2))


def test_no_latent_frame_depends_on_the_future() -> None:
    codec, frames = tiny_codec(), clip()
    changed = frames.clone()
    changed[:, :, 9:] += 1.0
    before, after = codec.encode(frames), codec.encode(changed)
    assert torch.equal(before[:, :, :3], after[:, :, :3])
    assert not torch.allclose(before[:, :, 3:], after[:, :, 3:])
    later = before.clone()
    later[:, :, 2:] += 1.0
    assert torch.equal(codec.decode(before)[:, :, :5], codec.decode(later)[:, :, :5])


@pytest.mark.parametrize("chunks", [(1, 4, 4, 4, 4), (5, 12), (9, 4, 4), (17,)])
def test_encoding_in_chunks_equals_the_whole(chunks: tuple[int, ...]) -> None:
    codec, frames = tiny_codec(), clip()
    stream = EncoderStream(codec)
    parts = [stream.push(part) for part in frames.split(chunks, dim=2)]
    torch.testing.assert_close(torch.cat(parts, dim=2), codec.encode(frames), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunks", [(1, 1, 1, 1, 1), (2, 3), (1, 4)])
def test_decoding_in_chunks_equals_the_whole(chunks: tuple[int, ...]) -> None:
    codec = tiny_codec()
    latents = codec.encode(clip())
    stream = DecoderStream(codec)
    parts = [stream.push(part) for part in latents.split(chunks, dim=2)]
    torch.testing.assert_close(torch.cat(parts, dim=2), codec.decode(latents), rtol=1e-5, atol=1e-5)


def test_progressive_decoding_starts_with_one_frame_and_keeps_bounded_state() -> None:
    codec = tiny_codec()
    latents = codec.encode(clip())
    parts = list(decode_progressively(codec, latents))
    assert [part.shape[2] for part in parts] == [1, 4, 4, 4, 4]
    torch.testing.assert_close(torch.cat(parts, dim=2), codec.decode(latents), rtol=1e-5, atol=1e-5)
    stream = DecoderStream(codec)
    stream.push(latents[:, :, :2])
    held = stream.cache.num_bytes()
    stream.push(latents[:, :, 2:])
    assert stream.cache.num_bytes() == held


def test_later_chunks_must_fill_latent_frames() -> None:
    stream = EncoderStream(tiny_codec())
    stream.push(clip(5))
    with pytest.raises(ShapeError, match="multiple of 4"):
        stream.push(clip(5))


def test_tiles_with_full_context_equal_the_whole() -> None:
    """With an overlap of three times the codec's reach the blended zone of either tile has all its context."""
    codec = tiny_codec()
    frames = clip(5, 96, 16)
    latents = codec.encode(frames)
    tiling = Tiling(tile=22, overlap=18)
    torch.testing.assert_close(decode_tiled(codec, latents, tiling), codec.decode(latents), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(encode_tiled(codec, frames, tiling), latents, rtol=1e-4, atol=1e-4)


def test_a_frame_smaller_than_a_tile_is_coded_whole() -> None:
    codec = tiny_codec()
    latents = codec.encode(clip())
    assert torch.equal(decode_tiled(codec, latents, Tiling(16, 6)), codec.decode(latents))
