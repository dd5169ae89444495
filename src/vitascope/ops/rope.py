"""Rotary positions over continuous coordinates (seconds, rows, columns).

B batch, L positions, H heads, E width of a head (even). Pairs are (i, i + E/2), so that a rotation is two halves and
no interleaving. Source: Su et al. 2021 (RoFormer), equation 34; here the lowest and highest period are given instead of
a base, because coordinates are seconds and not indices.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log

import torch
from torch import Tensor

from vitascope.core.errors import ShapeError

RotaryTable = tuple[Tensor, Tensor]
"""Cosines and sines, each (..., L, E/2) in fp32."""


def periods_to_frequencies(
    num: int, min_period: float, max_period: float, device: torch.device | str | None = None
) -> Tensor:
    """`num` angular frequencies (radians per unit), geometric from 2 pi / min_period down to 2 pi / max_period."""
    steps = torch.linspace(0.0, 1.0, num, device=device)
    return 2 * torch.pi * torch.exp(-(log(min_period) + steps * log(max_period / min_period)))


def rotary_table(positions_L: Tensor, width: int, min_period: float, max_period: float) -> RotaryTable:
    """The table for `positions_L` (..., L) and heads of `width`. Raises ShapeError for an odd width."""
    if width % 2:
        raise ShapeError(f"a rotated head needs an even width, got {width}; nearest: {width - 1}, {width + 1}")
    frequencies = periods_to_frequencies(width // 2, min_period, max_period, positions_L.device)
    angles = positions_L.float().unsqueeze(-1) * frequencies
    return angles.cos(), angles.sin()


def axial_table(axes: Sequence[Tensor], width: int, min_period: float, max_period: float) -> RotaryTable:
    """A table over several coordinates (each (L,)): the pairs of a head are divided between them.

    Raises ShapeError unless `width` is a multiple of twice the number of coordinates.
    """
    if width % (2 * len(axes)):
        raise ShapeError(f"heads of {width} cannot be divided between {len(axes)} coordinates of rotary pairs")
    tables = [rotary_table(axis, width // len(axes), min_period, max_period) for axis in axes]
    return torch.cat([cos for cos, _ in tables], -1), torch.cat([sin for _, sin in tables], -1)


def rotate(x_BLHE: Tensor, table: RotaryTable) -> Tensor:
    """`x_BLHE` (..., L, H, E) turned by a table (..., L, E/2); in fp32, returned in the dtype of `x_BLHE`."""
    cos, sin = (part.unsqueeze(-2) for part in table)
    first, second = x_BLHE.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x_BLHE.dtype)
