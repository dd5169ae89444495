"""Attention layers with QK-norm.

A batch (clips, frames or places, whatever the tokens are grouped by), L queries, S keys, D width, H query heads,
G key heads (H, or 1 for multi-query: Shazeer 2019), E = D / H. Queries and keys are RMS-normalised with a learned
weight (Henry et al. 2020; Dehghani et al. 2023), per head or over all heads at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from vitascope.core.errors import ShapeError
from vitascope.nn.norms import RMSNorm
from vitascope.ops.attention import Attend, attend
from vitascope.ops.rope import RotaryTable, rotate

KeysValues = tuple[Tensor, Tensor]
"""Keys and values, (A, S, H, E) each."""


@dataclass(frozen=True)
class Visibility:
    """Which keys a query sees: `mask` (L, S), with `blind` (L,) for queries that see none (their row of `mask` is True
    throughout, and their result is set to zero)."""

    mask: Tensor
    blind: Tensor

    @staticmethod
    def of(seen_LS: Tensor) -> Visibility:
        """From a boolean (L, S) that may have empty rows."""
        blind = ~seen_LS.any(-1)
        return Visibility(seen_LS | blind.unsqueeze(-1), blind)

    def cover(self, out_ALHE: Tensor) -> Tensor:
        """`out_ALHE` with zeros for the blind queries."""
        return out_ALHE.masked_fill(self.blind[:, None, None], 0.0)


def head_width(width: int, num_heads: int) -> int:
    """Width of a head. Raises ShapeError unless it is a whole, even number."""
    if num_heads < 1 or width < 1 or width % num_heads or (width // num_heads) % 2:
        raise ShapeError(f"width {width} cannot be divided between {num_heads} heads of an even width")
    return width // num_heads


@dataclass(frozen=True)
class AttentionKind:
    """In what the attentions of families differ.

    bias: of the projections to queries, keys and values. norm: over a "head" or over "all" heads at once.
    pairs: what a rotation turns: the "halves" of a head, its "neighbours", or these with a table "per_head".
    """

    bias: bool = False
    norm: Literal["head", "all"] = "head"
    eps: float = 1e-6
    pairs: Literal["halves", "neighbours", "per_head"] = "halves"

    def make_norm(self, each: int, num_heads: int) -> RMSNorm:
        """The norm of queries or keys."""
        return RMSNorm(each if self.norm == "head" else each * num_heads, self.eps)

    def normalise(self, norm: RMSNorm, x_ALHE: Tensor) -> Tensor:
        """Queries or keys through their norm."""
        return norm(x_ALHE) if self.norm == "head" else norm(x_ALHE.flatten(-2)).view_as(x_ALHE)

    def turn(self, x_ALHE: Tensor, table: RotaryTable) -> Tensor:
        """Queries or keys turned by their positions."""
        return rotate(x_ALHE, table, neighbours=self.pairs != "halves", per_head=self.pairs == "per_head")


PLAIN = AttentionKind()


class SelfAttention(nn.Module):
    """Attention of a sequence to itself, (A, L, D) -> (A, L, D); one product gives queries, keys and values."""

    def __init__(self, width: int, num_heads: int, num_key_heads: int, kind: AttentionKind = PLAIN) -> None:
        super().__init__()
        each = head_width(width, num_heads)
        self.kind = kind
        self.head_counts = (num_heads, num_key_heads, num_key_heads)
        self.each = each
        self.qkv = nn.Linear(width, sum(self.head_counts) * each, bias=kind.bias)
        self.norm_q, self.norm_k = kind.make_norm(each, num_heads), kind.make_norm(each, num_key_heads)
        self.out = nn.Linear(width, width)

    def forward(
        self,
        x_ALD: Tensor,
        table: RotaryTable | None = None,
        mask: Tensor | None = None,
        read: Attend = attend,
        alone: bool = False,
    ) -> Tensor:
        """`table` turns queries and keys; `mask` is boolean (L, S) and lets every query see itself; `read` is how they
        meet. `alone`: a query sees nothing else, whatever the mask."""
        heads = self.qkv(x_ALD).unflatten(-1, (-1, self.each))
        q_ALHE, k_ASGE, v_ASGE = heads.split(self.head_counts, -2)
        if alone:
            return self.out(v_ASGE.repeat_interleave(self.head_counts[0] // self.head_counts[1], -2).flatten(-2))
        q_ALHE, k_ASGE = self.kind.normalise(self.norm_q, q_ALHE), self.kind.normalise(self.norm_k, k_ASGE)
        if table is not None:
            q_ALHE, k_ASGE = self.kind.turn(q_ALHE, table), self.kind.turn(k_ASGE, table)
        return self.out(read(q_ALHE, k_ASGE, v_ASGE, mask).flatten(-2))


class CrossAttention(nn.Module):
    """Attention to a context of another width, (A, L, D) and (A, S, context) -> (A, L, D); starts at zero.

    Keys and values depend on the context alone: `keys_values` once, then `read` at every step, does the same work once.
    """

    def __init__(self, width: int, context_width: int, num_heads: int, kind: AttentionKind = PLAIN) -> None:
        super().__init__()
        self.kind = kind
        self.each = head_width(width, num_heads)
        self.q = nn.Linear(width, width, bias=kind.bias)
        self.kv = nn.Linear(context_width, 2 * width, bias=kind.bias)
        self.norm_q, self.norm_k = kind.make_norm(self.each, num_heads), kind.make_norm(self.each, num_heads)
        self.out = nn.Linear(width, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x_ALD: Tensor, context_ASC: Tensor, mask_AS: Tensor | None = None) -> Tensor:
        """`mask_AS` is True where a token of the context is real."""
        return self.read(x_ALD, self.keys_values(context_ASC), mask_AS)

    def keys_values(self, context_ASC: Tensor) -> KeysValues:
        """Keys and values of a context, (A, S, H, E) each."""
        k_ASHE, v_ASHE = self.kv(context_ASC).unflatten(-1, (-1, self.each)).chunk(2, -2)
        return self.kind.normalise(self.norm_k, k_ASHE), v_ASHE

    def queries(self, x_ALD: Tensor) -> Tensor:
        """(A, L, H, E)."""
        return self.kind.normalise(self.norm_q, self.q(x_ALD).unflatten(-1, (-1, self.each)))

    def read(self, x_ALD: Tensor, keys_values: KeysValues, mask_AS: Tensor | None = None) -> Tensor:
        """`forward` with keys and values that are there already."""
        mask = None if mask_AS is None else mask_AS[:, None, None, :]
        return self.out(attend(self.queries(x_ALD), *keys_values, mask).flatten(-2))


@dataclass(frozen=True)
class Side:
    """One side of an exchange: tokens (A, L, D), the rotary table of their times, and what they see of the other."""

    tokens: Tensor
    table: RotaryTable
    sees: Visibility | None = None


class Exchange(nn.Module):
    """Two sequences of different widths read each other, both in their state before the exchange.

    Queries, keys and values of both have the width `inner`; positions (seconds) are rotary on both sides.
    """

    def __init__(self, width_a: int, width_b: int, inner: int, num_heads: int) -> None:
        super().__init__()
        self.each = head_width(inner, num_heads)
        self.qkv_a, self.qkv_b = nn.Linear(width_a, 3 * inner, bias=False), nn.Linear(width_b, 3 * inner, bias=False)
        self.norm_qa, self.norm_ka = RMSNorm(self.each), RMSNorm(self.each)
        self.norm_qb, self.norm_kb = RMSNorm(self.each), RMSNorm(self.each)
        self.out_a, self.out_b = nn.Linear(inner, width_a), nn.Linear(inner, width_b)

    def forward(self, a: Side, b: Side) -> tuple[Tensor, Tensor]:
        """What a reads from b, (A, La, Da), and what b reads from a, (A, Lb, Db)."""
        qa, ka, va = self.qkv_a(a.tokens).unflatten(-1, (-1, self.each)).chunk(3, -2)
        qb, kb, vb = self.qkv_b(b.tokens).unflatten(-1, (-1, self.each)).chunk(3, -2)
        qa, ka = rotate(self.norm_qa(qa), a.table), rotate(self.norm_ka(ka), a.table)
        qb, kb = rotate(self.norm_qb(qb), b.table), rotate(self.norm_kb(kb), b.table)
        return self.out_a(_read(qa, kb, vb, a.sees)), self.out_b(_read(qb, ka, va, b.sees))


def _read(q_ALHE: Tensor, k_ASHE: Tensor, v_ASHE: Tensor, sees: Visibility | None) -> Tensor:
    if sees is None:
        return attend(q_ALHE, k_ASHE, v_ASHE).flatten(-2)
    return sees.cover(attend(q_ALHE, k_ASHE, v_ASHE, sees.mask)).flatten(-2)
