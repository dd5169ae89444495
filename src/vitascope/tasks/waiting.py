"""Cells that are given weakly, at a level between two of the schedule: they wait until the schedule is below it.

Elsewhere such a cell goes along as soon as the schedule passes its level, for the rest of that step. LTX-Video moves
its tokens in whole steps alone; what a token then has more of noise than it is told, it keeps.
Source: LTX-Video 0.9.5 and later, as LTXConditionPipeline of diffusers has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitascope.core.tracks import VIDEO, Track
from vitascope.diffusion.samplers import Denoise

ROUNDING = 1e-6
"""A level of the schedule counts as reached that far above a cell's own."""


def settled(noise: Tensor, levels: Sequence[float]) -> Tensor:
    """For each cell the highest level of the schedule that is not above its own; 0 where there is none. Cells above all
    of the schedule stay as they are: samplers refuse them."""
    falling = torch.tensor(levels, dtype=torch.float64, device=noise.device)
    reached = falling <= noise.double().unsqueeze(-1) + ROUNDING
    below = torch.where(reached, falling, 0.0).amax(-1).to(noise.dtype)
    return torch.where(noise > levels[0] + ROUNDING, noise, below)


@dataclass(frozen=True)
class Waiting:
    """The `tracks -> x0` that samplers call with settled levels; while cells of the video wait, the model is told their
    own level. own: levels of the video before they were settled, of the shape of the track's."""

    denoise: Denoise
    own: Tensor

    def __call__(self, tracks: dict[str, Track]) -> dict[str, Tensor]:
        """x0 of every track."""
        video = tracks[VIDEO]
        level = max(float(track.noise.max()) for track in tracks.values())
        # cells that have gone along are at the highest level, so those below it are where they began
        told = torch.where(video.noise < level - ROUNDING, self.own, video.noise)
        shown: dict[str, Track] = {**tracks, VIDEO: video.with_values(video.values, told)}
        return self.denoise(shown)
