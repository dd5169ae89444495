"""Steps that reuse what the blocks did to the tokens a step ago, where little has changed since.

Two ways to tell how much has changed:

    first_block   the first block is run; what it adds to the tokens is compared with what it added when all blocks
                  were run last.  Source: first-block cache of ParaAttention (Cheng 2024), as diffusers has it.
    tea           the change of the signal from step to step (`core.protocols.Passage`), through a polynomial that was
                  fitted to the model, is added up until it reaches the threshold.  Source: Liu et al. 2024, TeaCache.

Below the threshold, what the remaining (tea: all) blocks added last is added again. Change is mean |a - b| / mean |b|,
of the clip which changed most. The calls of a step share one decision, that of the clips which lead (guidance: of its
conditional branch), so that it does not depend on how many branches go in one call; each call, told by its key, has
what it added for itself. A cache serves one clip, or one batch of them.
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
class Lead:
    """What the decision compares with, of the clips that lead, and what has changed since (tea)."""

    evidence: State
    change: float = 0.0


class StepCache:
    """The state of `StepCaching` along the `levels` of one run."""

    def __init__(self, options: StepCaching, levels: Sequence[float]) -> None:
        self.options = options
        self.num_blocks = self.num_skipped = 0
        self._open = tuple(levels[options.first : max(0, len(levels) - 1 - options.last)])
        self._lead: Lead | None = None
        self._added: dict[Hashable, State] = {}
        self._branches: Hashable = None
        self._reusing = False

    @property
    def skipped_share(self) -> float:
        """Of the blocks that clips would have gone through, how many they did not; in [0, 1]."""
        return self.num_skipped / max(1, self.num_blocks)

    def begin(self, branches: Hashable) -> None:
        """A step with these branches, in one call or several. Where they are others than before, all blocks are run."""
        if branches != self._branches:
            self._added.clear()
            self._lead, self._branches = None, branches

    def run(
        self,
        key: Hashable,
        level: Callable[[], float],
        state: State,
        passage: Passage,
        num_leading: int | None = None,
    ) -> State:
        """The state after all blocks, run or not.

        level: gives the highest of any cell, asked for where it matters (a GPU has to be waited for). num_leading: how
        many clips decide, from the first on; None: all of them; 0: none, it is done as was decided last.
        """
        first = self.options.kind == "first_block"
        head, tail = (passage.layers[:1], passage.layers[1:]) if first else ((), passage.layers)
        entered = state
        for layer in head:
            state = layer(state)
        if num_leading != 0:
            signal = _minus(state, entered, num_leading) if first else (passage.signal(state)[:num_leading].detach(),)
            self._reusing = self._decide(signal, level)
        del entered
        num_clips = next(part.shape[0] for part in state if part is not None)
        self.num_blocks += len(passage.layers) * num_clips
        added = self._added.get(key)
        if self._reusing and added is not None and _alike(added, state):
            self.num_skipped += len(tail) * num_clips
            return _plus(state, added)
        out = state
        for layer in tail:
            out = layer(out)
        self._added[key] = _minus(out, state)
        return out

    def _decide(self, evidence: State, level: Callable[[], float]) -> bool:
        """Whether the blocks of this step are skipped."""
        lead = self._lead
        if lead is None or not _alike(lead.evidence, evidence):
            self._lead = Lead(evidence)
            return False
        change = relative_change(evidence, lead.evidence)
        if self.options.kind == "tea":
            lead.change += rescaled(self.options.coefficients, change)
            lead.evidence, change = evidence, lead.change
        if change < self.options.threshold and self._is_open(level()):
            return True
        self._lead = Lead(evidence)
        return False

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


def _minus(a: State, b: State, count: int | None = None) -> State:
    """Of the first `count` clips, or of all."""
    return tuple(
        None if x is None or y is None else (x[:count] - y[:count]).detach() for x, y in zip(a, b, strict=True)
    )


def _plus(a: State, b: State) -> State:
    return tuple(None if x is None or y is None else x + y for x, y in zip(a, b, strict=True))
