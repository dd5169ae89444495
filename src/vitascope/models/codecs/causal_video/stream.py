"""Encoding and decoding a clip piece by piece, with the same result as all at once and memory that does not grow.

B batch, C latent channels, T frames (N latent frames), H and W px (h and w cells).
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from vitascope.core.errors import ShapeError
from vitascope.core.shapes import check_frames, check_latents
from vitascope.models.codecs.causal_video.model import CausalVideoCodec
from vitascope.nn.causal_conv import TailCache


class EncoderStream:
    """Frames in, latents out. The first push takes 1 + k*time frames, each later one k*time (k >= 1)."""

    def __init__(self, codec: CausalVideoCodec) -> None:
        self.codec = codec
        self.cache = TailCache()
        self._started = False

    def push(self, frames: Tensor) -> Tensor:
        """Frames (B, 3, T, H, W) in [-1, 1] to their normalised latents (B, C, N, h, w).

        Raises ShapeError when the frames do not fill whole latent frames.
        """
        time = self.codec.strides.time
        if not self._started:
            check_frames(frames.shape, self.codec.strides)
            frames = self.codec.lead_in(frames)
            self._started = True
        elif frames.shape[2] < 1 or frames.shape[2] % time:
            raise ShapeError(f"a later chunk must be a multiple of {time} frames, got {frames.shape[2]}")
        moments = self.codec.encoder(frames.movedim(1, -1), self.cache).movedim(-1, 1)
        return self.codec.normalise(moments.chunk(2, dim=1)[0])


class DecoderStream:
    """Latents in, frames out: the first latent frame gives one frame, each later one `time` frames."""

    def __init__(self, codec: CausalVideoCodec) -> None:
        self.codec = codec
        self.cache = TailCache()
        self._started = False

    def push(self, latents: Tensor) -> Tensor:
        """Normalised latents (B, C, N, h, w), any N >= 1, to their frames (B, 3, T, H, W)."""
        check_latents(latents.shape, self.codec.latent_channels)
        raw = self.codec.denormalise(latents).movedim(1, -1)
        frames = self.codec.decoder(raw, self.cache).movedim(-1, 1)
        skipped = 0 if self._started else self.codec.strides.time - 1
        self._started = True
        return frames[:, :, skipped:]


def decode_progressively(codec: CausalVideoCodec, latents: Tensor, chunk: int = 1) -> Iterator[Tensor]:
    """Frames of `chunk` latent frames at a time, as soon as they are ready; together they equal `codec.decode`."""
    return codec.stream(latents, chunk)
