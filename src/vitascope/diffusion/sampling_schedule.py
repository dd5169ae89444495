"""The levels that a model is sampled at, as its configuration says: for a number of steps and a size of clip.

A schedule is made in steps: a spacing from 1 down, a shift towards noise, a stretch of its end, and then the last
level, 0. All are on the level t of rectified flow, where sigma = t.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp
from typing import Literal

from vitascope.core.errors import InputError, choice
from vitascope.diffusion.schedules import check_levels, shift_level

Spacing = Literal["equal", "linear_quadratic"]
SPACINGS: tuple[Spacing, ...] = ("equal", "linear_quadratic")
LISTS: dict[str, tuple[float, ...]] = {
    "ltx-distilled": (1.0, 0.9937, 0.9875, 0.9812, 0.975, 0.9094, 0.725),
    "ltx-distilled-second": (0.9094, 0.725, 0.4219),
}
"""Levels that distilled models are sampled at, by name. Source: LTX-Video 0.9.8, first and second pass."""


def read_levels(text: str) -> tuple[float, ...]:
    """A name of LISTS, or levels with commas between them; a last level 0 may be left out. Raises InputError."""
    if text in LISTS:
        return LISTS[text]
    try:
        levels = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        names = ", ".join(LISTS)
        raise InputError(f"levels are numbers such as 1,0.9,0.5, or one of {names}; got {text!r}") from error
    return listed_levels(levels)


def listed_levels(levels: Sequence[float]) -> tuple[float, ...]:
    """Levels without a last 0. Raises InputError unless they fall from 1 or below."""
    values = tuple(float(level) for level in levels)
    values = values[:-1] if values and values[-1] == 0 else values
    check_levels([*values, 0.0])
    return values


@dataclass(frozen=True)
class ShiftBySize:
    """A shift whose logarithm is linear in the number of latent cells: log_low at cells_low, log_high at cells_high.

    Cells are frames x rows x columns of the video latents. Source: Esser et al. 2024 for why; FLUX for the line.
    """

    cells_low: int = 1024
    log_low: float = 0.95
    cells_high: int = 4096
    log_high: float = 2.05

    def __post_init__(self) -> None:
        if self.cells_low == self.cells_high:
            raise InputError("the two sizes of a shift by size must differ")
        if not max(abs(self.log_low), abs(self.log_high)) <= 20:
            raise InputError(f"a shift by size lies in -20..20, got {self.log_low} and {self.log_high}")

    def shift(self, num_cells: int) -> float:
        """The factor for a clip of so many cells."""
        share = (num_cells - self.cells_low) / (self.cells_high - self.cells_low)
        return exp(min(self.log_low + share * (self.log_high - self.log_low), 500.0))


@dataclass(frozen=True)
class SamplingSchedule:
    """How to space levels.

    spacing: "equal" steps from 1 to `end`, or "linear_quadratic" (Mochi 1, LTX-Video): the first half of the steps
    removes `threshold` of the noise evenly, the rest goes on from there as a parabola to 0.
    shift: towards noise, see `schedules`; by_size: takes its place where given.
    end: level that the steps would reach if the last one did not go to 0 (Wan's UniPC: 0.001).
    terminal: if above 0, levels are stretched so that the last one above 0 is this (LTX-Video: 0.1).
    below_one: the first level is at most 1 - below_one, which multistep solvers need that take logarithms of alpha.
    listed: the levels themselves, for distilled models; then the number of steps is theirs.
    grid: if above 0, the model is told each level rounded down to a multiple of 1 / grid, as it was trained.
    """

    spacing: Spacing = "equal"
    shift: float = 1.0
    by_size: ShiftBySize | None = None
    end: float = 0.0
    terminal: float = 0.0
    threshold: float = 0.025
    below_one: float = 0.0
    listed: tuple[float, ...] = ()
    grid: int = 0

    def __post_init__(self) -> None:
        choice("spacing", self.spacing, SPACINGS)
        if not 0 < self.shift < float("inf"):
            raise InputError(f"the shift of a schedule must be positive, got {self.shift}")
        for name in ("end", "terminal", "threshold", "below_one"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} of a schedule lies in [0, 1), got {getattr(self, name)}")
        if self.listed:
            check_levels([*self.listed, 0.0])
        if self.grid < 0:
            raise InputError(f"the grid of a schedule must not be negative, got {self.grid}")

    @property
    def num_steps(self) -> int | None:
        """Steps of a schedule that has no choice."""
        return len(self.listed) or None

    def levels(self, num_steps: int, num_cells: int = 1) -> list[float]:
        """`num_steps` + 1 levels, falling strictly to 0. num_cells: of the video latents.

        Raises InputError for a number of steps that there cannot be.
        """
        if num_steps < 1:
            raise InputError(f"the number of steps must be 1 or more, got {num_steps}")
        if self.listed:
            if num_steps != len(self.listed):
                raise InputError(f"this model is sampled in {len(self.listed)} steps, not {num_steps}")
            return check_levels([min(self.listed[0], 1 - self.below_one), *self.listed[1:], 0.0])
        shift = self.shift if self.by_size is None else self.by_size.shift(num_cells)
        levels = [level if shift == 1 else shift_level(level, shift) for level in self._spaced(num_steps)]
        if self.terminal and levels[-1] < 1:
            stretch = (1 - levels[-1]) / (1 - self.terminal)
            levels = [1 - (1 - level) / stretch for level in levels]
        levels[0] = min(levels[0], 1 - self.below_one)
        return check_levels([*levels, 0.0])

    def _spaced(self, num_steps: int) -> Sequence[float]:
        if self.spacing == "equal":
            # to the last bit as numpy spaces them: `grid` rounds down what lies on a multiple, or just below
            return [i * ((self.end - 1) / num_steps) + 1 for i in range(num_steps)]
        even = max(1, num_steps // 2)
        if num_steps == 1:
            return [1.0]
        slope = self.threshold / even
        bend = (1 - self.threshold - slope * (num_steps - even)) / (num_steps - even) ** 2
        after = [max(0, i - even) for i in range(num_steps)]
        return [1 - slope * i - bend * extra**2 for i, extra in enumerate(after)]
