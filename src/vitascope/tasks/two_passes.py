"""A clip in two passes: made small, its latents enlarged by a model, and made anew from there at few levels.

B clips, C channels, N latent frames, h and w latent rows and columns. Source: LTX-Video 0.9.7 and later (multi-scale
rendering), as diffusers' LTXLatentUpsamplePipeline and LTXConditionPipeline have it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from vitascope.core.errors import CapabilityError, CheckpointError, InputError, ShapeError
from vitascope.core.protocols import Normalises
from vitascope.core.random import derive_seed
from vitascope.core.shapes import ClipFormat
from vitascope.core.tracks import VIDEO
from vitascope.diffusion.sampling_schedule import LISTS, listed_levels
from vitascope.media.frames import fit
from vitascope.models.ltx_upsampler.model import LTXUpsampler
from vitascope.models.published import open_published
from vitascope.tasks.discover import UPSAMPLER
from vitascope.tasks.generate import Clock, Generated, Report, decode_clips, is_guided, sample
from vitascope.tasks.pipeline import Pipeline, Residence
from vitascope.tasks.request import GenerateRequest
from vitascope.tasks.settings import recipe_of, resolve

GROWTH = 2
"""Rows and columns of latents after the up-sampler for one before it."""


@dataclass(frozen=True)
class TwoPasses:
    """How the second pass follows the first.

    share: of the clip's width and height that the first pass has, rounded down to whole tokens; twice that is the size
    of the second, from which the clip is brought to its own. levels: of the second pass. adain: share in [0, 1] to
    which the mean and spread of each channel are set back to those of the first pass. tone_map: how far, in [0, 1],
    large values are pressed together.
    """

    share: float = 2 / 3
    levels: tuple[float, ...] = LISTS["ltx-distilled-second"]
    adain: float = 1.0
    tone_map: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InputError(f"the first pass has a share in (0, 1] of the size, got {self.share}")
        if listed_levels(self.levels)[0] >= 1:
            raise InputError(f"the second pass begins at a level below 1, got {self.levels[0]}")
        for name in ("adain", "tone_map"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} of two passes lies in [0, 1], got {getattr(self, name)}")


def load_upsampler(
    folder: str | Path, device: torch.device | str = "cpu", variant: str = "", memory: Residence | None = None
) -> LTXUpsampler:
    """The up-sampler in its folder, or in a pipeline's folder with `latent_upsampler`. memory: of a pipeline under a
    limit; the weights then come when they are needed, there alone. Raises CheckpointError."""
    folder = Path(folder)
    inside = folder / UPSAMPLER
    place = inside if inside.is_dir() else folder
    part = open_published(place, ["LTXLatentUpsamplerModel"], variant=variant)
    if memory is None:
        return cast(LTXUpsampler, part.load(device=device))
    model, store = part.bare()
    memory.add(UPSAMPLER, model, store)
    return cast(LTXUpsampler, model)


def generate_in_two_passes(
    pipeline: Pipeline,
    upsampler: LTXUpsampler,
    request: GenerateRequest,
    passes: TwoPasses = TwoPasses(),
    report: Report = lambda step: None,
) -> Generated:
    """One clip. The request's levels or steps are those of the first pass; all else holds for both.

    What is given is brought to the size of each pass. Under a limit of memory both passes go as planned for the second,
    the larger in everything. Raises InputError (ShapeError, CapabilityError) before the first step.
    """
    first, second = plan_sizes(pipeline, request.format, passes.share)
    check_upsampler(pipeline, upsampler)
    given, clock = request.given, Clock()
    if given.draft is not None or given.video is not None:
        raise InputError("two passes make the video: give neither a draft nor a video")
    small = replace(request, format=first)
    large = replace(
        request,
        format=second,
        levels=passes.levels,
        num_inference_steps=None,
        seed=derive_seed(request.seed, "second pass"),
    )
    pipeline = _fitted(pipeline, upsampler, first, large)
    num_steps = (resolve(pipeline, small).num_inference_steps or 0, len(listed_levels(passes.levels)))
    made = sample(pipeline, [small], _counted(report, 0, sum(num_steps)), clock)
    draft = enlarge(pipeline, upsampler, made.tracks[VIDEO].values, passes)
    clock.lap("enlarge")
    large = replace(large, given=replace(given, draft=draft[0]))
    again = sample(pipeline, [large], _counted(report, num_steps[0], sum(num_steps)), clock)
    (clip,) = decode_clips(pipeline, [large], again.tracks)
    frames = fit(clip.frames, request.format.width_px, request.format.height_px)
    clock.lap("decode")
    recipe = {**recipe_of(pipeline, request), "two_passes": {**asdict(passes), "levels": list(passes.levels)}}
    use = None if pipeline.memory is None else pipeline.memory.use
    shares = (made.skipped_share, again.skipped_share)
    skipped = sum(share * num for share, num in zip(shares, num_steps, strict=True)) / sum(num_steps)
    return Generated(replace(clip, frames=frames), recipe, clock.seconds, skipped, use)


def _fitted(pipeline: Pipeline, upsampler: LTXUpsampler, first: ClipFormat, large: GenerateRequest) -> Pipeline:
    """The pipeline as it keeps its limit of memory, if there is one, in both passes."""
    if pipeline.memory is None:
        return pipeline
    if next(upsampler.parameters()).device.type != "meta":
        raise InputError("under a limit of memory, the up-sampler comes by load_upsampler(..., memory=pipeline.memory)")
    strides = pipeline.video_codec.strides
    rows = (first.height_px // strides.height, first.width_px // strides.width)
    return pipeline.memory.fit(pipeline, [large], is_guided(pipeline, large), rows)


def plan_sizes(pipeline: Pipeline, fmt: ClipFormat, share: float) -> tuple[ClipFormat, ClipFormat]:
    """The formats of both passes. Raises ShapeError for a clip that is too small to have a first pass."""
    strides = pipeline.video_codec.strides
    sides = []
    for name, size, step in (
        ("width", fmt.width_px, strides.width * pipeline.patch[1]),
        ("height", fmt.height_px, strides.height * pipeline.patch[0]),
    ):
        side = int(size * share + 1e-6) // step * step
        if not side:
            raise ShapeError(f"{name} {size} px is too small for two passes; at least {int(step / share) + 1} px")
        sides.append(side)
    small = replace(fmt, width_px=sides[0], height_px=sides[1])
    return small, replace(fmt, width_px=GROWTH * sides[0], height_px=GROWTH * sides[1])


def check_upsampler(pipeline: Pipeline, upsampler: LTXUpsampler) -> None:
    """Raise CapabilityError or CheckpointError unless the up-sampler enlarges the pipeline's latents in space alone."""
    codec, config = pipeline.video_codec, upsampler.config
    if pipeline.audio_codec is not None:
        raise CapabilityError(f"{pipeline.name} makes sound; two passes are for pictures alone")
    if not isinstance(codec, Normalises):
        raise CapabilityError(
            f"{pipeline.name} cannot be made in two passes: its codec has no latents that an up-sampler knows"
        )
    if config.channels != codec.latent_channels:
        raise CheckpointError(
            f"the up-sampler has {config.channels} latent channels, {pipeline.name} {codec.latent_channels}"
        )
    if config.time or not config.space:
        raise CheckpointError("two passes need an up-sampler of rows and columns; this one enlarges time")


@torch.no_grad()
def enlarge(pipeline: Pipeline, upsampler: LTXUpsampler, latents: Tensor, passes: TwoPasses) -> Tensor:
    """Latents (1, C, N, h, w) of the first pass to (1, C, N, 2h, 2w), both normalised, fp32."""
    codec = pipeline.video_codec
    assert isinstance(codec, Normalises)
    with pipeline.at_work("video_codec", "enlarge"):
        raw = codec.denormalise(latents.float())
    with pipeline.at_work(UPSAMPLER, "enlarge"):
        grown = upsampler(raw.to(upsampler.enter.weight.dtype)).float()
    with pipeline.at_work("video_codec", "enlarge"):
        return codec.normalise(tone_map(match_statistics(grown, raw, passes.adain), passes.tone_map))


def match_statistics(latents: Tensor, reference: Tensor, share: float) -> Tensor:
    """`share` of the way from latents (B, C, ...) to latents with the mean and spread of `reference`, channel by
    channel.  Source: Huang and Belongie 2017 (AdaIN), eq. 8."""
    axes = tuple(range(2, latents.ndim))
    spread, mean = torch.std_mean(latents, axes, keepdim=True)
    wanted_spread, wanted_mean = torch.std_mean(reference, axes, keepdim=True)
    return latents.lerp((latents - mean) / spread * wanted_spread + wanted_mean, share)


def tone_map(latents: Tensor, share: float) -> Tensor:
    """Press values of large magnitude together; `share` 0 changes nothing. Source: LTX-Video 0.9.8, as in diffusers."""
    strength = 0.75 * share
    return latents * (1 - 0.8 * strength * torch.sigmoid(4 * strength * (latents.abs() - 1)))


def _counted(report: Report, before: int, total: int) -> Report:
    """`report` with steps counted over both passes."""
    return lambda step: report(replace(step, index=step.index + before, num_steps=total))
