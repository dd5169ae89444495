"""The shape of a dual-stream denoiser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from vitascope.core.errors import CheckpointError, InputError, choice
from vitascope.nn.attention import head_width
from vitascope.weights.foreign import ForeignConfig

TextSees = Literal["all", "text"]


@dataclass(frozen=True)
class MochiConfig:
    """A dual-stream transformer. Defaults are those of Mochi 1.

    width, stream_width: of the video and text streams; the heads are those of the video stream, and the text stream is
    projected to their width. text_sees: "all", or "text" alone: then text depends on nothing that changes from step to
    step, and its keys and values are worked out once for a clip (the seeds' asymmetric attention; weights must be
    trained so). area: rows times columns that positions are scaled to. Raises InputError (ShapeError for head widths)
    where values contradict each other.
    """

    width: int = 3072
    stream_width: int = 1536
    depth: int = 48
    num_heads: int = 24
    video_channels: int = 12
    text_width: int = 4096
    frequency_width: int = 256
    patch: int = 2
    pool_heads: int = 8
    area: float = 192.0 * 192.0
    eps: float = 1e-6
    text_sees: TextSees = "all"

    def __post_init__(self) -> None:
        head_width(self.width, self.num_heads)
        choice("text_sees", self.text_sees, get_args(TextSees))
        if min(self.depth, self.stream_width, self.video_channels, self.patch, self.pool_heads) < 1:
            raise InputError("depth, stream_width, video_channels, patch and pool_heads must be positive")
        if self.text_width % self.pool_heads:
            raise InputError(f"text of width {self.text_width} cannot be pooled by {self.pool_heads} heads")
        if self.frequency_width < 1 or self.area <= 0:
            raise InputError("frequency_width and area must be positive")

    @staticmethod
    def fitting(video_channels: int, audio_channels: int, text_width: int) -> dict[str, int]:
        """The fields that follow from the latents and the text that a model reads."""
        return {"video_channels": video_channels, "text_width": text_width}

    @property
    def patch_sizes(self) -> tuple[int, int, int]:
        """Frames, rows and columns of latents in a token."""
        return (1, self.patch, self.patch)

    @property
    def patch_values(self) -> int:
        """Numbers in a video token."""
        return self.video_channels * self.patch**2


def from_diffusers(values: Mapping[str, Any]) -> MochiConfig:
    """The `config.json` of a `MochiTransformer3DModel`. Raises CheckpointError for what is not a Mochi 1 model."""
    theirs = ForeignConfig(values, "the configuration of the Mochi transformer")
    heads, each = theirs.take("num_attention_heads", 24), theirs.take("attention_head_dim", 128)
    channels = theirs.take("in_channels", 12)
    theirs.only(out_channels=channels, qk_norm="rms_norm", activation_fn="swiglu")
    theirs.ignore("max_sequence_length")
    config = MochiConfig(
        width=heads * each,
        stream_width=theirs.take("pooled_projection_dim", 1536),
        depth=theirs.take("num_layers", 48),
        num_heads=heads,
        video_channels=channels,
        text_width=theirs.take("text_embed_dim", 4096),
        frequency_width=theirs.take("time_embed_dim", 256),
        patch=theirs.take("patch_size", 2),
    )
    theirs.done()
    return config


def to_diffusers(config: MochiConfig) -> dict[str, Any]:
    """What `from_diffusers` reads as this configuration. Raises CheckpointError for what no Mochi 1 model has."""
    plain = MochiConfig()
    for name in ("pool_heads", "area", "eps", "text_sees"):
        if getattr(config, name) != getattr(plain, name):
            raise CheckpointError(f"a dual-stream model with {name} {getattr(config, name)} is not a Mochi 1 model")
    return {
        "_class_name": "MochiTransformer3DModel",
        "activation_fn": "swiglu",
        "attention_head_dim": config.width // config.num_heads,
        "in_channels": config.video_channels,
        "max_sequence_length": 256,
        "num_attention_heads": config.num_heads,
        "num_layers": config.depth,
        "out_channels": None,
        "patch_size": config.patch,
        "pooled_projection_dim": config.stream_width,
        "qk_norm": "rms_norm",
        "text_embed_dim": config.text_width,
        "time_embed_dim": config.frequency_width,
    }
