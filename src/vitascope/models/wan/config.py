"""The shape of a Wan denoiser."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from vitascope.core.errors import InputError
from vitascope.core.protocols import NoiseGranularity
from vitascope.nn.attention import head_width


@dataclass(frozen=True)
class WanConfig:
    """A Wan 2.1 transformer. Defaults are those of the 14B text-to-video model.

    in_channels: latents plus, for image to video, 4 channels of mask and the latents of the known frames.
    image_width: of the image tokens that the cross-attentions also read (CLIP: 1280), 0 for none; image_positions:
    tokens of a learned position table for them (first-and-last-frame models), 0 for none.
    frequency_width: sinusoids of the noise level. noise: what the weights were trained to take a level per.
    Raises InputError (ShapeError for head widths) where values contradict each other.
    """

    width: int = 5120
    depth: int = 40
    num_heads: int = 40
    hidden: int = 13824
    in_channels: int = 16
    out_channels: int = 16
    text_width: int = 4096
    image_width: int = 0
    image_positions: int = 0
    frequency_width: int = 256
    patch: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    cross_norm: bool = True
    noise: NoiseGranularity = "clip"

    def __post_init__(self) -> None:
        head_width(self.width, self.num_heads)
        if min(self.depth, self.hidden, self.in_channels, self.out_channels, self.text_width, *self.patch) < 1:
            raise InputError("depth, hidden, channels, text_width and patch must be positive")
        if self.frequency_width < 2 or self.frequency_width % 2:
            raise InputError(f"frequency_width must be even and positive, got {self.frequency_width}")
        if self.image_positions and not self.image_width:
            raise InputError("image_positions need image tokens: give image_width")

    @property
    def in_values(self) -> int:
        """Numbers in a token on the way in."""
        return self.in_channels * prod(self.patch)

    @property
    def out_values(self) -> int:
        """Numbers in a token on the way out."""
        return self.out_channels * prod(self.patch)

    @property
    def condition_channels(self) -> int:
        """Channels beside the noisy latents: the mask and latents of known frames, 0 for text to video."""
        return self.in_channels - self.out_channels
