"""The one data structure of the project: tracks of latent cells, each cell with its own noise level.

B batch, C channels, T latent frames, H and W latent rows and columns. A video track is (B, C, T, H, W), an audio track
(B, C, T). Noise levels lie in [0, 1] (1 pure noise, 0 known) and are broadcastable to the values with the channel axis
1: video (B, 1, T, 1|H, 1|W), audio (B, 1, T).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from vitascope.core.errors import ShapeError

VIDEO = "video"
AUDIO = "audio"


@dataclass(frozen=True)
class Track:
    """Latent cells, the noise level of each, and the time in seconds of each latent frame, shape (T,).

    condition: clean channels beside the values that some models read, in the shape of the values but for their number.
    """

    values: Tensor
    noise: Tensor
    times_s: Tensor
    condition: Tensor | None = None

    def __post_init__(self) -> None:
        if self.values.ndim not in (3, 5):
            raise ShapeError(f"a track has 3 (audio) or 5 (video) axes, got shape {tuple(self.values.shape)}")
        if self.noise.ndim != self.values.ndim or self.noise.shape[1] != 1:
            raise ShapeError(
                f"noise levels of a track {tuple(self.values.shape)} need as many axes and one channel, "
                f"got {tuple(self.noise.shape)}"
            )

    def with_values(self, values: Tensor, noise: Tensor | None = None) -> Track:
        """The same track with other values and, if given, other noise levels."""
        return replace(self, values=values, noise=self.noise if noise is None else noise)


Tracks = Mapping[str, Track]


@dataclass(frozen=True)
class TextContext:
    """Text for cross-attention: embeddings (B, S, D) and a mask (B, S), True where a token is real.

    image: tokens (B, I, W) of a picture that some models read beside the text. prepared: what a model made of both once
    for all its steps (`core.protocols.Prepares`), tensors of batch B in an order of its own.
    """

    embeddings: Tensor
    mask: Tensor
    image: Tensor | None = None
    prepared: tuple[Tensor, ...] = ()
