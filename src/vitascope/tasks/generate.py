"""A request to a clip: known cells in, one sampling loop, both codecs out.

B clips, T frames, N latent frames. The loop is the same for every task; `known.py` says what each task knows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vitascope.caches.steps import StepCache
from vitascope.core.errors import CheckpointError, InputError
from vitascope.core.protocols import Prepares
from vitascope.core.random import generator
from vitascope.core.shapes import latent_frames
from vitascope.core.tracks import AUDIO, VIDEO, TextContext, Track, Tracks
from vitascope.diffusion.guidance import GuidedDenoiser, busy_values
from vitascope.diffusion.joining import join_tracks
from vitascope.diffusion.samplers import Denoise, sampler_named
from vitascope.diffusion.samplers.step import Step
from vitascope.media.frames import fit, fit_samples
from vitascope.media.reading import Clip
from vitascope.models.codecs.decoding import decode_frames
from vitascope.nn.footprint import is_finite
from vitascope.tasks.condition import image_tokens
from vitascope.tasks.known import start_tracks
from vitascope.tasks.known_noise import with_known_noise
from vitascope.tasks.memory import MemoryUse
from vitascope.tasks.pipeline import Pipeline
from vitascope.tasks.request import GenerateRequest
from vitascope.tasks.settings import check_batch, guidance_of, levels_of, recipe_of, resolve
from vitascope.tasks.waiting import Waiting, settled

Report = Callable[[Step], None]
"""Called after every step, with the cells so far; raising from it cancels the run."""


@dataclass(frozen=True)
class Generated:
    """A clip, what it was made with (JSON values), and the seconds that each stage took (over its batch).

    skipped_share: of the denoiser's blocks, those that a step cache skipped, in [0, 1]. memory: where there was a
    limit, what was planned for it and what was measured.
    """

    clip: Clip
    recipe: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)
    skipped_share: float = 0.0
    memory: MemoryUse | None = None


def generate(pipeline: Pipeline, request: GenerateRequest, report: Report = lambda step: None) -> Generated:
    """Make one clip. Raises InputError (ShapeError, PromptError, CapabilityError) before the first step."""
    return generate_batch(pipeline, [request], report)[0]


def generate_batch(
    pipeline: Pipeline, requests: Sequence[GenerateRequest], report: Report = lambda step: None
) -> list[Generated]:
    """Make several clips of one format together. Prompts, seeds and what is given may differ; the settings may not.

    A step cache decides for all clips of a batch at once: with one, a clip depends on the others.
    """
    first = check_batch(pipeline, requests)
    if pipeline.memory is not None:
        pipeline = pipeline.memory.fit(pipeline, requests, is_guided(pipeline, first))
    clock = Clock()
    sampled = sample(pipeline, requests, report, clock)
    clips = decode_clips(pipeline, requests, sampled.tracks)
    clock.lap("decode")
    use = None if pipeline.memory is None else pipeline.memory.use
    return [
        Generated(clip, recipe_of(pipeline, request), clock.seconds, sampled.skipped_share, use)
        for request, clip in zip(requests, clips, strict=True)
    ]


def decode_clips(pipeline: Pipeline, requests: Sequence[GenerateRequest], tracks: dict[str, Track]) -> list[Clip]:
    """The clips that sampled tracks stand for, with what was given whole put back as it was."""
    frames, sounds = _decode(pipeline, tracks, requests[0])
    return [
        _finish(pipeline, request, shown, heard) for request, shown, heard in zip(requests, frames, sounds, strict=True)
    ]


@dataclass(frozen=True)
class Sampled:
    """Tracks at the end of a run, and `Generated.skipped_share`."""

    tracks: dict[str, Track]
    skipped_share: float = 0.0


def sample(
    pipeline: Pipeline,
    requests: Sequence[GenerateRequest],
    report: Report = lambda step: None,
    clock: Clock | None = None,
) -> Sampled:
    """`generate_batch` without decoding; `clock` is told of the stages."""
    first = check_batch(pipeline, requests)
    clock, levels = clock or Clock(), levels_of(pipeline, first)
    starts: list[Tracks] = [start_tracks(pipeline, r.format, r.given, r.seed, levels[0]) for r in requests]
    if any(not torch.equal(start[VIDEO].times_s, starts[0][VIDEO].times_s) for start in starts):
        raise InputError("clips of a batch share the times of their later keyframes and shots with this model")
    tracks = join_tracks(starts)
    own = tracks[VIDEO].noise
    if pipeline.defaults.keyframes == "beside":
        tracks[VIDEO] = tracks[VIDEO].with_values(tracks[VIDEO].values, settled(own, levels))
    clock.lap("encode")
    cache = None if first.step_cache is None else StepCache(first.step_cache, levels)
    denoise = replace(_guided(pipeline, requests, first, cache), levels=tuple(levels))
    clock.lap("text")
    count = latent_frames(first.format.num_frames, pipeline.video_codec.strides.time)
    call = with_known_noise(denoise, first.image_cond_noise_scale, [request.seed for request in requests])
    call = call if torch.equal(own, tracks[VIDEO].noise) else Waiting(call, own)
    tracks = _run(pipeline, call, tracks, levels, requests, lambda step: report(_visible(step, count)))
    del denoise, call  # with it go keys and values of the texts
    clock.lap("denoise")
    return Sampled(tracks | {VIDEO: _first_frames(tracks[VIDEO], count)}, 0.0 if cache is None else cache.skipped_share)


def _first_frames(track: Track, count: int) -> Track:
    """The clip's own latent frames, without those that stood beside them."""
    if track.values.shape[2] == count:
        return track
    return Track(track.values[:, :, :count], track.noise[:, :, :count], track.times_s[:count])


def _visible(step: Step, count: int) -> Step:
    tracks = {**step.tracks, VIDEO: _first_frames(step.tracks[VIDEO], count)}
    return replace(step, tracks=tracks, x0={**step.x0, VIDEO: step.x0[VIDEO][:, :, :count]})


def _guided(
    pipeline: Pipeline, requests: Sequence[GenerateRequest], first: GenerateRequest, cache: StepCache | None
) -> GuidedDenoiser:
    """The denoiser with prompts, guidance and camera; without the unconditional half where nothing asks for it."""
    guidance = guidance_of(pipeline, first)
    cond, uncond = _texts(pipeline, requests, is_guided(pipeline, first))
    cameras = [request.given.camera for request in requests if request.given.camera is not None]
    return GuidedDenoiser(
        pipeline.denoiser,
        pipeline.path,
        cond,
        uncond,
        guidance,
        level_grid=pipeline.defaults.schedule.grid,
        camera=torch.stack([_latent_camera(pipeline, camera) for camera in cameras]) if cameras else None,
        max_clips=pipeline.max_clips,
        steps=cache,
        busy_values=busy_values(pipeline.device),
    )


def is_guided(pipeline: Pipeline, request: GenerateRequest) -> bool:
    """Whether there is an unconditional half."""
    guidance = guidance_of(pipeline, request)
    return any(guidance.text_scale(track) != 1 for track in pipeline.tracks)


@torch.no_grad()
def _texts(
    pipeline: Pipeline, requests: Sequence[GenerateRequest], guided: bool
) -> tuple[TextContext, TextContext | None]:
    """Prompts, and negative prompts if `guided`, with pictures, as the denoiser reads them and with what it can work
    out of them once for all steps. All are encoded in one call: an encoder may have to be loaded for it."""
    count, denoiser = len(requests), pipeline.denoiser
    prompts = [request.prompt for request in requests]
    prompts += [request.negative_prompt for request in requests] if guided else []
    with pipeline.autocast(), pipeline.at_work("text_encoder", "text"):
        text = pipeline.text_encoder(prompts)
        image = image_tokens(pipeline, [request.given for request in requests])
        parts = [
            TextContext(text.embeddings[start : start + count], text.mask[start : start + count], image)
            for start in range(0, len(prompts), count)
        ]
    if isinstance(denoiser, Prepares):
        with pipeline.autocast(), pipeline.at_work("denoiser", "denoise"):
            parts = [denoiser.prepare(part) for part in parts]
    return parts[0], parts[1] if guided else None


def _latent_camera(pipeline: Pipeline, camera: Tensor) -> Tensor:
    """A path (T, 7) by frame as (N, 7) by latent frame: the first frame, then means over each block of frames."""
    time_stride = pipeline.video_codec.strides.time
    later = camera[1:].unflatten(0, (len(camera) // time_stride, time_stride)).mean(1)
    return torch.cat([camera[:1], later]).to(pipeline.device)


@torch.no_grad()
def _run(
    pipeline: Pipeline,
    denoise: Denoise,
    tracks: dict[str, Track],
    levels: Sequence[float],
    requests: Sequence[GenerateRequest],
    report: Report,
) -> dict[str, Track]:
    sampler = sampler_named(resolve(pipeline, requests[0]).sampler or "")
    draw = [generator(request.seed, "sampler") for request in requests]
    with pipeline.autocast(), pipeline.at_work("denoiser", "denoise"):
        for step in sampler(denoise, tracks, levels, path=pipeline.path, generator=draw):
            if step.index in (0, step.num_steps - 1):  # not at all of them: a GPU has to be waited for
                _check_finite(pipeline, step)
            report(step)
            tracks = step.tracks
    return tracks


def _check_finite(pipeline: Pipeline, step: Step) -> None:
    if not all(is_finite(track.values) for track in step.tracks.values()):
        what = f"{pipeline.name} gives no finite numbers at step {step.index + 1} of {step.num_steps}"
        raise CheckpointError(f"{what}: its weights may be damaged{' or a LoRA is too strong' * bool(pipeline.loras)}")


@torch.no_grad()
def _decode(
    pipeline: Pipeline, tracks: dict[str, Track], first: GenerateRequest
) -> tuple[Tensor, Sequence[Tensor | None]]:
    """Frames (B, T, 3, H, W) uint8 and, for each clip, samples (N,) in [-1, 1] if the model makes sound; on the CPU."""
    with pipeline.autocast(), pipeline.at_work("video_codec", "decode"):
        how = first.decoding(pipeline.decoding)
        frames = decode_frames(pipeline.video_codec, tracks[VIDEO].values.float(), how)
    if pipeline.audio_codec is None:
        return frames, [None] * len(frames)
    with pipeline.autocast(), pipeline.at_work("audio_codec", "decode"):
        sound = pipeline.audio_codec.decode(tracks[AUDIO].values.float()).float()
    return frames, list(fit_samples(sound[:, 0].clamp(-1, 1), first.format.num_samples).cpu())


def _finish(pipeline: Pipeline, request: GenerateRequest, frames: Tensor, sound: Tensor | None) -> Clip:
    """The clip with what was given whole put back as it was."""
    fmt, given = request.format, request.given
    if given.video is not None:
        frames = fit(given.video, fmt.width_px, fmt.height_px)
    if given.audio is not None:
        sound = fit_samples(given.audio, fmt.num_samples)
    return Clip(frames, fmt.fps, sound, fmt.sample_rate_hz)


class Clock:
    """Seconds since the last lap, added up by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last_s = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last_s
        self._last_s = now
