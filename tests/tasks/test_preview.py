"""Pictures of a clip while it forms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from vitascope.core.protocols import VideoCodec
from vitascope.diffusion.samplers import Step
from vitascope.media.reading import read_image
from vitascope.tasks.generate import generate
from vitascope.tasks.pipeline import Pipeline
from vitascope.tasks.preview import preview_frames, write_preview
from vitascope.tasks.request import GenerateRequest


class Plain:
    """The codec of a pipeline without its preview."""

    def __init__(self, codec: VideoCodec) -> None:
        self.strides, self.latent_channels = codec.strides, codec.latent_channels
        self.encode, self.decode = codec.encode, codec.decode


def test_the_preview_shows_the_latest_estimate(pipeline: Pipeline, tmp_path: Path) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def report(step: Step) -> None:
        small = preview_frames(pipeline, step)
        whole = preview_frames(replace(pipeline, video_codec=Plain(pipeline.video_codec)), step)
        seen.append((small, whole))
        write_preview(pipeline, step, tmp_path / "now.png")

    made = generate(pipeline, GenerateRequest("a red ball", format=pipeline.defaults.clip), report)
    small, whole = seen[-1]
    # 2 px a cell of 4 px.
    assert small.shape == (1, 9, 3, 16, 16)
    assert whole.shape == (1, 9, 3, 32, 32)
    # The last step of the sampler ends at its estimate, and rounding may move a pixel by one.
    assert (whole[0].int() - made.clip.frames.int()).abs().max() <= 1
    assert not torch.equal(seen[0][1], whole)
    assert read_image(tmp_path / "now.png").shape[2] > 8 * 16
