"""The image half of CLIP in the file of Wan's authors, as the encoder of `transformers` that it is."""

from __future__ import annotations

from math import isqrt

import torch
from torch import nn

from vitascope.core.errors import CheckpointError
from vitascope.models.parts import close
from vitascope.models.pretrained import transformers
from vitascope.weights.keys import LEAVES, Drop, KeyTable, Rename, Rule, Split, Squeeze, renamed_layers
from vitascope.weights.shapes import Shapes
from vitascope.weights.sources import TensorSource, Under
from vitascope.weights.streaming import load_streaming

MARKS = ("visual.cls_embedding", "visual.transformer.0.attn.to_qkv.weight")
"""Names that together are in no other files."""
PREFIX = "visual."
"""Of all names of the image half."""
HEAD = 80
"""Width of a head of ViT-H/14."""


def original_keys(prefix: str) -> KeyTable:
    """Of the authors' names behind `visual.`, to those of `transformers`, whose names may have a prefix."""
    theirs, ours = "transformer.{layer}", f"{prefix}encoder.layers.{{layer}}"
    rules: list[Rule] = [
        Drop("head"),
        Rename("patch_embedding.weight", f"{prefix}embeddings.patch_embedding.weight"),
        Squeeze("cls_embedding", f"{prefix}embeddings.class_embedding", 2),
        Squeeze("pos_embedding", f"{prefix}embeddings.position_embedding.weight", 1),
        *renamed_layers({
            "pre_norm": f"{prefix}pre_layrnorm",
            "post_norm": f"{prefix}post_layernorm",
            f"{theirs}.norm1": f"{ours}.layer_norm1",
            f"{theirs}.norm2": f"{ours}.layer_norm2",
            f"{theirs}.attn.proj": f"{ours}.self_attn.out_proj",
            f"{theirs}.mlp.0": f"{ours}.mlp.fc1",
            f"{theirs}.mlp.2": f"{ours}.mlp.fc2",
        }),
        *(
            Split(f"{theirs}.attn.to_qkv.{leaf}", tuple(f"{ours}.self_attn.{part}_proj.{leaf}" for part in "qkv"))
            for leaf in LEAVES
        ),
    ]  # fmt: skip
    return tuple(rules)


def load_original(
    source: TensorSource, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", head: int = HEAD
) -> nn.Module:
    """The image encoder of a file that holds CLIP, in eval mode and without gradients. head: width of one of its heads.

    Raises CheckpointError where the tensors do not fit, CapabilityError without `transformers`.
    """
    library, inside = transformers("image encoders of public checkpoints"), Under(source, PREFIX)
    shapes = Shapes(inside)
    if any(mark.removeprefix(PREFIX) not in shapes for mark in MARKS):
        raise CheckpointError(f"{source.label} holds no image encoder as Wan's authors write it")
    width, _, patch_px, _ = shapes["patch_embedding.weight"]
    config = library.CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=shapes.axis("transformer.0.mlp.0.weight", 0),
        num_hidden_layers=shapes.count("transformer"),
        num_attention_heads=max(1, width // head),
        image_size=patch_px * isqrt(shapes.axis("pos_embedding", 1) - 1),
        patch_size=patch_px,
        hidden_act="gelu",
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        model: nn.Module = library.CLIPVisionModel(config)
    prefix = next(iter(model.state_dict())).partition("embeddings.")[0]
    try:
        load_streaming(model, inside, original_keys(prefix), device=device, dtype=dtype)
    finally:
        close(source)
    _fill_positions(model, device)
    return model.eval().requires_grad_(False)


def _fill_positions(model: nn.Module, device: torch.device | str) -> None:
    """Buffers that no checkpoint holds: the numbers of the positions."""
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:
            parent, _, leaf = name.rpartition(".")
            numbers = torch.arange(buffer.numel(), device=device).view(buffer.shape)
            model.get_submodule(parent).register_buffer(leaf, numbers, persistent=False)
