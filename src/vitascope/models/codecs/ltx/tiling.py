"""The LTX codec tile by tile. In time it needs none: chunks give what the whole clip gives.

Tiles whose overlap is three times the codec's reach equal the whole frame, since the outer third of an overlap counts
for nothing. The published codecs reach too far for that (by their convolutions 15 cells in the encoder, 22 in the
decoder): there tiles are close to the whole frame, the closer the larger the overlap, and not equal to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitascope.core.shapes import check_frames
from vitascope.models.codecs.ltx.model import NOISE_SCALE, TIMESTEP, LTXCodec
from vitascope.nn.tiling import Span, Tiling, blend_tiles


def encode_tiled(codec: LTXCodec, frames: Tensor, tiling: Tiling, chunk: int = 1) -> Tensor:
    """`codec.encode` tile by tile: frames (B, 3, T, H, W) to latents (B, C, N, h, w)."""
    check_frames(frames.shape, codec.strides)
    height, width = codec.strides.height, codec.strides.width

    def code(rows: Span, columns: Span) -> Tensor:
        return codec.encode(frames[:, :, :, rows.slice(height), columns.slice(width)], chunk)

    return blend_tiles(code, (frames.shape[3] // height, frames.shape[4] // width), tiling, (1, 1))


def decode_tiled(
    codec: LTXCodec,
    latents: Tensor,
    tiling: Tiling,
    chunk: int = 1,
    timestep: float = TIMESTEP,
    noise_scale: float = NOISE_SCALE,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`codec.decode` tile by tile: latents (B, C, N, h, w) to frames (B, 3, T, H, W). Every tile gets its part of the
    noise that the whole frame gets."""
    decoder = codec.tile_decoder(latents, timestep, noise_scale, generator)

    def code(rows: Span, columns: Span) -> Tensor:
        return torch.cat(list(decoder(rows.slice(), columns.slice(), chunk)), 2)

    size = (latents.shape[3], latents.shape[4])
    return blend_tiles(code, size, tiling, (codec.strides.height, codec.strides.width))
