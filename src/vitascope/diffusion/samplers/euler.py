"""First order: Euler's method on rectified flow, DDIM (deterministic) on a variance-preserving path; one formula."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vitascope.core.tracks import Tracks
from vitascope.diffusion.paths import Path
from vitascope.diffusion.samplers.step import Denoise, Draw, Run, Step


def euler(
    denoise: Denoise,
    tracks: Tracks,
    levels: Sequence[float],
    *,
    path: Path,
    generator: Draw | None = None,
) -> Iterator[Step]:
    """One evaluation a step; each cell goes to the next level along the line through its x0 and its noise.

    Source: Song et al. 2020, "Denoising diffusion implicit models", eq. 12 with no fresh noise. `generator` is unused.
    """
    run = Run(tracks, levels, path)
    state = run.begin()
    for index in range(run.num_steps):
        x0 = denoise(state)
        values = {name: move(state[name].values, x0[name]) for name, move in run.moves(index).items()}
        state = run.advance(state, values, index)
        yield run.step(index, state, x0)
