"""What all samplers share: the step they yield, the level of every cell along the way, and one cell's move.

A cell that starts at level s stands at min(s, level_i) at step i: it waits while the schedule is above it, then goes
along. Known cells (s = 0) never change. Every sampler here moves a cell from level t to t' by

    x' = ratio x + gain d,    ratio = sigma' / sigma,    gain = alpha' - ratio alpha,

with d its estimate of x0 over the interval: the exact solution when x0 is constant (DDIM, Song et al. 2020, eq. 12;
first-order DPM-Solver++, Lu et al. 2022, eq. 9 with alpha (1 - exp(-h)) = gain). Nothing here divides by alpha, so
pure noise is an ordinary place to start; sigma' = 0 is one to end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vitascope.core.errors import InputError
from vitascope.core.tracks import Track, Tracks
from vitascope.diffusion.paths import Path, precise
from vitascope.diffusion.schedules import check_levels

ROUNDING = 1e-6  # levels stored in float32 may differ this much from those of the schedule
Denoise = Callable[[dict[str, Track]], dict[str, Tensor]]
Draw = torch.Generator | Sequence[torch.Generator]
"""Where fresh noise comes from: one generator for the batch, or one per clip, so that a clip does not depend on the
others of its batch."""


@dataclass(frozen=True)
class Step:
    """A state of the run. `level` is that of the schedule after the step, `tracks` the cells there, `x0` the latest
    estimate of the clean values of every track. `index` counts from 0 to `num_steps` - 1."""

    index: int
    num_steps: int
    level: float
    tracks: dict[str, Track]
    x0: dict[str, Tensor]


class Sampler(Protocol):
    """Lowers the levels of `tracks` along `levels`, yielding after every step.

    `denoise` gives x0 of every track; it gets tracks whose `noise` is each cell's present level. `levels` falls
    strictly, from the highest level of any cell or above it; it need not end at 0.
    Raises InputError, at the first step, for levels that are no schedule or start below a cell.
    """

    def __call__(
        self,
        denoise: Denoise,
        tracks: Tracks,
        levels: Sequence[float],
        *,
        path: Path,
        generator: Draw | None = None,
    ) -> Iterator[Step]: ...


@dataclass(frozen=True)
class Move:
    """One step of one track. `ratio` and `gain` have the precision of the values; `h` is the gain in log(alpha / sigma)
    (float64; 0 where the cell waits, inf from alpha = 0 or to sigma = 0); `full` marks cells that take the whole step
    of the schedule, so that their history is as regular as the schedule's."""

    moving: Tensor
    full: Tensor
    ratio: Tensor
    gain: Tensor
    h: Tensor

    def __call__(self, x: Tensor, x0: Tensor) -> Tensor:
        """Values at the next level; waiting cells bit for bit as they are."""
        return torch.where(self.moving, (self.ratio * x + self.gain * x0).to(x.dtype), x)


class Run:
    """The levels of every cell of some tracks along a schedule."""

    def __init__(self, tracks: Tracks, levels: Sequence[float], path: Path) -> None:
        self.levels = check_levels(levels)
        self.path = path
        self.start = {name: precise(track.noise) for name, track in tracks.items()}
        highest = max((float(noise.max()) for noise in self.start.values()), default=0.0)
        if highest > self.levels[0] + ROUNDING:
            raise InputError(
                f"the schedule starts at level {self.levels[0]:g}, below cells at level {highest:g}: they would be "
                "taken for cleaner than they are"
            )
        self._tracks = tracks

    @property
    def num_steps(self) -> int:
        return len(self.levels) - 1

    def begin(self) -> dict[str, Track]:
        """The tracks as given; a level that the schedule starts a rounding below counts as its first."""
        return {name: track.with_values(track.values, self.noise(name, 0)) for name, track in self._tracks.items()}

    def noise(self, name: str, index: int) -> Tensor:
        """Levels of a track's cells before step `index`, in the type of the track's own."""
        return self._level(name, index).to(self._tracks[name].noise.dtype)

    def move(self, name: str, index: int) -> Move:
        """Step `index` of a track."""
        level, target = self._level(name, index), self._level(name, index + 1)
        alpha, sigma = self.path.alpha_sigma(level)
        moving = (target < level) & (sigma > 0)  # so little noise that sigma rounds to 0 is none
        alpha_next, sigma_next = self.path.alpha_sigma(target)
        ratio = torch.where(moving, sigma_next / torch.where(moving, sigma, 1.0), 1.0)
        gain = torch.where(moving, alpha_next - ratio * alpha, 0.0)
        h = (alpha_next.log() - sigma_next.log()) - (alpha.log() - sigma.log())
        dtype = torch.promote_types(self._tracks[name].values.dtype, torch.float32)
        return Move(
            moving=moving,
            full=moving & (self.start[name] >= self.levels[index] - ROUNDING),
            ratio=ratio.to(dtype),
            gain=gain.to(dtype),
            h=torch.where(moving, h, 0.0),
        )

    def moves(self, index: int) -> dict[str, Move]:
        """Step `index` of every track."""
        return {name: self.move(name, index) for name in self.start}

    def advance(self, state: Tracks, values: dict[str, Tensor], index: int) -> dict[str, Track]:
        """The tracks after step `index` with these values."""
        return {name: track.with_values(values[name], self.noise(name, index + 1)) for name, track in state.items()}

    def step(self, index: int, state: dict[str, Track], x0: dict[str, Tensor]) -> Step:
        """What to yield after step `index`."""
        return Step(index, self.num_steps, self.levels[index + 1], state, x0)

    def _level(self, name: str, index: int) -> Tensor:
        return self.start[name].clamp(max=self.levels[index])
