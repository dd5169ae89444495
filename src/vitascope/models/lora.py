"""LoRAs on our models: merged into the weights, or beside them, and taken off again without a trace.

Merged, W + sum of scale_i * delta_i is summed up in fp32 and rounded once to the dtype of the weights; it costs nothing
at run time. No arithmetic undoes that rounding, so what is merged into is kept as it was, in main memory, and copied
back: the weights are then the same to the bit. Beside the weights nothing but the factors takes memory, and every step
pays for them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from vitascope.core.errors import CapabilityError, InputError
from vitascope.models import FAMILIES, named
from vitascope.nn.low_rank import Branch, LowRankLinear
from vitascope.weights.keys import KeyTable, Rename
from vitascope.weights.lora import Lora, LowRank
from vitascope.weights.lora_fit import Layout, Part, fit

LAYOUTS = ("diffusers_keys", "original_keys")
"""The functions of a family's `keys.py` that give a table from a configuration."""
_OTHERS = {
    "audio_attn": "LTX-2",
    "vace_blocks": "Wan VACE",
    "double_blocks": "HunyuanVideo or FLUX",
    "single_transformer_blocks": "FLUX or HunyuanVideo",
    "joint_blocks": "Stable Diffusion 3",
    "down_blocks": "Stable Diffusion",
    "input_blocks": "Stable Diffusion",
}
"""Parts of the names of layers that tell models which are not among ours."""


@dataclass(frozen=True)
class Scaled:
    """A part of a LoRA with the scale that it was asked for with."""

    part: Part
    scale: float


class LoraStack:
    """The LoRAs of one model, which has one stack at a time.

    keep: hold what is merged into, so that LoRAs can be changed and removed; without it, `set` works once and merging
    takes no memory. Texts that the model prepared before a change do not fit it after.
    """

    def __init__(self, model: nn.Module, *, keep: bool = True) -> None:
        self._model, self._keep, self._fixed = model, keep, False
        self._layouts: dict[str, Layout] = {}
        self._kept: dict[str, Tensor] = {}
        self._replaced: dict[str, nn.Linear] = {}

    def set(self, loras: Sequence[tuple[Lora, float]], *, merged: bool = True) -> None:
        """Make these LoRAs, each times its scale, the only ones of the model.

        merged: into the weights, or beside them. Whole differences, and updates of what is no linear map, are merged in
        both cases. Raises CheckpointError for a LoRA that does not fit, InputError for a scale that is no number,
        CapabilityError for weights that cannot be added to; the model is then as it was.
        """
        if loras:
            self._layouts = self._layouts or layouts_of(self._model)
        by_name = updates_of(self._model, loras, self._layouts)
        tensors = self._tensors(by_name)
        self.remove()
        try:
            for name, parts in by_name.items():
                aside = [not merged and self._may_stand_beside(scaled.part) for scaled in parts]
                self._merge(name, tensors[name], [p for p, beside in zip(parts, aside, strict=True) if not beside])
                self._stand_beside(name, [p for p, beside in zip(parts, aside, strict=True) if beside])
        except BaseException:
            if self._keep:
                self.remove()
            raise

    def remove(self) -> None:
        """The model as it was before the first `set`, to the bit. Raises CapabilityError where nothing was kept."""
        if self._fixed:
            raise CapabilityError("LoRAs were merged without keeping the weights: load the model again")
        for name, linear in self._replaced.items():
            current = self._model.get_submodule(name)
            assert isinstance(current, LowRankLinear)
            linear.weight, linear.bias = current.weight, current.bias  # they may have been moved since
            self._put(name, linear.train(current.training))
        tensors = self._model.state_dict(keep_vars=True)
        with torch.no_grad():
            for name, kept in self._kept.items():
                tensors[name].copy_(kept)
        self._replaced.clear()
        self._kept.clear()

    def _tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """All tensors of the model; those of these names must be such that something can be added to them."""
        tensors = self._model.state_dict(keep_vars=True)
        for name in names:
            if not tensors[name].is_floating_point() or tensors[name].is_meta:
                raise CapabilityError(f"a LoRA cannot be added to {name}: its weights are quantised or not loaded")
        return tensors

    def _may_stand_beside(self, part: Part) -> bool:
        layer, _, leaf = part.name.rpartition(".")
        plain = type(self._model.get_submodule(layer)) is nn.Linear
        return isinstance(part.update, LowRank) and bool(layer) and leaf == "weight" and plain

    def _merge(self, name: str, tensor: Tensor, parts: Sequence[Scaled]) -> None:
        if not parts:
            return
        if self._keep:
            self._kept[name] = tensor.detach().to("cpu", copy=True)
        else:
            self._fixed = True
        merge_into(tensor, parts)

    def _stand_beside(self, name: str, parts: Sequence[Scaled]) -> None:
        if not parts:
            return
        layer = name.rpartition(".")[0]
        linear = self._model.get_submodule(layer)
        assert isinstance(linear, nn.Linear)
        branches = []
        for scaled in parts:
            update = scaled.part.update
            assert isinstance(update, LowRank)
            branches.append(Branch(scaled.part.rows, update.down, scaled.scale * update.scale * update.up.float()))
        self._replaced[layer] = linear
        self._put(layer, LowRankLinear(linear, branches))

    def _put(self, layer: str, linear: nn.Linear) -> None:
        parent, _, leaf = layer.rpartition(".")
        setattr(self._model.get_submodule(parent), leaf, linear)


def merge_into(tensor: Tensor, parts: Sequence[Scaled]) -> None:
    """Add updates to a weight in place: summed up in fp32, rounded once."""
    with torch.no_grad(), torch.autocast(tensor.device.type, enabled=False):
        total = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
        for scaled in parts:
            rows = scaled.part.rows
            rows = rows if isinstance(rows, slice) else rows.to(total.device)
            total[rows] += scaled.scale * scaled.part.update.delta(total.device)
        tensor.copy_(total)


def updates_of(
    model: nn.Module, loras: Sequence[tuple[Lora, float]], layouts: Mapping[str, Layout] | None = None
) -> dict[str, list[Scaled]]:
    """What LoRAs, each times its scale, add to the weights of a model, by our names. layouts: `layouts_of(model)`.

    Raises CheckpointError for a LoRA that does not fit, InputError for a scale that is no number.
    """
    by_name: dict[str, list[Scaled]] = {}
    family, layouts = family_of(model), layouts or (layouts_of(model) if loras else {})
    for lora, scale in loras:
        if not isfinite(scale):
            raise InputError(f"the scale of a LoRA must be a number, got {scale} for {lora.label}")
        what = f"this model of the family {family}"
        for part in fit(lora, layouts, what, lambda lora, n: _hint(lora, n, family)):
            by_name.setdefault(part.name, []).append(Scaled(part, scale))
    return by_name


def family_of(model: nn.Module) -> str:
    """The name of a model's family, or that of its class."""
    place = f"{type(model).__module__}:{type(model).__qualname__}"
    return next((name for name, family in FAMILIES.items() if family.model == place), type(model).__name__)


def layouts_of(model: nn.Module) -> dict[str, Layout]:
    """The names that a LoRA of a model may use: those of every key table of its family, and our own."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    tables = _tables(type(model).__module__, lambda: getattr(model, "config", None))
    tables["own_keys"] = tuple(Rename(name, name) for name in shapes)
    return {name: Layout(table, shapes) for name, table in tables.items()}


def looks_like(lora: Lora) -> list[str]:
    """The models that a LoRA seems to be for, by the names of its layers; none where that cannot be told."""
    layers = {_signature(target.layer) for target in lora.updates}
    for part, name in _OTHERS.items():
        if any(part in layer for layer in layers):
            return [name]
    hits: dict[str, int] = {}
    denoisers = {name: family for name, family in FAMILIES.items() if ".codecs." not in family.model}
    for family, places in denoisers.items():
        tables = _tables(places.model.partition(":")[0], named(places.config))
        names = (name for table in tables.values() for rule in table for name in (*rule.theirs, *rule.ours))
        hits[family] = len(layers & {_signature(name.rpartition(".")[0]) for name in names})
    most = max(hits.values())
    return [family for family, count in hits.items() if count == most > len(layers) / 2]


def _tables(module: str, config: Callable[[], Any]) -> dict[str, KeyTable]:
    """The key tables beside the module of a model, if there are any, for `config()`."""
    place = f"{module.rpartition('.')[0]}.keys"
    if not place.startswith("vitascope.") or find_spec(place) is None:
        return {}
    keys = import_module(place)
    return {name: getattr(keys, name)(config()) for name in LAYOUTS if hasattr(keys, name)}


def _signature(layer: str) -> str:
    """The name of a layer with its dots flattened and its numbers, or the fields that stand for them, as 0."""
    return re.sub(r"\d+|\{\w+\}", "0", layer.replace(".", "_"))


def _hint(lora: Lora, fitting: int, family: str) -> str:
    """What to say of a LoRA of which `fitting` updates have a place in a model."""
    like = looks_like(lora)
    if like and family not in like:
        return f"; it looks like one for {' or '.join(like)}"
    return f"; the others fit: it is for another variant of {family}" if fitting else ""
