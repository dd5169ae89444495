"""Data whose every quantity is known: x0 ~ N(MEAN, SPREAD^2) in each cell, so all samplers have an exact answer.

At level t, x ~ N(alpha MEAN, alpha^2 SPREAD^2 + sigma^2); the flow from noise to data keeps (x - mean) / std.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vitascope.core.tracks import Track
from vitascope.diffusion.paths import Path
from vitascope.diffusion.samplers import Denoise, Sampler, Step

MEAN, SPREAD = 0.7, 0.4


def audio(values: Tensor, noise: Tensor | float) -> Track:
    """A track of values (B, C, T); one level for all cells, or levels of any shape that fits."""
    levels = noise if isinstance(noise, Tensor) else torch.full((values.shape[0], 1, values.shape[2]), noise)
    return Track(values, levels.to(values.dtype), torch.arange(values.shape[2]) / 10)


def posterior_mean(path: Path) -> Denoise:
    """The best x0: E[x0 | x] of every cell."""

    def denoise(tracks: dict[str, Track]) -> dict[str, Tensor]:
        x0 = {}
        for name, track in tracks.items():
            alpha, sigma = path.alpha_sigma(track.noise)
            gain = alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2)
            x0[name] = (MEAN + gain * (track.values - alpha * MEAN)).to(track.values.dtype)
        return x0

    return denoise


def place(path: Path, z: Tensor, level: float) -> Tensor:
    """Where the flow passes at `level` on its way to MEAN + SPREAD z."""
    alpha, sigma = path.alpha_sigma(torch.tensor(level, dtype=torch.float64))
    return alpha * MEAN + (alpha**2 * SPREAD**2 + sigma**2).sqrt() * z


def sample(
    sampler: Sampler, path: Path, tracks: dict[str, Track], levels: Sequence[float], denoise: Denoise | None = None
) -> list[Step]:
    generator = torch.Generator().manual_seed(5)
    return list(sampler(denoise or posterior_mean(path), tracks, levels, path=path, generator=generator))
