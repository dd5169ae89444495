"""Attention to some keys at a time, merged, is attention to all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vitascope.ops.attention import attend
from vitascope.ops.partial import Partial, attend_partly, merge

TOLERANCE = 2e-6
"""Relative; fp32 sums of a hundred terms in another order."""


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def differ(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def in_parts(q: Tensor, k: Tensor, v: Tensor, sizes: list[int], mask: Tensor | None = None) -> Partial:
    found, start = None, 0
    for size in sizes:
        seen = None if mask is None else mask[..., start : start + size]
        part = attend_partly(q, k[:, start : start + size], v[:, start : start + size], seen)
        found, start = part if found is None else merge(found, part), start + size
    assert found is not None
    return found


def test_two_keys_by_hand() -> None:
    """One key a part: the result is their mean weighted by exp(score), and lse the log of the weights' sum."""
    q, k, v = torch.tensor([2.0, 0.0]), torch.tensor([[3.0, 1.0], [-1.0, 5.0]]), torch.tensor([[1.0, 0.0], [0.0, 4.0]])
    found = in_parts(q.view(1, 1, 1, 2), k.view(1, 2, 1, 2), v.view(1, 2, 1, 2), [1, 1])
    scores = (k @ q) * 2**-0.5
    weights = scores.exp()
    torch.testing.assert_close(found.lse.flatten(), weights.sum().log().view(1))
    torch.testing.assert_close(found.out.flatten(), weights @ v / weights.sum())


@pytest.mark.parametrize("sizes", [[11], [1, 10], [4, 4, 3], [1] * 11])
@pytest.mark.parametrize("num_key_heads", [6, 2, 1])
def test_parts_of_any_size_give_the_whole(sizes: list[int], num_key_heads: int) -> None:
    q, k, v = draw(2, 5, 6, 8), draw(2, 11, num_key_heads, 8, seed=1), draw(2, 11, num_key_heads, 8, seed=2)
    found = in_parts(q, k, v, sizes)
    assert found.out.shape == q.shape
    assert found.lse.shape == q.shape[:3]
    assert differ(found.out, attend(q, k, v)) < TOLERANCE


def test_the_order_of_the_parts_does_not_matter() -> None:
    q, k, v = draw(1, 4, 2, 8), draw(1, 9, 2, 8, seed=1), draw(1, 9, 2, 8, seed=2)
    parts = [attend_partly(q, k[:, i : i + 3], v[:, i : i + 3]) for i in (0, 3, 6)]
    a = merge(merge(parts[0], parts[1]), parts[2])
    b = merge(parts[2], merge(parts[1], parts[0]))
    assert differ(a.out, b.out) < TOLERANCE
    assert differ(a.lse, b.lse) < TOLERANCE


def test_scores_far_apart_do_not_overflow() -> None:
    """Of scores near +-2000, whose exponentials fp32 does not have, the larger wins whichever comes first."""
    q, k = torch.full((1, 1, 1, 4), 32.0), torch.stack([torch.full((4,), s) for s in (31.0, -31.0)]).view(1, 2, 1, 4)
    v = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1).expand(1, 2, 1, 4)
    for order in ([0, 1], [1, 0]):
        found = in_parts(q, k[:, order], v[:, order], [1, 1])
        assert torch.equal(found.out, torch.ones(1, 1, 1, 4))


def test_a_masked_part_counts_for_what_is_seen_of_it() -> None:
    q, k, v = draw(2, 5, 3, 8), draw(2, 7, 3, 8, seed=1), draw(2, 7, 3, 8, seed=2)
    mask = torch.rand((2, 1, 5, 7), generator=torch.Generator().manual_seed(3)) < 0.5
    mask[..., 6] = True
    mask[0, :, :, :3] = False  # the first clip sees nothing of the first part
    found = in_parts(q, k, v, [3, 4], mask)
    assert differ(found.out, attend(q, k, v, mask)) < TOLERANCE


def test_queries_that_see_nothing_have_nothing() -> None:
    blind = attend_partly(draw(1, 2, 1, 4), draw(1, 3, 1, 4), draw(1, 3, 1, 4), torch.zeros(2, 3, dtype=torch.bool))
    assert not blind.out.any()
    assert blind.lse.isneginf().all()
    both = merge(blind, blind)
    assert not both.out.any()
    assert both.lse.isneginf().all()


def test_half_precision_is_merged_in_full() -> None:
    q, k, v = draw(1, 6, 2, 16), draw(1, 24, 2, 16, seed=1), draw(1, 24, 2, 16, seed=2)
    found = in_parts(q.bfloat16(), k.bfloat16(), v.bfloat16(), [8, 8, 8])
    assert found.out.dtype == found.lse.dtype == torch.float32
    # parts are rounded to 8 bits of mantissa, 0.4% each
    assert differ(found.out, attend(q, k, v)) < 0.01


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 128, 20])
def test_the_kernels_of_a_gpu_give_the_same(dtype: torch.dtype, width: int) -> None:
    q, k, v = (draw(2, 45, 4, width, seed=seed).to("cuda", dtype) for seed in range(3))
    found = in_parts(q, k, v, [20, 25])
    expected = attend(q.double(), k.double(), v.double())
    assert differ(found.out.double(), expected) < (1e-5 if dtype == torch.float32 else 0.01)
