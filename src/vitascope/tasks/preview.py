"""A picture of a clip while it forms."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from vitascope.core.tracks import VIDEO
from vitascope.diffusion.samplers.step import Step
from vitascope.media.pictures import contact_sheet, write_picture
from vitascope.models.codecs.decoding import decode_frames, to_uint8
from vitascope.tasks.pipeline import Pipeline


@runtime_checkable
class HasPreview(Protocol):
    """A video codec with a small decoder of its own."""

    def preview(self, latents: Tensor) -> Tensor: ...


@torch.no_grad()
def preview_frames(pipeline: Pipeline, step: Step) -> Tensor:
    """Frames (B, T, 3, h, w) uint8 of the latest estimate of the clip: small ones where the codec has a preview.

    Under a limit of memory they are decoded as planned for the clip. The plan does not count that the denoiser keeps
    keys and values of the texts meanwhile: a preview may take that much more than it says.
    """
    codec, latents = pipeline.video_codec, step.x0[VIDEO].float()
    with pipeline.autocast(), pipeline.at_work("video_codec", "decode"):
        if isinstance(codec, HasPreview):
            return to_uint8(codec.preview(latents)).movedim(1, 2).cpu()
        use = None if pipeline.memory is None else pipeline.memory.use
        return decode_frames(codec, latents, pipeline.decoding if use is None else use.plan.decoding)


def write_preview(pipeline: Pipeline, step: Step, path: Path) -> None:
    """Write the frames of `preview_frames` side by side as one picture. Raises MediaError."""
    clips = list(preview_frames(pipeline, step))
    write_picture(path, contact_sheet(clips, [f"step {step.index + 1} of {step.num_steps}"] * len(clips)))
