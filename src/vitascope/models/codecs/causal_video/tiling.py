"""Coding large frames tile by tile, so that memory follows the tile and not the frame.

Every tile is coded with a margin of context around it. What a cell shows depends on its neighbours within the codec's
reach, most of it on the nearest: with the margin the tiles agree where they meet, and a linear blend across the overlap
hides what is left. B batch, C latent channels, N latent frames, h and w cells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from vitascope.core.errors import ShapeError
from vitascope.models.codecs.causal_video.model import CausalVideoCodec


@dataclass(frozen=True)
class Tiling:
    """Side of a tile and overlap of neighbours, in latent cells."""

    tile: int = 16
    overlap: int = 6

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < self.tile:
            raise ShapeError(f"the overlap of tiles must lie in [0, {self.tile - 1}] cells, got {self.overlap}")


def decode_tiled(codec: CausalVideoCodec, latents: Tensor, tiling: Tiling) -> Tensor:
    """`codec.decode` tile by tile: latents (B, C, N, h, w) to frames (B, 3, T, H, W)."""
    codec.check_latents(latents)
    strides = codec.strides
    return _tiled(codec.decode, latents, tiling, (1, 1), (strides.height, strides.width))


def encode_tiled(codec: CausalVideoCodec, frames: Tensor, tiling: Tiling) -> Tensor:
    """`codec.encode` tile by tile: frames (B, 3, T, H, W) to latents (B, C, N, h, w)."""
    codec.check_frames(frames)
    strides = codec.strides
    return _tiled(codec.encode, frames, tiling, (strides.height, strides.width), (1, 1))


def _tiled(
    code: Callable[[Tensor], Tensor],
    source: Tensor,
    tiling: Tiling,
    source_scale: tuple[int, int],
    target_scale: tuple[int, int],
) -> Tensor:
    """Code each tile of `source` and blend; the scales are source and target values per cell along height, width."""
    height, width = source.shape[3] // source_scale[0], source.shape[4] // source_scale[1]
    total: Tensor | None = None
    for top, bottom, row_ramps in _spans(height, tiling):
        for left, right, column_ramps in _spans(width, tiling):
            rows = slice(top * source_scale[0], bottom * source_scale[0])
            columns = slice(left * source_scale[1], right * source_scale[1])
            coded = code(source[:, :, :, rows, columns])
            if total is None:
                size = (height * target_scale[0], width * target_scale[1])
                total = coded.new_zeros(*coded.shape[:3], *size)
            weight_rows = _weights(bottom - top, row_ramps, target_scale[0], coded)
            weight_columns = _weights(right - left, column_ramps, target_scale[1], coded)
            rows = slice(top * target_scale[0], bottom * target_scale[0])
            columns = slice(left * target_scale[1], right * target_scale[1])
            total[:, :, :, rows, columns] += coded * weight_rows[:, None] * weight_columns
    assert total is not None
    return total


def _spans(size: int, tiling: Tiling) -> Iterator[tuple[int, int, tuple[int, int]]]:
    """Start, end and the overlaps with the neighbours before and after, in cells, of the tiles along one axis."""
    step = tiling.tile - tiling.overlap
    starts = [0]
    while starts[-1] + tiling.tile < size:
        starts.append(min(starts[-1] + step, size - tiling.tile))
    ends = [min(start + tiling.tile, size) for start in starts]
    shared = [0, *(end - start for (_, end), (start, _) in pairwise(zip(starts, ends, strict=True))), 0]
    for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
        yield start, end, (shared[index], shared[index + 1])


def _weights(size: int, ramps: tuple[int, int], scale: int, like: Tensor) -> Tensor:
    """Blend weights of a tile of `size` cells: 1, with linear ramps over the middle third of each overlap.

    Near its own border a tile lacks context, so the outer third of an overlap belongs to the neighbour alone.
    """
    position = torch.arange(size * scale, dtype=torch.float32, device=like.device) + 0.5
    weights = torch.ones_like(position)
    for overlap, distance in zip(ramps, (position, size * scale - position), strict=True):
        if overlap:
            third = overlap * scale / 3
            weights = weights * ((distance - third) / third).clamp(0, 1)
    return weights.to(like.dtype)
