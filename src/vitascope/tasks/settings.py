"""What a clip is made with: a request with the pipeline's defaults filled in, and whether the pipeline can make it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

from vitascope.core.errors import CapabilityError, InputError, ShapeError, choice
from vitascope.core.shapes import latent_frames
from vitascope.diffusion.guidance import Guidance
from vitascope.diffusion.samplers import SAMPLERS
from vitascope.diffusion.sampling_schedule import listed_levels
from vitascope.models.codecs.decoding import check_decoding
from vitascope.tasks.pipeline import PRECISIONS, Pipeline
from vitascope.tasks.request import SETTINGS, GenerateRequest


def check_batch(pipeline: Pipeline, requests: Sequence[GenerateRequest]) -> GenerateRequest:
    """The first of the requests, resolved. Raises InputError unless they can be worked on together."""
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
    check_decoding(pipeline.video_codec, first.decoding(pipeline.decoding))
    if first.image_cond_noise_scale and pipeline.denoiser.capabilities.noise == "clip":
        raise CapabilityError(f"{pipeline.name} takes one noise level a clip: it has no known frames to add noise to")
    return first


def resolve(pipeline: Pipeline, request: GenerateRequest) -> GenerateRequest:
    """The request with the pipeline's defaults filled in. Raises InputError for a sampler that there is not."""
    own, guidance, sampler = pipeline.defaults, guidance_of(pipeline, request), request.sampler
    steps, levels = request.num_inference_steps, None if request.levels is None else listed_levels(request.levels)
    if levels is not None:
        steps = len(levels)
    cache = request.step_cache
    if cache is not None and not cache.coefficients:
        cache = replace(cache, coefficients=own.tea_coefficients)
    return replace(
        request,
        num_inference_steps=(own.schedule.num_steps or own.num_inference_steps) if steps is None else steps,
        guidance_scale=guidance.scale,
        sampler=choice("sampler", own.sampler if sampler is None else sampler, SAMPLERS),
        levels=levels,
        guidance_rescale=guidance.rescale,
        guidance_interval=guidance.interval,
        stg_scale=guidance.perturbed,
        stg_layers=guidance.perturbed_layers,
        stg_by=guidance.perturbation,
        step_cache=cache,
    )


def guidance_of(pipeline: Pipeline, request: GenerateRequest) -> Guidance:
    """The pipeline's guidance with what the request says otherwise. Raises InputError where the two do not go together.

    A scale other than the pipeline's own takes the place of its scales by track.
    """
    own = pipeline.defaults.guidance
    scale = own.scale if request.guidance_scale is None else request.guidance_scale
    asked = {
        "rescale": request.guidance_rescale,
        "interval": request.guidance_interval,
        "perturbed": request.stg_scale,
        "perturbed_layers": request.stg_layers,
        "perturbation": request.stg_by,
    }
    changes = {name: value for name, value in asked.items() if value is not None}
    return replace(own, scale=scale, scales=own.scales if scale == own.scale else {}, **changes)


def recipe_of(pipeline: Pipeline, request: GenerateRequest) -> dict[str, Any]:
    """What a clip was made with, as JSON values: settings as resolved, model, LoRAs if it has any, and the fingerprint
    of its weights."""
    settings = resolve(pipeline, request).settings()
    precision = next(name for name, dtype in PRECISIONS.items() if dtype == pipeline.precision)
    made_with = {"model": pipeline.name, "weights": pipeline.fingerprint, "precision": precision}
    return {**settings, **made_with, **({"loras": list(pipeline.loras)} if pipeline.loras else {})}


def levels_of(pipeline: Pipeline, settings: GenerateRequest) -> list[float]:
    """The levels of a resolved request."""
    assert settings.num_inference_steps is not None
    fmt, strides, schedule = settings.format, pipeline.video_codec.strides, pipeline.defaults.schedule
    if settings.levels is not None:
        schedule = replace(schedule, listed=settings.levels)
    grid = (fmt.height_px // strides.height, fmt.width_px // strides.width)
    return schedule.levels(settings.num_inference_steps, latent_frames(fmt.num_frames, strides.time) * prod(grid))


def _shared(request: GenerateRequest) -> tuple[object, ...]:
    named = tuple(getattr(request, name) for name in SETTINGS if name not in ("prompt", "negative_prompt", "seed"))
    return (request.format, *named, request.given.camera is None)


def _check_camera(pipeline: Pipeline, request: GenerateRequest) -> None:
    camera, num_frames = request.given.camera, request.format.num_frames
    if camera is None:
        return
    if not pipeline.denoiser.capabilities.camera:
        raise CapabilityError(f"{pipeline.name} takes no camera path")
    if camera.shape != (num_frames, 7):
        raise ShapeError(f"the camera path of {num_frames} frames is ({num_frames}, 7), got {tuple(camera.shape)}")
