"""Attention backends: each equals plain softmax attention in float64, whatever the shapes and masks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, library

from vitascope.core.errors import InputError, ShapeError
from vitascope.ops import block_attention as block_attention_module
from vitascope.ops.attention import BACKENDS, BLOCKS_MIN_LENGTH, MATMUL_MAX_SCORES, attend, choose_backend
from vitascope.ops.block_attention import block_attention

each_backend = pytest.mark.parametrize("backend", [*BACKENDS, "auto"])


def plain(q_BLHE: Tensor, k_BSGE: Tensor, v_BSGE: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(E)) v head by head, in float64."""
    heads, groups = q_BLHE.shape[2], k_BSGE.shape[2]
    out = torch.zeros(q_BLHE.shape, dtype=torch.float64)
    for batch in range(q_BLHE.shape[0]):
        for head in range(heads):
            shared = head * groups // heads
            q, k, v = (x.double() for x in (q_BLHE[batch, :, head], k_BSGE[batch, :, shared], v_BSGE[batch, :, shared]))
            scores = q @ k.T / q.shape[-1] ** 0.5
            if mask is not None:
                seen = mask.expand(q_BLHE.shape[0], heads, *scores.shape)[batch, head]
                scores[~seen] = float("-inf")
            out[batch, :, head] = scores.softmax(-1) @ v
    return out


def draw(num_queries: int, num_keys: int, heads: int = 4, key_heads: int = 4, width: int = 8) -> list[Tensor]:
    make = torch.Generator().manual_seed(0)
    shapes = ((2, num_queries, heads, width), *((2, num_keys, key_heads, width),) * 2)
    return [torch.randn(shape, generator=make) for shape in shapes]


def seen(*shape: int) -> Tensor:
    """A random mask in which every query sees a key, the first."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[..., 0] = True
    return mask


# One key, fewer and more queries than keys, and enough of both for "auto" to take the fused kernel.
@each_backend
@pytest.mark.parametrize(("num_queries", "num_keys"), [(5, 5), (1, 9), (37, 3), (6, 1), (100, 90)])
def test_equals_plain_softmax_at_any_lengths(backend: str, num_queries: int, num_keys: int) -> None:
    q, k, v = draw(num_queries, num_keys)
    out = attend(q, k, v, backend=backend)
    assert out.shape == q.shape
    torch.testing.assert_close(out.double(), plain(q, k, v), rtol=1e-5, atol=1e-5)  # float32 sums of 8 and 90 terms


@each_backend
@pytest.mark.parametrize("shape", [(7, 11), (4, 1, 11), (2, 1, 1, 11), (2, 1, 7, 1), (1, 4, 7, 11), (2, 4, 7, 11)])
def test_masks_of_every_broadcastable_shape(backend: str, shape: tuple[int, ...]) -> None:
    q, k, v = draw(7, 11)
    mask = seen(*shape)
    out = attend(q, k, v, mask, backend)
    torch.testing.assert_close(out.double(), plain(q, k, v, mask), rtol=1e-5, atol=1e-5)
    hidden = (~mask.expand(2, 4, 7, 11)).all(dim=(1, 2))  # (2, 11): keys that no query sees
    v = v.masked_fill(hidden[..., None, None], 1e6)
    torch.testing.assert_close(attend(q, k, v, mask, backend), out)


@each_backend
@pytest.mark.parametrize("key_heads", [1, 2])
def test_heads_may_share_keys_and_values(backend: str, key_heads: int) -> None:
    q, k, v = draw(6, 9, heads=4, key_heads=key_heads)
    torch.testing.assert_close(attend(q, k, v, backend=backend).double(), plain(q, k, v), rtol=1e-5, atol=1e-5)
    spelt_out = [x.repeat_interleave(4 // key_heads, dim=2) for x in (k, v)]
    torch.testing.assert_close(attend(q, k, v, backend=backend), attend(q, *spelt_out, backend=backend))


@each_backend
def test_bf16_is_within_its_rounding(backend: str) -> None:
    """bf16 keeps 8 bits: an output, a weighted mean of values up to 4, is off by at most a few of its half steps
    (2^-9 each), for the rounding of the weights and of the result."""
    q, k, v = (x.bfloat16() for x in draw(20, 30))
    out = attend(q, k, v, backend=backend)
    assert out.dtype == torch.bfloat16
    assert (out.double() - plain(q, k, v)).abs().max() < 4 * 4 * 2**-9


@each_backend
def test_gradients_are_those_of_plain_softmax(backend: str) -> None:
    q, k, v = inputs = [x.requires_grad_() for x in draw(6, 9, key_heads=1)]
    mask = seen(6, 9)
    weights = torch.randn(2, 6, 4, 8, generator=torch.Generator().manual_seed(2))
    ours = torch.autograd.grad((attend(q, k, v, mask, backend) * weights).sum(), inputs)
    q, k, v = wide = [x.detach().double().requires_grad_() for x in inputs]
    theirs = torch.autograd.grad((plain(q, k, v, mask) * weights).sum(), wide)
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.double(), expected, rtol=1e-4, atol=1e-5)


@given(st.integers(1, 300), st.integers(1, 300))
def test_small_products_are_spelt_out_on_a_cpu_alone(num_queries: int, num_keys: int) -> None:
    small, long = num_queries * num_keys <= MATMUL_MAX_SCORES, min(num_queries, num_keys) >= BLOCKS_MIN_LENGTH
    assert (choose_backend(num_queries, num_keys, "cpu") == "matmul") == small
    assert (choose_backend(num_queries, num_keys, "cpu", blocks=True) == "blocks") == (long and not small)
    assert choose_backend(num_queries, num_keys, "cuda", blocks=True) == "sdpa"


@pytest.mark.parametrize("shape", [(1, 700, 600, 2, 16), (2, 33, 2000, 3, 8), (1, 257, 40, 1, 128)])
@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_blocks_lose_no_more_than_rounded_weights_would(shape: tuple[int, ...], spread: float) -> None:
    """Longer than a block, heads that do not fill one, and scores up to some hundred: the error is that of weights and
    results of 8 bits (2^-9 each, relative to the values), not of scores of 8 bits (100 * 2^-9 in an exponent)."""
    batch, num_queries, num_keys, heads, width = shape
    make = torch.Generator().manual_seed(3)
    q = torch.randn(batch, num_queries, heads, width, generator=make) * spread
    k, v = (torch.randn(batch, num_keys, heads, width, generator=make) for _ in range(2))
    q, k, v = (x.bfloat16() for x in (q, k * spread, v))
    mask = seen(batch, heads, num_queries, num_keys)
    for given_mask in (None, mask):
        expected = plain(q, k, v, given_mask)
        error = (attend(q, k, v, given_mask, "blocks").double() - expected).norm() / expected.norm()
        assert error < 3 * 2**-8


@pytest.mark.parametrize("peak", [5, 20, 120])
def test_blocks_find_narrow_peaks_between_the_keys_that_are_sampled(peak: int) -> None:
    """As heads have that look at their own place: of 2,048 keys some ten count. Guessed from every 32nd key alone, the
    error was 4% at peaks of 60, and rose with the number of keys."""
    num, width = 2048, 64
    turns = torch.arange(num)[:, None] * torch.randn(width // 2, generator=torch.Generator().manual_seed(0)) * 0.12
    places = torch.cat([turns.cos(), turns.sin()], -1)[None, :, None]
    q, k = ((places * scale).bfloat16() for scale in (2 * peak * width**-0.5, 1.0))
    v = torch.randn(1, num, 1, width, generator=torch.Generator().manual_seed(1)).bfloat16()
    hidden = torch.ones(num, num, dtype=torch.bool).tril(-64)  # the peaks, which are sampled all the same
    for mask in (None, hidden | hidden.mT):
        expected = plain(q, k, v, mask)
        seen_rows = slice(None) if mask is None else slice(64, -64)
        out = attend(q, k, v, mask, "blocks").double()[:, seen_rows]
        error = (out - expected[:, seen_rows]).norm() / expected[:, seen_rows].norm()
        assert error < 2**-8


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.bfloat16, 3 * 2**-8), (torch.float16, 2**-10), (torch.float32, 1e-5)]
)
def test_blocks_add_weights_beyond_what_16_bits_hold(dtype: torch.dtype, bound: float) -> None:
    """20,000 keys that all lie near the guess, in numbers that 16 does and does not divide: their values add up to
    some 100,000, which fp16 does not reach. In bf16 the sum, the product and the result are rounded, by 2^-8 each."""
    for num_keys in (20_000, 20_001):
        q, k = torch.zeros(1, 40, 1, 16), torch.zeros(1, num_keys, 1, 16)
        q[..., 0], k[:, 5000, ..., 0] = 1.0, 12.0  # one key that is not sampled lies 3 above all others
        v = torch.linspace(10, 30, num_keys)[None, :, None, None].expand(k.shape).contiguous()
        q, k, v = (x.to(dtype) for x in (q, k, v))
        out = attend(q, k, v, None, "blocks").double()
        torch.testing.assert_close(out, plain(q, k, v, None), rtol=bound, atol=0)


def test_blocks_keep_to_finite_weights_where_scores_are_beyond_reason() -> None:
    """At scores of 80,000 a guess in 16 bits is off by hundreds, of which no exponential is finite. Of two keys that
    lie within their rounding of each other either may win: few rows have them."""
    q, k, v = (x.bfloat16() for x in draw(300, 300, heads=2, key_heads=2))
    q, k = q * 250, k * 250
    mask = torch.ones(300, 300, dtype=torch.bool).tril()
    for given_mask in (None, mask):
        out, expected = attend(q, k, v, given_mask, "blocks").double(), plain(q, k, v, given_mask)
        assert out.isfinite().all()
        assert (out - expected).norm() / expected.norm() < 0.02


def test_blocks_do_not_meet_keys_that_no_query_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (x.bfloat16() for x in draw(300, 300, heads=2, key_heads=2))
    met: list[int] = []
    sums = block_attention_module._sums
    monkeypatch.setattr(block_attention_module, "_sums", lambda weights: met.append(weights.shape[-1]) or sums(weights))
    mask = torch.ones(2, 1, 1, 300, dtype=torch.bool)
    mask[1, ..., 100:] = False
    poisoned = v.clone()
    poisoned[1, 100:] = torch.nan
    out = attend(q, k, poisoned, mask, "blocks")
    assert set(met) == {300, 100}
    torch.testing.assert_close(out.double(), plain(q, k, v, mask), rtol=0, atol=2**-6)  # values up to 3, of 8 bits
    one = attend(q, k, v, torch.ones(1, 1, 1, 1, dtype=torch.bool), "blocks")
    torch.testing.assert_close(one, attend(q, k, v, None, "blocks"), rtol=0, atol=0)


def test_blocks_are_opaque_to_the_compiler_and_taken_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (x.bfloat16() for x in draw(300, 300, heads=2, key_heads=2))
    library.opcheck(block_attention, (q, k, v, None))
    taken: list[int] = []
    blocks = BACKENDS["blocks"]
    monkeypatch.setitem(BACKENDS, "blocks", lambda *inputs: taken.append(1) or blocks(*inputs))
    with torch.no_grad():
        attend(q, k, v)
    assert len(taken) == 1
    attend(q.requires_grad_(), k, v)
    attend(q.detach().float(), k.float(), v.float())
    assert len(taken) == 1


def test_bad_requests_are_refused() -> None:
    q, k, v = draw(3, 3, heads=4, key_heads=3)
    with pytest.raises(ShapeError, match="4 query heads cannot share 3 key heads"):
        attend(q, k, v)
    with pytest.raises(InputError, match="valid values: sdpa, matmul"):
        attend(*draw(3, 3), backend="flash3")
