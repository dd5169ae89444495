"""A request to a clip: known cells in, one sampling loop, both codecs out.

B clips, T frames, N latent frames. The loop is the same for every task; `known.py` says what each task knows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from vitascope.core.errors import CapabilityError, InputError, ShapeError, choice
from vitascope.core.protocols import Prepares
from vitascope.core.random import generator
from vitascope.core.shapes import ClipFormat
from vitascope.core.tracks import AUDIO, VIDEO, TextContext, Track
from vitascope.diffusion.guidance import Guidance, GuidedDenoiser, join_tracks
from vitascope.diffusion.samplers import SAMPLERS, sampler_named
from vitascope.diffusion.samplers.step import Step
from vitascope.media.frames import fit, fit_samples
from vitascope.media.reading import Clip
from vitascope.models.codecs.decoding import decode_frames
from vitascope.tasks.condition import image_tokens
from vitascope.tasks.known import start_tracks
from vitascope.tasks.memory import MemoryUse
from vitascope.tasks.pipeline import PRECISIONS, Pipeline
from vitascope.tasks.request import GenerateRequest

Report = Callable[[Step], None]
"""Called after every step, with the cells so far; raising from it cancels the run."""


@dataclass(frozen=True)
class Generated:
    """A clip, what it was made with (JSON values), and the seconds that each stage took (over its batch).

    memory: where there was a limit, what was planned for it and what was measured.
    """

    clip: Clip
    recipe: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)
    memory: MemoryUse | None = None


def generate(pipeline: Pipeline, request: GenerateRequest, report: Report = lambda step: None) -> Generated:
    """Make one clip. Raises InputError (ShapeError, PromptError, CapabilityError) before the first step."""
    return generate_batch(pipeline, [request], report)[0]


def generate_batch(
    pipeline: Pipeline, requests: Sequence[GenerateRequest], report: Report = lambda step: None
) -> list[Generated]:
    """Make several clips of one format together. Prompts, seeds and what is given may differ; the settings may not."""
    if not requests:
        raise InputError("a batch needs at least one request")
    first = resolve(pipeline, requests[0])
    for request in requests[1:]:
        if _shared(resolve(pipeline, request)) != _shared(first):
            raise InputError("clips of a batch share format, steps, guidance, sampler and whether a camera is given")
    pipeline.check_format(first.format)
    pipeline.check_tracks()
    for request in requests:
        _check_camera(pipeline, request)
    if pipeline.memory is not None:
        pipeline = pipeline.memory.fit(pipeline, requests, _is_guided(pipeline, _guidance(pipeline, first)))
    clock = _Clock()
    tracks = join_tracks([start_tracks(pipeline, r.format, r.given, r.seed) for r in requests])
    clock.lap("encode")
    denoise = _guided(pipeline, requests, first)
    clock.lap("text")
    tracks = _sample(pipeline, denoise, tracks, [request.seed for request in requests], first, report)
    del denoise  # with it go keys and values of the texts
    clock.lap("denoise")
    frames, sounds = _decode(pipeline, tracks, first.format)
    clock.lap("decode")
    use = None if pipeline.memory is None else pipeline.memory.use
    return [
        Generated(_finish(pipeline, request, shown, heard), recipe_of(pipeline, request), clock.seconds, use)
        for request, shown, heard in zip(requests, frames, sounds, strict=True)
    ]


def resolve(pipeline: Pipeline, request: GenerateRequest) -> GenerateRequest:
    """The request with the pipeline's defaults filled in. Raises InputError for a sampler that there is not."""
    own = pipeline.defaults
    steps, scale, sampler = request.num_inference_steps, request.guidance_scale, request.sampler
    return replace(
        request,
        num_inference_steps=(own.schedule.num_steps or own.num_inference_steps) if steps is None else steps,
        guidance_scale=own.guidance.scale if scale is None else scale,
        sampler=choice("sampler", own.sampler if sampler is None else sampler, SAMPLERS),
    )


def recipe_of(pipeline: Pipeline, request: GenerateRequest) -> dict[str, Any]:
    """What a clip was made with, as JSON values: settings as resolved, model, LoRAs if it has any, and the fingerprint
    of its weights."""
    settings = resolve(pipeline, request).settings()
    precision = next(name for name, dtype in PRECISIONS.items() if dtype == pipeline.precision)
    made_with = {"model": pipeline.name, "weights": pipeline.fingerprint, "precision": precision}
    return {**settings, **made_with, **({"loras": list(pipeline.loras)} if pipeline.loras else {})}


def _shared(request: GenerateRequest) -> tuple[object, ...]:
    settings = (request.format, request.num_inference_steps, request.guidance_scale, request.sampler)
    return (*settings, request.given.camera is None)


def _guided(pipeline: Pipeline, requests: Sequence[GenerateRequest], first: GenerateRequest) -> GuidedDenoiser:
    """The denoiser with prompts, guidance and camera; without the unconditional half where nothing asks for it."""
    guidance = _guidance(pipeline, first)
    cond, uncond = _texts(pipeline, requests, _is_guided(pipeline, guidance))
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
    )


def _guidance(pipeline: Pipeline, first: GenerateRequest) -> Guidance:
    assert first.guidance_scale is not None
    guidance = pipeline.defaults.guidance
    return (
        guidance if first.guidance_scale == guidance.scale else replace(guidance, scale=first.guidance_scale, scales={})
    )


def _is_guided(pipeline: Pipeline, guidance: Guidance) -> bool:
    """Whether there is an unconditional half."""
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
    with _precision(pipeline), pipeline.at_work("text_encoder", "text"):
        text = pipeline.text_encoder(prompts)
        image = image_tokens(pipeline, [request.given for request in requests])
        parts = [
            TextContext(text.embeddings[start : start + count], text.mask[start : start + count], image)
            for start in range(0, len(prompts), count)
        ]
    if isinstance(denoiser, Prepares):
        with _precision(pipeline), pipeline.at_work("denoiser", "denoise"):
            parts = [denoiser.prepare(part) for part in parts]
    return parts[0], parts[1] if guided else None


def _check_camera(pipeline: Pipeline, request: GenerateRequest) -> None:
    camera, num_frames = request.given.camera, request.format.num_frames
    if camera is None:
        return
    if not pipeline.denoiser.capabilities.camera:
        raise CapabilityError(f"{pipeline.name} takes no camera path")
    if camera.shape != (num_frames, 7):
        raise ShapeError(f"the camera path of {num_frames} frames is ({num_frames}, 7), got {tuple(camera.shape)}")


def _latent_camera(pipeline: Pipeline, camera: Tensor) -> Tensor:
    """A path (T, 7) by frame as (N, 7) by latent frame: the first frame, then means over each block of frames."""
    time_stride = pipeline.video_codec.strides.time
    later = camera[1:].unflatten(0, (len(camera) // time_stride, time_stride)).mean(1)
    return torch.cat([camera[:1], later]).to(pipeline.device)


@torch.no_grad()
def _sample(
    pipeline: Pipeline,
    denoise: GuidedDenoiser,
    tracks: dict[str, Track],
    seeds: Sequence[int],
    settings: GenerateRequest,
    report: Report,
) -> dict[str, Track]:
    assert settings.num_inference_steps is not None
    assert settings.sampler is not None
    num_cells = prod(tracks[VIDEO].values.shape[2:])
    levels = pipeline.defaults.schedule.levels(settings.num_inference_steps, num_cells)
    sampler = sampler_named(settings.sampler)
    draw = [generator(seed, "sampler") for seed in seeds]
    with _precision(pipeline), pipeline.at_work("denoiser", "denoise"):
        for step in sampler(denoise, tracks, levels, path=pipeline.path, generator=draw):
            report(step)
            tracks = step.tracks
    return tracks


@torch.no_grad()
def _decode(pipeline: Pipeline, tracks: dict[str, Track], fmt: ClipFormat) -> tuple[Tensor, Sequence[Tensor | None]]:
    """Frames (B, T, 3, H, W) uint8 and, for each clip, samples (N,) in [-1, 1] if the model makes sound; on the CPU."""
    with _precision(pipeline), pipeline.at_work("video_codec", "decode"):
        frames = decode_frames(pipeline.video_codec, tracks[VIDEO].values.float(), pipeline.decoding)
    if pipeline.audio_codec is None:
        return frames, [None] * len(frames)
    with _precision(pipeline), pipeline.at_work("audio_codec", "decode"):
        sound = pipeline.audio_codec.decode(tracks[AUDIO].values.float()).float()
    return frames, list(fit_samples(sound[:, 0].clamp(-1, 1), fmt.num_samples).cpu())


def _finish(pipeline: Pipeline, request: GenerateRequest, frames: Tensor, sound: Tensor | None) -> Clip:
    """The clip with what was given whole put back as it was."""
    fmt, given = request.format, request.given
    if given.video is not None:
        frames = fit(given.video, fmt.width_px, fmt.height_px)
    if given.audio is not None:
        sound = fit_samples(given.audio, fmt.num_samples)
    return Clip(frames, fmt.fps, sound, fmt.sample_rate_hz)


def _precision(pipeline: Pipeline) -> torch.autocast:
    reduced = pipeline.precision != torch.float32
    return torch.autocast(pipeline.device.type, pipeline.precision if reduced else torch.bfloat16, enabled=reduced)


class _Clock:
    """Seconds since the last lap, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last_s = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self._last_s
        self._last_s = now
