"""The updates of a LoRA carried over to our tensors, through the key tables that checkpoints are read by.

A rule of a table moves rows or gives rows another shape (`Rule.acts_on`). An update of one of several of their layers
that make one of ours is then an update of some of its rows; which ones is found by sending row numbers through the
rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vitascope.core.errors import CheckpointError
from vitascope.weights.keys import KeyTable, Move, is_dropped, plan
from vitascope.weights.lora import Difference, Lora, LowRank, Target, Update, few

Rows = slice | Tensor
"""Rows of a tensor, in a row or by their numbers (int64)."""


@dataclass(frozen=True)
class Part:
    """What one update adds to rows of one of our tensors; the update has the shape of those rows."""

    name: str
    rows: Rows
    update: Update


class Layout:
    """The tensors of a model under the names of one layout, with the rules that they come by.

    shapes: of all our tensors. Raises CheckpointError where the table does not cover them.
    """

    def __init__(self, table: KeyTable, shapes: Mapping[str, torch.Size]) -> None:
        self._table, self._own = table, shapes
        self.places: dict[str, tuple[Move, int]] = {}
        self.shapes: dict[str, torch.Size] = {}
        self._flat: dict[tuple[str, str], list[str]] = {}
        for move in plan(table, shapes, writing=True, label="the model"):
            theirs = move.rule.write([torch.empty(shapes[name], device="meta") for name in move.ours])
            for index, (name, tensor) in enumerate(zip(move.theirs, theirs, strict=True)):
                self.places[name], self.shapes[name] = (move, index), tensor.shape
                for layer, leaf in _readings(name):
                    self._flat.setdefault((layer.replace(".", "_"), leaf), []).append(name)

    def find(self, target: Target) -> list[str]:
        """Names (theirs) of what a target may stand for: one, none, or more than one where underscores are unclear."""
        if target.flat:
            return self._flat.get((target.layer.replace(".", "_"), target.leaf), [])
        names = (f"{target.layer}.{target.leaf}", target.layer if target.leaf == "weight" else "")
        return [name for name in names if name in self.places]

    def drops(self, target: Target) -> bool:
        """Whether a target says nothing that the model needs."""
        return not target.flat and is_dropped(self._table, f"{target.layer}.{target.leaf}")

    def takes_factors(self, name: str) -> bool:
        """Whether their tensor `name` can be updated by a product of factors."""
        move, _ = self.places[name]
        return move.rule.acts_on != "whole" and all(len(self._own[ours]) > 1 for ours in move.ours)

    def carry(self, name: str, update: Update) -> list[Part]:
        """An update of their tensor `name`, in its shape, as updates of ours."""
        move, index = self.places[name]
        acts_on, read = move.rule.acts_on, move.rule.read
        if acts_on == "rows":
            return self._moved(move, index, update)
        if isinstance(update, LowRank):
            return [Part(move.ours[0], slice(None), replace(update, down=read([update.down])[0]))]
        return [Part(move.ours[0], slice(None), Difference(read([update.values])[0]))]

    def _moved(self, move: Move, index: int, update: Update) -> list[Part]:
        """Through a rule that moves rows: -1 stands for rows of other tensors of theirs."""
        numbers = [torch.full(self.shapes[name][:1], -1) for name in move.theirs]
        numbers[index] = torch.arange(len(numbers[index]))
        parts = []
        for name, origin in zip(move.ours, move.rule.read(numbers), strict=True):
            places = (origin >= 0).nonzero()[:, 0]
            if len(places):
                parts.append(Part(name, _tight(places), _taken(update, origin[places])))
        return parts


def fit(
    lora: Lora, layouts: Mapping[str, Layout], what: str, hint: Callable[[Lora, int], str] = lambda lora, fitting: ""
) -> list[Part]:
    """All that a LoRA adds to a model, under the layout whose names it uses.

    what: the model, in messages; `hint(lora, how many updates fit)` ends the message about names that do not. Raises
    CheckpointError for names that no layout has, that stand for several tensors or for one twice, and for other shapes.
    """
    targets = list(lora.updates)
    unknown = {
        key: [target for target in targets if not layout.find(target) and not layout.drops(target)]
        for key, layout in layouts.items()
    }
    best = min(unknown, key=lambda key: len(unknown[key]))
    if left := unknown[best]:
        raise CheckpointError(
            f"{lora.label} does not fit {what}: {len(left)} of its {len(targets)} updates have no place there "
            f"({few(_said(target) for target in left)}){hint(lora, len(targets) - len(left))}"
        )
    layout, parts, wrong = layouts[best], list[Part](), list[str]()
    taken = dict[str, Target]()
    for target, update in lora.updates.items():
        names = layout.find(target)
        if len(names) > 1:
            raise CheckpointError(f"{lora.label}: {target.layer} may stand for {' or '.join(names)}")
        for name in names:
            if name in taken:
                raise CheckpointError(f"{lora.label} adds to {name} twice: {taken[name].layer} and {target.layer}")
            taken[name] = target
            shaped = _shaped(update, layout.shapes[name])
            if shaped is None or (isinstance(shaped, LowRank) and not layout.takes_factors(name)):
                wrong.append(f"{_said(target)} {_sizes(update)} for {tuple(layout.shapes[name])}")
            else:
                parts += layout.carry(name, shaped)
    if wrong:
        raise CheckpointError(
            f"{lora.label} was made for another size of {what}: {len(wrong)} of its {len(targets)} updates have other "
            f"shapes ({few(wrong)})"
        )
    return parts


def _readings(name: str) -> list[tuple[str, str]]:
    """What a tensor of theirs may be called: layer and leaf, or by its own name where it is no layer's."""
    layer, _, leaf = name.rpartition(".")
    return [(name, "weight"), (layer, leaf)] if layer else [(name, "weight")]


def _said(target: Target) -> str:
    return target.layer if target.leaf == "weight" else f"{target.layer}.{target.leaf}"


def _sizes(update: Update) -> str:
    if isinstance(update, LowRank):
        return str((len(update.up), *update.down.shape[1:]))
    return str(tuple(update.values.shape))


def _shaped(update: Update, shape: torch.Size) -> Update | None:
    """The update for a tensor of that shape: axes of one at the end, and kernels flattened to matrices, are the same
    numbers. None where it does not fit."""
    if isinstance(update, Difference):
        same = _bare(update.values.shape) == _bare(shape)
        return Difference(update.values.reshape(shape)) if same else None
    inputs, own = shape[1:], update.down.shape[1:]
    if len(shape) < 2 or len(update.up) != shape[0]:
        return None
    if _bare(own) != _bare(inputs) and own != (inputs.numel(),):
        return None
    return replace(update, down=update.down.reshape(-1, *inputs))


def _bare(shape: torch.Size) -> list[int]:
    sizes = list(shape)
    while sizes and sizes[-1] == 1:
        sizes.pop()
    return sizes


def _taken(update: Update, rows: Tensor) -> Update:
    """The given rows of an update, which is itself where they are all of them in their order."""
    of = update.up if isinstance(update, LowRank) else update.values
    if torch.equal(rows, torch.arange(len(of))):
        return update
    return replace(update, up=of[rows]) if isinstance(update, LowRank) else Difference(of[rows])


def _tight(places: Tensor) -> Rows:
    """Ascending row numbers, as a slice if none is left out between them."""
    first, last = int(places[0]), int(places[-1])
    return slice(first, last + 1) if last - first + 1 == len(places) else places
