"""The causal video codec tile by tile, so that memory follows the tile and not the frame.

B batch, C latent channels, N latent frames, h and w cells.
"""

from __future__ import annotations

from torch import Tensor

from vitascope.core.shapes import check_frames, check_latents
from vitascope.models.codecs.causal_video.model import CausalVideoCodec
from vitascope.nn.tiling import Span, Tiling, blend_tiles


def decode_tiled(codec: CausalVideoCodec, latents: Tensor, tiling: Tiling) -> Tensor:
    """`codec.decode` tile by tile: latents (B, C, N, h, w) to frames (B, 3, T, H, W)."""
    check_latents(latents.shape, codec.latent_channels)

    def code(rows: Span, columns: Span) -> Tensor:
        return codec.decode(latents[:, :, :, rows.slice(), columns.slice()])

    size = (latents.shape[3], latents.shape[4])
    return blend_tiles(code, size, tiling, (codec.strides.height, codec.strides.width))


def encode_tiled(codec: CausalVideoCodec, frames: Tensor, tiling: Tiling) -> Tensor:
    """`codec.encode` tile by tile: frames (B, 3, T, H, W) to latents (B, C, N, h, w)."""
    check_frames(frames.shape, codec.strides)
    height, width = codec.strides.height, codec.strides.width

    def code(rows: Span, columns: Span) -> Tensor:
        return codec.encode(frames[:, :, :, rows.slice(height), columns.slice(width)])

    return blend_tiles(code, (frames.shape[3] // height, frames.shape[4] // width), tiling, (1, 1))
