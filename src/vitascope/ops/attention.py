"""Attention backends behind one function.

B batch, L queries, S keys, H query heads, G key heads (G divides H; G = 1 is multi-query), E width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vitascope.core.errors import ShapeError, choice
from vitascope.ops.block_attention import block_attention

Backend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


class Attend(Protocol):
    """How tokens read each other: `attend`, or what stands for it where several processes share the tokens.

    Queries (B, L, H, E), keys and values (B, S, G, E), and a mask as `attend` takes it, to (B, L, H, E).
    """

    def __call__(self, q_BLHE: Tensor, k_BSGE: Tensor, v_BSGE: Tensor, mask: Tensor | None = None, /) -> Tensor: ...


MATMUL_MAX_SCORES = 8192
"""On a CPU, up to this many scores a head (L * S) the plain path is taken (`choose_backend`)."""
BLOCKS_MIN_LENGTH = 256
"""On a CPU in bf16, from this many queries and keys on, blocks are taken."""


def _sdpa(q_BLHE: Tensor, k_BSHE: Tensor, v_BSHE: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = q_BLHE.transpose(1, 2), k_BSHE.transpose(1, 2), v_BSHE.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _matmul(q_BLHE: Tensor, k_BSHE: Tensor, v_BSHE: Tensor, mask: Tensor | None) -> Tensor:
    """Scores are formed as they stand; the softmax is in fp32, its result in the dtype of the values."""
    q_BHLE, k_BHES = q_BLHE.transpose(1, 2), k_BSHE.permute(0, 2, 3, 1)
    scores = torch.matmul(q_BHLE, k_BHES).float() * q_BLHE.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(-1).to(v_BSHE.dtype)
    return torch.matmul(weights, v_BSHE.transpose(1, 2)).transpose(1, 2)


BACKENDS: dict[str, Backend] = {"sdpa": _sdpa, "matmul": _matmul, "blocks": block_attention}


def choose_backend(num_queries: int, num_keys: int, device_type: str, blocks: bool = False) -> str:
    """The backend that measured faster for this shape. blocks: bf16 without gradients, which `block_attention` is for.

    The fused CPU kernel of torch works on blocks of 32 or more queries, one call per head and batch entry. Factorised
    attention asks for the opposite: thousands of heads of 7 or 16 queries. There two batched products and a softmax
    that the compiler fuses are 4 to 8 times faster, forward and backward. Beyond a few thousand scores a head the
    scores no longer stay in the cache and the fused kernel wins.
    """
    if device_type != "cpu":
        return "sdpa"
    if num_queries * num_keys <= MATMUL_MAX_SCORES:
        return "matmul"
    return "blocks" if blocks and min(num_queries, num_keys) >= BLOCKS_MIN_LENGTH else "sdpa"


def attend(q_BLHE: Tensor, k_BSGE: Tensor, v_BSGE: Tensor, mask: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Softmax attention, (B, L, H, E).

    mask: boolean, broadcastable to (B, H, L, S), True where a query sees a key; every query must see one (a query that
    sees none is the caller's to handle: see `nn.attention.Visibility`). backend: "auto" (`choose_backend`) or a name
    in BACKENDS. Raises InputError for an unknown backend and ShapeError for head counts that do not divide.
    """
    num_heads, num_key_heads = q_BLHE.shape[-2], k_BSGE.shape[-2]
    if num_heads % num_key_heads:
        raise ShapeError(f"{num_heads} query heads cannot share {num_key_heads} key heads")
    if num_key_heads != num_heads:
        k_BSGE, v_BSGE = (repeat_heads(x, num_heads) for x in (k_BSGE, v_BSGE))
    if backend == "auto":
        blocks = q_BLHE.dtype == torch.bfloat16 and not (torch.is_grad_enabled() and q_BLHE.requires_grad)
        backend = choose_backend(q_BLHE.shape[1], k_BSGE.shape[1], q_BLHE.device.type, blocks)
    return BACKENDS[choice("attention backend", backend, BACKENDS)](q_BLHE, k_BSGE, v_BSGE, mask)


def repeat_heads(x_BSGE: Tensor, num_heads: int) -> Tensor:
    """Each of G heads stands for num_heads / G neighbours."""
    groups = x_BSGE.shape[-2]
    if groups == 1:
        return x_BSGE.expand(*x_BSGE.shape[:-2], num_heads, x_BSGE.shape[-1])
    return x_BSGE.repeat_interleave(num_heads // groups, dim=-2)
