"""Which noise levels to train on, how much each counts, and which to pass through when sampling.

A sampling schedule is a `list[float]` of `num_steps` + 1 levels that falls strictly from `start` to 0.
A shift s > 1 moves levels towards noise: t' = s t / (1 + (s - 1) t)  (Esser et al. 2024, eq. 23); it divides the
signal-to-noise ratio of rectified flow by s^2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf, isfinite, sqrt
from typing import Literal, overload

import torch
from torch import Tensor

from vitascope.core.errors import InputError, choice
from vitascope.core.protocols import Prediction
from vitascope.diffusion.paths import PREDICTIONS, Path, precise

LevelDensity = Literal["uniform", "logit_normal"]
LEVEL_DENSITIES: tuple[LevelDensity, ...] = ("uniform", "logit_normal")


@overload
def shift_level(level: float, shift: float) -> float: ...
@overload
def shift_level(level: Tensor, shift: float) -> Tensor: ...
def shift_level(level: float | Tensor, shift: float) -> float | Tensor:
    """Move a level (a number or a tensor) towards noise by `shift` > 0; 0 and 1 stay, `1 / shift` undoes it."""
    # written so that 1 stays 1 to the last bit
    return shift * level / (shift * level + (1 - level))


def resolution_shift(num_cells: int, base_cells: int) -> float:
    """Shift that gives `num_cells` latent cells the noise that `base_cells` have: sqrt(n / m) (Esser et al. 2024)."""
    if num_cells < 1 or base_cells < 1:
        raise InputError(f"numbers of cells must be positive, got {num_cells} and {base_cells}")
    return sqrt(num_cells / base_cells)


# --- sampling: lists of levels ---------------------------------------------------------------------------------------


def uniform_levels(num_steps: int, start: float = 1.0) -> list[float]:
    """Equal steps from `start` in (0, 1] to 0."""
    return shifted_levels(num_steps, 1.0, start)


def shifted_levels(num_steps: int, shift: float, start: float = 1.0) -> list[float]:
    """Equal steps, shifted: with shift > 1 more of them are spent near noise. Begins at `start`, ends at 0."""
    _check_list(num_steps, start)
    if not 0 < shift < inf:
        raise InputError(f"shift must be positive, got {shift}")
    first = shift_level(start, 1 / shift)
    levels = [shift_level(first * (1 - i / num_steps), shift) for i in range(num_steps)]
    return check_levels([start, *levels[1:], 0.0])


def karras_levels(
    num_steps: int,
    path: Path,
    start: float = 1.0,
    *,
    rho: float = 7.0,
    ratio_min: float = 0.02,
    ratio_max: float = 80.0,
) -> list[float]:
    """Levels whose noise-to-signal ratio sigma / alpha is evenly spaced in its rho-th root, then 0.

    The ratio runs from that of `start` (at most `ratio_max`) down to `ratio_min`.  Source: Karras et al. 2022, eq. 5.
    """
    _check_list(num_steps, start)
    alpha, sigma = path.alpha_sigma(torch.tensor(start, dtype=torch.float64))
    top = min(ratio_max, float(sigma / alpha) if float(alpha) > 0 else inf)
    if not 0 < ratio_min < top or rho <= 0:
        raise InputError(f"ratio_min must lie between 0 and {top:.4g} and rho above 0, got {ratio_min} and {rho}")
    share = torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1)
    ratios = (top ** (1 / rho) + share * (ratio_min ** (1 / rho) - top ** (1 / rho))) ** rho
    return check_levels([start, *path.level_of(ratios).tolist()[1:], 0.0])


def check_levels(levels: Sequence[float]) -> list[float]:
    """`levels` as a list if it is a schedule: two or more numbers in [0, 1], each below the one before."""
    values = [float(level) for level in levels]
    if len(values) < 2 or not all(isfinite(v) and 0 <= v <= 1 for v in values):
        raise InputError(f"a schedule needs two or more levels between 0 and 1, got {values[:8]}")
    if any(after >= before for before, after in pairwise(values)):
        raise InputError(f"the levels of a schedule must fall at every step, got {values[:8]}")
    return values


def _check_list(num_steps: int, start: float) -> None:
    if num_steps < 1:
        raise InputError(f"the number of steps must be 1 or more, got {num_steps}")
    if not 0 < start <= 1:
        raise InputError(f"sampling starts at a level above 0 and up to 1, got {start}")


# --- training: drawing levels ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LevelDistribution:
    """The density that training levels are drawn from.

    uniform: on (0, 1).  logit_normal: sigmoid of a normal of `mean` and `std` (Esser et al. 2024, eq. 19).
    `shift` then moves them towards noise. `low` and `high` cut the range before the shift.
    """

    density: LevelDensity = "logit_normal"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        choice("level density", self.density, LEVEL_DENSITIES)
        if self.std <= 0 or self.shift <= 0 or not 0 <= self.low < self.high <= 1:
            raise InputError(f"std and shift must be positive and 0 <= low < high <= 1, got {self}")

    def sample(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Levels of `shape`, float32, on the generator's device."""
        device = generator.device
        if self.density == "uniform":
            levels = torch.rand(tuple(shape), generator=generator, device=device)
        else:
            normal = torch.randn(tuple(shape), generator=generator, device=device)
            levels = torch.sigmoid(self.mean + self.std * normal)
        return shift_level(self.low + (self.high - self.low) * levels, self.shift)


# --- training: loss weights, all on the squared error of x0 ----------------------------------------------------------


def x0_weight(path: Path, level: Tensor, kind: Prediction = "velocity", *, min_level: float = 0.0) -> Tensor:
    """The factor that makes the squared error of x0 the squared error of a prediction of `kind`.

    With d the error of x0: noise errs by alpha/sigma d, v by (alpha^2 + sigma^2)/sigma d, velocity by
    (alpha + sigma)/sigma d. On rectified flow the velocity weight is 1 / t^2, and 1 / max(t, min_level)^2 with a floor.
    Returns float32 of the level's shape; infinite at level 0 unless `min_level` > 0.
    """
    choice("prediction", kind, PREDICTIONS)
    alpha, sigma = path.alpha_sigma(precise(level).clamp(min=min_level))
    factors = {"x0": sigma, "noise": alpha, "v": alpha**2 + sigma**2, "velocity": alpha + sigma}
    return ((factors[kind] / sigma) ** 2).float() if kind != "x0" else torch.ones_like(sigma).float()


def min_snr_weight(
    path: Path, level: Tensor, kind: Prediction = "x0", *, gamma: float = 5.0, min_level: float = 1e-3
) -> Tensor:
    """Min-SNR-gamma weight for a loss on a prediction of `kind`.  Source: Hang et al. 2023, section 3.4.

    min(SNR, gamma) for x0, / SNR for noise, / (SNR + 1) for v on a VP path. Returns float32 of the level's shape.
    """
    if gamma <= 0:
        raise InputError(f"gamma must be positive, got {gamma}")
    level = precise(level).clamp(min=min_level)
    alpha, sigma = path.alpha_sigma(level)
    snr = (alpha / sigma) ** 2
    if kind == "noise":  # min(1, gamma / SNR) also where alpha is 0
        return (gamma / snr).clamp(max=1.0).float()
    return (snr.clamp(max=gamma) / x0_weight(path, level, kind).double()).float()
