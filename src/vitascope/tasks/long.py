"""Clips longer than the model's own length, and going on from a clip: windows that carry their last frames over."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vitascope.core.errors import InputError
from vitascope.core.random import derive_seed
from vitascope.core.shapes import ClipFormat, latent_frames
from vitascope.media.frames import fit, fit_samples
from vitascope.media.reading import Clip
from vitascope.tasks.generate import Generated, Report, generate, recipe_of
from vitascope.tasks.pipeline import Pipeline
from vitascope.tasks.request import GenerateRequest, Given


def generate_any_length(
    pipeline: Pipeline, request: GenerateRequest, report: Report = lambda step: None
) -> Generated:
    """`generate` for any number of frames: past the model's own length, in windows that overlap by known frames.

    Raises InputError where a longer clip cannot hold what is given (a video or a camera path).
    """
    native = pipeline.defaults.clip.num_frames
    if request.format.num_frames <= native:
        return generate(pipeline, request, report)
    pipeline.check_format(request.format)
    if request.given.video is not None or request.given.camera is not None:
        raise InputError(f"a given video or camera path works for clips of at most {native} frames")
    late = [k.time_s for k in request.given.keyframes if k.time_s * request.format.fps > native - 1]
    if late:
        raise InputError(f"keyframes must lie in the first {(native - 1) / request.format.fps:.3f} s, got {late[0]} s")
    window = replace(request, format=replace(request.format, num_frames=native))
    made = generate(pipeline, _with_audio(window, request.given.audio, 0), report)
    return _continue(pipeline, request, made, report)


def extend(pipeline: Pipeline, request: GenerateRequest, clip: Clip, report: Report = lambda step: None) -> Generated:
    """`clip` with `request.format.num_frames` - 1 further frames (a multiple of the codec's time stride).

    The clip is brought to the request's size; its frame rate must be the request's. What was there stays as it was.
    """
    fmt = request.format
    if abs(clip.fps - fmt.fps) > 1e-3:
        raise InputError(f"the clip to extend has {clip.fps:g} fps, the request {fmt.fps:g}")
    latent_frames(fmt.num_frames, pipeline.video_codec.strides.time)
    frames = fit(clip.frames, fmt.width_px, fmt.height_px)
    samples = torch.zeros(0) if clip.samples is None else clip.samples
    start = Clip(frames, fmt.fps, fit_samples(samples, _num_samples(fmt, len(frames))), fmt.sample_rate_hz)
    total = replace(request, format=replace(fmt, num_frames=len(frames) + fmt.num_frames - 1))
    return _continue(pipeline, total, Generated(start, {}), report)


def _continue(pipeline: Pipeline, request: GenerateRequest, made: Generated, report: Report) -> Generated:
    """Go on from `made` until the request's number of frames is there."""
    fmt, stride = request.format, pipeline.video_codec.strides.time
    native = pipeline.defaults.clip.num_frames
    frames, samples, seconds = made.clip.frames, made.clip.samples, dict(made.seconds)
    assert samples is not None
    while len(frames) < fmt.num_frames:
        overlap = min(pipeline.defaults.overlap_frames, 1 + (len(frames) - 1) // stride * stride)
        new = min(native - overlap, fmt.num_frames - len(frames))
        first = len(frames) - overlap
        start = _num_samples(fmt, first)
        part = replace(
            request,
            format=replace(fmt, num_frames=overlap + new),
            seed=derive_seed(request.seed, "window", first),
            given=Given(past=frames[first:], past_audio=samples[start:]),
        )
        next_part = generate(pipeline, _with_audio(part, request.given.audio, start), report)
        assert next_part.clip.samples is not None
        frames = torch.cat([frames, next_part.clip.frames[overlap:]])
        joined = _join_sound(samples, next_part.clip.samples, start)
        samples = fit_samples(joined, _num_samples(fmt, len(frames)))
        for name, spent in next_part.seconds.items():
            seconds[name] = seconds.get(name, 0.0) + spent
    clip = Clip(frames[: fmt.num_frames], fmt.fps, fit_samples(samples, fmt.num_samples), fmt.sample_rate_hz)
    return Generated(clip, recipe_of(pipeline, request), seconds)


def _join_sound(before: Tensor, after: Tensor, start: int, fade: int = 320) -> Tensor:
    """`after`, which begins at sample `start` of `before`, takes over where `before` ends, over `fade` samples."""
    length = len(before)
    fade = min(fade, length - start)
    ramp = torch.linspace(0, 1, fade)
    tail = before[length - fade :] * (1 - ramp) + after[length - fade - start : length - start] * ramp
    return torch.cat([before[: length - fade], tail, after[length - start :]])


def _num_samples(fmt: ClipFormat, num_frames: int) -> int:
    return replace(fmt, num_frames=num_frames).num_samples if num_frames else 0


def _with_audio(request: GenerateRequest, audio: Tensor | None, start: int) -> GenerateRequest:
    """The request with its part of the given audio, from sample `start` on."""
    if audio is None:
        return request
    stop = start + request.format.num_samples
    return replace(request, given=replace(request.given, audio=fit_samples(audio[start:stop], stop - start)))
