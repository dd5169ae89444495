"""The authors' file of Mochi 1: how it is told from others, and the configuration that its shapes give."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vitascope.models.mochi.config import MochiConfig
from vitascope.weights.shapes import Shapes

MARKS = ("x_embedder.proj.weight", "blocks.0.attn.qkv_x.weight", "pos_frequencies")
"""Names that together are in no other files."""


def read_config(shapes: Shapes, notes: Mapping[str, Any]) -> MochiConfig:
    """The configuration of a file, which has no notes. Raises CheckpointError for what is not a Mochi 1 model."""
    del notes
    return MochiConfig(
        width=shapes.axis("x_embedder.proj.weight", 0),
        stream_width=shapes.axis("blocks.0.attn.qkv_y.weight", 1),
        depth=shapes.count("blocks"),
        num_heads=shapes.axis("pos_frequencies", 1),
        video_channels=shapes.axis("x_embedder.proj.weight", 1),
        text_width=shapes.axis("t5_yproj.weight", 1),
        frequency_width=shapes.axis("t_embedder.mlp.0.weight", 1),
        patch=shapes.axis("x_embedder.proj.weight", 2),
    )
