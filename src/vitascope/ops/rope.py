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
from vitascope.ops.parts import in_parts

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


def rotate(x_BLHE: Tensor, table: RotaryTable, *, neighbours: bool = False, per_head: bool = False) -> Tensor:
    """`x_BLHE` (..., L, H, E) turned by a table (..., L, E/2), or (..., L, H, E/2) `per_head`; in fp32, returned in the
    dtype of `x_BLHE`. Pairs are (i, i + E/2) or, as in checkpoints trained that way, the `neighbours` (2i, 2i + 1).
    """
    cos, sin = table if per_head else (part.unsqueeze(-2) for part in table)
    apart = torch.is_grad_enabled() or torch.compiler.is_compiling()  # what complex products are not for
    turn = _turn_halves if not neighbours else _turn_neighbours if apart else _turn_complex
    return in_parts(turn, x_BLHE, cos, sin)


def _turn_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def _turn_neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2).to(x.dtype)


def _turn_complex(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`_turn_neighbours` in one pass: a pair is a complex number, its rotation a product."""
    pairs = torch.view_as_complex(x.float().contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype)


def index_table(positions_L: Tensor, width: int, theta: float = 10_000.0) -> RotaryTable:
    """A table by index and base, theta^(-2i / width), as Su et al. write it; formed in fp64, kept in fp32."""
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device=positions_L.device) / width
    angles = positions_L.double().unsqueeze(-1) * theta**-exponents
    return angles.cos().float(), angles.sin().float()


def grid_table(tables: Sequence[RotaryTable]) -> RotaryTable:
    """Tables of T, H and W positions as one of T * H * W, each axis turning its own share of the pairs."""
    sizes = [len(cos) for cos, _ in tables]
    parts = []
    for axis, table in enumerate(tables):
        shape = [1] * len(sizes)
        shape[axis] = sizes[axis]
        parts.append([part.reshape(*shape, -1).expand(*sizes, -1).flatten(0, -2) for part in table])
    return torch.cat([cos for cos, _ in parts], -1), torch.cat([sin for _, sin in parts], -1)
