"""The waveform codec: shapes, causality, decoding that is the same every time, and streams that equal the whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vitascope.core.errors import InputError, ShapeError
from vitascope.core.protocols import AudioCodec
from vitascope.models.codecs.waveform.config import PRESETS, ToneBank, WaveAttention, WaveformConfig, WaveLevel
from vitascope.models.codecs.waveform.model import WaveformCodec, compand

PLAIN = WaveformConfig(
    latent_channels=4,
    levels=(WaveLevel(8, 4, encoder_blocks=1, decoder_blocks=2, overlap=3), WaveLevel(12, 2)),
    noisy_blocks=0,
)
CONFIGS = {
    "plain": PLAIN,
    "noise": replace(PLAIN, noisy_blocks=1),
    "attention": replace(PLAIN, attention=WaveAttention(num_heads=2, window=5)),
    "tones": replace(PLAIN, tones=ToneBank(num_sines=5, num_harmonics=3, steps=2, channels=8)),
    "all": replace(
        PLAIN,
        noisy_blocks=2,
        attention=WaveAttention(num_heads=3, window=4),
        tones=ToneBank(num_sines=5, num_harmonics=3, steps=2, channels=8),
    ),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def make(config: WaveformConfig) -> WaveformCodec:
    """A codec with random weights throughout, zero-initialised ones and latent statistics included."""
    torch.manual_seed(0)
    codec = WaveformCodec(config).eval()
    for parameter in codec.parameters():
        nn.init.normal_(parameter, std=0.2)
    codec.latent_mean.normal_()
    codec.latent_std.uniform_(0.5, 2.0)
    return codec.requires_grad_(False)


def sound(num_latents: int = 24, batch: int = 2) -> Tensor:
    return torch.rand(batch, 1, num_latents * 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


@settings(max_examples=8)
@given(num_latents=st.integers(1, 20), name=st.sampled_from(sorted(CONFIGS)))
def test_sounds_round_trip_in_shape(num_latents: int, name: str) -> None:
    codec = make(CONFIGS[name])
    latents = codec.encode(sound(num_latents))
    assert latents.shape == (2, 4, num_latents)
    decoded = codec.decode(latents)
    assert decoded.shape == (2, 1, num_latents * 8)
    assert decoded.isfinite().all()


def test_it_is_an_audio_codec() -> None:
    codec: AudioCodec = make(PLAIN)
    assert (codec.sample_rate_hz, codec.hop, codec.latent_channels) == (16000, 8, 4)


@each_config
def test_decoding_is_the_same_every_time_and_for_every_clip_of_a_batch(config: WaveformConfig) -> None:
    codec = make(config)
    latents = codec.encode(sound())
    decoded = codec.decode(latents)
    torch.manual_seed(99)
    assert torch.equal(codec.decode(latents), decoded)
    assert torch.equal(make(config).decode(latents), decoded)
    torch.testing.assert_close(codec.decode(latents[1:]), decoded[1:], rtol=1e-5, atol=1e-5)


@each_config
def test_nothing_depends_on_the_future(config: WaveformConfig) -> None:
    codec, samples = make(config), sound()
    changed = samples.clone()
    changed[..., 10 * 8 :] *= -0.5
    before, after = codec.encode(samples), codec.encode(changed)
    assert torch.equal(before[..., :10], after[..., :10])
    assert not torch.allclose(before[..., 10:], after[..., 10:])
    later = before.clone()
    later[..., 7:] += 1.0
    assert torch.equal(codec.decode(before)[..., : 7 * 8], codec.decode(later)[..., : 7 * 8])
    assert not torch.allclose(codec.decode(before)[..., 7 * 8 :], codec.decode(later)[..., 7 * 8 :])


# 1e-5 of signals of about unit size: float32 sums of at most a few hundred terms in another order
@each_config
@pytest.mark.parametrize("chunks", [(1,) * 24, (5, 19), (23, 1)])
def test_decoding_in_chunks_equals_the_whole(config: WaveformConfig, chunks: tuple[int, ...]) -> None:
    codec = make(config)
    latents = codec.encode(sound())
    stream = codec.stream_decoder()
    parts = [stream.push(part) for part in latents.split(chunks, dim=2)]
    whole = codec.decode(latents)
    assert (torch.cat(parts, dim=2) - whole).abs().max() <= 1e-5 * max(1.0, float(whole.abs().max()))


@each_config
@pytest.mark.parametrize("chunks", [(1, 7, 13, 171), (96, 96), (3,) * 64])
def test_encoding_in_chunks_of_any_size_equals_the_whole(config: WaveformConfig, chunks: tuple[int, ...]) -> None:
    codec = make(config)
    stream = codec.stream_encoder()
    parts = [stream.push(part) for part in sound().split(chunks, dim=2)]
    whole = codec.encode(sound())
    assert stream.num_pending == 0
    assert (torch.cat(parts, dim=2) - whole).abs().max() <= 1e-5 * max(1.0, float(whole.abs().max()))


def test_a_stream_holds_back_what_does_not_fill_a_hop() -> None:
    stream = make(PLAIN).stream_encoder()
    assert stream.push(sound(1)[..., :5]).shape == (2, 4, 0)
    assert stream.num_pending == 5
    assert stream.push(sound(2)[..., :12]).shape == (2, 4, 2)
    assert stream.num_pending == 1


@torch.no_grad()
def test_a_stream_keeps_bounded_state() -> None:
    codec = make(CONFIGS["all"])
    stream = codec.stream_decoder()
    latents = codec.encode(sound())
    stream.push(latents[..., :12])
    held = stream.state.tails.num_bytes()
    stream.push(latents[..., 12:])
    assert stream.state.tails.num_bytes() == held
    assert stream.state.position == 24


def test_the_noise_is_read_at_the_position_in_the_clip_and_repeats_after_the_table() -> None:
    codec = make(CONFIGS["noise"])
    frames = codec.noise_table.shape[1]
    like = torch.zeros(1, 8, 10)
    whole = codec.noise_at(0, torch.zeros(1, 8, 30))
    assert torch.equal(codec.noise_at(5, like), whole[..., 10:20])  # two frames of the first level a latent
    assert torch.equal(codec.noise_at(frames // 2, like), whole[..., :10])
    silent, loud = codec.decode(torch.zeros(1, 4, 6)), codec.decode_part(torch.zeros(1, 4, 6), None)
    assert torch.equal(silent, loud)
    assert not torch.allclose(silent[..., 24:32], silent[..., 32:40])  # latents that say the same still hiss


def test_companding_is_the_mu_law() -> None:
    samples = torch.tensor([-1.0, -1 / 255, 0.0, 1 / 255, 0.5, 1.0])
    small = torch.log(torch.tensor(2.0)) / torch.log(torch.tensor(256.0))
    expected = torch.tensor([-1.0, -float(small), 0.0, float(small), 0.8757, 1.0])
    torch.testing.assert_close(compand(samples), expected, rtol=1e-4, atol=1e-5)


def test_latents_are_normalised_by_the_statistics() -> None:
    codec = make(PLAIN)
    raw = codec.posterior(sound())[0]
    mean, std = codec.latent_mean[:, None], codec.latent_std[:, None]
    torch.testing.assert_close(codec.encode(sound()), (raw - mean) / std)
    torch.testing.assert_close(codec.denormalise(codec.normalise(raw)), raw)


def test_sizes_that_do_not_fit_are_refused_with_the_nearest() -> None:
    codec = make(PLAIN)
    with pytest.raises(ShapeError, match=r"20 samples do not fit.*multiples of 8; nearest: 16, 24"):
        codec.encode(torch.zeros(1, 1, 20))
    for shape in ((1, 2, 16), (1, 16)):
        with pytest.raises(ShapeError, match=r"\(B, 1, S\)"):
            codec.encode(torch.zeros(shape))
        with pytest.raises(ShapeError, match=r"\(B, 1, S\)"):
            codec.stream_encoder().push(torch.zeros(shape))
    for shape in ((1, 3, 5), (1, 4, 0), (4, 5)):
        with pytest.raises(ShapeError, match=r"\(B, 4, T\)"):
            codec.decode(torch.zeros(shape))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"levels": ()}, "at least one level"),
        ({"latent_channels": 0}, "one latent channel"),
        ({"noisy_blocks": 3}, r"0\.\.2"),
        ({"attention": WaveAttention(num_heads=4)}, "multiple of twice the 4 heads"),
        ({"tones": ToneBank(steps=3)}, "divide the 8 samples"),
    ],
)
def test_configurations_that_contradict_themselves_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(PLAIN, **changes)


@pytest.mark.parametrize("name", ["channels", "stride", "overlap", "kernel"])
def test_levels_must_be_positive(name: str) -> None:
    with pytest.raises(InputError, match="must be positive"):
        replace(PLAIN.levels[0], **{name: 0})


@pytest.mark.parametrize(("name", "channels"), [("pocket", 32), ("reference", 128)])
def test_presets_give_50_latents_a_second(name: str, channels: int) -> None:
    config = PRESETS[name]
    assert (config.hop, config.sample_rate_hz, config.latent_channels) == (320, 16000, channels)
    codec = WaveformCodec(config).requires_grad_(False)
    latents = codec.encode(torch.zeros(1, 1, 640))
    assert latents.shape == (1, channels, 2)
    assert codec.decode(latents).shape == (1, 1, 640)
