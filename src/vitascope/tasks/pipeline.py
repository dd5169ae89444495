"""Everything that makes a clip, put together: codecs, text encoder, denoiser and the defaults they were trained for."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from math import inf
from typing import Literal, Protocol

import torch
from torch import nn

from vitascope.core.errors import CapabilityError, ShapeError
from vitascope.core.protocols import AudioCodec, Denoiser, ImageEncoder, KeepsTexts, TextEncoder, VideoCodec
from vitascope.core.shapes import (
    ClipFormat,
    latent_frame_times,
    latent_frames,
    latent_size,
    nearest_multiples,
    pixel_frames,
)
from vitascope.core.tracks import AUDIO, VIDEO
from vitascope.diffusion.guidance import Guidance
from vitascope.diffusion.paths import Path
from vitascope.diffusion.sampling_schedule import SamplingSchedule
from vitascope.models.codecs.decoding import AS_IT_IS, Decoding
from vitascope.models.offload.stores import FileStore
from vitascope.tasks.memory import MemoryUse
from vitascope.tasks.request import GenerateRequest
from vitascope.weights.lora import Lora

PRECISIONS: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
FrameTimes = Literal["middle", "begin", "begin_causal"]
KeyframePlace = Literal["cells", "beside"]
MAX_SIDE_PX, MAX_FPS = 8192, 240.0


@dataclass(frozen=True)
class Defaults:
    """How a model samples unless told otherwise.

    clip: the format it was trained at. schedule: the levels that it is sampled at.
    frame_times: when the model is told that a latent frame is: in the middle of its frames, or at the first of them,
    counted as if all latent frames held as many frames ("begin") or as they are ("begin_causal").
    keyframes: whether what is given of a later time takes the place of latent frames ("cells"), or stands "beside" them
    as frames of its own at that time, which the others read and which are left out of the clip; what is given weakly
    then waits for a whole step of the schedule (`tasks.waiting`).
    tea_coefficients: of the polynomial that was fitted to the model, for step caches of the kind "tea".
    overlap_frames: frames that a longer clip carries over from one window of `clip.num_frames` to the next.
    """

    clip: ClipFormat = field(default_factory=ClipFormat)
    num_inference_steps: int = 20
    guidance: Guidance = field(default_factory=Guidance)
    sampler: str = "dpmpp_2m"
    schedule: SamplingSchedule = field(default_factory=SamplingSchedule)
    overlap_frames: int = 9
    frame_times: FrameTimes = "middle"
    tea_coefficients: tuple[float, ...] = ()
    keyframes: KeyframePlace = "cells"

    def latent_times_s(self, num_latent_frames: int, stride: int, fps: float) -> list[float]:
        """The time of each latent frame in seconds, for a codec of that time stride."""
        if self.frame_times == "middle":
            return latent_frame_times(num_latent_frames, stride, fps)
        before = stride - 1 if self.frame_times == "begin_causal" else 0
        return [max(0, i * stride - before) / fps for i in range(num_latent_frames)]


class Residence(Protocol):
    """What brings the parts of a pipeline to its device and takes them away."""

    @property
    def use(self) -> MemoryUse | None: ...
    def add(self, name: str, module: nn.Module, store: FileStore) -> None: ...
    def fit(
        self,
        pipeline: Pipeline,
        requests: Sequence[GenerateRequest],
        guided: bool,
        enlarged_from: tuple[int, int] | None = None,
    ) -> Pipeline: ...
    def merge(self, loras: Sequence[tuple[Lora, float]]) -> None: ...
    def fill(self, pipeline: Pipeline, prompts: Sequence[str]) -> None: ...
    def at_work(self, part: str, stage: str) -> AbstractContextManager[object]: ...
    def release(self) -> None: ...


@dataclass(frozen=True)
class Pipeline:
    """Models on one device with one precision; `patch` is rows and columns of latents that a video token covers.

    audio_codec: None where the model makes pictures without sound. image_encoder: of models that read pictures as they
    read text; num_pictures: the first alone, or the first and the last. loras: in the denoiser, FILE:SCALE each; the
    fingerprint is then also of them. memory: where parts are not always on the device, what brings them there
    (`tasks.fitting.Fitted`); their weights are there inside `at_work` alone. decoding: how frames are decoded.
    max_clips: most clips in one call of the denoiser; None for no limit.
    """

    name: str
    denoiser: Denoiser
    text_encoder: TextEncoder
    video_codec: VideoCodec
    audio_codec: AudioCodec | None
    path: Path
    defaults: Defaults
    device: torch.device
    precision: torch.dtype
    patch: tuple[int, int] = (1, 1)
    audio_patch: int = 1
    fingerprint: str = ""
    image_encoder: ImageEncoder | None = None
    num_pictures: int = 1
    loras: tuple[str, ...] = ()
    memory: Residence | None = None
    decoding: Decoding = AS_IT_IS
    max_clips: int | None = None

    def fill_texts(self, prompts: Sequence[str]) -> None:
        """See to it that a text encoder which keeps what it made (`core.protocols.KeepsTexts`) knows all these prompts:
        it is then loaded once for them. Raises InputError where a limit of memory is too little for it."""
        if self.memory is not None:
            self.memory.fill(self, prompts)
        elif isinstance(self.text_encoder, KeepsTexts):
            self.text_encoder.fill(prompts)

    def autocast(self) -> torch.autocast:
        """A block in which texts are read, clips denoised and decoded: in the pipeline's precision."""
        reduced = self.precision != torch.float32
        return torch.autocast(self.device.type, self.precision if reduced else torch.bfloat16, enabled=reduced)

    def at_work(self, part: str, stage: str) -> AbstractContextManager[object]:
        """A block in which the part of that name (a field) has its weights on the device, for a stage of a clip:
        "text", "encode", "denoise" or "decode"."""
        return nullcontext() if self.memory is None else self.memory.at_work(part, stage)

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
        codec = self.audio_codec
        if codec is not None and fmt.sample_rate_hz != codec.sample_rate_hz:
            raise ShapeError(f"sound is made at {codec.sample_rate_hz} Hz, not at {fmt.sample_rate_hz} Hz")

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

    @property
    def tracks(self) -> tuple[str, ...]:
        """The tracks of a clip: those that there are codecs for."""
        return (VIDEO,) if self.audio_codec is None else (VIDEO, AUDIO)

    def check_tracks(self) -> None:
        """Raise CapabilityError unless the denoiser has the tracks of a clip."""
        missing = [name for name in self.tracks if name not in self.denoiser.capabilities.tracks]
        if missing:
            raise CapabilityError(f"{self.name} has no {' or '.join(missing)} track")
