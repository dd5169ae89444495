"""Tiles of a frame and their blend weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitascope.core.errors import ShapeError
from vitascope.nn.tiling import Span, Tiling, blend_tiles, blend_weights, spans


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 11), st.integers(1, 4))
def test_tiles_cover_an_axis_and_their_weights_sum_to_one(size: int, tile: int, overlap: int, scale: int) -> None:
    tiles = spans(size, Tiling(tile, min(overlap, tile - 1)))
    total = torch.zeros(size * scale)
    for span, weights in zip(tiles, blend_weights(tiles, scale), strict=True):
        assert span.end - span.start == min(tile, size)
        assert weights.min() >= 0
        total[span.slice(scale)] += weights
    torch.testing.assert_close(total, torch.ones(size * scale))


@pytest.mark.parametrize("tiling", [Tiling(5, 4), Tiling(6, 2), Tiling(20, 0)])
def test_a_code_without_reach_is_blended_to_itself(tiling: Tiling) -> None:
    """Each cell shown as 2 x 3: what all tiles agree on comes back."""
    x = torch.randn(1, 2, 3, 11, 9, generator=torch.Generator().manual_seed(0))

    def code(rows: Span, columns: Span) -> torch.Tensor:
        tile = x[..., rows.slice(), columns.slice()]
        return tile.repeat_interleave(2, -2).repeat_interleave(3, -1)

    out = blend_tiles(code, (11, 9), tiling, (2, 3))
    torch.testing.assert_close(out, x.repeat_interleave(2, -2).repeat_interleave(3, -1))


def test_overlaps_as_large_as_a_tile_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"must lie in \[0, 7\] cells, got 8"):
        Tiling(8, 8)
