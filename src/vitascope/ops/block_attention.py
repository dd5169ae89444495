"""Attention over long sequences on a CPU in half precision, by matrix products of blocks that stay in the cache.

torch's fused CPU kernel reaches a quarter of the rate of its own matrix products in bf16. Here a block of queries meets
all keys in one product, which takes a guess of each row's maximum away; weights are formed where the scores are, in the
cache, and a second product reads the values. The sum of the weights divides the result. No more than one block of
scores is ever there.

B batch, L queries, S keys, H heads, E width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from torch import Tensor, library
from torch.nn.functional import scaled_dot_product_attention

CACHE_BYTES = 2**21
"""Of the scores of one thread's block, which two products and the exponentials write and read."""
SAMPLED_KEYS = 64
"""Keys that a row's highest score is guessed from."""
LEAD, MARGIN = 1.0, 4.0
"""How far the guess is put above the highest of the sampled scores, and how far the highest score of all may lie from
the guess before its block is worked out again."""
COARSE = 1024.0
"""From here on numbers of 16 bits are too far apart for a guess within `MARGIN`."""


@library.custom_op("vitascope::block_attention", mutates_args=())
def block_attention(q_BLHE: Tensor, k_BSHE: Tensor, v_BSHE: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention, (B, L, H, E); `mask` is boolean, broadcastable to (B, H, L, S). Gradients go through torch's
    own kernel, which runs the forward pass once more.

    Products are accumulated in fp32 and rounded to the inputs' dtype. A score is rounded after the guessed maximum of
    its row is taken away, so that scores near the maximum, which alone count, keep an error of some 2^-9 of their
    distance to the guess. A few keys tell it; where it is far from the maximum (a peak lies between them, or they are
    masked) the block's scores are worked out again around the one that was found. So the error is that of weights in
    16 bits, whatever the scores. Weights are divided by their sum after the second product, which is beyond fp16 for
    many keys: fp16 is worked on in fp32.
    """
    if q_BLHE.dtype == torch.float16:
        return block_attention(q_BLHE.float(), k_BSHE.float(), v_BSHE.float(), mask).half()
    out_BLHE = torch.empty(q_BLHE.shape, dtype=q_BLHE.dtype)
    if mask is not None:
        shape = (*[1] * (4 - mask.ndim), *mask.shape)
        mask = mask.expand(len(q_BLHE), *shape[1:3], k_BSHE.shape[1])
    for b, out_LHE in enumerate(out_BLHE):
        clip = (q_BLHE[b], k_BSHE[b], v_BSHE[b])
        _attend(*clip, None if mask is None else mask[b], out_LHE)
    return out_BLHE


def _attend(q_LHE: Tensor, k_SHE: Tensor, v_SHE: Tensor, mask: Tensor | None, out_LHE: Tensor) -> None:
    """Of one clip; `mask` broadcasts to (H, L, S). Keys that no query sees are not met at all."""
    if mask is not None and mask.shape[:2] == (1, 1) and mask.any():
        if not mask.all():
            seen_S = mask[0, 0].nonzero().squeeze(1)
            k_SHE, v_SHE = k_SHE[seen_S], v_SHE[seen_S]
        mask = None
    num_queries, heads, each = q_LHE.shape
    num_keys = len(k_SHE)
    q_HLE, out_HLE = q_LHE.transpose(0, 1), out_LHE.transpose(0, 1)
    k_HFS = _with_ones(k_SHE.transpose(0, 1)).transpose(-1, -2)
    v_HSE = v_SHE.transpose(0, 1).contiguous()
    threads = max(1, torch.get_num_threads())
    group = min(heads, threads)
    rows = _block_rows(num_queries, num_keys, q_LHE.element_size() * group / threads)
    space = q_LHE.new_empty(group * rows * num_keys)
    if mask is not None:
        mask = mask.expand(heads, num_queries, num_keys)
    for first in range(0, heads, group):
        here = slice(first, first + group)
        sampled = k_HFS[here, :each, :: max(1, num_keys // SAMPLED_KEYS)].contiguous()
        meeting = _Meeting(k_HFS[here], sampled, each**-0.5, space)
        for start in range(0, num_queries, rows):
            at = slice(start, start + rows)
            weights = meeting.weights(q_HLE[here, at], None if mask is None else mask[here, at])
            out_HLE[here, at] = torch.bmm(weights, v_HSE[here]) / _sums(weights)


@block_attention.register_fake
def _(q_BLHE: Tensor, k_BSHE: Tensor, v_BSHE: Tensor, mask: Tensor | None = None) -> Tensor:
    return torch.empty_like(q_BLHE, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    q, k, v, ctx.mask = inputs
    ctx.save_for_backward(q, k, v)


def _backward(ctx: Any, grad_BLHE: Tensor) -> tuple[Tensor | None, ...]:
    with torch.enable_grad():
        parts = [part.detach().transpose(1, 2).requires_grad_() for part in ctx.saved_tensors]
        out_BHLE = scaled_dot_product_attention(*parts, attn_mask=ctx.mask)
        grads = torch.autograd.grad(out_BHLE, parts, grad_BLHE.transpose(1, 2))
    return (*(grad.transpose(1, 2) for grad in grads), None)


block_attention.register_autograd(_backward, setup_context=_keep)


def _block_rows(num_queries: int, num_keys: int, bytes_a_score: float) -> int:
    """Rows of a block: as many as the cache holds, a multiple of 32, and blocks of about one size."""
    most = max(32, int(CACHE_BYTES / (num_keys * bytes_a_score)) // 32 * 32)
    blocks = -(-num_queries // most)
    return -(-num_queries // blocks // 32) * 32


def _with_ones(k_HSE: Tensor) -> Tensor:
    """Keys with a last entry of one, (H, S, E + 1): it meets the guess, which the product then takes away."""
    k_HSF = k_HSE.new_empty(*k_HSE.shape[:-1], k_HSE.shape[-1] + 1)
    k_HSF[..., :-1] = k_HSE
    k_HSF[..., -1] = 1
    return k_HSF


@dataclass
class _Meeting:
    """The keys that blocks of rows meet. sampled: those that guesses are from, without the ones. space: what all blocks
    write their scores to, one after the other."""

    k_GFS: Tensor
    sampled_GES: Tensor
    scale: float
    space: Tensor

    def weights(self, q_GRE: Tensor, seen: Tensor | None) -> Tensor:
        """exp(score - guess) of a block of rows, (G, R, S), in `space`, in the dtype of the queries."""
        guess = torch.bmm(q_GRE, self.sampled_GES).amax(-1, keepdim=True) + LEAD / self.scale
        q_GRF = torch.cat((q_GRE, -guess), -1)
        scores = self._scores(q_GRF, seen)
        if seen is not None or _reaches(scores, MARGIN):
            over = _highest(scores)
            if over.abs().max() > MARGIN:  # below it, too: the guess may be of a key that is not seen
                q_GRF[..., -1:] -= over / self.scale
                scores = self._scores(q_GRF, seen)
                if guess.abs().max() * self.scale > COARSE:
                    scores -= _highest(scores)
        return scores.exp_()

    def _scores(self, q_GRF: Tensor, seen: Tensor | None) -> Tensor:
        """Less the guess of each row."""
        groups, rows, _ = q_GRF.shape
        scores = self.space[: groups * rows * self.k_GFS.shape[-1]].view(groups, rows, -1)
        torch.baddbmm(scores, q_GRF, self.k_GFS, alpha=self.scale, beta=0, out=scores)
        return scores if seen is None else scores.masked_fill_(~seen, float("-inf"))


def _highest(scores: Tensor) -> Tensor:
    """Of each row; zero for rows that see nothing."""
    highest = scores.amax(-1, keepdim=True)
    return highest.masked_fill_(highest.isinf(), 0)


def _sums(weights: Tensor) -> Tensor:
    """Of each row, in fp32. Sums in bf16 are three times as fast: those of up to 16 parts, and then theirs."""
    num = weights.shape[-1]
    most = next(parts for parts in (16, 8, 4, 2, 1) if num >= 256 * parts or parts == 1)
    return weights.unflatten(-1, (gcd(num, most), -1)).sum(-1).sum(-1, keepdim=True, dtype=torch.float32)


def _reaches(values: Tensor, bound: float) -> bool:
    """Whether any value is above a positive bound. The bits of positive floats are in the order of their values, and
    whole numbers are compared seven times as fast as numbers in 16 bits."""
    bits = {2: torch.int16, 4: torch.int32}[values.element_size()]
    return bool(values.view(bits).amax() > values.new_tensor(bound).view(bits))
