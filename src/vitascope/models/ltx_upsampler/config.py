"""The shape of a latent up-sampler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vitascope.core.errors import InputError
from vitascope.weights.foreign import ForeignConfig

GROUPS = 32
"""Of channels that are normalised together."""


@dataclass(frozen=True)
class LTXUpsamplerConfig:
    """Convolutions around a step that doubles rows and columns (`space`), latent frames after the first (`time`), or
    both. Defaults are those of the published spatial up-samplers.

    channels: of the latents. width: inside. num_blocks: residual blocks before the step, and after it. dims: whether
    their kernels reach over time (3) or stay in a frame (2). Raises InputError where values contradict each other.
    """

    channels: int = 128
    width: int = 512
    num_blocks: int = 4
    dims: int = 3
    space: bool = True
    time: bool = False

    def __post_init__(self) -> None:
        if min(self.channels, self.width, self.num_blocks) < 1 or self.width % GROUPS:
            raise InputError(f"channels and num_blocks must be positive, width a multiple of {GROUPS}")
        if self.dims not in (2, 3):
            raise InputError(f"kernels have 2 or 3 dimensions, got {self.dims}")
        if not (self.space or self.time):
            raise InputError("an up-sampler enlarges space, time or both")
        if self.time and self.dims == 2:
            raise InputError("an up-sampler with kernels of 2 dimensions enlarges space alone")


def from_diffusers(values: Mapping[str, Any]) -> LTXUpsamplerConfig:
    """The `config.json` of an `LTXLatentUpsamplerModel`. Raises CheckpointError for what no such model has."""
    theirs = ForeignConfig(values, "the configuration of the latent up-sampler")
    config = LTXUpsamplerConfig(
        channels=theirs.take("in_channels", 128),
        width=theirs.take("mid_channels", 512),
        num_blocks=theirs.take("num_blocks_per_stage", 4),
        dims=theirs.take("dims", 3),
        space=theirs.take("spatial_upsample", True),
        time=theirs.take("temporal_upsample", False),
    )
    theirs.done()
    return config


def to_diffusers(config: LTXUpsamplerConfig) -> dict[str, Any]:
    """What `from_diffusers` reads as this configuration."""
    return {
        "_class_name": "LTXLatentUpsamplerModel",
        "dims": config.dims,
        "in_channels": config.channels,
        "mid_channels": config.width,
        "num_blocks_per_stage": config.num_blocks,
        "spatial_upsample": config.space,
        "temporal_upsample": config.time,
    }
