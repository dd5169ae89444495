"""Causal waveform codec with a KL bottleneck and a decoder that may draw noise.

B batch, C latent channels, S samples, T latents (S = T * hop), F frames of the first level (S = F * its stride).

The encoder goes straight to the first level's rate by one strided convolution over the waveform and its companded copy
(so that soft sounds are seen), then on to the latent rate; the decoder mirrors it and ends in a sub-pixel convolution
whose kernels overlap. Wind and rain cannot be coded sample by sample, so the last units of the decoder receive white
noise, one value a sample, which they shape: with the energy score as loss (training/objectives/audio_codec.py) they
learn the distribution of such sounds. The noise is a fixed table read at the position in the clip: decoding is
deterministic, and a stream equals the whole.

Sources: SoundStream, Encodec and DAC (Kumar et al. 2023) for the frame; Gritsenko et al. 2020 for noise and score.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from vitascope.core.errors import ShapeError
from vitascope.core.shapes import nearest_multiples
from vitascope.models.codecs.waveform.attention import WindowAttention
from vitascope.models.codecs.waveform.config import WaveAttention, WaveformConfig, WaveLevel
from vitascope.models.codecs.waveform.stream import WaveDecoderStream, WaveEncoderStream, WaveState
from vitascope.models.codecs.waveform.tones import PitchInput, Tones
from vitascope.nn.causal_conv import TailCache
from vitascope.nn.conv1d import CausalConv1d, ResidualUnit1d, Snake, StepNorm, SubPixelUpsample, depth_to_time

DILATIONS = (1, 3, 9)
NOISE_PERIOD_SAMPLES = 1 << 17
"""Length of the noise table: 8.2 s at 16 kHz."""
_COMPANDING = 255.0
_NOISE_SEED = 20


class WaveEncoder(nn.Module):
    """Samples (B, 1, S) in [-1, 1] to posterior moments (B, 2C, T)."""

    def __init__(self, config: WaveformConfig) -> None:
        super().__init__()
        first, last = config.levels[0], config.levels[-1]
        self.last_units = last.encoder_blocks
        self.stem = CausalConv1d(2, first.channels, first.overlap * first.stride, first.stride, bias=False)
        _start_as_wavelets(self.stem.weight)
        layers: list[nn.Module] = _units(first, first.encoder_blocks)
        for above, level in pairwise(config.levels):
            layers += [
                Snake(above.channels),
                CausalConv1d(above.channels, level.channels, level.overlap * level.stride, level.stride),
                *_units(level, level.encoder_blocks),
            ]
        self.layers = nn.ModuleList(layers)
        self.pitch, self.pitch_in, self.linear = None, None, None
        if config.tones is not None:
            self.pitch = PitchInput(config.tones, config.hop, config.sample_rate_hz)
            self.pitch_in = nn.Conv1d(config.tones.num_sines, last.channels, 1)
            self.linear = nn.Conv1d(config.tones.num_sines, config.latent_channels, 1)
            for parameter in self.linear.parameters():
                nn.init.zeros_(parameter)
        self.attention = _attention(last.channels, config.attention)
        self.norm_out = StepNorm(last.channels)
        self.activation_out = Snake(last.channels)
        self.conv_out = CausalConv1d(last.channels, 2 * config.latent_channels, 3)

    def forward(self, samples: Tensor, state: WaveState | None = None) -> Tensor:
        tails = state.tails if state is not None else None
        h = self.stem(torch.cat([samples, compand(samples)], dim=1), tails)
        pitches = self.pitch(samples, tails) if self.pitch is not None else None
        for number, layer in enumerate(self.layers):
            if self.pitch_in is not None and number == len(self.layers) - self.last_units:
                h = h + self.pitch_in(pitches)
            h = layer(h) if isinstance(layer, Snake) else layer(h, tails)
        if self.attention is not None:
            h = self.attention(h, tails, state.position if state is not None else 0)
        moments = self.conv_out(self.activation_out(self.norm_out(h)), tails)
        if self.linear is None:
            return moments
        mean, log_variance = moments.chunk(2, dim=1)
        return torch.cat([mean + self.linear(pitches), log_variance], dim=1)


class WaveDecoder(nn.Module):
    """Raw latents (B, C, T) to samples (B, 1, S), in parts: what the latents say (`trunk`), what noise adds (`finish`),
    and sines (`tones`, which may be None) to be added to both."""

    def __init__(self, config: WaveformConfig) -> None:
        super().__init__()
        first, last = config.levels[0], config.levels[-1]
        self.conv_in = CausalConv1d(config.latent_channels, last.channels, 3)
        self.attention = _attention(last.channels, config.attention)
        layers: list[nn.Module] = _units(last, last.decoder_blocks)
        for level, above in pairwise(reversed(config.levels)):
            units = above.decoder_blocks - (config.noisy_blocks if above is first else 0)
            layers += [
                Snake(level.channels),
                SubPixelUpsample(level.channels, above.channels, level.stride, level.overlap),
                *_units(above, units),
            ]
        self.layers = nn.ModuleList(layers)
        self.noise = NoiseInput(first.channels, first.stride) if config.noisy_blocks else None
        self.noisy_layers = nn.ModuleList(_units(first, config.noisy_blocks))
        self.head = WaveHead(first)
        self.tones = (
            Tones(config.tones, config.latent_channels, config.hop, config.sample_rate_hz) if config.tones else None
        )

    def trunk(self, latents: Tensor, state: WaveState | None = None) -> Tensor:
        """Latents (B, C, T) to features of the first level (B, C_0, F)."""
        tails = state.tails if state is not None else None
        h = self.conv_in(latents, tails)
        if self.attention is not None:
            h = self.attention(h, tails, state.position if state is not None else 0)
        for layer in self.layers:
            h = layer(h) if isinstance(layer, Snake) else layer(h, tails)
        return h

    def finish(self, h: Tensor, noise: Tensor, state: WaveState | None = None) -> Tensor:
        """Features (B, C_0, F) and white noise (B or 1, stride_0, F) to samples (B, 1, S)."""
        tails = state.tails if state is not None else None
        if self.noise is not None:
            h = self.noise(h, noise)
        for layer in self.noisy_layers:
            h = layer(h, tails)
        return self.head(h, tails)


class NoiseInput(nn.Module):
    """Adds noise to features, mixed to their channels and scaled, channel by channel, by what they say."""

    def __init__(self, channels: int, noise_channels: int) -> None:
        super().__init__()
        self.norm = StepNorm(channels)
        self.gain = nn.Conv1d(channels, channels, 1)
        self.mix = nn.Conv1d(noise_channels, channels, 1, bias=False)
        nn.init.normal_(self.gain.weight, std=0.1 / channels**0.5)
        nn.init.constant_(self.gain.bias, 0.1)  # type: ignore[arg-type]

    def forward(self, h: Tensor, noise: Tensor) -> Tensor:
        return h + self.gain(self.norm(h)) * self.mix(noise)


class WaveHead(nn.Module):
    """Features (B, C, F) to samples (B, 1, F * stride): each frame is a sum of atoms of `overlap` strides' length.

    A gate, exponential because loudness is, sets the level of each channel frame by frame.
    """

    def __init__(self, level: WaveLevel) -> None:
        super().__init__()
        self.stride = level.stride
        self.norm = StepNorm(level.channels)
        self.gate = nn.Conv1d(level.channels, level.channels, 1)
        self.conv = CausalConv1d(level.channels, level.stride, level.overlap, bias=False)
        nn.init.normal_(self.gate.weight, std=0.1 / level.channels**0.5)
        nn.init.constant_(self.gate.bias, -2.0)  # type: ignore[arg-type]
        atoms = self.conv.weight.new_empty(level.channels, 1, level.overlap * level.stride)
        _start_as_wavelets(atoms)
        with torch.no_grad():
            # Tap k sees the frame overlap - 1 - k strides ago, hence plays that part of its atom.
            parts = atoms.view(level.channels, level.overlap, level.stride).flip(1)
            self.conv.weight.copy_(parts.permute(2, 0, 1))

    def forward(self, h: Tensor, tails: TailCache | None = None) -> Tensor:
        normed = self.norm(h)
        return depth_to_time(self.conv(normed * self.gate(normed).clamp(-9.0, 3.0).exp(), tails), self.stride)


class WaveformCodec(nn.Module):
    """Encoder, decoder and the statistics that bring latents to zero mean and unit scale per channel."""

    def __init__(self, config: WaveformConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = WaveEncoder(config)
        self.decoder = WaveDecoder(config)
        self.latent_mean: Tensor
        self.latent_std: Tensor
        self.noise_table: Tensor
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latent_std", torch.ones(config.latent_channels))
        stride = config.levels[0].stride
        table = torch.randn(NOISE_PERIOD_SAMPLES, generator=torch.Generator().manual_seed(_NOISE_SEED))
        frames = NOISE_PERIOD_SAMPLES // stride
        self.register_buffer("noise_table", table[: frames * stride].view(frames, stride).T, persistent=False)

    @property
    def sample_rate_hz(self) -> int:
        return self.config.sample_rate_hz

    @property
    def hop(self) -> int:
        return self.config.hop

    @property
    def latent_channels(self) -> int:
        return self.config.latent_channels

    def posterior(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance, each (B, C, T) and not normalised, of samples (B, 1, T * hop) in [-1, 1]."""
        self.check_samples(samples)
        mean, log_variance = self.encoder(samples).chunk(2, dim=1)
        return mean, log_variance.clamp(-20, 10)

    def encode(self, samples: Tensor) -> Tensor:
        """Samples (B, 1, T * hop) in [-1, 1] to normalised latents (B, C, T): the posterior's mean.

        Raises ShapeError, naming the nearest valid lengths, unless the length is a multiple of the hop.
        """
        return self.normalise(self.posterior(samples)[0])

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents (B, C, T) to samples (B, 1, T * hop), about [-1, 1]; the same every time."""
        self.check_latents(latents)
        return self.decode_part(latents, None)

    def decode_part(self, latents: Tensor, state: WaveState | None) -> Tensor:
        """`decode` of latents that go on where `state` stands (at the start without one); does not move `state`."""
        h = self.decoder.trunk(self.denormalise(latents), state)
        sound = self.decoder.finish(h, self.noise_at(state.position if state is not None else 0, h), state)
        return sound if self.decoder.tones is None else sound + self.decoder.tones(self.denormalise(latents), state)

    def noise_at(self, position: int, like: Tensor) -> Tensor:
        """The table's noise (1, stride_0, F) for features `like` (B, C_0, F) that start at latent `position`."""
        period = self.noise_table.shape[1]
        start = position * (self.hop // self.config.levels[0].stride)
        frames = torch.arange(start, start + like.shape[-1], device=like.device) % period
        return self.noise_table[:, frames][None].to(like.dtype)

    def stream_encoder(self) -> WaveEncoderStream:
        """A fresh stream: samples in, latents out, the same as `encode` gives for all of them."""
        return WaveEncoderStream(self, WaveState())

    def stream_decoder(self) -> WaveDecoderStream:
        """A fresh stream: latents in, samples out, the same as `decode` gives for all of them."""
        return WaveDecoderStream(self, WaveState())

    def normalise(self, raw: Tensor) -> Tensor:
        return (raw - self.latent_mean.to(raw.dtype)[:, None]) / self.latent_std.to(raw.dtype)[:, None]

    def denormalise(self, latents: Tensor) -> Tensor:
        return latents * self.latent_std.to(latents.dtype)[:, None] + self.latent_mean.to(latents.dtype)[:, None]

    @torch.no_grad()
    def start_from_pitches(self, samples: Tensor, num_components: int) -> None:
        """Let the linear paths carry the principal components of how loud the pitches are in `samples` (B, 1, T * hop),
        in the first `num_components` latent channels: training starts from a codec that can hold a tune.

        Does nothing without tones. The other channels, and all else, are left to the convolutions.
        """
        pitch, linear, tones = self.encoder.pitch, self.encoder.linear, self.decoder.tones
        if pitch is None or linear is None or tones is None:
            return
        loudness = pitch(samples).transpose(1, 2).flatten(0, 1).double()
        mean = loudness.mean(dim=0)
        centred = loudness - mean
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(loudness))
        scale, basis = values[-num_components:].clamp(min=1e-8).sqrt(), vectors[:, -num_components:]
        assert linear.bias is not None
        linear.weight[:num_components, :, 0] = (basis / scale).T.float()
        linear.bias[:num_components] = (-(basis / scale).T @ mean).float()
        tones.start_from(basis * scale, mean)
        self.encoder.conv_out.weight[:num_components] = 0.0

    def check_samples(self, samples: Tensor) -> None:
        """Raise ShapeError unless `samples` is (B, 1, T * hop) with T >= 1."""
        if samples.ndim != 3 or samples.shape[1] != 1:
            raise ShapeError(f"samples must be (B, 1, S), got {tuple(samples.shape)}")
        if not samples.shape[2] or samples.shape[2] % self.hop:
            near = ", ".join(map(str, nearest_multiples(samples.shape[2], self.hop)))
            raise ShapeError(
                f"{samples.shape[2]} samples do not fit: the codec takes multiples of {self.hop}; nearest: {near}"
            )

    def check_latents(self, latents: Tensor) -> None:
        """Raise ShapeError unless `latents` is (B, C, T) with T >= 1."""
        if latents.ndim != 3 or latents.shape[1] != self.latent_channels or not latents.shape[2]:
            raise ShapeError(f"latents must be (B, {self.latent_channels}, T), T >= 1, got {tuple(latents.shape)}")


def compand(samples: Tensor) -> Tensor:
    """sign(x) log(1 + 255 |x|) / log 256, the mu-law curve: soft sounds become visible. Source: ITU-T G.711."""
    return samples.sign() * torch.log1p(_COMPANDING * samples.abs()) / torch.log1p(samples.new_tensor(_COMPANDING))


def _units(level: WaveLevel, count: int) -> list[nn.Module]:
    return [ResidualUnit1d(level.channels, level.kernel, DILATIONS[i % len(DILATIONS)]) for i in range(count)]


def _attention(channels: int, config: WaveAttention | None) -> WindowAttention | None:
    return WindowAttention(channels, config) if config is not None else None


@torch.no_grad()
def _start_as_wavelets(kernels: Tensor) -> None:
    """Fill kernels (C, inputs, taps) with windowed cosines of mel-spaced pitches and random phases: a better start for
    layers that meet the waveform than white noise."""
    channels, inputs, taps = kernels.shape
    top = torch.log1p(torch.tensor(0.5 * 16000 / 700))
    cycles = torch.expm1(torch.linspace(0, 1, channels) * top) * 700 / 16000
    phase = torch.rand(channels)
    steps = torch.arange(taps)
    wave = torch.cos(2 * torch.pi * (cycles[:, None] * steps + phase[:, None]))
    window = torch.sin(torch.pi * (steps + 0.5) / taps)
    atoms = wave * window
    atoms /= atoms.norm(dim=1, keepdim=True).clamp(min=1e-3)
    kernels.copy_(atoms[:, None].expand(-1, inputs, -1))
