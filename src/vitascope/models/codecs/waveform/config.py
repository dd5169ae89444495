"""Shapes of waveform codecs and the presets."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from vitascope.core.errors import InputError


@dataclass(frozen=True)
class WaveLevel:
    """One rate: its width, the stride from the level above (the waveform above the first), and its residual units.

    overlap: the kernel that changes the rate covers `overlap` strides. kernel: taps of the residual units, whose
    dilations go 1, 3, 9, 1, ...
    """

    channels: int
    stride: int
    encoder_blocks: int = 1
    decoder_blocks: int = 2
    overlap: int = 2
    kernel: int = 7

    def __post_init__(self) -> None:
        if min(self.channels, self.stride, self.overlap, self.kernel) < 1:
            raise InputError(f"channels, stride, overlap and kernel of a level must be positive, got {self}")


@dataclass(frozen=True)
class WaveAttention:
    """A self-attention block with rotary positions at the latent rate, at the end of the encoder and the start of the
    decoder: each latent sees itself and the `window` - 1 before it."""

    num_heads: int = 4
    window: int = 32


@dataclass(frozen=True)
class ToneBank:
    """Sines of a decoder (tones.py): `num_sines` a semitone apart from lowest_hz up, and `num_harmonics` of a voice
    whose pitch stays within pitch_range_octaves of pitch_hz; levels change `steps` times a latent. window: samples that
    the encoder listens to for the pitches of the sines, at least the hop."""

    num_sines: int = 72
    lowest_hz: float = 55.0
    num_harmonics: int = 32
    pitch_hz: float = 120.0
    pitch_range_octaves: float = 0.5
    steps: int = 4
    channels: int = 128
    window: int = 2048


@dataclass(frozen=True)
class WaveformConfig:
    """A causal waveform codec: the hop is the product of the strides.

    noisy_blocks: how many of the first level's decoder units come after the noise (see model.py); 0 leaves the decoder
    without noise. tones: sines that the decoder adds; None for none.
    """

    latent_channels: int
    levels: tuple[WaveLevel, ...]
    sample_rate_hz: int = 16000
    attention: WaveAttention | None = None
    noisy_blocks: int = 1
    tones: ToneBank | None = None

    def __post_init__(self) -> None:
        if not self.levels or self.latent_channels < 1 or self.sample_rate_hz < 1:
            raise InputError("a waveform codec needs at least one level, one latent channel and a sample rate")
        if not 0 <= self.noisy_blocks <= self.levels[0].decoder_blocks:
            raise InputError(
                f"noisy_blocks must lie in 0..{self.levels[0].decoder_blocks}, the decoder units of the first level, "
                f"got {self.noisy_blocks}"
            )
        if self.tones is not None and (self.tones.steps < 1 or self.hop % self.tones.steps):
            raise InputError(f"tones.steps must divide the {self.hop} samples of a latent, got {self.tones.steps}")
        if self.tones is not None and self.tones.window < self.hop:
            raise InputError(f"tones.window must be at least the hop, {self.hop} samples, got {self.tones.window}")
        if self.attention is not None and self.levels[-1].channels % (2 * self.attention.num_heads):
            raise InputError(
                f"the last level's {self.levels[-1].channels} channels must be a multiple of twice the "
                f"{self.attention.num_heads} heads"
            )

    @property
    def hop(self) -> int:
        """Samples per latent."""
        return prod(level.stride for level in self.levels)


PRESETS: dict[str, WaveformConfig] = {
    "pocket": WaveformConfig(
        latent_channels=32,
        levels=(
            WaveLevel(96, 16, encoder_blocks=1, decoder_blocks=3, overlap=3),
            WaveLevel(160, 4, encoder_blocks=2, decoder_blocks=2),
            WaveLevel(256, 5, encoder_blocks=2, decoder_blocks=2, kernel=3),
        ),
        tones=ToneBank(),
    ),
    "reference": WaveformConfig(
        latent_channels=128,
        levels=(
            WaveLevel(64, 2, encoder_blocks=1, decoder_blocks=3, overlap=8),
            WaveLevel(128, 4, encoder_blocks=3, decoder_blocks=3),
            WaveLevel(256, 5, encoder_blocks=3, decoder_blocks=3),
            WaveLevel(512, 8, encoder_blocks=3, decoder_blocks=3),
        ),
        attention=WaveAttention(num_heads=8, window=64),
    ),
}
"""16 kHz, 320 samples a latent, 50 latents a second. "pocket" goes straight to 1 kHz, which makes it fast on a CPU;
"reference" has the strides (2, 4, 5, 8) and 128 channels of the reference design."""
