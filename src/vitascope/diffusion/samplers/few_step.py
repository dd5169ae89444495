"""For distilled models: jump to x0, add fresh noise of the next level, repeat."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vitascope.core.errors import InputError
from vitascope.core.tracks import Tracks
from vitascope.diffusion.paths import Path
from vitascope.diffusion.samplers.step import Denoise, Draw, Run, Step


def few_step(
    denoise: Denoise,
    tracks: Tracks,
    levels: Sequence[float],
    *,
    path: Path,
    generator: Draw | None = None,
) -> Iterator[Step]:
    """x' = alpha' x0 + sigma' eps with new noise from `generator`, which must be given; drawn on its own device.

    Tracks draw in the order of their names, and every step draws for every cell, so that what one cell gets does not
    depend on which others wait.  Source: Song et al. 2023, "Consistency models", algorithm 1.
    """
    if generator is None:
        raise InputError("the few_step sampler draws fresh noise at every step: give it a generator")
    run = Run(tracks, levels, path)
    state = run.begin()
    for index in range(run.num_steps):
        x0 = denoise(state)
        moves = run.moves(index)
        values = {}
        for name in sorted(state):
            track = state[name]
            fresh = _fresh(track.values.shape, generator)
            level = run.noise(name, index + 1)
            renewed = path.add_noise(x0[name], fresh.to(track.values), level).to(track.values.dtype)
            values[name] = torch.where(moves[name].moving, renewed, track.values)
        state = run.advance(state, values, index)
        yield run.step(index, state, x0)


def _fresh(shape: torch.Size, draw: Draw) -> Tensor:
    if isinstance(draw, torch.Generator):
        return torch.randn(shape, generator=draw, device=draw.device)
    return torch.stack([torch.randn(shape[1:], generator=each, device=each.device) for each in draw])
