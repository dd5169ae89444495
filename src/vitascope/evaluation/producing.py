"""Where the clips of an evaluation come from: a model, or the world itself (the ceiling). And where they are kept.

T frames, N samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, cast
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

import vitascope
from vitascope.core.protocols import AudioCodec, VideoCodec
from vitascope.core.shapes import ClipFormat
from vitascope.evaluation.footage import Footage
from vitascope.evaluation.prompts import GROUPS, Case
from vitascope.media.files import atomic_file
from vitascope.media.frames import fit_samples
from vitascope.models import load_model
from vitascope.tasks.generate import generate_batch
from vitascope.tasks.load import POCKET, choose_device, choose_precision
from vitascope.tasks.pipeline import Pipeline
from vitascope.tasks.request import GenerateRequest, Given, Keyframe
from vitascope.weights.checkpoint import file_digest
from vitascope.world.render import render
from vitascope.world.sound import synthesise


class ClipSource(Protocol):
    """Makes clips for cases. `identity` is another one whenever the same case would give another clip."""

    @property
    def fmt(self) -> ClipFormat:
        """Format of the clips."""
        ...

    @property
    def identity(self) -> str:
        """Which clips these are."""
        ...

    def make(self, cases: Sequence[Case]) -> list[Footage]:
        """The clips of some cases of one group."""
        ...


def true_clip(case: Case, fmt: ClipFormat) -> Footage:
    """What the world itself makes of the case."""
    return Footage(render([case.scene], fmt)[0], synthesise(case.scene, fmt), fmt.fps, fmt.sample_rate_hz)


def middle_frame(fmt: ClipFormat) -> int:
    """The frame of the second keyframe of the group "keyframes"."""
    return (fmt.num_frames - 1) // 2


def given_for(case: Case, fmt: ClipFormat) -> Given:
    """What the model is given besides the prompt: nothing, or pictures, sound or video of the case's own scene."""
    if case.group == "audio_to_video":
        return Given(audio=synthesise(case.scene, fmt))
    if case.group == "video_to_audio":
        return Given(video=render([case.scene], fmt)[0])
    if case.group == "keyframes":
        frames = render([case.scene], fmt)[0]
        return Given(tuple(Keyframe(index / fmt.fps, frames[index]) for index in (0, middle_frame(fmt))))
    return Given()


@dataclass(frozen=True)
class Codecs:
    """Both codecs, either of which may be missing; `digest` tells their weights apart."""

    video: VideoCodec | None
    audio: AudioCodec | None
    device: torch.device
    precision: torch.dtype
    digest: str

    def through(self, clip: Footage) -> Footage:
        """The clip encoded and decoded."""
        frames, audio = clip.frames, clip.audio
        reduced = self.precision != torch.float32
        cast_to = self.precision if reduced else torch.bfloat16
        with torch.inference_mode(), torch.autocast(self.device.type, cast_to, enabled=reduced):
            if self.video is not None:
                pixels = frames.to(self.device).movedim(0, 1)[None].float() / 127.5 - 1
                again = self.video.decode(self.video.encode(pixels)).float().clamp(-1, 1)[0]
                frames = ((again + 1) * 127.5).round().to(torch.uint8).movedim(0, 1).cpu()
            if self.audio is not None and audio is not None:
                audio = self._sound(self.audio, audio)
        return Footage(frames, audio, clip.fps, clip.sample_rate_hz)

    def _sound(self, codec: AudioCodec, samples: Tensor) -> Tensor:
        count = -(-len(samples) // codec.hop)
        padded = fit_samples(samples, count * codec.hop).to(self.device)
        again = codec.decode(codec.encode(padded[None, None])).float()
        return fit_samples(again[0, 0].clamp(-1, 1).cpu(), len(samples))


def load_codecs(model: str = POCKET, device: str = "auto", precision: str = "auto") -> Codecs:
    """The codecs in a model's folder; the audio codec may be missing from it. Raises CheckpointError."""
    folder = Path(vitascope.__path__[0]) / "pocket" if model == POCKET else Path(model)
    place = choose_device(device)
    video_file, audio_file = (folder / f"{name}.safetensors" for name in ("video_codec", "audio_codec"))
    video = cast(VideoCodec, load_model(video_file, place))
    audio = cast(AudioCodec, load_model(audio_file, place)) if audio_file.is_file() else None
    digest = file_digest(video_file) + (file_digest(audio_file) if audio is not None else "")
    return Codecs(video, audio, place, choose_precision(precision, place), digest)


@dataclass(frozen=True)
class WorldSource:
    """The world's own clips, as they are or once through the codecs: what a perfect model would score."""

    fmt: ClipFormat
    codecs: Codecs | None = None

    @property
    def identity(self) -> str:
        """Which clips these are."""
        return "the world" + (f" through {self.codecs.digest}" if self.codecs else "")

    def make(self, cases: Sequence[Case]) -> list[Footage]:
        """The clips of some cases."""
        clips = [true_clip(case, self.fmt) for case in cases]
        return [self.codecs.through(clip) if self.codecs else clip for clip in clips]


@dataclass(frozen=True)
class ModelSource:
    """Clips of a model; settings that are None are the model's own."""

    pipeline: Pipeline
    fmt: ClipFormat
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    sampler: str | None = None

    @property
    def identity(self) -> str:
        """Which clips these are."""
        settings = (self.num_inference_steps, self.guidance_scale, self.sampler, self.pipeline.defaults)
        return f"{self.pipeline.name} {self.pipeline.fingerprint} {self.pipeline.precision} {self.fmt} {settings}"

    def left_out(self) -> dict[str, str]:
        """The groups that say nothing about this model, and why."""
        can = self.pipeline.denoiser.capabilities
        whole = can.noise == "clip" and not can.condition_channels
        reasons = {
            name: "makes no sound" if group.sound and self.pipeline.audio_codec is None else
            "takes one noise level a clip, so it keeps no frames" if group.frames and whole else ""
            for name, group in GROUPS.items()
        }  # fmt: skip
        return {name: reason for name, reason in reasons.items() if reason}

    def request(self, case: Case) -> GenerateRequest:
        """What the model is asked for."""
        return GenerateRequest(
            case.prompt,
            format=self.fmt,
            seed=case.seed,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            sampler=self.sampler,
            given=given_for(case, self.fmt),
        )

    def make(self, cases: Sequence[Case]) -> list[Footage]:
        """The clips of some cases, generated together; a group "codec" is the world's clips through the codecs."""
        if all(case.group == "codec" for case in cases):
            parts = self.pipeline
            codecs = Codecs(parts.video_codec, parts.audio_codec, parts.device, parts.precision, parts.fingerprint)
            clips = [codecs.through(true_clip(case, self.fmt)) for case in cases]
            return clips if parts.audio_codec is not None else [replace(clip, audio=None) for clip in clips]
        made = generate_batch(self.pipeline, [self.request(case) for case in cases])
        return [Footage(m.clip.frames, m.clip.samples, m.clip.fps, self.fmt.sample_rate_hz) for m in made]


@dataclass(frozen=True)
class ClipStore:
    """Clips on disk, without loss, one .npz a case; an evaluation that was interrupted finds them again."""

    folder: Path

    def path(self, case: Case, identity: str) -> Path:
        """Where the clip of a case is; another prompt, seed, scene or source is another file."""
        digest = hashlib.blake2b(repr((case, identity)).encode(), digest_size=6).hexdigest()
        return self.folder / case.group / f"{case.number:04}-{digest}.npz"

    def load(self, case: Case, identity: str) -> Footage | None:
        """The clip, or None if it is not there or not whole."""
        try:
            with np.load(self.path(case, identity)) as arrays:
                audio = torch.from_numpy(arrays["audio"].astype(np.float32) / 32767)
                frames = torch.from_numpy(arrays["frames"])
                return Footage(frames, audio if len(audio) else None, float(arrays["fps"]), int(arrays["rate_hz"]))
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            return None

    def save(self, case: Case, identity: str, clip: Footage) -> Footage:
        """Write a clip; sound is kept in 16 bits. Returns it as `load` will give it."""
        path = self.path(case, identity)
        path.parent.mkdir(parents=True, exist_ok=True)
        audio = np.round(np.clip(clip.samples, -1, 1) * 32767).astype(np.int16)
        with atomic_file(path) as file:
            np.savez_compressed(
                file, frames=clip.frames.cpu().numpy(), audio=audio, fps=clip.fps, rate_hz=clip.sample_rate_hz
            )
        saved = self.load(case, identity)
        assert saved is not None
        return saved
