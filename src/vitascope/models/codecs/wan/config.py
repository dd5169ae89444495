"""The shape of a Wan codec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vitascope.core.errors import CheckpointError, InputError
from vitascope.core.shapes import VideoStrides
from vitascope.weights.foreign import ForeignConfig

LATENT_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
               0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)  # fmt: skip
LATENT_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
              3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)  # fmt: skip
"""Of the published weights, per latent channel."""


@dataclass(frozen=True)
class WanCodecConfig:
    """base: channels that the encoder lifts pixels to; multiples: of `base`, level by level, each with half the rows
    and columns of the one before. halve_time: for each step between levels, whether it halves the frames too. blocks:
    residual blocks a level of the encoder; the decoder has one more. decoder_base: what stands for `base` in the
    decoder, 0 for the same. Raises InputError where lengths contradict each other.
    """

    base: int = 96
    multiples: tuple[int, ...] = (1, 2, 4, 4)
    halve_time: tuple[bool, ...] = (False, True, True)
    blocks: int = 2
    latent_channels: int = 16
    latent_mean: tuple[float, ...] = LATENT_MEAN
    latent_std: tuple[float, ...] = LATENT_STD
    decoder_base: int = 0

    def __post_init__(self) -> None:
        if min(self.base, self.blocks, self.latent_channels, *self.multiples) < 1 or self.decoder_base < 0:
            raise InputError("base, multiples, blocks and latent_channels must be positive")
        if len(self.halve_time) != len(self.multiples) - 1:
            raise InputError(f"{len(self.multiples)} levels have {len(self.multiples) - 1} steps between them")
        if not len(self.latent_mean) == len(self.latent_std) == self.latent_channels:
            raise InputError(f"latent_mean and latent_std need {self.latent_channels} values, one a channel")
        if min(self.latent_std) <= 0:
            raise InputError("latent_std must be positive")

    @property
    def channels(self) -> tuple[int, ...]:
        """Of each level of the encoder."""
        return tuple(self.base * multiple for multiple in self.multiples)

    @property
    def decoder_channels(self) -> tuple[int, ...]:
        """Of each level of the decoder, from pixels to latents."""
        return tuple((self.decoder_base or self.base) * multiple for multiple in self.multiples)

    @property
    def strides(self) -> VideoStrides:
        side = 2 ** len(self.halve_time)
        return VideoStrides(2 ** sum(self.halve_time), side, side)


def from_diffusers(values: Mapping[str, Any]) -> WanCodecConfig:
    """The `config.json` of an `AutoencoderKLWan` of Wan 2.1. Raises CheckpointError for that of another codec."""
    theirs = ForeignConfig(values, "the configuration of the Wan codec")
    theirs.only(is_residual=False, in_channels=3, out_channels=3, patch_size=None, attn_scales=[])
    theirs.ignore("scale_factor_temporal", "scale_factor_spatial", "dropout")
    base = theirs.take("base_dim", 96)
    decoder_base = theirs.take("decoder_base_dim", None) or base
    multiples = theirs.take("dim_mult", (1, 2, 4, 4))
    halve_time = theirs.take("temperal_downsample", (False, True, True))
    if len(halve_time) != len(multiples) - 1:
        steps = len(multiples) - 1
        raise CheckpointError(f"{theirs.label}: temperal_downsample must have {steps} values, got {len(halve_time)}")
    config = WanCodecConfig(
        base=base,
        multiples=multiples,
        halve_time=halve_time,
        blocks=theirs.take("num_res_blocks", 2),
        latent_channels=theirs.take("z_dim", 16),
        latent_mean=theirs.take("latents_mean", LATENT_MEAN),
        latent_std=theirs.take("latents_std", LATENT_STD),
        decoder_base=0 if decoder_base == base else decoder_base,
    )
    theirs.done()
    return config


def to_diffusers(config: WanCodecConfig) -> dict[str, Any]:
    """What `from_diffusers` reads as this configuration."""
    return {
        "_class_name": "AutoencoderKLWan",
        "attn_scales": [],
        "base_dim": config.base,
        "decoder_base_dim": config.decoder_base or None,
        "dim_mult": list(config.multiples),
        "dropout": 0.0,
        "latents_mean": list(config.latent_mean),
        "latents_std": list(config.latent_std),
        "num_res_blocks": config.blocks,
        "temperal_downsample": list(config.halve_time),
        "z_dim": config.latent_channels,
    }
