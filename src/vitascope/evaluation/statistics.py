"""Shares with their uncertainty, and medians of offsets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np

Z_95 = 1.959963984540054


def wilson_interval(successes: int, total: int, z: float = Z_95) -> tuple[float, float]:
    """Score interval of a binomial share. Source: Wilson, JASA 22 (1927). (0, 1) when nothing was counted."""
    if total == 0:
        return 0.0, 1.0
    share = successes / total
    denominator = 1 + z * z / total
    centre = (share + z * z / (2 * total)) / denominator
    half = z / denominator * sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Share:
    """`successes` out of `total`."""

    successes: int
    total: int

    @classmethod
    def of(cls, outcomes: Iterable[bool]) -> Share:
        """Count the true ones."""
        listed = list(outcomes)
        return cls(sum(map(bool, listed)), len(listed))

    @property
    def value(self) -> float:
        """The share in [0, 1]; nan when nothing was counted."""
        return self.successes / self.total if self.total else float("nan")

    def as_dict(self) -> dict[str, float | int | None]:
        """Value, n and the 95% Wilson interval."""
        low, high = wilson_interval(self.successes, self.total)
        value = self.value if self.total else None
        return {"value": value, "successes": self.successes, "n": self.total, "low": low, "high": high}


@dataclass(frozen=True)
class OffsetSummary:
    """Signed offsets in milliseconds, boiled down, with the events that found no partner."""

    num_matched: int
    num_missed: int
    num_extra: int
    median_signed_ms: float | None
    median_ms: float | None
    p95_ms: float | None

    @classmethod
    def of(cls, offsets_ms: Sequence[float], num_missed: int, num_extra: int) -> OffsetSummary:
        """Median of the signed offsets, median and 95th percentile of their size."""
        if not offsets_ms:
            return cls(0, num_missed, num_extra, None, None, None)
        signed = np.asarray(offsets_ms, np.float64)
        size = np.abs(signed)
        return cls(
            len(offsets_ms),
            num_missed,
            num_extra,
            float(np.median(signed)),
            float(np.median(size)),
            float(np.percentile(size, 95)),
        )
