"""What of some requests says how much memory their clips take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vitascope.caches.steps import Kind
from vitascope.core.protocols import KeepsTexts
from vitascope.core.shapes import ClipFormat
from vitascope.diffusion.guidance import Perturbation
from vitascope.tasks.known import num_beside
from vitascope.tasks.pipeline import Pipeline
from vitascope.tasks.request import GenerateRequest


@dataclass(frozen=True)
class Clips:
    """What is made: clips of one format, and what of it follows from the request.

    guided: with an unconditional half. read: prompts that the text encoder has to read; None for all.
    longest: bytes of the longest prompt; None for the most there may be.
    encoded_frames: frames that the codec reads at a time, 0 for none. beside: latent frames that stand beside those of
    the clip. step_cache: the kind of one, if there is one. perturbed: how layers are disabled for a branch of guidance,
    if there is such a branch. enlarged_from: rows and columns of the latents that an up-sampler makes it of, if one
    does.
    """

    format: ClipFormat
    count: int = 1
    guided: bool = True
    read: int | None = None
    longest: int | None = None
    camera: bool = False
    encoded_frames: int = 0
    beside: int = 0
    step_cache: Kind | None = None
    perturbed: Perturbation | None = None
    enlarged_from: tuple[int, int] | None = None


def clips_of(pipeline: Pipeline, requests: Sequence[GenerateRequest], guided: bool) -> Clips:
    """What of some requests says how much memory they take."""
    first, own = requests[0], pipeline.defaults.guidance
    stride, frames = pipeline.video_codec.strides.time, 0
    perturbed = own.perturbed if first.stg_scale is None else first.stg_scale
    read, prompts = None, [request.prompt for request in requests]
    prompts += [request.negative_prompt for request in requests] if guided else []
    if isinstance(pipeline.text_encoder, KeepsTexts):
        read = len(pipeline.text_encoder.missing(prompts))
    for given in (request.given for request in requests):
        if given.video is not None or pipeline.denoiser.capabilities.condition_channels:
            frames = first.format.num_frames
            continue
        if given.past is not None:
            frames = max(frames, len(given.past))
        if given.keyframes:
            # a latent frame after the first holds several: a picture in its place stands still for them
            inside = pipeline.defaults.keyframes != "beside"
            later = inside and any(round(shown.time_s * first.format.fps) for shown in given.keyframes)
            frames = max(frames, 1 + stride * later)
        frames = max(frames, *(len(shot.frames) for shot in given.shots), 0)
    return Clips(
        first.format,
        len(requests),
        guided,
        read,
        longest_of(prompts),
        first.given.camera is not None,
        frames,
        max(num_beside(pipeline, first.format, request.given) for request in requests),
        None if first.step_cache is None else first.step_cache.kind,
        (first.stg_by or own.perturbation) if perturbed else None,
    )


def longest_of(prompts: Sequence[str]) -> int:
    """Bytes of the longest of some prompts."""
    return max(len(prompt.encode("utf-8", "replace")) for prompt in prompts)
