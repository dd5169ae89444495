"""Key tables of the Mochi codec: diffusers' layout and the authors' own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

from torch import Tensor

from vitascope.core.errors import CheckpointError
from vitascope.models.codecs.mochi.config import Layer, MochiCodecConfig
from vitascope.nn.resample import Block
from vitascope.weights.keys import Fuse, KeyTable, Rename, Rule, Squeeze, renamed_layers

Part = Literal["encoder", "decoder"]
PARTS: tuple[Part, ...] = ("encoder", "decoder")


@dataclass(frozen=True)
class KernelToMatrix(Rename):
    """A kernel (outputs, C, *block) becomes a matrix (outputs, block * C): a convolution without overlap, with the
    channels last as `nn.resample.space_to_depth` gives them."""

    block: Block

    def read(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        for tensor in tensors:
            if tensor.shape[2:] != self.block:
                raise CheckpointError(
                    f"{self.theirs_name} has the shape {tuple(tensor.shape)}, not (..., {self.block})"
                )
        return [tensor.movedim(1, -1).flatten(1) for tensor in tensors]

    def write(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensor.unflatten(1, (*self.block, -1)).movedim(-1, 1) for tensor in tensors]


@dataclass(frozen=True)
class ChannelsInnermost(Rename):
    """Rows (C, cells) of a matrix or bias become rows (cells, C), the order of `nn.resample.depth_to_space`."""

    cells: int

    def read(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [self._turn(tensor, (-1, self.cells)) for tensor in tensors]

    def write(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [self._turn(tensor, (self.cells, -1)) for tensor in tensors]

    def _turn(self, tensor: Tensor, shape: tuple[int, int]) -> Tensor:
        if len(tensor) % self.cells:
            raise CheckpointError(f"{self.theirs_name} has {len(tensor)} rows, not a multiple of {self.cells}")
        return tensor.unflatten(0, shape).transpose(0, 1).flatten(0, 1)


def diffusers_keys(config: MochiCodecConfig) -> KeyTable:
    """Names of `AutoencoderKLMochi`."""
    rules: list[Rule] = renamed_layers({
        "encoder.proj_in": "encoder.lift", "encoder.norm_out.norm_layer": "encoder.norm_out",
        "decoder.proj_out": "decoder.linear_out",
    })  # fmt: skip
    rules += [
        Rename("encoder.proj_out.weight", "encoder.linear_out.weight"),
        *_pointwise("decoder.conv_in", "decoder."),
    ]
    for part in PARTS:
        for number, layer in enumerate(_layers(config, part)):
            stage = _diffusers_stage(config, part, layer.stage)
            rules += _layer(layer, stage, f"{part}.layers.{number}", _diffusers_layer)
    return tuple(rules)


def original_keys(config: MochiCodecConfig, part: Part | None = None) -> KeyTable:
    """Names of the authors' files, of which there are two: a `part` of the codec (its `encoder` or `decoder` module)
    and of one file; or, without, the whole codec and a file with both, each under its name, as repackaged ones are."""
    rules: list[Rule] = []
    for each in PARTS if part is None else (part,):
        at = "" if part else f"{each}."
        if each == "encoder":
            rules += renamed_layers({f"{at}layers.0": f"{at}lift", f"{at}output_norm": f"{at}norm_out"})
            rules.append(Rename(f"{at}output_proj.weight", f"{at}linear_out.weight"))
        else:
            rules += [*_pointwise(f"{at}blocks.0.0", at), *renamed_layers({f"{at}output_proj": f"{at}linear_out"})]
        for number, layer in enumerate(_layers(config, each)):
            place = _original_encoder_place if each == "encoder" else _original_decoder_place
            rules += _layer(layer, at + place(config, layer), f"{at}layers.{number}", _original_layer)
    return tuple(rules)


Names = dict[str, str]
"""Our names of the parts of a layer, and theirs."""


def _layers(config: MochiCodecConfig, part: Part) -> list[Layer]:
    return config.encoder_layers() if part == "encoder" else config.decoder_layers()


def _layer(layer: Layer, theirs: str, ours: str, names: Callable[[Layer], Names]) -> list[Rule]:
    """Rules of one layer, their names under `theirs`."""
    parts = {part: f"{theirs}.{name}" if name else theirs for part, name in names(layer).items()}
    block = (layer.steps, 2, 2)
    match layer.kind:
        case "residual":
            return renamed_layers({name: f"{ours}.{part}" for part, name in parts.items()})
        case "attention":
            rules: list[Rule] = renamed_layers({parts["norm"]: f"{ours}.norm", parts["out"]: f"{ours}.out"})
            projections = tuple(f"{parts[part]}.weight" for part in ("q", "k", "v", "qkv") if part in parts)
            return [*rules, Fuse(projections, f"{ours}.qkv.weight")]
        case "shrink":
            return [
                KernelToMatrix(f"{parts['linear']}.weight", f"{ours}.linear.weight", block),
                Rename(f"{parts['linear']}.bias", f"{ours}.linear.bias"),
            ]
        case "grow":
            return [
                ChannelsInnermost(f"{parts['linear']}.{leaf}", f"{ours}.linear.{leaf}", prod(block))
                for leaf in ("weight", "bias")
            ]


def _diffusers_stage(config: MochiCodecConfig, part: Part, stage: int) -> str:
    if stage == 0:
        return f"{part}.block_in"
    if stage > len(config.time_steps):
        return f"{part}.block_out"
    return f"{part}.{'down' if part == 'encoder' else 'up'}_blocks.{stage - 1}"


def _diffusers_layer(layer: Layer) -> Names:
    index = layer.index
    match layer.kind:
        case "residual":
            parts = {"norm1": "norm1.norm_layer", "conv1": "conv1.conv", "norm2": "norm2.norm_layer"}
            return {part: f"resnets.{index}.{name}" for part, name in (parts | {"conv2": "conv2.conv"}).items()}
        case "attention":
            projections = {part: f"attentions.{index}.to_{part}" for part in "qkv"}
            return {"norm": f"norms.{index}.norm_layer", **projections, "out": f"attentions.{index}.to_out.0"}
        case "shrink":
            return {"linear": "conv_in.conv"}
        case "grow":
            return {"linear": "proj"}


def _original_encoder_place(config: MochiCodecConfig, layer: Layer) -> str:
    """All stages are in one list, `layers`: those of a level as a list of its own, `shrink` first."""
    steps, before = len(config.time_steps), 1 + config.blocks[0]
    if layer.stage == 0:
        return f"layers.{1 + layer.index}"
    if layer.stage > steps:
        return f"layers.{before + steps + layer.index}"
    inner = 0 if layer.kind == "shrink" else 1 + layer.index
    return f"layers.{before + layer.stage - 1}.layers.{inner}"


def _original_decoder_place(config: MochiCodecConfig, layer: Layer) -> str:
    """`blocks` is a list of stages; the first begins with the lift."""
    if layer.kind == "grow":
        return f"blocks.{layer.stage}.proj"
    if 0 < layer.stage <= len(config.time_steps):
        return f"blocks.{layer.stage}.blocks.{layer.index}"
    return f"blocks.{layer.stage}.{layer.index + (layer.stage == 0)}"


def _original_layer(layer: Layer) -> Names:
    match layer.kind:
        case "residual":
            return {"norm1": "stack.0", "conv1": "stack.2", "norm2": "stack.3", "conv2": "stack.5"}
        case "attention":
            return {"norm": "attn_block.norm", "qkv": "attn_block.attn.qkv", "out": "attn_block.attn.out"}
        case "shrink" | "grow":
            return {"linear": ""}


def _pointwise(theirs: str, at: str) -> list[Rule]:
    """The decoder's lift: a convolution of one cell is a matrix."""
    return [Squeeze(f"{theirs}.weight", f"{at}lift.weight", -3), Rename(f"{theirs}.bias", f"{at}lift.bias")]
