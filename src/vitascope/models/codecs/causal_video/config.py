"""Shapes of causal video codecs and the presets."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import prod

from vitascope.core.errors import InputError
from vitascope.core.shapes import VideoStrides


@dataclass(frozen=True)
class Level:
    """One resolution: its width, its residual blocks on the way down and up, and the (time, height, width) stride
    between the level above and it."""

    channels: int
    encoder_blocks: int
    decoder_blocks: int
    stride: tuple[int, int, int] = (1, 1, 1)


@dataclass(frozen=True)
class CausalVideoConfig:
    """A causal video codec: `patch_px` x `patch_px` pixels become channels, then one level after the other.

    The strides are the products over patch and levels. `preview_channels` is the width of the preview decoder, which
    shows each latent frame as `preview_px` x `preview_px` px a cell.
    """

    latent_channels: int
    levels: tuple[Level, ...]
    patch_px: int = 1
    kernel: tuple[int, int, int] = (3, 3, 3)
    preview_channels: int = 64
    preview_px: int = 8

    def __post_init__(self) -> None:
        if not self.levels or self.latent_channels < 1 or self.patch_px < 1:
            raise InputError("a video codec needs at least one level, one latent channel and a patch of 1 px")
        for above, level in pairwise(self.levels):
            if above.channels * prod(level.stride) % level.channels:
                raise InputError(
                    f"{above.channels} channels times the stride {level.stride} must be a multiple of {level.channels}"
                )

    @property
    def strides(self) -> VideoStrides:
        """Frames and pixels per latent cell."""
        time, height, width = (prod(level.stride[axis] for level in self.levels) for axis in range(3))
        return VideoStrides(time, height * self.patch_px, width * self.patch_px)

    @property
    def cell(self) -> tuple[int, int, int]:
        """Frames, rows and columns of pixels per latent cell, as a block."""
        return self.strides.time, self.strides.height, self.strides.width

    @property
    def compression(self) -> float:
        """Values of the video per value of the latent, far from the first frame."""
        strides = self.strides
        return 3 * strides.time * strides.height * strides.width / self.latent_channels


PRESETS: dict[str, CausalVideoConfig] = {
    "pocket": CausalVideoConfig(
        latent_channels=16,
        patch_px=4,
        levels=(Level(64, 1, 2), Level(128, 1, 2, (2, 2, 2)), Level(128, 1, 1, (2, 1, 1))),
        preview_px=4,
    ),
    "reference-4x8x8x16": CausalVideoConfig(
        latent_channels=16,
        levels=(
            Level(64, 1, 2),
            Level(64, 2, 3, (1, 2, 2)),
            Level(128, 2, 3, (1, 2, 2)),
            Level(256, 2, 3, (1, 2, 2)),
            Level(256, 2, 3, (4, 1, 1)),
        ),
    ),
    "reference-4x8x8x4": CausalVideoConfig(
        latent_channels=4,
        levels=(
            Level(128, 1, 2),
            Level(128, 2, 3, (1, 2, 2)),
            Level(256, 2, 3, (2, 2, 2)),
            Level(256, 2, 3, (2, 2, 2)),
        ),
    ),
    "reference-8x32x32x128": CausalVideoConfig(
        latent_channels=128,
        patch_px=4,
        levels=(
            Level(128, 2, 3),
            Level(256, 2, 3, (2, 2, 2)),
            Level(512, 2, 3, (2, 2, 2)),
            Level(512, 2, 3, (2, 2, 2)),
        ),
    ),
}
