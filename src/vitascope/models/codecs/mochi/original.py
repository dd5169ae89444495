"""The authors' files of the Mochi codec: how they are told from others, and the configuration that their shapes give.

They are two, of the encoder and of the decoder; here both are read as one, each behind its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from vitascope.core.errors import CheckpointError
from vitascope.models.codecs.mochi.config import LATENT_MEAN, MochiCodecConfig
from vitascope.weights.shapes import Shapes

MARKS = ("encoder.layers.0.weight", "encoder.output_norm.weight", "decoder.blocks.0.0.weight")
"""Names that together are in no other files."""


def read_config(shapes: Shapes, notes: Mapping[str, Any]) -> MochiCodecConfig:
    """The configuration of the files, which have no notes; mean and spread of the latents are the published ones.

    Raises CheckpointError for what is not a Mochi 1 codec.
    """
    del notes
    latents = shapes.axis("decoder.blocks.0.0.weight", 1)
    if latents != len(LATENT_MEAN):
        raise CheckpointError(f"a Mochi codec has {len(LATENT_MEAN)} latent channels, these files have {latents}")
    places = [f"encoder.layers.{index}" for index in range(1, shapes.count("encoder.layers"))]
    levels = [place for place in places if f"{place}.layers.0.weight" in shapes]
    if not levels:
        raise CheckpointError("a Mochi codec has several levels, these files have one")
    first, last = places[: places.index(levels[0])], places[places.index(levels[-1]) + 1 :]
    stages = [first, *([f"{place}.layers.{k}" for k in range(1, shapes.count(f"{place}.layers"))] for place in levels)]
    stages.append(last)
    steps = [shapes.axis(f"{place}.layers.0.weight", 2) for place in levels]
    channels = [shapes.axis(f"{place}.weight", 0) for place in ("encoder.layers.0", *(f"{x}.layers.0" for x in levels))]
    return MochiCodecConfig(
        encoder_channels=tuple(channels),
        decoder_channels=_decoder_channels(shapes, steps),
        time_steps=tuple(steps),
        blocks=tuple(len(stage) for stage in stages),
        attention=tuple(bool(stage and shapes.first(f"{stage[0]}.attn_block.")) for stage in stages),
        latent_channels=latents,
    )


def _decoder_channels(shapes: Shapes, steps: list[int]) -> tuple[int, ...]:
    channels = [shapes.axis("decoder.blocks.0.0.weight", 0)]
    for stage, step in enumerate(steps[::-1], start=1):
        channels.append(shapes.axis(f"decoder.blocks.{stage}.proj.weight", 0) // prod((step, 2, 2)))
    return tuple(channels[::-1])
