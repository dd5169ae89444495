"""From what is given to cells: the latents, noise levels and times of both tracks before the first step.

B = 1 clip, C channels, N latent frames, A audio latents. A given cell stands at level 1 - strength (0: known), every
other cell at 1 with noise that depends on the seed and the track alone. Over a draft, a given cell stands between what
is given and the noised draft.
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
from vitascope.tasks.request import Given, Keyframe, Shot

PREFIX = 2
"""Latent frames of a shot that stand beside the clip where such are taken; the rest takes its place in it."""


@dataclass(frozen=True)
class Cells:
    """Clean latents where something is given and the level of every latent frame: (1, C, N, ...), (N,)."""

    clean: Tensor
    level: Tensor


@dataclass(frozen=True)
class Draft:
    """Latents (1, C, N, h, w) of a whole clip, and the level that they are taken up at."""

    values: Tensor
    level: float


def start_tracks(
    pipeline: Pipeline, fmt: ClipFormat, given: Given, seed: int, first_level: float = 1.0
) -> dict[str, Track]:
    """The tracks of a clip of format `fmt` with what is given in its place. first_level: where the schedule begins,
    which is where a draft is taken up.

    Raises InputError (ShapeError) when something given does not fit the clip, CapabilityError when the model cannot
    take levels by the frame, or has no sound where the task needs it.
    """
    check_sound(pipeline, given)
    codec = pipeline.audio_codec
    conditioned = pipeline.denoiser.capabilities.condition_channels > 0
    condition = known_frames(pipeline, fmt, given).to(pipeline.device) if conditioned else None
    # What stands beside the latents is not put into them.
    inside = Given(draft=given.draft) if conditioned else given
    shots = [_encoded(pipeline, fmt, shot) for shot in inside.shots]
    tracks = {VIDEO: _video_cells(pipeline, fmt, inside, shots)}
    drafts = {} if given.draft is None else {VIDEO: _draft(given.draft, tracks[VIDEO], first_level)}
    times_s = {
        VIDEO: pipeline.defaults.latent_times_s(len(tracks[VIDEO].level), pipeline.video_codec.strides.time, fmt.fps)
    }
    if codec is not None:
        tracks[AUDIO] = _audio_cells(pipeline, codec, fmt, given)
        times_s[AUDIO] = [(i + 0.5) * codec.hop / codec.sample_rate_hz for i in range(len(tracks[AUDIO].level))]
    partial = any(len(set(cells.level.tolist())) > 1 for cells in tracks.values())
    if partial and pipeline.denoiser.capabilities.noise == "clip":
        raise CapabilityError(
            f"{pipeline.name} takes one noise level a clip: it cannot keep frames and make others; give it text alone"
        )
    draw = {name: generator(seed, name) for name in tracks}
    made = {
        name: _noised(pipeline, cells, times_s[name], draw[name], drafts.get(name)) for name, cells in tracks.items()
    }
    shown = beside_cells(pipeline, fmt, inside, shots)
    # drawn after the clip's own noise, so that it is the same with and without them
    more = [_noised(pipeline, cells, times, draw[VIDEO]) for cells, times in shown]
    video = _one_after_the_other([made[VIDEO], *more])
    if given.draft is not None:  # no cell, however weakly it is given, is told to be noisier than where that begins
        video = video.with_values(video.values, video.noise.clamp(max=first_level))
    return made | {VIDEO: replace(video, condition=condition)}


def check_sound(pipeline: Pipeline, given: Given) -> None:
    """Raise CapabilityError for a sound to follow, or a clip to give sound to, where the model has none."""
    if pipeline.audio_codec is None and any(part is not None for part in (given.audio, given.video, given.past_audio)):
        raise CapabilityError(f"{pipeline.name} makes pictures without sound: give neither a sound nor a silent clip")


def _noised(
    pipeline: Pipeline, cells: Cells, times_s: list[float], draw: torch.Generator, draft: Draft | None = None
) -> Track:
    """Cells at their levels; over a draft, as far from it at its own level to what is given as their strength says.

    Source of the latter: diffusers' LTXConditionPipeline.
    """
    device = pipeline.device
    noise = torch.randn(cells.clean.shape, generator=draw).to(device)
    level = cells.level.view(1, 1, -1, *[1] * (cells.clean.ndim - 3)).to(device)
    clean = cells.clean.to(device)
    if draft is None:
        noised = pipeline.path.add_noise(clean, noise, level)
    else:
        begun = pipeline.path.add_noise(draft.values.to(device), noise, torch.full_like(level, draft.level))
        noised = begun.lerp(clean, 1 - level)
    values = torch.where(level == 0, clean, noised)
    return Track(values, level, torch.tensor(times_s).to(device))


def _one_after_the_other(tracks: list[Track]) -> Track:
    """Latent frames of all, along time."""
    if len(tracks) == 1:
        return tracks[0]
    values, noise = (torch.cat(parts, 2) for parts in zip(*((t.values, t.noise) for t in tracks), strict=True))
    return Track(values, noise, torch.cat([track.times_s for track in tracks]))


@dataclass(frozen=True)
class EncodedShot:
    """A shot, the frame that it begins at, and its latents (1, C, n, h, w)."""

    shot: Shot
    frame: int
    latents: Tensor

    @property
    def beside(self) -> int:
        """How many of its latent frames stand beside the clip; the others take their place in it."""
        return PREFIX if self.frame else 0


def _draft(values: Tensor, cells: Cells, first_level: float) -> Draft:
    """Latents (C, N, h, w) under these cells. Raises InputError (ShapeError) for those of another clip, and where noise
    alone would be left of them."""
    if values.shape != cells.clean.shape[1:]:
        raise ShapeError(f"the draft of such a clip is {tuple(cells.clean.shape[1:])}, got {tuple(values.shape)}")
    if first_level >= 1:
        raise InputError("a draft is taken up at a level below 1: give levels that begin there, such as 0.9,0.7,0.4")
    return Draft(values[None].float(), first_level)


def _video_cells(pipeline: Pipeline, fmt: ClipFormat, given: Given, shots: list[EncodedShot]) -> Cells:
    codec = pipeline.video_codec
    count = latent_frames(fmt.num_frames, codec.strides.time)
    grid = (fmt.height_px // codec.strides.height, fmt.width_px // codec.strides.width)
    clean = torch.zeros(1, codec.latent_channels, count, *grid)
    level, num_past = torch.ones(count), 0
    if given.video is not None:
        clean, level = _encode(pipeline, _sized(given.video, fmt, "the given video")), torch.zeros(count)
    if given.past is not None:
        past = _encode(pipeline, _sized(given.past, fmt, "the clip to extend", whole=False))
        if past.shape[2] >= count:
            asked = f"{given.past.shape[0]} frames are given and {fmt.num_frames} asked for"
            raise ShapeError(f"{asked}: nothing is left to make")
        num_past = past.shape[2]
        clean[:, :, :num_past], level[:num_past] = past, 0.0
    in_shots: dict[int, float] = {}
    for shot in shots:
        own = shot.latents[:, :, shot.beside :]
        start = shot.frame // codec.strides.time + shot.beside
        end = start + own.shape[2]
        if start < num_past or not in_shots.keys().isdisjoint(range(start, end)):
            raise InputError(f"the shot at {shot.shot.time_s} s lies over something else that is given")
        clean[:, :, start:end], level[start:end] = own, 1.0 - shot.shot.strength
        in_shots |= dict.fromkeys(range(start, end), shot.shot.time_s)
    taken: dict[int, float] = {}
    for keyframe in given.keyframes:
        if pipeline.defaults.keyframes == "beside" and _frame(fmt, keyframe.time_s, "keyframe"):
            continue
        index, latent = _keyframe(pipeline, fmt, keyframe)
        if index < num_past:
            raise InputError(f"a keyframe at {keyframe.time_s} s lies in the part that is already there")
        if index in in_shots:
            raise InputError(
                f"a keyframe at {keyframe.time_s} s lies in the shot at {in_shots[index]} s: give one of them"
            )
        if index in taken:
            raise InputError(
                f"keyframes at {taken[index]} s and {keyframe.time_s} s fall on one latent frame; "
                f"leave {codec.strides.time} frames ({codec.strides.time / fmt.fps:.3f} s) between them"
            )
        taken[index] = keyframe.time_s
        clean[:, :, index], level[index] = latent, 1.0 - keyframe.strength
    return Cells(clean, level)


def beside_cells(
    pipeline: Pipeline, fmt: ClipFormat, given: Given, shots: list[EncodedShot]
) -> list[tuple[Cells, list[float]]]:
    """What is given of later times, where it stands beside the clip's own latent frames: cells with the times in
    seconds of their latent frames. Pictures come first, as they are; of a shot the first two latent frames.

    Source: LTX-Video 0.9.5 and later, as diffusers' LTXConditionPipeline has it.
    """
    stride, own = pipeline.video_codec.strides.time, pipeline.defaults
    if own.keyframes != "beside":
        return []
    shown: list[tuple[int, Tensor, float]] = []
    past = 0 if given.past is None else len(given.past)
    for keyframe in given.keyframes:
        frame = _frame(fmt, keyframe.time_s, "keyframe")
        if 0 < frame < past:
            raise InputError(f"a keyframe at {keyframe.time_s} s lies in the part that is already there")
        if frame:
            picture = fit(keyframe.picture, fmt.width_px, fmt.height_px)[None]
            shown.append((frame, _encode(pipeline, picture), keyframe.strength))
    shown += [(shot.frame, shot.latents[:, :, : shot.beside], shot.shot.strength) for shot in shots if shot.beside]
    return [
        (
            Cells(latents, torch.full((latents.shape[2],), 1.0 - strength)),
            [time_s + frame / fmt.fps for time_s in own.latent_times_s(latents.shape[2], stride, fmt.fps)],
        )
        for frame, latents, strength in shown
    ]


def num_beside(pipeline: Pipeline, fmt: ClipFormat, given: Given) -> int:
    """How many latent frames `beside_cells` gives. Raises InputError for what lies after the last frame."""
    if pipeline.defaults.keyframes != "beside":
        return 0
    keyframes = [keyframe for keyframe in given.keyframes if _frame(fmt, keyframe.time_s, "keyframe")]
    shots = [shot for shot in given.shots if _frame(fmt, shot.time_s, "shot")]
    return len(keyframes) + PREFIX * len(shots)


def _encoded(pipeline: Pipeline, fmt: ClipFormat, shot: Shot) -> EncodedShot:
    """Raises InputError (ShapeError, CapabilityError) for a shot that does not fit."""
    time, frame = pipeline.video_codec.strides.time, _frame(fmt, shot.time_s, "shot")
    count = latent_frames(len(shot.frames), time)
    if frame and pipeline.defaults.keyframes != "beside":
        raise CapabilityError(
            f"{pipeline.name} takes frames at the beginning of the clip alone, not at {shot.time_s} s"
        )
    if frame + len(shot.frames) > fmt.num_frames:
        raise InputError(
            f"a shot of {len(shot.frames)} frames at {shot.time_s} s does not fit a clip of {fmt.num_frames}"
        )
    if frame and count < PREFIX:
        raise ShapeError(f"a later shot has {1 + time} frames or more, got {len(shot.frames)}; one frame is a keyframe")
    return EncodedShot(shot, frame, _encode(pipeline, fit(shot.frames, fmt.width_px, fmt.height_px)))


def _frame(fmt: ClipFormat, time_s: float, what: str) -> int:
    """The frame at a time. Raises InputError after the last one."""
    frame = round(time_s * fmt.fps)
    if frame > fmt.num_frames - 1:
        last_s = (fmt.num_frames - 1) / fmt.fps
        raise InputError(f"a {what} at {time_s} s lies after the last frame, at {last_s:.3f} s")
    return frame


def _keyframe(pipeline: Pipeline, fmt: ClipFormat, keyframe: Keyframe) -> tuple[int, Tensor]:
    """Index and latent (1, C, h, w) of the latent frame that shows the keyframe.

    The first latent frame is a picture; a later one holds `time` frames, and the keyframe stands still for them.
    """
    time = pipeline.video_codec.strides.time
    index = -(-_frame(fmt, keyframe.time_s, "keyframe") // time)
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
