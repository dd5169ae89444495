"""Steps that reuse what the blocks did to the tokens a step ago, where little has changed since.

Two ways to tell how much has changed:

    first_block   the first block is run; what it adds to the tokens is compared with what it added when all blocks
                  were run last.  Source: first-block cache of ParaAttention (Cheng 2024), as diffusers has it.
    tea           the change of the signal from step to step (`core.protocols.Passage`), through a polynomial that was
                  fitted to the model, is added up until it reaches the threshold.  Source: Liu et al. 2024, TeaCache.

Below the threshold, what the remaining (tea: all) blocks added last is added again. Change is mean |a - b| / mean |b|.
All clips of a call share one decision, that of the clip which changed most; calls are told apart by a key (guidance
names its branches), and each has a state of its own. A cache serves one clip, or one batch of them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Literal

import torch
from torch import Tensor

from vitascope.core.errors import InputError, choice
from vitascope.core.protocols import Passage, State

Kind = Literal["first_block", "tea"]
KINDS: tuple[Kind, ...] = ("first_block", "tea")
ROUNDING = 1e-6  # levels stored in float32 may differ this much from those of the schedule


@dataclass(frozen=True)
class StepCaching:
    """How to cache steps.

    threshold: change below which blocks are skipped; 0 never skips. first, last: steps at the ends of the schedule that
    run all blocks. coefficients: of the polynomial of "tea", highest power first; without any, the change itself.
    Raises InputError for values that make no sense.
    """

    kind: Kind = "first_block"
    threshold: float = 0.1
    first: int = 1
    last: int = 1
    coefficients: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        choice("step cache", self.kind, KINDS)
        if not (isfinite(self.threshold) and self.threshold >= 0):
            raise InputError(f"the threshold of a step cache is a number from 0 up, got {self.threshold}")
        if min(self.first, self.last) < 0:
            raise InputError("the numbers of first and last steps without a cache must not be negative")
        if not all(map(isfinite, self.coefficients)):
            raise InputError(f"a step cache needs finite coefficients, got {self.coefficients}")

    @classmethod
    def parse(cls, text: str) -> StepCaching:
        """From "KIND" or "KIND:THRESHOLD", such as "first_block:0.1". Raises InputError."""
        name, colon, threshold = text.partition(":")
        choice("step cache", name, KINDS)
        kind: Kind = "tea" if name == "tea" else "first_block"
        if not colon:
            return cls(kind)
        try:
            value = float(threshold)
        except ValueError as error:
            raise InputError(
                f"a step cache is KIND or KIND:THRESHOLD, such as first_block:0.1; got {text!r}"
            ) from error
        return cls(kind, value)

    def __str__(self) -> str:
        return f"{self.kind}:{self.threshold:g}"


@dataclass
class _Kept:
    """Of one kind of call: what the decision compares with, and what the blocks added when they were run last."""

    evidence: State
    added: State
    change: float = 0.0


class StepCache:
    """The state of `StepCaching` along the `levels` of one run."""

    def __init__(self, options: StepCaching, levels: Sequence[float]) -> None:
        self.options = options
        self.num_blocks = self.num_skipped = 0
        self._open = tuple(levels[options.first : max(0, len(levels) - 1 - options.last)])
        self._kept: dict[Hashable, _Kept] = {}

    @property
    def skipped_share(self) -> float:
        """Of the blocks that clips would have gone through, how many they did not; in [0, 1]."""
        return self.num_skipped / max(1, self.num_blocks)

    def run(self, key: Hashable, level: Callable[[], float], state: State, passage: Passage) -> State:
        """The state after all blocks, run or not. level: gives the highest of any cell, asked for where it matters (a
        GPU has to be waited for)."""
        first = self.options.kind == "first_block"
        head, tail = (passage.layers[:1], passage.layers[1:]) if first else ((), passage.layers)
        entered = state
        for layer in head:
            state = layer(state)
        evidence = _minus(state, entered) if first else (passage.signal(state).detach(),)
        del entered
        num_clips = next(part.shape[0] for part in state if part is not None)
        self.num_blocks += len(passage.layers) * num_clips
        kept = self._kept.get(key)
        if kept is not None and _alike(kept.evidence, evidence) and self._reuse(kept, evidence, level):
            self.num_skipped += len(tail) * num_clips
            return _plus(state, kept.added)
        out = state
        for layer in tail:
            out = layer(out)
        self._kept[key] = _Kept(evidence, _minus(out, state))
        return out

    def _reuse(self, kept: _Kept, evidence: State, level: Callable[[], float]) -> bool:
        change = relative_change(evidence, kept.evidence)
        if self.options.kind == "tea":
            kept.change += rescaled(self.options.coefficients, change)
            kept.evidence, change = evidence, kept.change
        return change < self.options.threshold and self._is_open(level())

    def _is_open(self, level: float) -> bool:
        return bool(self._open) and self._open[-1] - ROUNDING <= level <= self._open[0] + ROUNDING


def relative_change(now: State, before: State) -> float:
    """Mean |now - before| / mean |before| of the clip and the stream that changed most."""
    changes = [
        (_size(a - b) / _size(b)).max() for a, b in zip(now, before, strict=True) if a is not None and b is not None
    ]
    return float(torch.stack(changes).max())


def rescaled(coefficients: Sequence[float], change: float) -> float:
    """What a change counts for: the value of the polynomial there, highest power first, or the change itself.

    The published polynomials fall below 0 on either side of the changes that they were fitted to (few steps make larger
    ones): there the change itself counts, so that a large one is never taken for none.
    """
    value = 0.0
    for coefficient in coefficients:
        value = value * change + coefficient
    return change if value < 0 or not coefficients else value


def _size(x: Tensor) -> Tensor:
    """Mean magnitude of each clip, (B,), in fp32."""
    return x.abs().flatten(1).mean(1, dtype=torch.float32)


def _alike(a: State, b: State) -> bool:
    shapes = [[None if part is None else part.shape for part in state] for state in (a, b)]
    return shapes[0] == shapes[1]


def _minus(a: State, b: State) -> State:
    return tuple(None if x is None or y is None else (x - y).detach() for x, y in zip(a, b, strict=True))


def _plus(a: State, b: State) -> State:
    return tuple(None if x is None or y is None else x + y for x, y in zip(a, b, strict=True))
