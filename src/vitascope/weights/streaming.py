"""From a source of tensors through a key table into a model, one rule at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from vitascope.core.errors import CheckpointError
from vitascope.weights.keys import KeyTable, Move, plan
from vitascope.weights.sources import TensorSource


def load_streaming(
    model: nn.Module,
    source: TensorSource,
    table: KeyTable,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | Callable[[str], torch.dtype] = torch.float32,
    report: Callable[[int, int], None] = lambda done, total: None,
    cut: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
) -> None:
    """Give a model built on the meta device its weights: every one, and no other, in `dtype` on `device`.

    dtype: of all floating-point weights, or of each by its name. cut: what the model holds of each, by its name: all
    of it, or a part where processes share it.

    Never holds more than the model so far and the tensors of one rule; a weight that needs no change stays the pages of
    its file, so that the machine holds it once. `report(rules done, rules in all)`. Raises
    CheckpointError, naming the tensors, when the source does not fit the model; the model is then useless.
    """
    wanted = model.state_dict(keep_vars=True)
    moves = moves_into(wanted, source, table)
    for done, move in enumerate(moves, start=1):
        tensors = [source.view(name) for name in move.theirs]
        for name, tensor in zip(move.ours, move.read(tensors, source.label), strict=True):
            kind = dtype if isinstance(dtype, torch.dtype) else dtype(name)
            _place(model, name, wanted[name], cut(name, tensor), source.label, device, kind)
        report(done, len(moves))


def moves_into(names: Collection[str], source: TensorSource, table: KeyTable) -> list[Move]:
    """How the tensors of a source become the weights of these names. Raises CheckpointError where any are missing or
    others are there."""
    moves = plan(table, source.names(), label=source.label)
    made = [name for move in moves for name in move.ours]
    unknown, missing = [name for name in made if name not in names], sorted(set(names) - set(made))
    for found, what in ((unknown, "of another model"), (missing, "missing")):
        if found:
            rest = ", ..." if len(found) > 3 else ""
            raise CheckpointError(f"{source.label}: {len(found)} weights {what} ({', '.join(found[:3])}{rest})")
    return moves


def check_kind(name: str, found: torch.dtype, wanted: torch.dtype, label: str) -> None:
    """Raise CheckpointError for whole numbers in the place of others: weights that were quantised, and whose scales
    stand elsewhere."""
    if found.is_floating_point != wanted.is_floating_point:
        kind = str(found).removeprefix("torch.")
        raise CheckpointError(f"{label}: {name} is of {kind}; quantised weights are not read: give fp32, bf16 or fp16")


def _place(
    model: nn.Module, name: str, old: Tensor, tensor: Tensor, label: str, device: torch.device | str, dtype: torch.dtype
) -> None:
    if tensor.shape != old.shape:
        raise CheckpointError(f"{label}: {name} has the shape {tuple(tensor.shape)}, expected {tuple(old.shape)}")
    check_kind(name, tensor.dtype, old.dtype, label)
    kept = tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
    if kept.untyped_storage().nbytes() != kept.nbytes or not kept.is_contiguous():
        kept = kept.clone(memory_format=torch.contiguous_format)  # not a view of a larger tensor
    parent, _, leaf = name.rpartition(".")
    if isinstance(old, nn.Parameter):
        setattr(model.get_submodule(parent), leaf, nn.Parameter(kept, requires_grad=False))
    else:
        setattr(model.get_submodule(parent), leaf, kept)
