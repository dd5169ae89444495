"""The authors' file of the Wan codec: how it is told from others, and the configuration that its shapes give."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vitascope.core.errors import CheckpointError
from vitascope.models.codecs.wan.config import LATENT_MEAN, WanCodecConfig
from vitascope.weights.shapes import Shapes

MARKS = ("encoder.conv1.weight", "encoder.downsamples.0.residual.0.gamma", "decoder.middle.0.residual.0.gamma")
"""Names that together are in no other files."""


def read_config(shapes: Shapes, notes: Mapping[str, Any]) -> WanCodecConfig:
    """The configuration of a file, which has no notes; mean and spread of the latents are those of the published one.

    Raises CheckpointError for what is not a Wan 2.1 codec.
    """
    del notes
    base, latents = shapes.axis("encoder.conv1.weight", 0), shapes.axis("conv2.weight", 0)
    if latents != len(LATENT_MEAN):
        raise CheckpointError(f"a Wan codec has {len(LATENT_MEAN)} latent channels, this file has {latents}")
    multiples, halve_time, blocks = [0], list[bool](), [0]
    for index in range(shapes.count("encoder.downsamples")):
        place = f"encoder.downsamples.{index}"
        if f"{place}.resample.1.weight" in shapes:
            halve_time.append(f"{place}.time_conv.weight" in shapes)
            multiples.append(0)
            blocks.append(0)
        else:
            multiples[-1] = shapes.axis(f"{place}.residual.2.weight", 0) // base
            blocks[-1] += 1
    if len(set(blocks)) != 1:
        raise CheckpointError(f"levels of a Wan codec have equally many blocks, those of this file {blocks}")
    return WanCodecConfig(base, tuple(multiples), tuple(halve_time), blocks[0], latents)
