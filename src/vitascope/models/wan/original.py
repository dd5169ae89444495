"""The authors' files of Wan 2.1: how they are told from others, and the configuration that their shapes give."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from vitascope.core.errors import CheckpointError
from vitascope.models.wan.config import WanConfig
from vitascope.weights.foreign import ForeignConfig
from vitascope.weights.shapes import Shapes

MARKS = ("patch_embedding.weight", "blocks.0.self_attn.q.weight", "head.modulation")
"""Names that together are in no other files."""
HEAD = 128
"""Width of a head of all published models."""


def read_config(shapes: Shapes, notes: Mapping[str, Any]) -> WanConfig:
    """The configuration of a file. notes: what the config.json beside it holds, or nothing.

    Raises CheckpointError where both contradict each other, and for what is not a Wan 2.1 model.
    """
    theirs = ForeignConfig(notes, "the configuration of the Wan transformer")
    width, in_channels, *patch = shapes["patch_embedding.weight"]
    if len(patch) != 3:
        raise CheckpointError(f"patch_embedding.weight of a Wan transformer has 5 axes, not {2 + len(patch)}")
    heads = theirs.take("num_heads", 0) or width // HEAD
    if not heads or width % heads:
        raise CheckpointError(f"a Wan transformer of width {width} has no heads of {HEAD}: its config.json is missing")
    positions = shapes["img_emb.emb_pos"][1] if "img_emb.emb_pos" in shapes else 0
    config = WanConfig(
        width=width,
        depth=shapes.count("blocks"),
        num_heads=heads,
        hidden=shapes.axis("blocks.0.ffn.0.weight", 0),
        in_channels=in_channels,
        out_channels=shapes.axis("head.head.weight", 0) // prod(patch),
        text_width=shapes.axis("text_embedding.0.weight", 1),
        image_width=shapes.axis("img_emb.proj.0.weight", 0) if "img_emb.proj.0.weight" in shapes else 0,
        image_positions=positions,
        image_apart="img_emb.proj.0.weight" not in shapes or "blocks.0.cross_attn.k_img.weight" in shapes,
        frequency_width=shapes.axis("time_embedding.0.weight", 1),
        patch=(patch[0], patch[1], patch[2]),
        eps=theirs.take("eps", 1e-6),
        cross_norm="blocks.0.norm3.weight" in shapes,
    )
    theirs.only(dim=config.width, ffn_dim=config.hidden, freq_dim=config.frequency_width, num_layers=config.depth)
    theirs.only(in_dim=config.in_channels, out_dim=config.out_channels, text_dim=config.text_width, qk_norm=True)
    theirs.only(model_type=model_type(config), cross_attn_norm=config.cross_norm, patch_size=config.patch)
    theirs.only(window_size=(-1, -1))
    theirs.ignore("text_len")
    theirs.done()
    return config


def model_type(config: WanConfig) -> str:
    """What the authors call the task: text, a picture, or a first and a last picture to video."""
    if not config.image_width:
        return "t2v"
    return "flf2v" if config.image_positions else "i2v"


def write_config(config: WanConfig) -> dict[str, Any]:
    """The authors' config.json of this configuration."""
    return {
        "_class_name": "WanModel",
        "dim": config.width,
        "eps": config.eps,
        "ffn_dim": config.hidden,
        "freq_dim": config.frequency_width,
        "in_dim": config.in_channels,
        "model_type": model_type(config),
        "num_heads": config.num_heads,
        "num_layers": config.depth,
        "out_dim": config.out_channels,
        "text_len": 512,
    }
