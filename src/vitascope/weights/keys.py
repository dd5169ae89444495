"""Key tables: how the tensors of somebody else's checkpoint become ours, and back.

A table is a tuple of rules. A rule pairs patterns of their names with patterns of ours; `{layer}` in a pattern stands
for one part of a dotted name and must be the same on both sides. Every rule can be undone, so one table reads and
writes. A name that no rule takes, that two rules take, or that lacks its companions is an error, never a warning.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vitascope.core.errors import CheckpointError

LEAVES = ("weight", "bias")
"""What a linear map or a convolution holds."""
Axes = Literal["rows", "columns", "whole"]
"""What `read` of a rule acts on. rows: it moves rows (first axis) to other places, whatever a row holds. columns: it
gives every row another shape, however many rows there are. whole: neither. A product up @ down of two factors is read
as read(up) @ down where rows are moved, as up @ read(down) where columns are."""


@dataclass(frozen=True)
class Rename:
    """One tensor under another name."""

    theirs_name: str
    ours_name: str

    @property
    def theirs(self) -> tuple[str, ...]:
        return (self.theirs_name,)

    @property
    def ours(self) -> tuple[str, ...]:
        return (self.ours_name,)

    def read(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Theirs to ours."""
        return list(tensors)

    def write(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Ours to theirs."""
        return list(tensors)

    @property
    def acts_on(self) -> Axes:
        return "rows"


@dataclass(frozen=True)
class Swap(Rename):
    """Two halves along the first axis change places, as in (shift, scale) and (scale, shift)."""

    def read(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [torch.cat(tensor.chunk(2)[::-1]) for tensor in tensors]

    def write(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return self.read(tensors)


@dataclass(frozen=True)
class Flatten(Rename):
    """A kernel (outputs, *shape) becomes a matrix (outputs, product of shape): a convolution without overlap is one."""

    shape: tuple[int, ...]

    def read(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [_shaped(tensor, (len(tensor), *self.shape), self.theirs_name).flatten(1) for tensor in tensors]

    def write(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensor.unflatten(1, self.shape) for tensor in tensors]

    @property
    def acts_on(self) -> Axes:
        return "columns"


@dataclass(frozen=True)
class Squeeze(Rename):
    """A tensor (1, ..., 1, *rest) loses `axes` leading or, below 0, trailing axes of one."""

    axes: int

    def read(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        ones = (1,) * abs(self.axes)
        kept = [t.shape[self.axes :] if self.axes > 0 else t.shape[: self.axes] for t in tensors]
        full = [(*ones, *k) if self.axes > 0 else (*k, *ones) for k in kept]
        return [_shaped(t, f, self.theirs_name).reshape(k) for t, f, k in zip(tensors, full, kept, strict=True)]

    def write(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        ones = (1,) * abs(self.axes)
        return [t.reshape((*ones, *t.shape) if self.axes > 0 else (*t.shape, *ones)) for t in tensors]

    @property
    def acts_on(self) -> Axes:
        return "whole" if self.axes > 0 else "columns"


@dataclass(frozen=True)
class Fuse:
    """Several of their tensors stacked along the first axis are one of ours; `parts` are their shares of it."""

    theirs: tuple[str, ...]
    ours_name: str
    parts: tuple[int, ...] = ()

    @property
    def ours(self) -> tuple[str, ...]:
        return (self.ours_name,)

    def read(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [torch.cat(list(tensors))]

    def write(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return _cut(tensors[0], self.parts or (1,) * len(self.theirs), self.ours_name)

    @property
    def acts_on(self) -> Axes:
        return "rows"


@dataclass(frozen=True)
class Split:
    """One of their tensors is several of ours, stacked along the first axis; `parts` are our shares of it."""

    theirs_name: str
    ours: tuple[str, ...]
    parts: tuple[int, ...] = ()

    @property
    def theirs(self) -> tuple[str, ...]:
        return (self.theirs_name,)

    def read(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return _cut(tensors[0], self.parts or (1,) * len(self.ours), self.theirs_name)

    def write(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [torch.cat(list(tensors))]

    @property
    def acts_on(self) -> Axes:
        return "rows"


@dataclass(frozen=True)
class Drop:
    """A tensor that may be there and says nothing that the model needs; it is not written back."""

    theirs_name: str
    ours: tuple[str, ...] = ()

    @property
    def theirs(self) -> tuple[str, ...]:
        return (self.theirs_name,)

    def read(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return []

    def write(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return []

    @property
    def acts_on(self) -> Axes:
        return "whole"


Rule = Rename | Fuse | Split | Drop
KeyTable = tuple[Rule, ...]


@dataclass(frozen=True)
class Move:
    """A rule with the names of one layer filled in."""

    rule: Rule
    theirs: tuple[str, ...]
    ours: tuple[str, ...]

    def read(self, tensors: Sequence[Tensor], label: str = "the checkpoint") -> list[Tensor]:
        """Theirs to ours. Tensors of several dtypes become one of fp32 (fp8 is promoted to nothing by itself). Raises
        CheckpointError for shapes that the rule cannot take, and for weights of which some were quantised."""
        if len({tensor.is_floating_point() for tensor in tensors}) > 1:
            kinds = ", ".join(f"{n} {str(t.dtype)[6:]}" for n, t in zip(self.theirs, tensors, strict=True))
            raise CheckpointError(f"{label}: whole numbers among weights, as where some were quantised: {kinds}")
        if len({tensor.dtype for tensor in tensors}) > 1:
            tensors = [tensor.float() for tensor in tensors]
        try:
            return self.rule.read(tensors)
        except (RuntimeError, IndexError, TypeError) as error:
            shapes = ", ".join(f"{n} {tuple(t.shape)}" for n, t in zip(self.theirs, tensors, strict=True))
            raise CheckpointError(f"{label}: shapes that do not go together: {shapes}") from error


def plan(table: KeyTable, names: Iterable[str], *, writing: bool = False, label: str = "the checkpoint") -> list[Move]:
    """What to do with tensors of these names, theirs (or ours, when writing), in the order of the names.

    Raises CheckpointError naming what no rule takes, what two rules would write, and what lacks its companions.
    """
    given, find = list(names), _Finder(table, writing)
    moves: dict[tuple[int, tuple[str, ...]], Move] = {}
    unknown = []
    for name in given:
        found = find(name)
        if not found:
            unknown.append(name)
        for number, values in found:
            rule = table[number]
            theirs, ours = (tuple(p.format_map(values) for p in side) for side in (rule.theirs, rule.ours))
            moves[number, theirs + ours] = Move(rule, theirs, ours)
    _check(list(moves.values()), given, unknown, writing, label)
    return list(moves.values())


def convert(
    table: KeyTable, tensors: Mapping[str, Tensor], *, writing: bool = False, label: str = "the checkpoint"
) -> dict[str, Tensor]:
    """All tensors at once, theirs to ours (or back, when writing). Raises CheckpointError; see `plan`."""
    out: dict[str, Tensor] = {}
    for move in plan(table, tensors, writing=writing, label=label):
        sources, targets = (move.ours, move.theirs) if writing else (move.theirs, move.ours)
        act = move.rule.write if writing else move.rule.read
        out.update(zip(targets, act([tensors[name] for name in sources]), strict=True))
    return out


def _check(moves: Sequence[Move], given: Sequence[str], unknown: Sequence[str], writing: bool, label: str) -> None:
    there = set(given)
    missing, taken, twice = [], set[str](), []
    written = set[str]()
    for move in moves:
        sources, targets = (move.ours, move.theirs) if writing else (move.theirs, move.ours)
        missing += [name for name in sources if name not in there]
        twice += [name for name in sources if name in taken] + [name for name in targets if name in written]
        taken.update(sources)
        written.update(targets)
    problems = [
        f"{len(found)} {what} ({', '.join(found[:3])}{', ...' if len(found) > 3 else ''})"
        for what, found in (("unknown", unknown), ("missing", missing), ("twice", twice))
        if found
    ]
    if problems:
        raise CheckpointError(f"the tensors of {label} do not fit: {'; '.join(problems)}")


def is_dropped(table: KeyTable, name: str) -> bool:
    """Whether a tensor of that name (theirs) says nothing that the model needs."""
    return any(isinstance(rule, Drop) and _expression(rule.theirs_name).fullmatch(name) for rule in table)


class _Finder:
    """The rules that take a name, by their numbers, with the fields of its pattern: plain names are looked up, and only
    patterns with fields are tried one by one (a table may hold a thousand rules)."""

    def __init__(self, table: KeyTable, writing: bool) -> None:
        self._plain: dict[str, list[int]] = {}
        self._patterns: list[tuple[int, re.Pattern[str]]] = []
        for number, rule in enumerate(table):
            for pattern in rule.ours if writing else rule.theirs:
                if "{" in pattern:
                    self._patterns.append((number, _expression(pattern)))
                else:
                    self._plain.setdefault(pattern, []).append(number)

    def __call__(self, name: str) -> list[tuple[int, dict[str, str]]]:
        plain: list[tuple[int, dict[str, str]]] = [(number, {}) for number in self._plain.get(name, ())]
        matches = ((number, pattern.fullmatch(name)) for number, pattern in self._patterns)
        return plain + [(number, match.groupdict()) for number, match in matches if match is not None]


def renamed_layers(names: Mapping[str, str]) -> list[Rule]:
    """Weight and bias of each layer, theirs to ours."""
    return [Rename(f"{theirs}.{leaf}", f"{ours}.{leaf}") for theirs, ours in names.items() for leaf in LEAVES]


def fused_layers(names: Mapping[str, Sequence[str]]) -> list[Rule]:
    """Weight and bias of each of our layers that several of theirs make."""
    return [
        Fuse(tuple(f"{name}.{leaf}" for name in theirs), f"{ours}.{leaf}")
        for ours, theirs in names.items()
        for leaf in LEAVES
    ]


def _expression(pattern: str) -> re.Pattern[str]:
    """`blocks.{layer}.weight` as a regular expression; a field stands for what lies between two dots."""
    parts = re.split(r"\{(\w+)\}", pattern)
    text = "".join(f"(?P<{part}>[^.]+)" if index % 2 else re.escape(part) for index, part in enumerate(parts))
    return re.compile(text)


def _cut(tensor: Tensor, parts: tuple[int, ...], name: str) -> list[Tensor]:
    if tensor.ndim == 0 or len(tensor) % sum(parts):
        raise CheckpointError(f"{name} {tuple(tensor.shape)} cannot be cut in proportions {parts}")
    return list(tensor.split([part * len(tensor) // sum(parts) for part in parts]))


def _shaped(tensor: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    if tensor.shape != shape:
        raise CheckpointError(f"{name} has the shape {tuple(tensor.shape)}, expected {shape}")
    return tensor
