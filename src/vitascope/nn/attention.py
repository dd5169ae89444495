"""Attention layers with QK-norm.

A batch (clips, frames or places, whatever the tokens are grouped by), L queries, S keys, D width, H query heads,
G key heads (H, or 1 for multi-query: Shazeer 2019), E = D / H. Queries and keys are RMS-normalised per head with a
learned weight (Henry et al. 2020; Dehghani et al. 2023).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from vitascope.core.errors import ShapeError
from vitascope.nn.norms import RMSNorm
from vitascope.ops.attention import attend
from vitascope.ops.rope import RotaryTable, rotate


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
    if num_heads < 1 or width % num_heads or (width // num_heads) % 2:
        raise ShapeError(f"width {width} cannot be divided between {num_heads} heads of an even width")
    return width // num_heads


class SelfAttention(nn.Module):
    """Attention of a sequence to itself, (A, L, D) -> (A, L, D); one product gives queries, keys and values."""

    def __init__(self, width: int, num_heads: int, num_key_heads: int) -> None:
        super().__init__()
        each = head_width(width, num_heads)
        self.head_counts = (num_heads, num_key_heads, num_key_heads)
        self.each = each
        self.qkv = nn.Linear(width, sum(self.head_counts) * each, bias=False)
        self.norm_q, self.norm_k = RMSNorm(each), RMSNorm(each)
        self.out = nn.Linear(width, width)

    def forward(self, x_ALD: Tensor, table: RotaryTable | None = None, mask: Tensor | None = None) -> Tensor:
        """`table` turns queries and keys; `mask` is boolean (L, S) and lets every query see itself."""
        heads = self.qkv(x_ALD).unflatten(-1, (-1, self.each))
        q_ALHE, k_ASGE, v_ASGE = heads.split(self.head_counts, -2)
        q_ALHE, k_ASGE = self.norm_q(q_ALHE), self.norm_k(k_ASGE)
        if table is not None:
            q_ALHE, k_ASGE = rotate(q_ALHE, table), rotate(k_ASGE, table)
        return self.out(attend(q_ALHE, k_ASGE, v_ASGE, mask).flatten(-2))


class CrossAttention(nn.Module):
    """Attention to a context of another width, (A, L, D) and (A, S, context) -> (A, L, D); starts at zero."""

    def __init__(self, width: int, context_width: int, num_heads: int) -> None:
        super().__init__()
        self.each = head_width(width, num_heads)
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(context_width, 2 * width, bias=False)
        self.norm_q, self.norm_k = RMSNorm(self.each), RMSNorm(self.each)
        self.out = nn.Linear(width, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x_ALD: Tensor, context_ASC: Tensor, mask_AS: Tensor | None = None) -> Tensor:
        """`mask_AS` is True where a token of the context is real."""
        q_ALHE = self.norm_q(self.q(x_ALD).unflatten(-1, (-1, self.each)))
        k_ASHE, v_ASHE = self.kv(context_ASC).unflatten(-1, (-1, self.each)).chunk(2, -2)
        mask = None if mask_AS is None else mask_AS[:, None, None, :]
        return self.out(attend(q_ALHE, self.norm_k(k_ASHE), v_ASHE, mask).flatten(-2))


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
