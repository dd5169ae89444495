"""The shape of a Mochi codec, and its layers in order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, get_args

from vitascope.core.errors import InputError, choice
from vitascope.core.shapes import VideoStrides
from vitascope.weights.foreign import ForeignConfig

LATENT_MEAN = (-0.06730895953510081, -0.038011381506090416, -0.07477820912866141, -0.05565264470995561,
               0.012767231469026969, -0.04703542746246419, 0.043896967884726704, -0.09346305707025976,
               -0.09918314763016893, -0.008729793427399178, -0.011931556316503654, -0.0321993391887285)  # fmt: skip
LATENT_STD = (0.9263795028493863, 0.9248894543193766, 0.9393059390890617, 0.959253732819592,
              0.8244560132752793, 0.917259975397747, 0.9294154431013696, 1.3720942357788521,
              0.881393668867029, 0.9168315692124348, 0.9185249279345552, 0.9274757570805041)  # fmt: skip
"""Of the published weights, per latent channel."""

GROUP = 32
"""Groups of every norm, and channels of every attention head."""

Lead = Literal["step", "end"]
Kind = Literal["residual", "attention", "shrink", "grow"]


@dataclass(frozen=True)
class Layer:
    """stage: 0 for the layers before the first step between levels, s for those of step s, then those behind the last.
    index: among the layers of its kind in the stage. steps: frames that a step makes one (or makes of one).
    """

    kind: Kind
    stage: int
    index: int
    channels: int
    outputs: int
    steps: int = 1


@dataclass(frozen=True)
class MochiCodecConfig:
    """encoder_channels, decoder_channels: of each level, from pixels to latents; every level has half the rows and
    columns of the one before. time_steps: frames that become one on each step between levels. blocks, attention:
    residual blocks of a stage and whether attention over time follows each (in the encoder only); one stage at the
    pixels, one for each step, one at the latents.

    lead: the decoder makes several frames of the first latent frame, of which the last alone is shown. "step" drops
    the others on every step between levels, as the authors do and the weights were trained; "end" carries them through
    and drops them at last, as diffusers does: the first frames differ between the two, and the first latent frame costs
    as much as any other. latent_std: of the published weights; a `scaling_factor` other than 1 divides it.

    Raises InputError where lengths contradict each other.
    """

    encoder_channels: tuple[int, ...] = (64, 128, 256, 384)
    decoder_channels: tuple[int, ...] = (128, 256, 512, 768)
    time_steps: tuple[int, ...] = (1, 2, 3)
    blocks: tuple[int, ...] = (3, 3, 4, 6, 3)
    attention: tuple[bool, ...] = (False, True, True, True, True)
    lead: Lead = "step"
    latent_channels: int = 12
    latent_mean: tuple[float, ...] = LATENT_MEAN
    latent_std: tuple[float, ...] = LATENT_STD

    def __post_init__(self) -> None:
        choice("lead", self.lead, get_args(Lead))
        levels = len(self.encoder_channels)
        if len(self.decoder_channels) != levels or len(self.time_steps) != levels - 1:
            raise InputError(f"{levels} levels need as many decoder_channels and {levels - 1} time_steps")
        if not len(self.blocks) == len(self.attention) == levels + 1:
            raise InputError(f"{levels} levels need {levels + 1} values in blocks and attention")
        if min(self.latent_channels, *self.blocks, *self.time_steps) < 1:
            raise InputError("latent_channels, blocks and time_steps must be positive")
        if any(channels < 1 or channels % GROUP for channels in self.encoder_channels + self.decoder_channels):
            raise InputError(f"channels must be multiples of {GROUP}")
        if not len(self.latent_mean) == len(self.latent_std) == self.latent_channels:
            raise InputError(f"latent_mean and latent_std need {self.latent_channels} values, one a channel")
        if min(self.latent_std) <= 0:
            raise InputError("latent_std must be positive")

    @property
    def strides(self) -> VideoStrides:
        side = 2 ** len(self.time_steps)
        return VideoStrides(prod(self.time_steps), side, side)

    def encoder_layers(self) -> list[Layer]:
        """From the pixels' level to the latents'."""
        channels = [self.encoder_channels[0], *self.encoder_channels, self.encoder_channels[-1]]
        layers: list[Layer] = []
        for stage, (count, attentive) in enumerate(zip(self.blocks, self.attention, strict=True)):
            here = channels[stage + 1]
            if 0 < stage <= len(self.time_steps):
                layers.append(Layer("shrink", stage, 0, channels[stage], here, self.time_steps[stage - 1]))
            for index in range(count):
                layers.append(Layer("residual", stage, index, here, here))
                if attentive:
                    layers.append(Layer("attention", stage, index, here, here))
        return layers

    def decoder_layers(self) -> list[Layer]:
        """From the latents' level to the pixels'."""
        channels = [self.decoder_channels[-1], *self.decoder_channels[::-1]]
        layers: list[Layer] = []
        for stage, count in enumerate(self.blocks[::-1]):
            here = channels[stage]
            layers += [Layer("residual", stage, index, here, here) for index in range(count)]
            if 0 < stage <= len(self.time_steps):
                layers.append(Layer("grow", stage, 0, here, channels[stage + 1], self.time_steps[-stage]))
        return layers


def from_diffusers(values: Mapping[str, Any]) -> MochiCodecConfig:
    """The `config.json` of an `AutoencoderKLMochi`, to decode as diffusers does (`lead`). Raises CheckpointError for
    that of another codec."""
    theirs = ForeignConfig(values, "the configuration of the Mochi codec")
    steps = theirs.take("temporal_expansions", (1, 2, 3))
    theirs.only(in_channels=15, out_channels=3, act_fn="silu", spatial_expansions=(2,) * len(steps))
    scaling = theirs.take("scaling_factor", 1.0)
    config = MochiCodecConfig(
        encoder_channels=theirs.take("encoder_block_out_channels", (64, 128, 256, 384)),
        decoder_channels=theirs.take("decoder_block_out_channels", (128, 256, 512, 768)),
        time_steps=steps,
        blocks=theirs.take("layers_per_block", (3, 3, 4, 6, 3)),
        attention=theirs.take("add_attention_block", (False, True, True, True, True)),
        lead="end",
        latent_channels=theirs.take("latent_channels", 12),
        latent_mean=theirs.take("latents_mean", LATENT_MEAN),
        latent_std=tuple(std / scaling for std in theirs.take("latents_std", LATENT_STD)),
    )
    theirs.done()
    return config


def to_diffusers(config: MochiCodecConfig) -> dict[str, Any]:
    """What `from_diffusers` reads as this configuration; `lead` is not among it."""
    return {
        "_class_name": "AutoencoderKLMochi",
        "act_fn": "silu",
        "add_attention_block": list(config.attention),
        "decoder_block_out_channels": list(config.decoder_channels),
        "encoder_block_out_channels": list(config.encoder_channels),
        "in_channels": 15,
        "latent_channels": config.latent_channels,
        "latents_mean": list(config.latent_mean),
        "latents_std": list(config.latent_std),
        "layers_per_block": list(config.blocks),
        "out_channels": 3,
        "scaling_factor": 1.0,
        "spatial_expansions": [2] * len(config.time_steps),
        "temporal_expansions": list(config.time_steps),
    }
