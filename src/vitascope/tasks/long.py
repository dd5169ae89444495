"""Clips longer than the model's own length, and going on from a clip: windows that carry their last frames over."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vitascope.core.errors import CapabilityError, InputError
from vitascope.core.random import derive_seed
from vitascope.core.shapes import ClipFormat, latent_frames
from vitascope.media.frames import fit, fit_samples
from vitascope.media.reading import Clip
from vitascope.tasks.generate import Generated, Report, generate
from vitascope.tasks.known import check_sound
from vitascope.tasks.memory import MemoryUse
from vitascope.tasks.pipeline import Pipeline
from vitascope.tasks.request import GenerateRequest, Given
from vitascope.tasks.settings import recipe_of

MAX_FRAMES = 1_000_000
FADE_SAMPLES = 320
"""Length of the passage from one window's sound to the next one's: 20 ms at 16 kHz."""


@dataclass(frozen=True)
class Window:
    """Frames [first, first + num_frames) of a clip; the first `overlap` of them are there before it is made."""

    first: int
    overlap: int
    num_frames: int


def generate_any_length(pipeline: Pipeline, request: GenerateRequest, report: Report = lambda step: None) -> Generated:
    """`generate` for any number of frames: past the model's own length, in windows that overlap by known frames.

    Steps are reported over all windows. Raises InputError for a camera path that is longer than the model's own length.
    """
    native = pipeline.defaults.clip.num_frames
    if request.format.num_frames <= native:
        return generate(pipeline, request, report)
    pipeline.check_format(request.format)
    if request.given.past is not None or request.given.past_audio is not None:
        raise InputError(f"a past works for clips of at most {native} frames; `extend` goes on from a clip")
    if request.given.shots or request.given.draft is not None:
        raise InputError(f"shots and drafts work for clips of at most {native} frames, got {request.format.num_frames}")
    if request.given.camera is not None:
        raise InputError(f"a camera path works for clips of at most {native} frames, got {request.format.num_frames}")
    video = request.given.video
    if video is not None and len(video) != request.format.num_frames:
        raise InputError(f"the given video has {len(video)} frames, the clip {request.format.num_frames}")
    return _make(pipeline, request, None, report)


def extend(pipeline: Pipeline, request: GenerateRequest, clip: Clip, report: Report = lambda step: None) -> Generated:
    """`clip` with `request.format.num_frames` - 1 further frames (a multiple of the codec's time stride).

    The request describes what follows: its keyframes count their seconds from the clip's last frame, its audio begins
    where the clip ends. The clip is brought to the request's size; its frame rate must be the request's. What was there
    stays as it was, but for the last FADE_SAMPLES of its sound, which pass over into the new. Raises InputError for
    another frame rate and for a given video, camera path or past.
    """
    fmt, given = request.format, request.given
    if abs(clip.fps - fmt.fps) > 1e-3:
        raise InputError(f"the clip to extend has {clip.fps:g} fps, the request {fmt.fps:g}")
    if given.video is not None or given.camera is not None or given.past is not None or given.past_audio is not None:
        raise InputError("a clip to extend goes with keyframes and audio, not with a given video, camera path or past")
    if given.shots or given.draft is not None:
        raise InputError("a clip to extend goes with keyframes and audio, not with shots or a draft")
    if latent_frames(fmt.num_frames, pipeline.video_codec.strides.time) < 2:
        raise InputError(f"{fmt.num_frames} frames add nothing: the first stands for the last of the clip to extend")
    check_sound(pipeline, given)
    frames = fit(clip.frames, fmt.width_px, fmt.height_px)
    samples = torch.zeros(0) if clip.samples is None else clip.samples
    silent = pipeline.audio_codec is None and clip.samples is None
    heard = None if silent else fit_samples(samples, _num_samples(fmt, len(frames)))
    start = Clip(frames, fmt.fps, heard, fmt.sample_rate_hz)
    before_s = (len(frames) - 1) / fmt.fps
    keyframes = tuple(replace(k, time_s=k.time_s + before_s) for k in given.keyframes)
    audio = None if given.audio is None or start.samples is None else torch.cat([start.samples, given.audio])
    total = replace(
        request,
        format=replace(fmt, num_frames=len(frames) + fmt.num_frames - 1),
        given=Given(keyframes=keyframes, audio=audio),
    )
    return _make(pipeline, total, start, report)


def plan_windows(num_frames: int, have: int, native: int, overlap: int, stride: int) -> list[Window]:
    """The windows of at most `native` frames that make `num_frames` frames out of the `have` that are there.

    All but a first window that starts from nothing begin with up to `overlap` known frames, 1 + k * stride of them.
    """
    windows = []
    if not have:
        have = min(native, num_frames)
        windows.append(Window(0, 0, have))
    while have < num_frames:
        known = 1 + (min(overlap, have) - 1) // stride * stride
        new = min(native - known, num_frames - have)
        windows.append(Window(have - known, known, known + new))
        have += new
    return windows


def _make(pipeline: Pipeline, request: GenerateRequest, start: Clip | None, report: Report) -> Generated:
    """All windows of a request, after `start` if there is one."""
    fmt, given, own = request.format, request.given, pipeline.defaults
    pipeline.check_format(replace(fmt, num_frames=own.clip.num_frames))
    if fmt.num_frames > MAX_FRAMES:
        raise InputError(f"a clip has at most {MAX_FRAMES} frames, got {fmt.num_frames}")
    can = pipeline.denoiser.capabilities
    if can.noise == "clip" and not can.condition_channels:
        most = own.clip.num_frames
        raise CapabilityError(
            f"{pipeline.name} takes one noise level a clip: it makes at most {most} frames ({most / fmt.fps:.3f} s at "
            f"{fmt.fps:g} fps) and goes on from none"
        )
    frames = torch.zeros(0, 3, fmt.height_px, fmt.width_px, dtype=torch.uint8) if start is None else start.frames
    before = None if start is None else start.samples
    samples = torch.zeros(0) if before is None else before
    stride = pipeline.video_codec.strides.time
    windows = plan_windows(fmt.num_frames, len(frames), own.clip.num_frames, own.overlap_frames, stride)
    _check_keyframes(request, len(frames))
    seconds: dict[str, float] = {}
    skipped = 0.0
    use: MemoryUse | None = None
    for number, window in enumerate(windows):
        part = _part(request, window, frames, None if pipeline.audio_codec is None else samples)
        made = generate(pipeline, part, _counted(report, number, len(windows)))
        frames = torch.cat([frames, made.clip.frames[window.overlap :]])
        if made.clip.samples is not None:
            samples = _join_sound(samples, made.clip.samples, _num_samples(fmt, window.first))
        samples = fit_samples(samples, _num_samples(fmt, len(frames)))
        skipped += made.skipped_share / len(windows)
        use = _highest(use, made.memory)
        for name, spent in made.seconds.items():
            seconds[name] = seconds.get(name, 0.0) + spent
    if given.audio is not None:
        samples = fit_samples(given.audio, fmt.num_samples)
    silent = pipeline.audio_codec is None and before is None
    clip = Clip(frames, fmt.fps, None if silent else samples, fmt.sample_rate_hz)
    return Generated(clip, recipe_of(pipeline, request), seconds, skipped, use)


def _part(request: GenerateRequest, window: Window, frames: Tensor, samples: Tensor | None) -> GenerateRequest:
    """The request of one window: its part of what is given, after the frames and samples (if any) that are there."""
    fmt, given = replace(request.format, num_frames=window.num_frames), request.given
    begin, new, end = window.first, window.first + window.overlap, window.first + window.num_frames
    start = _num_samples(request.format, begin)
    keyframes = tuple(
        # of its frame, so that a time between two frames is rounded once
        replace(keyframe, time_s=(round(keyframe.time_s * fmt.fps) - begin) / fmt.fps)
        for keyframe in given.keyframes
        if new <= round(keyframe.time_s * fmt.fps) < end
    )
    return replace(
        request,
        format=fmt,
        seed=request.seed if begin == 0 else derive_seed(request.seed, "window", begin),
        given=Given(
            keyframes=keyframes,
            audio=None if given.audio is None else fit_samples(given.audio[start:], fmt.num_samples),
            video=None if given.video is None else given.video[begin:end],
            past=frames[begin:] if window.overlap and given.video is None else None,
            past_audio=samples[start:] if samples is not None and window.overlap and given.audio is None else None,
        ),
    )


def _check_keyframes(request: GenerateRequest, have: int) -> None:
    """Every keyframe must fall on a frame that is yet to be made."""
    fmt = request.format
    before_s = max(0, have - 1) / fmt.fps
    for keyframe in request.given.keyframes:
        frame = round(keyframe.time_s * fmt.fps)
        if not have <= frame < fmt.num_frames:
            last_s = (fmt.num_frames - 1) / fmt.fps - before_s
            first_s = have / fmt.fps - before_s
            time_s = keyframe.time_s - before_s
            raise InputError(
                f"a keyframe at {time_s:g} s: keyframes lie between {first_s:.3f} s and {last_s:.3f} s here"
            )


def _highest(before: MemoryUse | None, after: MemoryUse | None) -> MemoryUse | None:
    """The later plan, with the highest peak of each stage."""
    if before is None or after is None:
        return after
    stages = dict.fromkeys([*before.measured, *after.measured])
    return replace(after, measured={name: max(use.measured.get(name, 0) for use in (before, after)) for name in stages})


def _counted(report: Report, done: int, total: int) -> Report:
    """`report` with steps counted over all windows."""
    return lambda step: report(
        replace(step, index=step.index + done * step.num_steps, num_steps=step.num_steps * total)
    )


def _join_sound(before: Tensor, after: Tensor, start: int, fade: int = FADE_SAMPLES) -> Tensor:
    """`after`, which begins at sample `start` of `before`, takes over where `before` ends, over `fade` samples."""
    length = len(before)
    fade = max(0, min(fade, length - start))
    ramp = torch.linspace(0, 1, fade)
    tail = before[length - fade :] * (1 - ramp) + after[length - fade - start : length - start] * ramp
    return torch.cat([before[: length - fade], tail, after[length - start :]])


def _num_samples(fmt: ClipFormat, num_frames: int) -> int:
    return replace(fmt, num_frames=num_frames).num_samples if num_frames else 0
