"""Coding large frames tile by tile, so that memory follows the tile and not the frame.

Every tile is coded with a margin of context around it. What a cell shows depends on its neighbours within the codec's
reach, most of it on the nearest: with the margin the tiles agree where they meet, and a linear blend across the overlap
hides what is left. B batch, C channels, T frames, H and W rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from vitascope.core.errors import ShapeError


@dataclass(frozen=True)
class Tiling:
    """Side of a tile and overlap of neighbours, in latent cells."""

    tile: int = 16
    overlap: int = 6

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < self.tile:
            raise ShapeError(f"the overlap of tiles must lie in [0, {self.tile - 1}] cells, got {self.overlap}")


@dataclass(frozen=True)
class Span:
    """A tile along one axis: first cell, end, and the cells it shares with the tiles before and after it."""

    start: int
    end: int
    shared: tuple[int, int]

    def slice(self, scale: int = 1) -> slice:
        """Of an axis with `scale` values a cell."""
        return slice(self.start * scale, self.end * scale)


def spans(size: int, tiling: Tiling) -> list[Span]:
    """Tiles that cover `size` cells; the last is moved back so that it is whole."""
    starts = [0]
    while starts[-1] + tiling.tile < size:
        starts.append(min(starts[-1] + tiling.tile - tiling.overlap, size - tiling.tile))
    ends = [min(start + tiling.tile, size) for start in starts]
    shared = [0, *(end - start for (_, end), (start, _) in pairwise(zip(starts, ends, strict=True))), 0]
    return [Span(*both, pair) for both, pair in zip(zip(starts, ends, strict=True), pairwise(shared), strict=True)]


def blend_tiles(
    code: Callable[[Span, Span], Tensor], size: tuple[int, int], tiling: Tiling, scale: tuple[int, int]
) -> Tensor:
    """The tiles of a frame of `size` cells, each (B, C, T, rows, columns) from `code(rows, columns)`, blended.

    scale: rows and columns of a coded cell.
    """
    row_spans, column_spans = spans(size[0], tiling), spans(size[1], tiling)
    row_weights, column_weights = blend_weights(row_spans, scale[0]), blend_weights(column_spans, scale[1])
    total: Tensor | None = None
    for rows, down in zip(row_spans, row_weights, strict=True):
        for columns, across in zip(column_spans, column_weights, strict=True):
            coded = code(rows, columns)
            if total is None:
                total = coded.new_zeros(*coded.shape[:3], size[0] * scale[0], size[1] * scale[1])
            weights = (down[:, None] * across).to(coded)
            total[:, :, :, rows.slice(scale[0]), columns.slice(scale[1])].addcmul_(coded, weights)
    assert total is not None
    return total


def blend_weights(tiles: list[Span], scale: int) -> list[Tensor]:
    """Of each tile of one axis, `scale` values a cell: 1, with linear ramps over the middle third of what neighbours
    share; those of all tiles sum to 1 everywhere.

    Near its own border a tile lacks context, so the outer third of an overlap belongs to the neighbour alone.
    """
    weights = []
    for span in tiles:
        size = (span.end - span.start) * scale
        position = torch.arange(size, dtype=torch.float32) + 0.5
        ramps = torch.ones(size)
        for shared, distance in zip(span.shared, (position, size - position), strict=True):
            if shared:
                third = shared * scale / 3
                ramps *= ((distance - third) / third).clamp(0, 1)
        weights.append(ramps)
    # where three tiles meet, ramps alone do not sum to 1
    total = torch.zeros(tiles[-1].end * scale)
    for span, ramps in zip(tiles, weights, strict=True):
        total[span.slice(scale)] += ramps
    return [ramps / total[span.slice(scale)] for span, ramps in zip(tiles, weights, strict=True)]
