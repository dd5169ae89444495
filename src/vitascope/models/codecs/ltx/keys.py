"""Key tables of the LTX codec: diffusers' layout and the authors' own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from vitascope.models.codecs.ltx.config import Layer, LTXCodecConfig, decoder_layers, encoder_layers
from vitascope.weights.keys import Drop, KeyTable, Rename, Rule, Squeeze, renamed_layers

UNUSED_STATISTICS = ("channel", "mean-of-stds", "mean-of-stds_over_std-of-means")
"""Of the authors' files, beside the mean and standard deviation of the latents."""
CHANGE = ("norm3", "conv_shortcut.conv")
ORIGINAL_CHANGE = ("norm3.norm", "conv_shortcut")
"""Norm and map of a block that changes its channels."""


def diffusers_keys(config: LTXCodecConfig) -> KeyTable:
    """Names of `AutoencoderKLLTXVideo`."""
    return (
        *_part("encoder", encoder_layers(config), _diffusers_names("down", config)),
        *_part("decoder", decoder_layers(config), _diffusers_names("up", config)),
        *_decoder_blocks(config, _diffusers_names("up", config)),
        *_timesteps(config, [_diffusers_stage("up", index, config) for index in range(len(config.decoder))], ""),
        Rename("latents_mean", "latent_mean"),
        Rename("latents_std", "latent_std"),
    )


def original_keys(config: LTXCodecConfig) -> KeyTable:
    """Names of the authors' files, without their prefix `vae.`."""
    down, up = (_original_names(way, config) for way in ("down", "up"))
    stages = [name.rsplit(".", 2)[0] for layer, name in zip(decoder_layers(config), up, strict=True) if _starts(layer)]
    return (
        *_part("encoder", encoder_layers(config), down, ORIGINAL_CHANGE),
        *_part("decoder", decoder_layers(config), up, ORIGINAL_CHANGE),
        *_decoder_blocks(config, up),
        *_timesteps(config, stages, "last_"),
        Rename("per_channel_statistics.mean-of-means", "latent_mean"),
        Rename("per_channel_statistics.std-of-means", "latent_std"),
        *(Drop(f"per_channel_statistics.{name}") for name in UNUSED_STATISTICS),
    )


def _starts(layer: Layer) -> bool:
    """Whether this is the first block of its stage."""
    return layer.kind == "residual" and layer.place == 0


def _diffusers_stage(way: str, index: int, config: LTXCodecConfig) -> str:
    """The middle stage is the encoder's last and the decoder's first."""
    if index == (len(config.encoder) - 1 if way == "down" else 0):
        return "mid_block"
    return f"{way}_blocks.{index if way == 'down' else index - 1}"


def _diffusers_names(way: str, config: LTXCodecConfig) -> list[str]:
    """Of each layer of encoder ("down") or decoder ("up")."""
    step = f"{way}samplers.0"
    parts = {"in": "conv_in", "out": "conv_out", "conv": step, "pack": step, "grow": step}
    parts["change"] = "conv_out" if way == "down" else "conv_in"
    names = []
    for layer in encoder_layers(config) if way == "down" else decoder_layers(config):
        part = parts.get(layer.kind, f"resnets.{layer.place}")
        inside = layer.kind not in ("in", "out")
        names.append(f"{_diffusers_stage(way, layer.stage, config)}.{part}" if inside else part)
    return names


def _original_names(way: str, config: LTXCodecConfig) -> list[str]:
    """Of each layer: the blocks of a stage, a step and a change of channels have each one number."""
    names, number = [], 0
    layers = encoder_layers(config) if way == "down" else decoder_layers(config)
    for (_, kind), group in groupby(layers, lambda layer: (layer.stage, layer.kind)):
        if kind in ("in", "out"):
            names.append(f"conv_{kind}")
            continue
        block = f"{way}_blocks.{number}"
        names += [f"{block}.res_blocks.{layer.place}" if kind == "residual" else block for layer in group]
        number += 1
    return names


def _part(part: str, layers: Sequence[Layer], names: Sequence[str], change: tuple[str, str] = CHANGE) -> list[Rule]:
    """What layers of encoder and decoder have alike."""
    rules: list[Rule] = []
    for index, (layer, name) in enumerate(zip(layers, names, strict=True)):
        theirs, ours = f"{part}.{name}", f"{part}.layers.{index}"
        match layer.kind:
            case "in" | "conv":
                rules += renamed_layers({f"{theirs}.conv": ours})
            case "out":
                rules += renamed_layers({f"{theirs}.conv": f"{ours}.conv"})
            case "pack" | "grow":
                rules += renamed_layers({f"{theirs}.conv.conv": f"{ours}.conv"})
            case "residual" | "change":
                rules += renamed_layers({f"{theirs}.conv{n}.conv": f"{ours}.conv{n}" for n in (1, 2)})
        if layer.kind == "change":
            norm, shortcut = (f"{theirs}.{name}" for name in change)
            rules += [
                *renamed_layers({norm: f"{ours}.norm"}),
                Squeeze(f"{shortcut}.weight", f"{ours}.shortcut.weight", -3),
                Rename(f"{shortcut}.bias", f"{ours}.shortcut.bias"),
            ]
    return rules


def _decoder_blocks(config: LTXCodecConfig, names: Sequence[str]) -> list[Rule]:
    """What blocks with timesteps or noise have besides."""
    rules: list[Rule] = []
    for index, (layer, name) in enumerate(zip(decoder_layers(config), names, strict=True)):
        theirs, ours = f"decoder.{name}", f"decoder.layers.{index}"
        if layer.kind == "residual" and config.timestep_conditioning:
            rules.append(Rename(f"{theirs}.scale_shift_table", f"{ours}.offsets"))
        if layer.kind == "residual" and config.decoder[layer.stage].inject_noise:
            rules += [Squeeze(f"{theirs}.per_channel_scale{n}", f"{ours}.noise{n}", -2) for n in (1, 2)]
    return rules


def _timesteps(config: LTXCodecConfig, stages: Sequence[str], last: str) -> list[Rule]:
    """`last` stands in the original names in front of what belongs to the last convolution."""
    if not config.timestep_conditioning:
        return []
    names = {}
    for index, stage in enumerate([*(f"{stage}." for stage in stages), last]):
        embedder = f"decoder.{stage}time_embedder.timestep_embedder"
        names |= {f"{embedder}.linear_{n}": f"decoder.vectors.{index}.{part}" for n, part in ((1, "rise"), (2, "out"))}
    out = len(decoder_layers(config)) - 1
    return [
        *renamed_layers(names),
        Rename(f"decoder.{last}scale_shift_table", f"decoder.layers.{out}.offsets"),
        Rename("decoder.timestep_scale_multiplier", "decoder.timestep_scale"),
    ]
