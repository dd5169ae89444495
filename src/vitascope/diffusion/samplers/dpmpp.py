"""DPM-Solver++ (2M): second order with one evaluation a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vitascope.core.tracks import Tracks
from vitascope.diffusion.paths import Path
from vitascope.diffusion.samplers.step import Denoise, Draw, Move, Run, Step


def dpmpp_2m(
    denoise: Denoise,
    tracks: Tracks,
    levels: Sequence[float],
    *,
    path: Path,
    generator: Draw | None = None,
) -> Iterator[Step]:
    """x0 is extrapolated to the middle of the step (in log(alpha / sigma)) through its last two estimates.

    First order for a cell's first step, for the step to level 0, and after a step from alpha = 0, where that middle is
    not defined.  Source: Lu et al. 2022, "DPM-Solver++", algorithm 2. `generator` is unused.
    """
    run = Run(tracks, levels, path)
    state = run.begin()
    last: dict[str, tuple[Move, Tensor]] = {}
    for index in range(run.num_steps):
        x0 = denoise(state)
        moves = run.moves(index)
        values = {
            name: move(state[name].values, middle_x0(x0[name], move, last.get(name))) for name, move in moves.items()
        }
        state = run.advance(state, values, index)
        last = {name: (moves[name], x0[name]) for name in moves}
        yield run.step(index, state, x0)


def usable_history(move: Move, last: Move) -> Tensor:
    """Where the step before can be extrapolated from: it was a whole, finite step, and this one is finite too."""
    return last.full & move.moving & last.h.isfinite() & move.h.isfinite() & (last.h > 0)


def middle_x0(x0: Tensor, move: Move, last: tuple[Move, Tensor] | None) -> Tensor:
    """x0 + h / (2 h_last) (x0 - x0_last) where there is a history, else x0."""
    if last is None:
        return x0
    last_move, last_x0 = last
    usable = usable_history(move, last_move)
    factor = torch.where(usable, move.h / torch.where(usable, last_move.h, 1.0) / 2, 0.0)
    return x0 + factor.to(move.ratio.dtype) * (x0 - last_x0)
