"""umT5 in the file of Wan's authors, as the encoder of `transformers` that it is.

Layers are one for one those of UMT5EncoderModel; its configuration follows from the shapes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vitascope.core.errors import CheckpointError
from vitascope.models.parts import close
from vitascope.models.pretrained import transformers
from vitascope.weights.keys import KeyTable, Rename
from vitascope.weights.shapes import Shapes
from vitascope.weights.sources import TensorSource
from vitascope.weights.streaming import load_streaming

TOKENS = "token_embedding.weight"
MARKS = (TOKENS, "blocks.0.pos_embedding.embedding.weight", "blocks.0.ffn.gate.0.weight")
"""Names that together are in no other files."""
MAX_DISTANCE = 128
"""Tokens apart beyond which all are equally far."""
_LAYER = {
    "norm1": "layer.0.layer_norm",
    "norm2": "layer.1.layer_norm",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
    **{f"attn.{part}": f"layer.0.SelfAttention.{part}" for part in "qkvo"},
}
KEYS: KeyTable = (
    Rename(TOKENS, "shared.weight"),
    Rename("norm.weight", "encoder.final_layer_norm.weight"),
    *(Rename(f"blocks.{{layer}}.{theirs}.weight", f"encoder.block.{{layer}}.{ours}.weight")
      for theirs, ours in _LAYER.items()),
)  # fmt: skip
"""Of the authors' names, to those of `transformers`."""


def original_sizes(source: TensorSource) -> tuple[int, int, int]:
    """Width of the embeddings of an encoder in a file, of its feed-forwards, and its heads.

    Raises CheckpointError where it is another model.
    """
    shapes = Shapes(source)
    if any(mark not in shapes for mark in MARKS):
        raise CheckpointError(f"{source.label} holds no text encoder as Wan's authors write it")
    return (
        shapes.axis(TOKENS, 1),
        shapes.axis("blocks.0.ffn.fc1.weight", 0),
        shapes.axis("blocks.0.pos_embedding.embedding.weight", 1),
    )


def original_tokens(source: TensorSource) -> int:
    """How many tokens an encoder in a file knows. Raises CheckpointError."""
    return Shapes(source).axis(TOKENS, 0)


def load_original(source: TensorSource, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> nn.Module:
    """The encoder in a file, in eval mode and without gradients.

    Raises CheckpointError where the tensors do not fit, CapabilityError without `transformers`.
    """
    config = original_config(source)
    with torch.device("meta"):
        model: Any = transformers("text encoders of public checkpoints").UMT5EncoderModel(config)
    del model.encoder.embed_tokens  # the same as `shared`, and not to be given its weights twice
    try:
        load_streaming(model, source, KEYS, device=device, dtype=dtype)
    finally:
        close(source)
    model.encoder.embed_tokens = model.shared
    return model.eval().requires_grad_(False)


def original_config(source: TensorSource) -> Any:
    """The configuration of `transformers` that the shapes of a file stand for. Raises CheckpointError."""
    library, shapes = transformers("text encoders of public checkpoints"), Shapes(source)
    width, hidden, heads = original_sizes(source)
    return library.UMT5Config(
        vocab_size=shapes.axis(TOKENS, 0),
        d_model=width,
        d_kv=shapes.axis("blocks.0.attn.q.weight", 0) // heads,
        d_ff=hidden,
        num_layers=shapes.count("blocks"),
        num_heads=heads,
        relative_attention_num_buckets=shapes.axis("blocks.0.pos_embedding.embedding.weight", 0),
        relative_attention_max_distance=MAX_DISTANCE,
        feed_forward_proj="gated-gelu",
        attn_implementation="sdpa",
    )
