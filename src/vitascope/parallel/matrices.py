"""Layers divided between processes: each holds some heads, or some units of a feed-forward, and the results are summed.

Weights stay plain tensors, each the process's own part. Fused projections stack queries, keys and values, and a process
needs the same heads of each: that is no contiguous range, so a weight is cut in several. Source: Shoeybi et al. 2019
(Megatron-LM), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitascope.core.errors import CapabilityError, CheckpointError, ShapeError
from vitascope.nn.attention import AttentionKind
from vitascope.nn.norms import RMSNorm
from vitascope.ops.rope import RotaryTable
from vitascope.parallel.ranks import Ranks, share_sizes


@dataclass(frozen=True)
class Cut:
    """What a process keeps of a weight: these ranges of an axis of `total` entries, one after the other."""

    axis: int
    total: int
    ranges: tuple[slice, ...]

    def of(self, tensor: Tensor) -> Tensor:
        """The kept part, in memory of its own. Raises CheckpointError for a tensor of another size."""
        if tensor.ndim <= self.axis or tensor.shape[self.axis] != self.total:
            raise CheckpointError(
                f"a weight {tuple(tensor.shape)} cannot be divided: axis {self.axis} has {self.total}"
            )
        parts = [tensor.narrow(self.axis, part.start, part.stop - part.start) for part in self.ranges]
        return torch.cat(parts, self.axis)

    @property
    def size(self) -> int:
        """Entries along the axis."""
        return sum(part.stop - part.start for part in self.ranges)


class SummedLinear(nn.Linear):
    """A linear map of which each process has some of the inputs; the processes' results are added, then the bias.

    Sums of reduced precision are formed in it: each process rounds its own part.
    """

    def __init__(self, linear: nn.Linear, cut: Cut, ranks: Ranks) -> None:
        with torch.device("meta"):
            super().__init__(cut.size, linear.out_features, bias=linear.bias is not None)
        self.ranks, self.bias = ranks, linear.bias
        self.weight = _kept(linear.weight, cut)

    def forward(self, input: Tensor) -> Tensor:
        total = self.ranks.sum(F.linear(input, self.weight))
        return total if self.bias is None else total + self.bias.to(total.dtype)


class SharedRMSNorm(RMSNorm):
    """An RMS norm over a width of which each process has a part: the mean square is that of all."""

    def __init__(self, norm: RMSNorm, cut: Cut, ranks: Ranks) -> None:
        with torch.device("meta"):
            super().__init__(cut.size, norm.eps)
        self.ranks, self.width = ranks, len(norm.weight)
        self.weight = _kept(norm.weight, cut)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        total = self.ranks.sum(wide.square().sum(-1, keepdim=True))
        return (wide * torch.rsqrt(total / self.width + self.eps) * self.weight).to(x.dtype)


@dataclass(frozen=True)
class HeadsOfKind(AttentionKind):
    """The kind of an attention of which this process has some heads: they take their part of a table per head."""

    heads: slice = field(default_factory=lambda: slice(None))

    def turn(self, x_ALHE: Tensor, table: RotaryTable) -> Tensor:
        if self.pairs == "per_head":
            table = table[0][..., self.heads, :], table[1][..., self.heads, :]
        return super().turn(x_ALHE, table)


class Divider:
    """Divides layers in place, and keeps account in `cuts` of what this process holds of each weight, by name."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.cuts: dict[str, Cut] = {}

    def cut(self, axis: int, parts: Sequence[int], each: int = 1, what: str = "heads") -> Cut:
        """Of an axis of stacked parts of so many heads (or units), `each` wide: this process's heads of every part.

        A part of one head beside parts of more is for all of them (multi-query) and kept whole. Raises ShapeError where
        heads do not go round, or where queries would part from the keys that they share.
        """
        several = [num for num in parts if num > 1] or list(parts)
        if len(set(several)) > 1 and any(num % self.ranks.size for num in several):
            raise ShapeError(f"groups of {several} {what} cannot be divided between {self.ranks.size} processes")
        ranges, start = [], 0
        for num in parts:
            own = slice(0, num)
            if num in several:
                own = self.ranks.own(share_sizes(num, self.ranks.size, what))
            ranges.append(slice((start + own.start) * each, (start + own.stop) * each))
            start += num
        return Cut(axis, start * each, tuple(ranges))

    def rows(self, layer: nn.Module, place: str, name: str, cut: Cut) -> None:
        """A linear map of which this process works out some results."""
        linear = _linear(layer, place, name)
        for leaf in ("weight", "bias"):
            if getattr(linear, leaf) is not None:
                self.parameter(linear, f"{place}.{name}", leaf, cut)
        linear.out_features = cut.size

    def columns(self, layer: nn.Module, place: str, name: str, cut: Cut) -> None:
        """A linear map that takes what `rows` gave."""
        linear = _linear(layer, place, name)
        self.cuts[f"{place}.{name}.weight"] = cut
        setattr(layer, name, SummedLinear(linear, cut, self.ranks))

    def norm(self, layer: nn.Module, place: str, name: str, cut: Cut) -> None:
        """A norm over all heads."""
        norm = layer.get_submodule(name)
        assert isinstance(norm, RMSNorm)
        self.cuts[f"{place}.{name}.weight"] = cut
        setattr(layer, name, SharedRMSNorm(norm, cut, self.ranks))

    def parameter(self, layer: nn.Module, place: str, name: str, cut: Cut) -> None:
        """A weight of its own."""
        self.cuts[f"{place}.{name}" if place else name] = cut
        setattr(layer, name, _kept(getattr(layer, name), cut))

    def kind(self, kind: AttentionKind, num_heads: int) -> HeadsOfKind:
        """That of an attention with so many heads in all."""
        own = self.ranks.own(share_sizes(num_heads, self.ranks.size, "heads"))
        return HeadsOfKind(**{part.name: getattr(kind, part.name) for part in fields(AttentionKind)}, heads=own)


def _linear(layer: nn.Module, place: str, name: str) -> nn.Linear:
    linear = layer.get_submodule(name)
    if type(linear) is not nn.Linear:
        kind = type(linear).__name__
        raise CapabilityError(f"{place}.{name} is a {kind}: divide matrices while they are plain, then change them")
    return linear


def _kept(weight: Tensor, cut: Cut) -> nn.Parameter:
    return nn.Parameter(cut.of(weight.detach()), requires_grad=weight.requires_grad)
