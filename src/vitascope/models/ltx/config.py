"""The shape of an LTX denoiser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vitascope.core.errors import CheckpointError, InputError
from vitascope.nn.attention import head_width
from vitascope.weights.foreign import ForeignConfig


@dataclass(frozen=True)
class LTXConfig:
    """An LTX-Video transformer. Defaults are those of the 2B model; 13B: width 4096, depth 48, heads of 128.

    A token is one latent. spatial_px: px a latent covers; base: seconds and px that stand for 1 in the positions.
    Raises InputError (ShapeError for head widths) where values contradict each other.
    """

    width: int = 2048
    depth: int = 28
    num_heads: int = 32
    in_channels: int = 128
    out_channels: int = 128
    text_width: int = 4096
    spatial_px: int = 32
    base: tuple[float, float, float] = (20.0, 2048.0, 2048.0)
    theta: float = 10_000.0
    eps: float = 1e-6

    def __post_init__(self) -> None:
        head_width(self.width, self.num_heads)
        if min(self.depth, self.in_channels, self.out_channels, self.text_width, self.spatial_px) < 1:
            raise InputError("depth, channels, text_width and spatial_px must be positive")
        if self.width < 6:
            raise InputError(f"positions need a width of at least 6, got {self.width}")
        if not (min(self.base) > 0 and self.theta > 1):
            raise InputError("base must be positive and theta above 1")

    @staticmethod
    def fitting(video_channels: int, audio_channels: int, text_width: int) -> dict[str, int]:
        """The fields that follow from the latents and the text that a model reads."""
        return {"in_channels": video_channels, "out_channels": video_channels, "text_width": text_width}


def from_diffusers(values: Mapping[str, Any]) -> LTXConfig:
    """The `config.json` of an `LTXVideoTransformer3DModel`. Raises CheckpointError for what no LTX-Video model has."""
    theirs = ForeignConfig(values, "the configuration of the LTX transformer")
    heads, each = theirs.take("num_attention_heads", 32), theirs.take("attention_head_dim", 64)
    in_channels = theirs.take("in_channels", 128)
    if each % 2:
        raise CheckpointError(f"{theirs.label}: attention_head_dim must be even, got {each}")
    theirs.only(patch_size=1, patch_size_t=1, activation_fn="gelu-approximate", qk_norm="rms_norm_across_heads")
    theirs.only(norm_elementwise_affine=False, attention_bias=True, attention_out_bias=True)
    theirs.only(cross_attention_dim=heads * each)
    config = LTXConfig(
        width=heads * each,
        depth=theirs.take("num_layers", 28),
        num_heads=heads,
        in_channels=in_channels,
        out_channels=theirs.whole("out_channels") or in_channels,
        text_width=theirs.take("caption_channels", 4096),
        eps=theirs.take("norm_eps", 1e-6),
    )
    theirs.done()
    return config


def to_diffusers(config: LTXConfig) -> dict[str, Any]:
    """What `from_diffusers` reads as this configuration. Raises CheckpointError for positions that it cannot say."""
    plain = LTXConfig()
    if (config.spatial_px, config.base, config.theta) != (plain.spatial_px, plain.base, plain.theta):
        raise CheckpointError("LTX positions other than those of the published models cannot be written for diffusers")
    return {
        "_class_name": "LTXVideoTransformer3DModel",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": config.width // config.num_heads,
        "attention_out_bias": True,
        "caption_channels": config.text_width,
        "cross_attention_dim": config.width,
        "in_channels": config.in_channels,
        "norm_elementwise_affine": False,
        "norm_eps": config.eps,
        "num_attention_heads": config.num_heads,
        "num_layers": config.depth,
        "out_channels": config.out_channels,
        "patch_size": 1,
        "patch_size_t": 1,
        "qk_norm": "rms_norm_across_heads",
    }
