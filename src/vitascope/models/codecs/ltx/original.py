"""The authors' files of the LTX codec: how they are told from others, and the configuration in their metadata.

There the layers are two lists of blocks: `res_x` (residual blocks), `res_x_y` (one that changes the channels) and
`compress_...` (a step between levels). The decoder's list stands in the order of the encoder's and is read backwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vitascope.core.errors import CheckpointError
from vitascope.models.codecs.ltx.config import PRESETS, DecoderStage, EncoderStage, EncoderStep, LTXCodecConfig
from vitascope.weights.foreign import ForeignConfig
from vitascope.weights.shapes import Shapes

MARKS = ("encoder.conv_in.conv.weight", "decoder.conv_in.conv.weight", "per_channel_statistics.mean-of-means")
"""Names that together are in no other files."""
STEPS: dict[str, EncoderStep] = {
    "compress_all": "conv", "compress_space_res": "space", "compress_time_res": "time", "compress_all_res": "both"
}  # fmt: skip
OLD_BLOCKS = (
    ("res_x", 4), ("compress_all", 1), ("res_x_y", 1), ("res_x", 3), ("compress_all", 1), ("res_x_y", 1), ("res_x", 3),
    ("compress_all", 1), ("res_x", 3), ("res_x", 4),
)  # fmt: skip
"""Of version 0.9.0, whose file may lack them."""

Block = tuple[str, dict[str, Any]]


def read_config(shapes: Shapes, notes: Mapping[str, Any]) -> LTXCodecConfig:
    """The configuration of a file. notes: "vae" of the configuration in its metadata; without, that of 0.9.0.

    Raises CheckpointError for what is not an LTX-Video codec.
    """
    theirs = ForeignConfig(notes, "the configuration of the LTX codec")
    theirs.only(dims=3, in_channels=3, out_channels=3, norm_layer="pixel_norm", latent_log_var="uniform")
    theirs.only(use_quant_conv=False, spatial_padding_mode="zeros", normalize_latent_channels=False, double_z=True)
    blocks = theirs.take("blocks", OLD_BLOCKS)
    encoder = _blocks(theirs.take("encoder_blocks", blocks))
    decoder = _blocks(theirs.take("decoder_blocks", blocks))
    config = LTXCodecConfig(
        _encoder_stages(encoder, theirs.take("encoder_base_channels", 128)),
        _decoder_stages(decoder, theirs.take("decoder_base_channels", 128)),
        theirs.take("latent_channels", 128),
        theirs.take("patch_size", 4),
        decoder_causal=theirs.take("causal_decoder", False),
        timestep_conditioning=theirs.take("timestep_conditioning", False),
        scaling=theirs.take("scaling_factor", 1.0),
    )
    theirs.done()
    if shapes.axis("encoder.conv_in.conv.weight", 1) != 3 * config.patch_px**2:
        raise CheckpointError(f"patches of {config.patch_px} px do not fit the first convolution of the LTX codec")
    return config


def write_config(config: LTXCodecConfig) -> dict[str, Any]:
    """ "vae" of the metadata that goes with this configuration. Raises CheckpointError for what it cannot say."""
    if not config.encoder_causal or config.eps != PRESETS["0.9.0"].eps:
        raise CheckpointError("the authors' layout knows only causal encoders with norms of eps 1e-6")
    return {
        "_class_name": "CausalVideoAutoencoder",
        "causal_decoder": config.decoder_causal,
        "decoder_base_channels": config.decoder[-1].channels,
        "decoder_blocks": [list(block) for block in _write_decoder(config.decoder)],
        "dims": 3,
        "encoder_base_channels": config.encoder[0].channels,
        "encoder_blocks": [list(block) for block in _write_encoder(config.encoder)],
        "in_channels": 3,
        "latent_channels": config.latent_channels,
        "latent_log_var": "uniform",
        "norm_layer": "pixel_norm",
        "out_channels": 3,
        "patch_size": config.patch_px,
        "scaling_factor": config.scaling,
        "spatial_padding_mode": "zeros",
        "timestep_conditioning": config.timestep_conditioning,
        "use_quant_conv": False,
    }


def _blocks(listed: Sequence[Any]) -> list[Block]:
    """[name, settings] or [name, number of layers], as both are written."""
    blocks: list[Block] = []
    for entry in listed:
        if not isinstance(entry, Sequence) or isinstance(entry, str) or len(entry) != 2:
            raise CheckpointError(f"a block of the LTX codec is [name, settings], got {entry!r}")
        name, settings = entry
        settings = {"num_layers": settings} if isinstance(settings, int) else settings
        valid = ("res_x", "res_x_y", *STEPS)
        if name not in valid or not isinstance(settings, Mapping):
            raise CheckpointError(f"block {name!r} of the LTX codec is not known; valid: {', '.join(valid)}")
        blocks.append((str(name), dict(settings)))
    return blocks


def _encoder_stages(blocks: Sequence[Block], channels: int) -> tuple[EncoderStage, ...]:
    stages: list[EncoderStage] = []
    for name, settings in blocks:
        if name == "res_x":
            stages.append(EncoderStage(channels, settings["num_layers"]))
        elif name == "res_x_y":
            channels *= settings.get("multiplier", 2)
        else:
            if not stages or stages[-1].step != "none":
                raise CheckpointError(f"{name} of the LTX codec must follow a res_x block")
            stages[-1] = replace(stages[-1], step=STEPS[name])
            channels *= 1 if name == "compress_all" else settings.get("multiplier", 2)
    return tuple(stages)


def _decoder_stages(blocks: Sequence[Block], channels: int) -> tuple[DecoderStage, ...]:
    for name, settings in blocks:
        channels *= settings.get("multiplier", 2 if name == "res_x_y" else 1)
    stages: list[DecoderStage] = []
    waiting = DecoderStage(0, 0)
    for name, settings in blocks[::-1]:
        if name == "res_x":
            noise = settings.get("inject_noise", False)
            waiting = replace(waiting, channels=channels, blocks=settings["num_layers"], inject_noise=noise)
            stages.append(waiting)
            waiting = DecoderStage(0, 0)
        elif name == "res_x_y":
            channels //= settings.get("multiplier", 2)
        elif name == "compress_all" and waiting.step == "none":
            narrow = settings.get("multiplier", 1)
            channels //= narrow
            waiting = DecoderStage(0, 0, "residual" if settings.get("residual", False) else "plain", narrow)
        else:
            raise CheckpointError(f"{name} cannot stand there in the decoder of an LTX codec")
    return tuple(stages)


def _write_encoder(stages: Sequence[EncoderStage]) -> list[Block]:
    names = {ours: theirs for theirs, ours in STEPS.items()}
    blocks: list[Block] = []
    for stage, after in zip(stages, [*stages[1:], stages[-1]], strict=True):
        blocks.append(("res_x", {"num_layers": stage.blocks}))
        factor = _factor(after.channels, stage.channels)
        if stage.step in ("space", "time", "both"):
            blocks.append((names[stage.step], {"multiplier": factor}))
            continue
        blocks += [(names[stage.step], {})] if stage.step == "conv" else []
        blocks += [("res_x_y", {"multiplier": factor})] if factor != 1 else []
    return blocks


def _write_decoder(stages: Sequence[DecoderStage]) -> list[Block]:
    blocks: list[Block] = []
    for before, stage in zip([stages[0], *stages[:-1]], stages, strict=True):
        factor = _factor(before.channels, stage.channels * stage.narrow)
        blocks += [("res_x_y", {"multiplier": factor})] if factor != 1 else []
        if stage.step != "none":
            blocks.append(("compress_all", {"residual": stage.step == "residual", "multiplier": stage.narrow}))
        blocks.append(("res_x", {"num_layers": stage.blocks, "inject_noise": stage.inject_noise}))
    return blocks[::-1]


def _factor(large: int, small: int) -> int:
    if large % small:
        raise CheckpointError(f"the authors' layout cannot say that {small} channels become {large}")
    return large // small
