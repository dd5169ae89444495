"""UniPC of order 2 (B2 variant, x0 prediction): the predictor of DPM-Solver++ 2M and a corrector at no extra cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitascope.core.tracks import Tracks
from vitascope.diffusion.paths import Path
from vitascope.diffusion.samplers.dpmpp import middle_x0, usable_history
from vitascope.diffusion.samplers.step import Denoise, Draw, Move, Run, Step


@dataclass(frozen=True)
class Past:
    """A finished step of one track: its move, the values it left from, x0 there, and the step before it."""

    move: Move
    values: Tensor
    x0: Tensor
    before: tuple[Move, Tensor] | None


def unipc(
    denoise: Denoise,
    tracks: Tracks,
    levels: Sequence[float],
    *,
    path: Path,
    generator: Draw | None = None,
) -> Iterator[Step]:
    """Each evaluation first corrects the step that led to it, then predicts the next one.

    Source: Zhao et al. 2023, "UniPC", algorithms 1 and 2 with B(h) = exp(h) - 1. `generator` is unused.
    """
    run = Run(tracks, levels, path)
    state = run.begin()
    past: dict[str, Past] = {}
    for index in range(run.num_steps):
        x0 = denoise(state)
        moves = run.moves(index)
        values: dict[str, Tensor] = {}
        for name, move in moves.items():
            before = past.get(name)
            x = state[name].values if before is None else _correct(before, x0[name], state[name].values)
            history = None if before is None else (before.move, before.x0)
            values[name] = move(x, middle_x0(x0[name], move, history))
            past[name] = Past(move, x, x0[name], history)
        state = run.advance(state, values, index)
        yield run.step(index, state, x0)


def _correct(past: Past, x0: Tensor, predicted: Tensor) -> Tensor:
    """The values that the past step arrives at, now that x0 there is known; waiting cells as predicted."""
    move, start = past.move, past.x0
    dtype = move.ratio.dtype
    estimate = start + (x0 - start) / 2
    if past.before is not None:
        last_move, last_x0 = past.before
        usable = usable_history(move, last_move)
        h = torch.where(usable, move.h, 1.0)
        r = -torch.where(usable, last_move.h, 1.0) / h
        weight_last, weight_new = _weights(h, r)
        second = start + (weight_last / r).to(dtype) * (last_x0 - start) + weight_new.to(dtype) * (x0 - start)
        estimate = torch.where(usable, second, estimate)
    return torch.where(move.moving, move(past.values, estimate), predicted)


def _weights(h: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of the differences to the x0 before (at r h) and to the new one (at h): both moments of the step exact.

    They solve a + b = m1 and r a + b = m2, with m1 = (phi1 - 1) / (h phi1'), and m2 likewise, in the paper's phi.
    """
    z = -h
    small = h < 1e-2
    safe = torch.where(small, -1.0, z)
    grown = torch.expm1(safe)
    first = torch.where(small, z / 2 + z**2 / 6 + z**3 / 24 + z**4 / 120, grown / safe - 1)
    second = torch.where(small, z / 6 + z**2 / 24 + z**3 / 120 + z**4 / 720, (grown / safe - 1) / safe - 0.5)
    scale = torch.expm1(z)
    m1, m2 = first / scale, 2 * second / scale
    weight_last = (m1 - m2) / (1 - r)
    return weight_last, m1 - weight_last
