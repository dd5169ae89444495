"""Paths from data to noise: x_t = alpha(t) x0 + sigma(t) eps, with the level t in [0, 1] (0 known, 1 noise).

A model may predict any of four quantities; they are turned into x0 here, so that nothing above has to ask which:

    x0        the clean value
    noise     eps
    v         alpha eps - sigma x0          Salimans & Ho 2022, "Progressive distillation", appendix D
    velocity  eps - x0                      dx/dt of rectified flow; Liu et al. 2022, Esser et al. 2024

Levels are tensors broadcastable to the values. Coefficients are computed in float64 and applied in float32 (float64
for float64 values), whatever the model's own precision.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from math import pi
from typing import Literal

import torch
from torch import Tensor

from vitascope.core.errors import InputError, choice
from vitascope.core.protocols import Prediction

PREDICTIONS: tuple[Prediction, ...] = ("velocity", "v", "noise", "x0")
VPSchedule = Literal["cosine", "scaled_linear"]
VP_SCHEDULES: tuple[VPSchedule, ...] = ("cosine", "scaled_linear")

SMALLEST_ALPHA = 1e-6  # below it a value holds no readable trace of x0, and x0 is not read from a noise prediction
NUM_VP_STEPS = 1000


class Path(ABC):
    """A path is its two coefficients; everything else follows."""

    @abstractmethod
    def alpha_sigma(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at `level` (any shape, values in [0, 1]) in float64: (1, 0) at 0, sigma > 0 above."""

    def alpha(self, level: Tensor) -> Tensor:
        """The share of x0 at `level`, float64."""
        return self.alpha_sigma(level)[0]

    def sigma(self, level: Tensor) -> Tensor:
        """The share of noise at `level`, float64."""
        return self.alpha_sigma(level)[1]

    def log_snr(self, level: Tensor) -> Tensor:
        """2 log(alpha / sigma), float64; +inf at level 0, -inf where alpha is 0."""
        alpha, sigma = self.alpha_sigma(level)
        return 2 * (alpha.log() - sigma.log())

    def level_of(self, ratio: Tensor) -> Tensor:
        """The levels at which sigma / alpha equals `ratio` (float64, >= 0): sigma / alpha rises with the level."""
        ratio = ratio.double()
        low, high = torch.zeros_like(ratio), torch.ones_like(ratio)
        for _ in range(60):
            middle = (low + high) / 2
            alpha, sigma = self.alpha_sigma(middle)
            above = sigma > ratio * alpha
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return (low + high) / 2

    def add_noise(self, x0: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """x_t of the clean values `x0` and the noise drawn for them."""
        alpha, sigma = self._coefficients(level, x0)
        return alpha * x0 + sigma * noise

    def to_x0(self, kind: Prediction, prediction: Tensor, x: Tensor, level: Tensor) -> Tensor:
        """x0 from what a model predicts at `x`.

        A noise prediction where alpha is 0 says nothing about x0: the answer there is 0, the mean of unit-scale data.
        """
        choice("prediction", kind, PREDICTIONS)
        if kind == "x0":
            return prediction.to(_work_dtype(x))
        alpha, sigma = self._coefficients(level, x)
        if kind == "v":
            return (alpha * x - sigma * prediction) / (alpha**2 + sigma**2)
        if kind == "velocity":
            return (x - sigma * prediction) / (alpha + sigma)
        readable = alpha > SMALLEST_ALPHA
        return torch.where(readable, (x - sigma * prediction) / torch.where(readable, alpha, 1.0), 0.0)

    def noise_of(self, x0: Tensor, x: Tensor, level: Tensor) -> Tensor:
        """The noise that makes `x` out of `x0`; 0 where sigma is 0."""
        alpha, sigma = self._coefficients(level, x)
        noisy = sigma > 0
        return torch.where(noisy, (x - alpha * x0) / torch.where(noisy, sigma, 1.0), 0.0)

    def from_x0(self, kind: Prediction, x0: Tensor, x: Tensor, level: Tensor) -> Tensor:
        """The prediction of this kind that a model with the answer `x0` at `x` gives; inverse of `to_x0`."""
        return self.target(kind, x0, self.noise_of(x0, x, level), level)

    def target(self, kind: Prediction, x0: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """What a model of this kind is trained to predict for clean values `x0` and their noise."""
        choice("prediction", kind, PREDICTIONS)
        if kind == "x0":
            return x0
        if kind == "noise":
            return noise
        if kind == "velocity":
            return noise - x0
        alpha, sigma = self._coefficients(level, x0)
        return alpha * noise - sigma * x0

    def _coefficients(self, level: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        dtype = _work_dtype(values)
        alpha, sigma = self.alpha_sigma(level)
        return alpha.to(values.device, dtype), sigma.to(values.device, dtype)


@dataclass(frozen=True)
class RectifiedFlow(Path):
    """The straight path: alpha = 1 - t, sigma = t.  Source: Liu et al. 2022, "Flow straight and fast"."""

    def alpha_sigma(self, level: Tensor) -> tuple[Tensor, Tensor]:
        level = precise(level)
        return 1 - level, level


@dataclass(frozen=True)
class VariancePreserving(Path):
    """alpha^2 + sigma^2 = 1, over a continuous level.

    cosine         Nichol & Dhariwal 2021, eq. 17 with offset 0.008; alpha is 0 at level 1 exactly.
    scaled_linear  sqrt(beta) linear from sqrt(0.00085) to sqrt(0.012) over 1000 steps (Rombach et al. 2022): level
                   (i + 1) / 1000 is their step i, alpha is linear in between.

    zero_terminal_snr: alpha is shifted and scaled to reach 0 at level 1 (Lin et al. 2023, algorithm 1).
    shift: divides the signal-to-noise ratio by shift^2 at every level; > 1 means noisier, as larger pictures need
    (Hoogeboom et al. 2023, "Simple diffusion", eq. 4 with shift = size / base size).
    """

    schedule: VPSchedule = "cosine"
    shift: float = 1.0
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        choice("VP schedule", self.schedule, VP_SCHEDULES)
        if not 0 < self.shift < float("inf"):
            raise InputError(f"the shift of a schedule must be positive, got {self.shift}")

    def alpha_sigma(self, level: Tensor) -> tuple[Tensor, Tensor]:
        level = precise(level)
        alpha = self._cosine(level) if self.schedule == "cosine" else self._tabulated(level)
        sigma = ((1 - alpha) * (1 + alpha)).clamp(min=0).sqrt()
        if self.shift == 1.0:
            return alpha, sigma
        length = (alpha**2 + (self.shift * sigma) ** 2).sqrt()
        return alpha / length, self.shift * sigma / length

    def _cosine(self, level: Tensor) -> Tensor:
        offset = 0.008
        scale = pi / 2 / (1 + offset)
        top = torch.sin(torch.full_like(level, scale))
        return torch.sin(scale * (1 - level)) / top

    def _tabulated(self, level: Tensor) -> Tensor:
        table = self._table.to(level.device, level.dtype)
        place = level.clamp(0, 1) * NUM_VP_STEPS
        below = place.floor().clamp(max=NUM_VP_STEPS - 1)
        index = below.long()
        return torch.lerp(table[index], table[index + 1], place - below)

    @cached_property
    def _table(self) -> Tensor:
        """alpha at the levels i / 1000, i = 0 .. 1000."""
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, NUM_VP_STEPS, dtype=torch.float64) ** 2
        alphas = torch.log1p(-betas).cumsum(0).div(2).exp()
        if self.zero_terminal_snr:
            alphas = (alphas - alphas[-1]) * alphas[0] / (alphas[0] - alphas[-1])
        return torch.cat([torch.ones(1, dtype=torch.float64), alphas])


def precise(level: Tensor) -> Tensor:
    """`level` in float64, or float32 on devices without it (MPS)."""
    return level.float() if level.device.type == "mps" else level.double()


def _work_dtype(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)
