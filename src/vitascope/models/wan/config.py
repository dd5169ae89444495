"""The shape of a Wan denoiser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from vitascope.core.errors import CheckpointError, InputError
from vitascope.core.protocols import NoiseGranularity
from vitascope.nn.attention import head_width
from vitascope.weights.foreign import ForeignConfig


@dataclass(frozen=True)
class WanConfig:
    """A Wan 2.1 transformer. Defaults are those of the 14B text-to-video model.

    in_channels: latents plus, for image to video, 4 channels of mask and the latents of the known frames.
    image_width: of the image tokens that the cross-attentions also read (CLIP: 1280), 0 for none; image_positions:
    tokens of a learned position table for them (first-and-last-frame models), 0 for none; image_apart: whether they
    have keys and values of their own, as in all published models, or stand in front of the words and are read as these.
    frequency_width: sinusoids of the noise level. noise: what the weights were trained to take a level per.
    masked_text: whether words that only fill up are left out; the published models read 512 words, whatever they are.
    Raises InputError (ShapeError for head widths) where values contradict each other.
    """

    width: int = 5120
    depth: int = 40
    num_heads: int = 40
    hidden: int = 13824
    in_channels: int = 16
    out_channels: int = 16
    text_width: int = 4096
    image_width: int = 0
    image_positions: int = 0
    image_apart: bool = True
    frequency_width: int = 256
    patch: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    cross_norm: bool = True
    noise: NoiseGranularity = "clip"
    masked_text: bool = False

    def __post_init__(self) -> None:
        head_width(self.width, self.num_heads)
        if min(self.depth, self.hidden, self.in_channels, self.out_channels, self.text_width, *self.patch) < 1:
            raise InputError("depth, hidden, channels, text_width and patch must be positive")
        if self.out_channels > self.in_channels:
            raise InputError(
                f"out_channels are in_channels or a part of them, at most {self.in_channels}, got {self.out_channels}"
            )
        if self.frequency_width < 1:
            raise InputError(f"frequency_width must be positive, got {self.frequency_width}")
        if self.image_positions and not self.image_width:
            raise InputError("image_positions need image tokens: give image_width")

    @staticmethod
    def fitting(video_channels: int, audio_channels: int, text_width: int) -> dict[str, int]:
        """The fields that follow from the latents and the text that a model without known frames beside them reads."""
        return {"in_channels": video_channels, "out_channels": video_channels, "text_width": text_width}

    @property
    def in_values(self) -> int:
        """Numbers in a token on the way in."""
        return self.in_channels * prod(self.patch)

    @property
    def out_values(self) -> int:
        """Numbers in a token on the way out."""
        return self.out_channels * prod(self.patch)

    @property
    def condition_channels(self) -> int:
        """Channels beside the noisy latents: the mask and latents of known frames, 0 for text to video."""
        return self.in_channels - self.out_channels


def from_diffusers(values: Mapping[str, Any]) -> WanConfig:
    """The `config.json` of a `WanTransformer3DModel`. Raises CheckpointError for what no Wan 2.1 model has."""
    theirs = ForeignConfig(values, "the configuration of the Wan transformer")
    heads, each = theirs.take("num_attention_heads", 40), theirs.take("attention_head_dim", 128)
    image_width = theirs.whole("image_dim")
    in_channels = theirs.take("in_channels", 16)
    theirs.only(qk_norm="rms_norm_across_heads", added_kv_proj_dim=heads * each if image_width else None)
    positions, apart = theirs.whole("pos_embed_seq_len"), values.get("added_kv_proj_dim") is not None
    theirs.ignore("rope_max_seq_len")
    config = WanConfig(
        width=heads * each,
        depth=theirs.take("num_layers", 40),
        num_heads=heads,
        hidden=theirs.take("ffn_dim", 13824),
        in_channels=in_channels,
        out_channels=theirs.whole("out_channels") or in_channels,
        text_width=theirs.take("text_dim", 4096),
        image_width=image_width,
        image_positions=positions if image_width else 0,
        image_apart=apart or not image_width,
        frequency_width=theirs.take("freq_dim", 256),
        patch=theirs.take("patch_size", (1, 2, 2)),
        eps=theirs.take("eps", 1e-6),
        cross_norm=theirs.take("cross_attn_norm", True),
    )
    theirs.done()
    return config


def to_diffusers(config: WanConfig) -> dict[str, Any]:
    """What `from_diffusers` reads as this configuration. Raises CheckpointError for what no Wan 2.1 model does."""
    if config.masked_text:
        raise CheckpointError("a Wan model that was trained with masked texts cannot be written for diffusers")
    return {
        "_class_name": "WanTransformer3DModel",
        "added_kv_proj_dim": config.width if config.image_width and config.image_apart else None,
        "attention_head_dim": config.width // config.num_heads,
        "cross_attn_norm": config.cross_norm,
        "eps": config.eps,
        "ffn_dim": config.hidden,
        "freq_dim": config.frequency_width,
        "image_dim": config.image_width or None,
        "in_channels": config.in_channels,
        "num_attention_heads": config.num_heads,
        "num_layers": config.depth,
        "out_channels": config.out_channels,
        "patch_size": list(config.patch),
        "pos_embed_seq_len": config.image_positions or None,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": config.text_width,
    }
