"""Key tables of the Wan codec: diffusers' layout and the authors' own."""

from __future__ import annotations

from itertools import pairwise

from vitascope.models.codecs.wan.config import WanCodecConfig
from vitascope.weights.keys import KeyTable, Rename, Rule, Squeeze, renamed_layers


def diffusers_keys(config: WanCodecConfig) -> KeyTable:
    """Names of `AutoencoderKLWan`."""
    rules = [
        *_pointwise("quant_conv", "to_moments"), *_pointwise("post_quant_conv", "from_latents"),
        *_ends("encoder", ("conv_in", "norm_out", "conv_out")), *_ends("decoder", ("conv_in", "norm_out", "conv_out")),
    ]  # fmt: skip
    down, up = _kinds(config)
    middles = ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1")
    for index, kind in enumerate(down[:-3]):
        rules += _layer(kind, f"encoder.down_blocks.{index}", f"encoder.layers.{index}", RESIDUAL)
    for offset, (kind, theirs) in enumerate(zip(down[-3:], middles, strict=True), start=len(down) - 3):
        rules += _layer(kind, f"encoder.{theirs}", f"encoder.layers.{offset}", RESIDUAL)
    for index, (kind, theirs) in enumerate(zip(up[:3], middles, strict=True)):
        rules += _layer(kind, f"decoder.{theirs}", f"decoder.layers.{index}", RESIDUAL)
    for index, kind in enumerate(up[3:]):
        block, place = divmod(index, config.blocks + 2)
        theirs = f"resnets.{place}" if place <= config.blocks else "upsamplers.0"
        rules += _layer(kind, f"decoder.up_blocks.{block}.{theirs}", f"decoder.layers.{index + 3}", RESIDUAL)
    return tuple(rules)


def original_keys(config: WanCodecConfig) -> KeyTable:
    """Names of the authors' file."""
    rules = [
        *_pointwise("conv1", "to_moments"), *_pointwise("conv2", "from_latents"),
        *_ends("encoder", ("conv1", "head.0", "head.2")), *_ends("decoder", ("conv1", "head.0", "head.2")),
    ]  # fmt: skip
    down, up = _kinds(config)
    last = len(down) - 3
    for index, kind in enumerate(down):
        theirs = f"downsamples.{index}" if index < last else f"middle.{index - last}"
        rules += _layer(kind, f"encoder.{theirs}", f"encoder.layers.{index}", ORIGINAL_RESIDUAL)
    for index, kind in enumerate(up):
        theirs = f"middle.{index}" if index < 3 else f"upsamples.{index - 3}"
        rules += _layer(kind, f"decoder.{theirs}", f"decoder.layers.{index}", ORIGINAL_RESIDUAL)
    return tuple(rules)


RESIDUAL = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "shortcut": "conv_shortcut"}
ORIGINAL_RESIDUAL = {
    "norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6", "shortcut": "shortcut"
}  # fmt: skip
"""Our names of the parts of a residual block, and theirs."""

Kind = tuple[str, bool]
"""A layer: "residual" (True: with a shortcut), "attention" or "resample" (True: in time too)."""


def _kinds(config: WanCodecConfig) -> tuple[list[Kind], list[Kind]]:
    """Layers of encoder and decoder in order."""
    steps = config.halve_time
    middle: list[Kind] = [("residual", False), ("attention", False), ("residual", False)]
    down: list[Kind] = []
    for level, (above, here) in enumerate(pairwise((config.base, *config.channels))):
        down += [("residual", above != here), *[("residual", False)] * (config.blocks - 1)]
        down += [("resample", steps[level])] if level < len(steps) else []
    up: list[Kind] = []
    channels = config.decoder_channels[::-1]
    for level, here in enumerate(channels):
        above = channels[level - 1] // 2 if level else here
        up += [("residual", above != here), *[("residual", False)] * config.blocks]
        up += [("resample", steps[::-1][level])] if level < len(steps) else []
    return down + middle, middle + up


def _layer(kind: Kind, theirs: str, ours: str, residual: dict[str, str]) -> list[Rule]:
    match kind:
        case ("residual", shortcut):
            rules: list[Rule] = []
            for norm, conv in (("norm1", "conv1"), ("norm2", "conv2")):
                rules.append(_norm(f"{theirs}.{residual[norm]}", f"{ours}.{norm}", 3))
                rules += renamed_layers({f"{theirs}.{residual[conv]}": f"{ours}.{conv}"})
            return rules + (_pointwise(f"{theirs}.{residual['shortcut']}", f"{ours}.shortcut") if shortcut else [])
        case ("attention", _):
            return [
                _norm(f"{theirs}.norm", f"{ours}.norm", 2),
                *_pointwise(f"{theirs}.to_qkv", f"{ours}.qkv", 2),
                *_pointwise(f"{theirs}.proj", f"{ours}.out", 2),
            ]
        case (_, time):
            space = renamed_layers({f"{theirs}.resample.1": f"{ours}.space"})
            return space + (renamed_layers({f"{theirs}.time_conv": f"{ours}.time"}) if time else [])


def _ends(part: str, names: tuple[str, str, str]) -> list[Rule]:
    """First convolution, last norm and last convolution of encoder or decoder."""
    first, norm, last = names
    return [
        *renamed_layers({f"{part}.{first}": f"{part}.conv_in"}),
        _norm(f"{part}.{norm}", f"{part}.norm_out", 3),
        *renamed_layers({f"{part}.{last}": f"{part}.conv_out"}),
    ]


def _norm(theirs: str, ours: str, ones: int) -> Rule:
    return Squeeze(f"{theirs}.gamma", f"{ours}.weight", -ones)


def _pointwise(theirs: str, ours: str, ones: int = 3) -> list[Rule]:
    """A convolution of one cell is a matrix."""
    return [Squeeze(f"{theirs}.weight", f"{ours}.weight", -ones), Rename(f"{theirs}.bias", f"{ours}.bias")]
