"""What some models read beside the noisy latents: known frames with a mask, and tokens of pictures.

B clips, T frames, N latent frames, C latent channels, I image tokens, W their width. Source: Wan team 2025 (arXiv
2503.20314), image-to-video: channels of a mask (one for each frame of a latent) and of the latents of a clip that is
gray where nothing is known.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vitascope.core.errors import CapabilityError, InputError, ShapeError
from vitascope.core.shapes import ClipFormat
from vitascope.media.frames import fit
from vitascope.tasks.pipeline import Pipeline
from vitascope.tasks.request import Given


@torch.no_grad()
def known_frames(pipeline: Pipeline, fmt: ClipFormat, given: Given) -> Tensor:
    """The condition (1, stride + C, N, h, w) of a clip, on the CPU: mask, then latents.

    Known are the keyframes, which must have strength 1, and the past. Raises InputError for a keyframe that is weaker
    or lies outside the clip, for a past that leaves nothing to make, and where nothing is known at all.
    """
    if given.shots:
        raise CapabilityError(f"{pipeline.name} takes pictures and a past, no shots")
    frames = torch.zeros(fmt.num_frames, 3, fmt.height_px, fmt.width_px)
    known = torch.zeros(fmt.num_frames, dtype=torch.bool)
    if given.past is not None:
        if len(given.past) >= fmt.num_frames:
            raise ShapeError(
                f"{len(given.past)} frames are given and {fmt.num_frames} asked for: nothing is left to make"
            )
        frames[: len(given.past)] = _pixels(fit(given.past, fmt.width_px, fmt.height_px))
        known[: len(given.past)] = True
    for keyframe in given.keyframes:
        frame = round(keyframe.time_s * fmt.fps)
        if frame >= fmt.num_frames:
            last_s = (fmt.num_frames - 1) / fmt.fps
            raise InputError(f"a keyframe at {keyframe.time_s} s lies after the last frame, at {last_s:.3f} s")
        if keyframe.strength != 1.0:
            raise CapabilityError(f"{pipeline.name} takes keyframes at strength 1 only, got {keyframe.strength}")
        if known[frame]:
            raise InputError(f"a keyframe at {keyframe.time_s} s falls on a frame that is there already")
        frames[frame] = _pixels(fit(keyframe.picture, fmt.width_px, fmt.height_px))
        known[frame] = True
    if not known.any():
        raise InputError(f"{pipeline.name} starts from a picture: give an image or a keyframe")
    with pipeline.at_work("video_codec", "encode"):
        latents = pipeline.video_codec.encode(frames.movedim(0, 1)[None].to(pipeline.device)).cpu()
    mask = frame_mask(known, pipeline.video_codec.strides.time)
    return torch.cat([mask[None, :, :, None, None].expand(-1, -1, -1, *latents.shape[3:]).to(latents), latents], 1)


def frame_mask(known: Tensor, stride: int) -> Tensor:
    """Known frames (T,) by latent frame, (stride, N): the first latent frame has one frame, which fills its column."""
    return torch.cat([known[:1].repeat(stride), known[1:]]).unflatten(0, (-1, stride)).T


def image_tokens(pipeline: Pipeline, givens: Sequence[Given]) -> Tensor | None:
    """Tokens (B, I, W) of the first keyframe of each clip, and of the last where the model reads two pictures; None for
    a model that reads none. Raises InputError for a clip without them."""
    if pipeline.image_encoder is None:
        return None
    rows = []
    for given in givens:
        shown = sorted(given.keyframes, key=lambda keyframe: keyframe.time_s)
        if not shown and given.past is None:
            raise InputError(f"{pipeline.name} starts from a picture: give an image or a keyframe")
        first = given.past[0] if given.past is not None else shown[0].picture
        pictures = [first] if pipeline.num_pictures == 1 else [first, shown[-1].picture if shown else first]
        rows.append(torch.cat([pipeline.image_encoder(_pixels(picture)[None]) for picture in pictures], 1))
    return torch.cat(rows).to(pipeline.device)


def _pixels(frames: Tensor) -> Tensor:
    """Frames (..., 3, H, W) uint8 to [-1, 1]."""
    return frames.float() / 127.5 - 1.0
