"""Everything that makes a clip, put together: codecs, text encoder, denoiser and the defaults they were trained for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

import torch

from vitascope.core.errors import CapabilityError, ShapeError
from vitascope.core.protocols import AudioCodec, Denoiser, TextEncoder, VideoCodec
from vitascope.core.shapes import ClipFormat, latent_frames, latent_size, nearest_multiples, pixel_frames
from vitascope.core.tracks import AUDIO, VIDEO
from vitascope.diffusion.guidance import Guidance
from vitascope.diffusion.paths import Path

PRECISIONS: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
MAX_SIDE_PX, MAX_FPS = 8192, 240.0


@dataclass(frozen=True)
class Defaults:
    """How a model samples unless told otherwise.

    clip: the format it was trained at; levels: the schedule is `shift`ed towards noise by this factor.
    overlap_frames: frames that a longer clip carries over from one window of `clip.num_frames` to the next.
    """

    clip: ClipFormat = field(default_factory=ClipFormat)
    num_inference_steps: int = 20
    guidance: Guidance = field(default_factory=Guidance)
    sampler: str = "dpmpp_2m"
    shift: float = 1.0
    overlap_frames: int = 9


@dataclass(frozen=True)
class Pipeline:
    """Models on one device with one precision; `patch` is rows and columns of latents that a video token covers."""

    name: str
    denoiser: Denoiser
    text_encoder: TextEncoder
    video_codec: VideoCodec
    audio_codec: AudioCodec
    path: Path
    defaults: Defaults
    device: torch.device
    precision: torch.dtype
    patch: tuple[int, int] = (1, 1)
    audio_patch: int = 1
    fingerprint: str = ""

    def check_format(self, fmt: ClipFormat) -> None:
        """Raise ShapeError, naming the nearest valid values, unless clips of this format can be made."""
        strides = self.video_codec.strides
        if not 1.0 <= fmt.fps <= MAX_FPS:
            raise ShapeError(f"the frame rate lies in 1..{MAX_FPS:g} fps, got {fmt.fps:g}")
        for name, size, stride, patch in (
            ("width", fmt.width_px, strides.width, self.patch[1]),
            ("height", fmt.height_px, strides.height, self.patch[0]),
        ):
            latent_size(size, stride * patch, name)
            if size > MAX_SIDE_PX:
                raise ShapeError(f"{name} {size} px is too large; at most {MAX_SIDE_PX} px a side")
        latent_frames(fmt.num_frames, strides.time)
        if fmt.sample_rate_hz != self.audio_codec.sample_rate_hz:
            raise ShapeError(f"sound is made at {self.audio_codec.sample_rate_hz} Hz, not at {fmt.sample_rate_hz} Hz")

    def frames_for(self, seconds: float, fps: float) -> int:
        """The number of frames of a clip of `seconds`; raises ShapeError, naming the nearest lengths, if none is within
        half a frame of it. A clip of 1 + k * stride frames counts as k * stride / fps seconds or one frame more."""
        stride = self.video_codec.strides.time
        wanted = seconds * fps
        if not (0.0 < seconds < inf and 0.0 < wanted < inf):
            raise ShapeError(f"the length must be a number of seconds above 0, got {seconds:g} s at {fps:g} fps")
        k = max(0, round((wanted - 0.5) / stride))
        low, high = k * stride, k * stride + 1
        if low - 0.5 <= wanted <= high + 0.5:
            return pixel_frames(1 + k, stride)
        steps = nearest_multiples(max(1, int(wanted)), stride)
        near = ", ".join(f"{step / fps:.3f}" for step in steps)
        raise ShapeError(
            f"{seconds:g} s at {fps:g} fps do not fit: frames come in steps of {stride}; nearest: {near} s"
        )

    def check_tracks(self, names: Sequence[str] = (VIDEO, AUDIO)) -> None:
        """Raise CapabilityError unless the denoiser has these tracks."""
        missing = [name for name in names if name not in self.denoiser.capabilities.tracks]
        if missing:
            raise CapabilityError(f"{self.name} has no {' or '.join(missing)} track")
