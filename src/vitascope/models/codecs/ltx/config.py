"""The shape of an LTX codec, its published generations, and the order of its layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any, Literal

from vitascope.core.errors import InputError, choice
from vitascope.core.shapes import VideoStrides
from vitascope.nn.resample import Block

EncoderStep = Literal["none", "conv", "space", "time", "both"]
DecoderStep = Literal["none", "plain", "residual"]
ENCODER_STRIDES: dict[str, Block] = {
    "none": (1, 1, 1), "conv": (2, 2, 2), "space": (1, 2, 2), "time": (2, 1, 1), "both": (2, 2, 2)
}  # fmt: skip


@dataclass(frozen=True)
class EncoderStage:
    """`blocks` residual blocks of `channels`, then a step to the next stage: "conv" a convolution of stride 2, "space",
    "time" or "both" a convolution whose blocks of cells become channels, beside the mean of the cells."""

    channels: int
    blocks: int
    step: EncoderStep = "none"


@dataclass(frozen=True)
class DecoderStage:
    """A step of stride 2 x 2 x 2 from the stage before, then `blocks` residual blocks of `channels`.

    step: "residual" adds the input to it, shown larger. narrow: channels before the step for one after it.
    inject_noise: whether the blocks add noise with a learned scale per channel.
    """

    channels: int
    blocks: int
    step: DecoderStep = "none"
    narrow: int = 1
    inject_noise: bool = False


@dataclass(frozen=True)
class LTXCodecConfig:
    """The last stage of the encoder and the first of the decoder are the middle ones, without a step.

    timestep_conditioning: whether the decoder is told how noisy its latents are. scaling: of normalised latents.
    eps: of the norms in front of shortcuts. Raises InputError where values contradict each other.
    """

    encoder: tuple[EncoderStage, ...]
    decoder: tuple[DecoderStage, ...]
    latent_channels: int = 128
    patch_px: int = 4
    encoder_causal: bool = True
    decoder_causal: bool = False
    timestep_conditioning: bool = False
    scaling: float = 1.0
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if not self.encoder or not self.decoder:
            raise InputError("encoder and decoder need at least one stage each")
        stages = (*self.encoder, *self.decoder)
        sizes = [size for stage in stages for size in (stage.channels, stage.blocks)]
        if min(self.latent_channels, self.patch_px, *sizes) < 1 or not self.scaling > 0:
            raise InputError("channels, blocks, latent_channels, patch_px and scaling must be positive")
        if self.encoder[-1].step != "none" or self.decoder[0].step != "none":
            raise InputError("the last stage of the encoder and the first of the decoder have no step")
        for stage, after in pairwise(self.encoder):
            _check_packing(stage, after.channels)
        for before, stage in pairwise(self.decoder):
            self._check_growth(before.channels, stage)
        doublings = sum(stage.step != "none" for stage in self.decoder)
        if (self._axis(0), self._axis(1)) != (2**doublings, 2**doublings):
            raise InputError(
                f"the encoder has the strides {self._axis(0)} in time and {self._axis(1)} in space after its patch, "
                f"the decoder {2**doublings} in both"
            )

    def _check_growth(self, before: int, stage: DecoderStage) -> None:
        after = stage.channels * stage.narrow if stage.step != "none" else stage.channels
        if stage.narrow not in (1, 2, 4, 8) or (stage.narrow > 1 and (stage.step == "none" or after != before)):
            raise InputError(f"a step that narrows {stage.narrow} times (1, 2, 4 or 8) cannot follow {before} channels")
        if stage.step == "residual" and after % 8:
            raise InputError(f"a residual step shows 8 channels as one; {after} is not a multiple of 8")
        if after != before and (self.timestep_conditioning or stage.inject_noise):
            raise InputError("a stage that changes its channels in a block has neither noise nor timesteps")

    def _axis(self, axis: int) -> int:
        return prod(ENCODER_STRIDES[stage.step][axis] for stage in self.encoder)

    @property
    def strides(self) -> VideoStrides:
        """Frames and px per latent cell."""
        return VideoStrides(self._axis(0), self._axis(1) * self.patch_px, self._axis(2) * self.patch_px)


def _check_packing(stage: EncoderStage, out_channels: int) -> None:
    cells = prod(ENCODER_STRIDES[stage.step])
    if stage.step in ("space", "time", "both") and (stage.channels * cells % out_channels or out_channels % cells):
        raise InputError(f"{stage.channels} channels of {cells} cells cannot become {out_channels} channels")


_OLD_ENCODER = (
    EncoderStage(128, 4, "conv"), EncoderStage(256, 3, "conv"), EncoderStage(512, 3, "conv"), EncoderStage(512, 3),
    EncoderStage(512, 4),
)  # fmt: skip
_NEW_ENCODER = (
    EncoderStage(128, 4, "space"), EncoderStage(256, 6, "time"), EncoderStage(512, 6, "both"),
    EncoderStage(1024, 2, "both"), EncoderStage(2048, 2),
)  # fmt: skip
PRESETS: dict[str, LTXCodecConfig] = {
    "0.9.0": LTXCodecConfig(
        _OLD_ENCODER,
        (DecoderStage(512, 4), DecoderStage(512, 3), DecoderStage(512, 3, "plain"), DecoderStage(256, 3, "plain"),
         DecoderStage(128, 4, "plain")),
    ),
    "0.9.1": LTXCodecConfig(
        _OLD_ENCODER,
        (DecoderStage(1024, 8), DecoderStage(512, 7, "residual", 2, True), DecoderStage(256, 6, "residual", 2, True),
         DecoderStage(128, 5, "residual", 2, True)),
        timestep_conditioning=True,
    ),
    "0.9.5": LTXCodecConfig(
        _NEW_ENCODER,
        (DecoderStage(1024, 5), *(DecoderStage(channels, 5, "residual", 2) for channels in (512, 256, 128))),
        timestep_conditioning=True,
    ),
}  # fmt: skip
"""By the first release that has it; 0.9.6, 0.9.7 and 0.9.8 have the codec of 0.9.5."""

LayerKind = Literal["in", "residual", "change", "conv", "pack", "grow", "out"]


@dataclass(frozen=True)
class Layer:
    """One layer of encoder or decoder: `place` counts the blocks of its stage, `scale` is rows per latent row (decoder
    alone). "change" is a residual block that changes the channels."""

    kind: LayerKind
    stage: int
    in_channels: int
    out_channels: int
    stride: Block = (1, 1, 1)
    place: int = 0
    scale: int = 1


def encoder_layers(config: LTXCodecConfig) -> tuple[Layer, ...]:
    """In order of the forward pass."""
    stages = config.encoder
    layers = [Layer("in", 0, 3 * config.patch_px**2, stages[0].channels)]
    for index, stage in enumerate(stages):
        here = stage.channels
        after = stages[index + 1].channels if index + 1 < len(stages) else here
        layers += [Layer("residual", index, here, here, place=place) for place in range(stage.blocks)]
        stride = ENCODER_STRIDES[stage.step]
        if stage.step == "conv":
            layers.append(Layer("conv", index, here, here, stride))
        if stage.step in ("none", "conv") and here != after:
            layers.append(Layer("change", index, here, after))
        elif stage.step not in ("none", "conv"):
            layers.append(Layer("pack", index, here, after, stride))
    return (*layers, Layer("out", len(stages) - 1, stages[-1].channels, config.latent_channels + 1))


def decoder_layers(config: LTXCodecConfig) -> tuple[Layer, ...]:
    """In order of the forward pass."""
    stages, scale, before = config.decoder, 1, config.decoder[0].channels
    layers = [Layer("in", 0, config.latent_channels, before)]
    for index, stage in enumerate(stages):
        here, wide = stage.channels, stage.channels * stage.narrow
        if before != wide:
            layers.append(Layer("change", index, before, wide, scale=scale))
        if stage.step != "none":
            scale *= 2
            layers.append(Layer("grow", index, wide, here, (2, 2, 2), scale=scale))
        layers += [Layer("residual", index, here, here, place=place, scale=scale) for place in range(stage.blocks)]
        before = here
    return (*layers, Layer("out", len(stages) - 1, before, 3 * config.patch_px**2, scale=scale))


BLOCK_TYPES = ("LTXVideoDownBlock3D", "LTXVideo095DownBlock3D")
PACKINGS: dict[str, EncoderStep] = {"conv": "conv", "spatial": "space", "temporal": "time", "spatiotemporal": "both"}
_LISTS = (
    "block_out_channels", "decoder_block_out_channels", "layers_per_block", "decoder_layers_per_block",
    "spatio_temporal_scaling", "decoder_spatio_temporal_scaling",
)  # fmt: skip
_OTHERS = {
    "down_block_types", "downsample_type", "upsample_residual", "upsample_factor", "decoder_inject_noise",
    "latent_channels", "patch_size", "patch_size_t", "in_channels", "out_channels", "encoder_causal", "decoder_causal",
    "timestep_conditioning", "scaling_factor", "resnet_norm_eps", "spatial_compression_ratio",
    "temporal_compression_ratio", "latents_mean", "latents_std",
}  # fmt: skip
"""The last four say nothing that the shape or the weights do not say."""


def from_diffusers(values: Mapping[str, Any]) -> LTXCodecConfig:
    """The `config.json` of an `AutoencoderKLLTXVideo`; keys that older files lack have the values of 0.9.0.

    Raises InputError for keys that are missing or unknown and for shapes that no such codec has.
    """
    unknown = [key for key in values if key not in _OTHERS and key not in _LISTS and not key.startswith("_")]
    missing = [key for key in _LISTS if key not in values]
    if unknown or missing:
        raise InputError(f"the codec's configuration lacks {missing or 'nothing'} and has unknown keys {unknown}")
    for key, only in (("patch_size_t", 1), ("in_channels", 3), ("out_channels", 3)):
        if values.get(key, only) != only:
            raise InputError(f"{key} must be {only}, got {values[key]}")
    return LTXCodecConfig(
        _encoder_stages(values),
        _decoder_stages(values),
        values.get("latent_channels", 128),
        values.get("patch_size", 4),
        values.get("encoder_causal", True),
        values.get("decoder_causal", False),
        values.get("timestep_conditioning", False),
        values.get("scaling_factor", 1.0),
        values.get("resnet_norm_eps", 1e-6),
    )


def _encoder_stages(values: Mapping[str, Any]) -> tuple[EncoderStage, ...]:
    channels, scaling = values["block_out_channels"], values["spatio_temporal_scaling"]
    types = values.get("down_block_types", [BLOCK_TYPES[0]] * len(channels))
    new = choice("down_block_types", types[-1], BLOCK_TYPES) == BLOCK_TYPES[1]
    num = len(channels) - new
    packings = values.get("downsample_type", ["conv"] * num)
    _check_lengths({"down_block_types": types, "downsample_type": packings, "spatio_temporal_scaling": scaling}, num)
    _check_lengths({"layers_per_block": values["layers_per_block"]}, num + 1)
    stages = []
    for index in range(num):
        packing: EncoderStep = PACKINGS[choice("downsample_type", packings[index], PACKINGS)] if new else "conv"
        if (types[index] == BLOCK_TYPES[1]) != new:
            raise InputError("down_block_types must all be the same")
        if new and channels[index] != channels[index + 1] and (packing == "conv" or not scaling[index]):
            raise InputError(f"a {BLOCK_TYPES[1]} changes its channels only where it packs cells")
        step = packing if scaling[index] else "none"
        stages.append(EncoderStage(channels[index], values["layers_per_block"][index], step))
    return (*stages, EncoderStage(channels[-1], values["layers_per_block"][-1]))


def _decoder_stages(values: Mapping[str, Any]) -> tuple[DecoderStage, ...]:
    channels = values["decoder_block_out_channels"][::-1]
    num, blocks = len(channels), values["decoder_layers_per_block"][::-1]
    scaling = values["decoder_spatio_temporal_scaling"][::-1]
    residual = values.get("upsample_residual", [False] * num)[::-1]
    factors = values.get("upsample_factor", [1] * num)[::-1]
    noise = values.get("decoder_inject_noise", [False] * (num + 1))[::-1]
    _check_lengths({"upsample_residual": residual, "upsample_factor": factors, "spatio_temporal_scaling": scaling}, num)
    _check_lengths({"decoder_layers_per_block": blocks, "decoder_inject_noise": noise}, num + 1)
    stages = [DecoderStage(channels[0], blocks[0], inject_noise=noise[0])]
    for index in range(num):
        step: DecoderStep = "none" if not scaling[index] else "residual" if residual[index] else "plain"
        here = channels[index] // factors[index]
        stages.append(DecoderStage(here, blocks[index + 1], step, factors[index], noise[index + 1]))
    return tuple(stages)


def _check_lengths(lists: Mapping[str, Any], num: int) -> None:
    for key, values in lists.items():
        if len(values) < num:
            raise InputError(f"{key} needs {num} values, got {len(values)}")


def to_diffusers(config: LTXCodecConfig) -> dict[str, Any]:
    """What `from_diffusers` reads as this configuration."""
    new = any(stage.step in ("space", "time", "both") for stage in config.encoder)
    names: dict[str, str] = {ours: theirs for theirs, ours in PACKINGS.items()} | {"none": "conv"}
    *stages, middle = config.encoder
    ups = config.decoder[:0:-1]
    return {
        "_class_name": "AutoencoderKLLTXVideo",
        "block_out_channels": [stage.channels for stage in (config.encoder if new else stages)],
        "decoder_block_out_channels": [stage.channels * stage.narrow for stage in ups],
        "decoder_causal": config.decoder_causal,
        "decoder_inject_noise": [stage.inject_noise for stage in config.decoder[::-1]],
        "decoder_layers_per_block": [stage.blocks for stage in config.decoder[::-1]],
        "decoder_spatio_temporal_scaling": [stage.step != "none" for stage in ups],
        "down_block_types": [BLOCK_TYPES[new]] * len(stages),
        "downsample_type": [names[stage.step] for stage in stages],
        "encoder_causal": config.encoder_causal,
        "latent_channels": config.latent_channels,
        "layers_per_block": [stage.blocks for stage in (*stages, middle)],
        "patch_size": config.patch_px,
        "resnet_norm_eps": config.eps,
        "scaling_factor": config.scaling,
        "spatio_temporal_scaling": [stage.step != "none" for stage in stages],
        "timestep_conditioning": config.timestep_conditioning,
        "upsample_factor": [stage.narrow for stage in ups],
        "upsample_residual": [stage.step == "residual" for stage in ups],
    }
