"""The authors' files of LTX-Video: how they are told from others, and the configuration in their metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vitascope.core.errors import CheckpointError
from vitascope.models.ltx.config import LTXConfig
from vitascope.weights.foreign import ForeignConfig
from vitascope.weights.shapes import Shapes

MARKS = ("patchify_proj.weight", "adaln_single.linear.weight", "transformer_blocks.0.attn1.to_q.weight")
"""Names that together are in no other files."""
NUM_HEADS = {2048: 32, 4096: 32}
"""By width, of the published models."""


def read_config(shapes: Shapes, notes: Mapping[str, Any]) -> LTXConfig:
    """The configuration of a file. notes: "transformer" of the configuration in its metadata, or nothing.

    Raises CheckpointError where both contradict each other, and for what is not an LTX-Video model.
    """
    theirs = ForeignConfig(notes, "the configuration of the LTX transformer")
    width, in_channels = shapes.axis("patchify_proj.weight", 0), shapes.axis("patchify_proj.weight", 1)
    heads = theirs.take("num_attention_heads", 0) or NUM_HEADS.get(width, 0)
    if not heads or width % heads:
        raise CheckpointError(f"an LTX transformer of width {width} needs the configuration that its file lacks")
    plain = LTXConfig()
    base = theirs.take("positional_embedding_max_pos", plain.base)
    config = LTXConfig(
        width=width,
        depth=shapes.count("transformer_blocks"),
        num_heads=heads,
        in_channels=in_channels,
        out_channels=shapes.axis("proj_out.weight", 0),
        text_width=shapes.axis("caption_projection.linear_1.weight", 1),
        base=(float(base[0]), float(base[1]), float(base[2])),
        theta=theirs.take("positional_embedding_theta", plain.theta),
        eps=theirs.take("norm_eps", plain.eps),
    )
    theirs.only(attention_head_dim=width // heads, cross_attention_dim=width, num_layers=config.depth)
    theirs.only(in_channels=in_channels, out_channels=config.out_channels, caption_channels=config.text_width)
    theirs.only(activation_fn="gelu-approximate", attention_bias=True, norm_elementwise_affine=False)
    theirs.only(qk_norm="rms_norm", standardization_norm="rms_norm", positional_embedding_type="rope")
    theirs.only(adaptive_norm="single_scale_shift", timestep_scale_multiplier=1000, only_cross_attention=False)
    theirs.only(double_self_attention=False, dropout=0.0, num_vector_embeds=None, use_tpu_flash_attention=False)
    theirs.only(patch_size=1, patch_size_t=1, attention_type="default")
    theirs.ignore("norm_num_groups", "num_embeds_ada_norm", "project_to_2d_pos", "upcast_attention")
    theirs.ignore("causal_temporal_positioning")  # what the pipeline tells of times
    theirs.ignore("use_linear_projection", "caption_projection_type")
    theirs.done()
    return config


def write_config(config: LTXConfig) -> dict[str, Any]:
    """ "transformer" of the metadata that goes with this configuration."""
    return {
        "_class_name": "Transformer3DModel",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": config.width // config.num_heads,
        "attention_type": "default",
        "caption_channels": config.text_width,
        "cross_attention_dim": config.width,
        "double_self_attention": False,
        "dropout": 0.0,
        "in_channels": config.in_channels,
        "norm_elementwise_affine": False,
        "norm_eps": config.eps,
        "norm_num_groups": 32,
        "num_attention_heads": config.num_heads,
        "num_embeds_ada_norm": 1000,
        "num_layers": config.depth,
        "num_vector_embeds": None,
        "only_cross_attention": False,
        "out_channels": config.out_channels,
        "positional_embedding_max_pos": [int(value) for value in config.base],
        "positional_embedding_theta": config.theta,
        "positional_embedding_type": "rope",
        "project_to_2d_pos": True,
        "qk_norm": "rms_norm",
        "standardization_norm": "rms_norm",
        "timestep_scale_multiplier": 1000,
        "upcast_attention": False,
        "use_linear_projection": False,
    }
