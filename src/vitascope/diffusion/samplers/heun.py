"""Second order, two evaluations a step: Heun's method."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vitascope.core.tracks import Tracks
from vitascope.diffusion.paths import Path
from vitascope.diffusion.samplers.step import Denoise, Draw, Run, Step


def heun(
    denoise: Denoise,
    tracks: Tracks,
    levels: Sequence[float],
    *,
    path: Path,
    generator: Draw | None = None,
) -> Iterator[Step]:
    """Euler's step, then the mean of the slopes at both ends; the step to level 0 stays Euler's.

    The slope is taken where every path is straight: y = x / (alpha + sigma) is rectified flow at the level
    u = sigma / (alpha + sigma), dy/du = (y - x0) / u. There neither end is singular but u = 0.
    Source: Karras et al. 2022, algorithm 1, in these variables. `generator` is unused.
    """
    run = Run(tracks, levels, path)
    state = run.begin()
    for index in range(run.num_steps):
        x0 = denoise(state)
        moves = run.moves(index)
        values = {name: move(state[name].values, x0[name]) for name, move in moves.items()}
        ahead = run.advance(state, values, index)
        if run.levels[index + 1] > 0:
            latest = denoise(ahead)
            values = {}
            for name, move in moves.items():
                ends = (state[name].noise, ahead[name].noise)
                mean = _mean_slope_step(path, ends, (state[name].values, ahead[name].values), (x0[name], latest[name]))
                values[name] = torch.where(move.moving, mean.to(state[name].values.dtype), state[name].values)
            ahead, x0 = run.advance(state, values, index), latest
        state = ahead
        yield run.step(index, state, x0)


def _mean_slope_step(
    path: Path, levels: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor], x0: tuple[Tensor, Tensor]
) -> Tensor:
    """Values after the step from levels[0] to levels[1]; anything finite where a level is 0."""
    dtype = torch.promote_types(values[0].dtype, torch.float32)
    scale: list[Tensor] = []
    place: list[Tensor] = []
    for level in levels:
        alpha, sigma = path.alpha_sigma(level)
        scale.append((alpha + sigma).to(dtype))
        place.append((sigma / (alpha + sigma)).to(dtype))
    straight = [value / factor for value, factor in zip(values, scale, strict=True)]
    slopes = [(y - clean) / torch.where(u > 0, u, 1.0) for y, clean, u in zip(straight, x0, place, strict=True)]
    return scale[1] * (straight[0] + (place[1] - place[0]) * (slopes[0] + slopes[1]) / 2)
