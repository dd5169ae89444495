"""From what is given to cells: the latents, noise levels and times of both tracks before the first step.

B = 1 clip, C channels, N latent frames, A audio latents. A given cell stands at level 1 - strength (0: known), every
other cell at 1 with noise that depends on the seed and the track alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vitascope.core.errors import CapabilityError, InputError, ShapeError
from vitascope.core.protocols import AudioCodec
from vitascope.core.random import generator
from vitascope.core.shapes import ClipFormat, latent_frames, num_audio_latents
from vitascope.core.tracks import AUDIO, VIDEO, Track
from vitascope.media.frames import fit, fit_samples
from vitascope.tasks.condition import known_frames
from vitascope.tasks.pipeline import Pipeline
from vitascope.tasks.request import Given, Keyframe


@dataclass(frozen=True)
class Cells:
    """Clean latents where something is given and the level of every latent frame: (1, C, N, ...), (N,)."""

    clean: Tensor
    level: Tensor


def start_tracks(pipeline: Pipeline, fmt: ClipFormat, given: Given, seed: int) -> dict[str, Track]:
    """The tracks of a clip of format `fmt` with what is given in its place.

    Raises InputError (ShapeError) when something given does not fit the clip, CapabilityError when the model cannot
    take levels by the frame, or has no sound where the task needs it.
    """
    check_sound(pipeline, given)
    codec = pipeline.audio_codec
    beside = pipeline.denoiser.capabilities.condition_channels > 0
    condition = known_frames(pipeline, fmt, given).to(pipeline.device) if beside else None
    # What stands beside the latents is not put into them.
    tracks = {VIDEO: _video_cells(pipeline, fmt, Given() if beside else given)}
    times_s = {
        VIDEO: pipeline.defaults.latent_times_s(len(tracks[VIDEO].level), pipeline.video_codec.strides.time, fmt.fps)
    }
    if codec is not None:
        tracks[AUDIO] = _audio_cells(pipeline, codec, fmt, given)
        times_s[AUDIO] = [(i + 0.5) * codec.hop / codec.sample_rate_hz for i in range(len(tracks[AUDIO].level))]
    partial = any(0 < int((cells.level < 1).sum()) < len(cells.level) for cells in tracks.values())
    if partial and pipeline.denoiser.capabilities.noise == "clip":
        raise CapabilityError(f"{pipeline.name} takes one noise level a clip: it cannot keep frames and make others")
    made = {name: _noised(pipeline, name, cells, torch.tensor(times_s[name]), seed) for name, cells in tracks.items()}
    return made | {VIDEO: replace(made[VIDEO], condition=condition)}


def check_sound(pipeline: Pipeline, given: Given) -> None:
    """Raise CapabilityError for a sound to follow, or a clip to give sound to, where the model has none."""
    if pipeline.audio_codec is None and any(part is not None for part in (given.audio, given.video, given.past_audio)):
        raise CapabilityError(f"{pipeline.name} makes pictures without sound: give neither a sound nor a silent clip")


def _noised(pipeline: Pipeline, name: str, cells: Cells, times_s: Tensor, seed: int) -> Track:
    device = pipeline.device
    noise = torch.randn(cells.clean.shape, generator=generator(seed, name)).to(device)
    level = cells.level.view(1, 1, -1, *[1] * (cells.clean.ndim - 3)).to(device)
    noised = pipeline.path.add_noise(cells.clean.to(device), noise, level)
    values = torch.where(level == 0, cells.clean.to(device), noised)
    return Track(values, level, times_s.to(device))


def _video_cells(pipeline: Pipeline, fmt: ClipFormat, given: Given) -> Cells:
    codec = pipeline.video_codec
    count = latent_frames(fmt.num_frames, codec.strides.time)
    grid = (fmt.height_px // codec.strides.height, fmt.width_px // codec.strides.width)
    clean = torch.zeros(1, codec.latent_channels, count, *grid)
    level = torch.ones(count)
    if given.video is not None:
        clean, level = _encode(pipeline, _sized(given.video, fmt, "the given video")), torch.zeros(count)
    if given.past is not None:
        past = _encode(pipeline, _sized(given.past, fmt, "the clip to extend", whole=False))
        if past.shape[2] >= count:
            asked = f"{given.past.shape[0]} frames are given and {fmt.num_frames} asked for"
            raise ShapeError(f"{asked}: nothing is left to make")
        clean[:, :, : past.shape[2]], level[: past.shape[2]] = past, 0.0
    taken: dict[int, float] = {}
    for keyframe in given.keyframes:
        index, latent = _keyframe(pipeline, fmt, keyframe)
        if level[index] == 0.0 and given.past is not None:
            raise InputError(f"a keyframe at {keyframe.time_s} s lies in the part that is already there")
        if index in taken:
            raise InputError(
                f"keyframes at {taken[index]} s and {keyframe.time_s} s fall on one latent frame; "
                f"leave {codec.strides.time} frames ({codec.strides.time / fmt.fps:.3f} s) between them"
            )
        taken[index] = keyframe.time_s
        clean[:, :, index], level[index] = latent, 1.0 - keyframe.strength
    return Cells(clean, level)


def _keyframe(pipeline: Pipeline, fmt: ClipFormat, keyframe: Keyframe) -> tuple[int, Tensor]:
    """Index and latent (1, C, h, w) of the latent frame that shows the keyframe.

    The first latent frame is a picture; a later one holds `time` frames, and the keyframe stands still for them.
    """
    time = pipeline.video_codec.strides.time
    frame = round(keyframe.time_s * fmt.fps)
    if frame > fmt.num_frames - 1:
        raise InputError(
            f"a keyframe at {keyframe.time_s} s lies after the last frame, at {(fmt.num_frames - 1) / fmt.fps:.3f} s"
        )
    index = -(-frame // time)
    picture = fit(keyframe.picture, fmt.width_px, fmt.height_px)[None]
    held = picture.expand(1 if index == 0 else 1 + time, -1, -1, -1)
    return index, _encode(pipeline, held)[:, :, -1]


def _audio_cells(pipeline: Pipeline, codec: AudioCodec, fmt: ClipFormat, given: Given) -> Cells:
    latents_per_s = codec.sample_rate_hz / codec.hop
    count = num_audio_latents(fmt.duration_s, latents_per_s, pipeline.audio_patch)
    clean, level = torch.zeros(1, codec.latent_channels, count), torch.ones(count)
    if given.audio is not None:
        clean, level = _encode_audio(pipeline, codec, given.audio, count), torch.zeros(count)
    elif given.past_audio is not None:
        whole = min(count, given.past_audio.shape[-1] // codec.hop)
        known = whole // pipeline.audio_patch * pipeline.audio_patch
        if known:
            clean[:, :, :known], level[:known] = _encode_audio(pipeline, codec, given.past_audio, known), 0.0
    return Cells(clean, level)


def _sized(frames: Tensor, fmt: ClipFormat, what: str, whole: bool = True) -> Tensor:
    """Frames fitted to the clip's size; refused unless as many as the clip has (`whole`)."""
    if whole and frames.shape[0] != fmt.num_frames:
        raise ShapeError(f"{what} has {frames.shape[0]} frames, the clip {fmt.num_frames}")
    return fit(frames, fmt.width_px, fmt.height_px)


@torch.no_grad()
def _encode(pipeline: Pipeline, frames: Tensor) -> Tensor:
    """Frames (T, 3, H, W) uint8 to latents (1, C, N, h, w) on the CPU."""
    pixels = frames.to(pipeline.device).movedim(0, 1)[None].float() / 127.5 - 1.0
    with pipeline.at_work("video_codec", "encode"):
        return pipeline.video_codec.encode(pixels).cpu()


@torch.no_grad()
def _encode_audio(pipeline: Pipeline, codec: AudioCodec, samples: Tensor, count: int) -> Tensor:
    """Samples (N,) cut or padded with silence to `count` latents, (1, C, count), on the CPU."""
    padded = fit_samples(samples, count * codec.hop)
    with pipeline.at_work("audio_codec", "encode"):
        return codec.encode(padded[None, None].to(pipeline.device)).cpu()
