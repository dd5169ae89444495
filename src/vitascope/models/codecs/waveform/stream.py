"""Encoding and decoding sound piece by piece, with the same result as all at once and memory that does not grow.

B batch, C latent channels, S samples, T latents.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vitascope.core.errors import ShapeError
from vitascope.nn.causal_conv import TailCache

if TYPE_CHECKING:
    from vitascope.models.codecs.waveform.model import WaveformCodec


@dataclass
class WaveState:
    """What a stream carries from chunk to chunk: the tails of all layers, the latents already gone by, and how far the
    voice of the tones (tones.py) has turned, (B, 1)."""

    tails: TailCache = field(default_factory=TailCache)
    position: int = 0
    turns: Tensor | None = None


class WaveEncoderStream:
    """Samples in, latents out as soon as a hop is full."""

    def __init__(self, codec: WaveformCodec, state: WaveState) -> None:
        self.codec = codec
        self.state = state
        self._rest: Tensor | None = None

    @property
    def num_pending(self) -> int:
        """Samples held back because they do not fill a hop yet."""
        return 0 if self._rest is None else self._rest.shape[-1]

    def push(self, samples: Tensor) -> Tensor:
        """Any number of samples (B, 1, S) in [-1, 1] to the normalised latents (B, C, T >= 0) that they complete."""
        if samples.ndim != 3 or samples.shape[1] != 1:
            raise ShapeError(f"samples must be (B, 1, S), got {tuple(samples.shape)}")
        if self._rest is not None:
            samples = torch.cat([self._rest, samples], dim=2)
        used = samples.shape[2] - samples.shape[2] % self.codec.hop
        self._rest = samples[:, :, used:].clone()
        if not used:
            return samples.new_zeros(samples.shape[0], self.codec.latent_channels, 0)
        mean = self.codec.encoder(samples[:, :, :used], self.state).chunk(2, dim=1)[0]
        self.state.position += used // self.codec.hop
        return self.codec.normalise(mean)


class WaveDecoderStream:
    """Latents in, samples out: a hop of samples for each latent, at once."""

    def __init__(self, codec: WaveformCodec, state: WaveState) -> None:
        self.codec = codec
        self.state = state

    def push(self, latents: Tensor) -> Tensor:
        """Normalised latents (B, C, T >= 1) to their samples (B, 1, T * hop)."""
        self.codec.check_latents(latents)
        samples = self.codec.decode_part(latents, self.state)
        self.state.position += latents.shape[2]
        return samples
