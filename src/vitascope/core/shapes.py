"""Arithmetic between pixels, samples, latents and seconds.

A causal video codec with strides (t, h, w) turns 1 + k*t frames of (m*h) x (n*w) px into 1 + k latent frames of m x n
cells. Nothing is rounded silently: a size that does not fit raises ShapeError naming the nearest sizes that do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, inf

from vitascope.core.errors import ShapeError


@dataclass(frozen=True)
class VideoStrides:
    """Pixels (or frames) per latent cell along time, height and width."""

    time: int
    height: int
    width: int


@dataclass(frozen=True)
class ClipFormat:
    """Size and rates of a clip: width and height in px, frames a second, number of frames, audio samples a second."""

    width_px: int = 128
    height_px: int = 128
    fps: float = 12.0
    num_frames: int = 25
    sample_rate_hz: int = 16000

    def __post_init__(self) -> None:
        for name in ("width_px", "height_px", "fps", "num_frames", "sample_rate_hz"):
            if not 0 < getattr(self, name) < inf:
                raise ShapeError(f"{name} must be positive and finite, got {getattr(self, name)}")

    @property
    def duration_s(self) -> float:
        """Length in seconds: every frame is shown for 1 / fps."""
        return self.num_frames / self.fps

    @property
    def num_samples(self) -> int:
        """Audio samples that cover the clip."""
        return ceil(self.duration_s * self.sample_rate_hz - 1e-6)


def nearest_multiples(value: int, step: int) -> tuple[int, ...]:
    """The positive multiples of `step` around `value`, smaller first."""
    below = value // step * step
    return (below, below + step) if below > 0 else (step,)


def latent_frames(num_frames: int, stride: int) -> int:
    """Latent frames of a causal codec: 1 + (num_frames - 1) / stride.

    Raises ShapeError unless num_frames = 1 + k * stride.
    """
    if num_frames < 1 or (num_frames - 1) % stride:
        below = max(0, (num_frames - 1) // stride) * stride + 1
        near = [n for n in (below, below + stride) if n >= 1]
        nearest = ", ".join(map(str, near))
        raise ShapeError(f"{num_frames} frames do not fit: the codec takes 1 + {stride}k frames; nearest: {nearest}")
    return 1 + (num_frames - 1) // stride


def pixel_frames(num_latent_frames: int, stride: int) -> int:
    """Frames that `num_latent_frames` (>= 1) decode to: 1 + (n - 1) * stride."""
    if num_latent_frames < 1:
        raise ShapeError(f"at least one latent frame is needed, got {num_latent_frames}")
    return 1 + (num_latent_frames - 1) * stride


def latent_size(size_px: int, stride: int, name: str) -> int:
    """Cells along one axis of `size_px` px. Raises ShapeError (naming `name`) unless it is a multiple of `stride`."""
    if size_px < 1 or size_px % stride:
        near = ", ".join(map(str, nearest_multiples(size_px, stride)))
        raise ShapeError(f"{name} {size_px} px does not fit: it must be a multiple of {stride}; nearest: {near}")
    return size_px // stride


def check_frames(shape: Sequence[int], strides: VideoStrides) -> None:
    """Raise ShapeError, naming the nearest valid sizes, unless `shape` is (B, 3, 1 + k*time, m*height, n*width)."""
    if len(shape) != 5 or shape[1] != 3:
        raise ShapeError(f"frames must be (B, 3, T, H, W), got {tuple(shape)}")
    latent_frames(shape[2], strides.time)
    latent_size(shape[3], strides.height, "height")
    latent_size(shape[4], strides.width, "width")


def check_latents(shape: Sequence[int], channels: int) -> None:
    """Raise ShapeError unless `shape` is (B, channels, N, h, w) with at least one latent frame."""
    if len(shape) != 5 or shape[1] != channels or shape[2] < 1:
        raise ShapeError(f"latents must be (B, {channels}, N, h, w), got {tuple(shape)}")


def latent_frame_times(num_latent_frames: int, stride: int, fps: float) -> list[float]:
    """Centre time in seconds of each latent frame: the first covers frame 0 alone, each later one `stride` frames."""
    first = 0.5 / fps
    return [first] + [(1 + (i - 1) * stride + stride / 2) / fps for i in range(1, num_latent_frames)]


def num_audio_latents(duration_s: float, latents_per_s: float, patch: int = 1) -> int:
    """Audio latents that cover `duration_s` seconds, rounded up to whole patches."""
    return ceil(duration_s * latents_per_s / patch - 1e-6) * patch
