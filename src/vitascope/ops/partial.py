"""Attention to a part of the keys at a time: each part's softmax with the logarithm of its sum, and their merging.

softmax over all keys = the parts' softmaxes weighted by exp(lse of the part - lse of all). Source: Milakov and
Gimelshein 2018 (online softmax); Liu et al. 2023 (ring attention), section 3. B batch, L queries, S keys, H heads,
G key heads, E width of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vitascope.ops.attention import repeat_heads


class Partial(NamedTuple):
    """The result of some keys, (B, L, H, E), and the log of the sum of the exponentials of their scores, (B, L, H);
    both in fp32. A query that sees none of the keys has 0 and -inf."""

    out: Tensor
    lse: Tensor


def attend_partly(q_BLHE: Tensor, k_BSGE: Tensor, v_BSGE: Tensor, mask: Tensor | None = None) -> Partial:
    """Softmax attention to these keys alone; `mask` as in `ops.attention.attend`, but queries may see no key."""
    k_BSGE, v_BSGE = (repeat_heads(x, q_BLHE.shape[-2]) for x in (k_BSGE, v_BSGE))
    q, k, v = (x.transpose(1, 2) for x in (q_BLHE, k_BSGE, v_BSGE))
    out, lse = _fused(q, k, v) if mask is None and _can_fuse(q) else _plain(q, k, v, mask)
    return Partial(out.transpose(1, 2).float(), lse.transpose(1, 2))


def merge(a: Partial, b: Partial) -> Partial:
    """What both parts of the keys give together."""
    lse = torch.logaddexp(a.lse, b.lse)
    # where neither part has a key, both shares are exp(-inf)
    base = lse.nan_to_num(neginf=0.0)
    share_a, share_b = ((part.lse - base).exp().unsqueeze(-1) for part in (a, b))
    return Partial(a.out * share_a + b.out * share_b, lse)


def _can_fuse(q: Tensor) -> bool:
    """Whether torch has a kernel that gives the logarithms too: on a CPU any width, on CUDA some."""
    if q.device.type == "cpu":
        return True
    return q.device.type == "cuda" and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def _fused(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(B, H, L, E) and (B, H, L). These operators have no public name that returns the logarithms."""
    if q.device.type == "cpu":
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    elif q.dtype in (torch.float16, torch.bfloat16) and torch.cuda.get_device_capability(q.device)[0] >= 8:
        found = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
    else:
        found = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
    # the last of these rounds the number of queries up
    return found[0], found[1][..., : q.shape[2]]


def _plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    scores = torch.matmul(q, k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    lse = scores.logsumexp(-1)
    weights = (scores - lse.nan_to_num(neginf=0.0).unsqueeze(-1)).exp()
    return torch.matmul(weights.to(v.dtype), v), lse
