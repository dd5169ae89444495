"""Which tokens of a sequence a process works on, and how all of them still read each other.

A model splits what belongs to its tokens, attends through its share, and joins the result; with `WHOLE` each of these
does nothing. B batch, L tokens, S common tokens (words, which every process has), H heads, E width of a head.
Sources: Jacobs et al. 2023 (DeepSpeed-Ulysses), section 3; Liu et al. 2023 (ring attention), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vitascope.core.errors import ShapeError
from vitascope.ops.attention import attend
from vitascope.ops.partial import Partial, attend_partly, merge
from vitascope.ops.rope import RotaryTable
from vitascope.parallel.ranks import Ranks, even_sizes, share_sizes

QKV = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values of the same tokens, (B, L, H, E) each; queries may be fewer (none, say)."""


class AttendJoint(Protocol):
    """Attention over a sequence and common tokens at once; `seen_BS` is True where a common token is real.

    Returns what the queries of both found, (B, L, H, E) and (B, queries of the common tokens, H, E).
    """

    def __call__(self, own: QKV, common: QKV, seen_BS: Tensor, /) -> tuple[Tensor, Tensor]: ...


class Share(Protocol):
    """The tokens of one process, of a sequence of a known length."""

    def split(self, x: Tensor, dim: int = 1) -> Tensor:
        """Of something that all tokens have along `dim`, the part of this process; an axis of 1 belongs to all."""
        ...

    def split_table(self, table: RotaryTable) -> RotaryTable:
        """`split` of a rotary table, (L, ...)."""
        ...

    def join(self, x: Tensor, dim: int = 1) -> Tensor:
        """The parts of all processes, on each of them."""
        ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, /) -> Tensor:
        """`ops.attention.attend` of this process's queries to the keys of all; the mask is that of all tokens."""
        ...

    def attend_joint(self, own: QKV, common: QKV, seen_BS: Tensor, /) -> tuple[Tensor, Tensor]:
        """See `AttendJoint`; what common queries found is the same to the bit on all processes."""
        ...


class Sharing(Protocol):
    """How processes share the tokens of sequences."""

    def of(self, num_tokens: int) -> Share:
        """For a sequence of this length. Raises ShapeError for one with fewer tokens than processes."""
        ...

    def check_heads(self, num_heads: int, num_key_heads: int) -> None:
        """Raise ShapeError, naming valid numbers of processes, where these heads cannot be attended with so."""
        ...


def attend_jointly(own: QKV, common: QKV, seen_BS: Tensor, /) -> tuple[Tensor, Tensor]:
    """`AttendJoint` where one process has all tokens."""
    q, k, v = (torch.cat(pair, 1) for pair in zip(own, common, strict=True))
    mask = F.pad(seen_BS, (own[1].shape[1], 0), value=True)[:, None, None]
    found = attend(q, k, v, mask)
    return found[:, : own[0].shape[1]], found[:, own[0].shape[1] :]


class Whole:
    """One process has all tokens: both the sharing and the share."""

    attend = staticmethod(attend)
    attend_joint = staticmethod(attend_jointly)

    def of(self, num_tokens: int) -> Share:
        return self

    def check_heads(self, num_heads: int, num_key_heads: int) -> None:
        return None

    def split(self, x: Tensor, dim: int = 1) -> Tensor:
        return x

    def split_table(self, table: RotaryTable) -> RotaryTable:
        return table

    def join(self, x: Tensor, dim: int = 1) -> Tensor:
        return x


WHOLE = Whole()


@dataclass(frozen=True)
class Part:
    """Neighbouring tokens, `sizes[rank]` of them: what is the same however they read each other."""

    ranks: Ranks
    sizes: list[int]

    def split(self, x: Tensor, dim: int = 1) -> Tensor:
        return x if x.shape[dim] == 1 else self.ranks.take(x, self.sizes, dim)

    def split_table(self, table: RotaryTable) -> RotaryTable:
        return self.split(table[0], 0), self.split(table[1], 0)

    def join(self, x: Tensor, dim: int = 1) -> Tensor:
        return self.ranks.gather(x, self.sizes, dim)


class UlyssesPart(Part):
    """Before attention tokens are exchanged for heads, after it heads for tokens: two exchanges of what one process
    has, whatever their number."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, /) -> Tensor:
        if mask is not None and mask.ndim == 4 and mask.shape[1] > 1:
            mask = self._heads(mask, 1)
        return self._to_tokens(attend(*self._to_heads((q, k, v)), mask))

    def attend_joint(self, own: QKV, common: QKV, seen_BS: Tensor, /) -> tuple[Tensor, Tensor]:
        heads = self._to_heads(own)
        words = (self._heads(common[0], 2), self._heads(common[1], 2), self._heads(common[2], 2))
        found, told = attend_jointly(heads, words, seen_BS)
        heads_of_all = [words[0].shape[2]] * self.ranks.size
        told = self.ranks.gather(told, heads_of_all, 2) if common[0].numel() else common[0]
        return self._to_tokens(found), told

    def _heads(self, x: Tensor, dim: int) -> Tensor:
        """This process's heads of something that it has for all of them."""
        return x.chunk(self.ranks.size, dim)[self.ranks.rank]

    def _to_heads(self, parts: QKV) -> QKV:
        """This process's tokens with all heads to all tokens with its heads, (B, L, H / n, E), in one exchange."""
        num, own = self.ranks.size, parts[0].shape[1]
        mixed_BLnhE = torch.cat([x.unflatten(2, (num, -1)) for x in parts], 3)
        swapped = self.ranks.swap(mixed_BLnhE.movedim((2, 1), (0, 1)).flatten(0, 1), [own] * num, self.sizes)
        q, k, v = swapped.movedim(0, 1).split([x.shape[2] // num for x in parts], 2)
        return q, k, v

    def _to_tokens(self, x_BLhE: Tensor) -> Tensor:
        """The way back: (B, L, H / n, E) to this process's tokens with all heads."""
        num, own = self.ranks.size, self.sizes[self.ranks.rank]
        swapped = self.ranks.swap(x_BLhE.movedim(1, 0), self.sizes, [own] * num)
        return swapped.unflatten(0, (num, own)).movedim((2, 1, 0), (0, 1, 2)).flatten(2, 3)


class RingPart(Part):
    """Keys and values go round from process to process, each block being read while the next is on its way; the
    partial softmaxes are merged."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, /) -> Tensor:
        if mask is not None and mask.shape[-2] > 1:
            mask = self.ranks.take(mask, self.sizes, -2)
        return self._round(q, k, v, mask)

    def attend_joint(self, own: QKV, common: QKV, seen_BS: Tensor, /) -> tuple[Tensor, Tensor]:
        # each common query is asked by one process, so that all hear the same answer
        sizes, num_own = even_sizes(common[0].shape[1], self.ranks.size), own[0].shape[1]
        q = torch.cat([own[0], self.ranks.take(common[0], sizes, 1)], 1)
        words = attend_partly(q, common[1], common[2], seen_BS[:, None, None])
        found = self._round(q, own[1], own[2], None, words)
        told = self.ranks.gather(found[:, num_own:], sizes, 1) if sum(sizes) else common[0]
        return found[:, :num_own], told

    def _round(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, found: Partial | None = None) -> Tensor:
        """What the queries find in the keys of all processes, and have found before."""
        block_2BSGE, num = torch.stack([k, v]), self.ranks.size
        for step in range(num):
            here, following = ((self.ranks.rank - back) % num for back in (step, step + 1))
            shape = (*block_2BSGE.shape[:2], self.sizes[following], *block_2BSGE.shape[3:])
            receive = self.ranks.pass_on(block_2BSGE, shape) if step < num - 1 else None
            seen = mask
            if mask is not None and mask.shape[-1] > 1:
                seen = mask.narrow(-1, sum(self.sizes[:here]), self.sizes[here])
            part = attend_partly(q, block_2BSGE[0], block_2BSGE[1], seen)
            found = part if found is None else merge(found, part)
            block_2BSGE = block_2BSGE if receive is None else receive()
        assert found is not None
        return found.out.to(q.dtype)


@dataclass(frozen=True)
class Ulysses:
    """Exchange of tokens for heads: the number of processes must divide the number of heads."""

    ranks: Ranks

    def of(self, num_tokens: int) -> Share:
        return UlyssesPart(self.ranks, share_sizes(num_tokens, self.ranks.size, "tokens"))

    def check_heads(self, num_heads: int, num_key_heads: int) -> None:
        common = gcd(num_heads, num_key_heads)
        if common % self.ranks.size:
            valid = ", ".join(str(num) for num in range(1, common + 1) if common % num == 0)
            raise ShapeError(
                f"{common} heads cannot be exchanged between {self.ranks.size} processes; "
                f"valid numbers of processes: {valid}; ring takes any"
            )


@dataclass(frozen=True)
class Ring:
    """Keys and values go round: any number of processes and heads."""

    ranks: Ranks

    def of(self, num_tokens: int) -> Share:
        return RingPart(self.ranks, share_sizes(num_tokens, self.ranks.size, "tokens"))

    def check_heads(self, num_heads: int, num_key_heads: int) -> None:
        return None


SHARINGS: dict[str, type[Ulysses] | type[Ring]] = {"ulysses": Ulysses, "ring": Ring}
