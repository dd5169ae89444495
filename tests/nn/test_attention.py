"""Attention layers: masks, blind queries, shared key heads, and two tracks that read each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vitascope.core.errors import ShapeError
from vitascope.nn.attention import CrossAttention, Exchange, SelfAttention, Side, Visibility, head_width
from vitascope.ops.rope import rotary_table

PERIODS = (0.1, 100.0)


def filled(layer: nn.Module) -> nn.Module:
    """The layer with random weights throughout, those that start at zero included."""
    make = torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3, generator=make)
    return layer.requires_grad_(False)


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("num_key_heads", [1, 4])
def test_self_attention_is_softmax_of_normed_queries_and_keys(num_key_heads: int) -> None:
    layer = filled(SelfAttention(16, 4, num_key_heads))
    assert isinstance(layer, SelfAttention)
    x = tokens(3, 5, 16)
    q, k, v = layer.qkv(x).unflatten(-1, (-1, 4)).split([4, num_key_heads, num_key_heads], -2)
    q, k = (
        torch.nn.functional.rms_norm(part, (4,), norm.weight, 1e-6)
        for part, norm in ((q, layer.norm_q), (k, layer.norm_k))
    )
    k, v = (part.expand(-1, -1, 4, -1) for part in (k, v))
    weights = (torch.einsum("alhe,ashe->ahls", q, k) / 2).softmax(-1)
    expected = layer.out(torch.einsum("ahls,ashe->alhe", weights, v).flatten(-2))
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_a_mask_hides_tokens_and_a_table_gives_order() -> None:
    layer = filled(SelfAttention(16, 2, 2))
    x = tokens(2, 6, 16)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    changed = x.clone()
    changed[:, 4:] += 1
    assert torch.equal(layer(x, mask=causal)[:, :4], layer(changed, mask=causal)[:, :4])
    # without a table a permutation of the tokens permutes the result; with one it does not
    order = torch.tensor([2, 0, 1, 5, 4, 3])
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order])
    table = rotary_table(torch.arange(6.0), 8, *PERIODS)
    assert not torch.allclose(layer(x[:, order], table), layer(x, table)[:, order], atol=1e-3)


@pytest.mark.parametrize("num_key_heads", [1, 2, 4])
def test_alone_is_a_mask_in_which_every_token_sees_itself(num_key_heads: int) -> None:
    layer = filled(SelfAttention(16, 4, num_key_heads))
    x, table = tokens(3, 5, 16), rotary_table(torch.arange(5.0), 4, *PERIODS)
    expected = layer(x, table, torch.eye(5, dtype=torch.bool))
    torch.testing.assert_close(layer(x, table, alone=True), expected, rtol=1e-5, atol=1e-6)
    assert (layer(x, table) - expected).abs().max() > 0.01


def test_cross_attention_starts_at_zero_and_does_not_read_padding() -> None:
    x, context = tokens(2, 5, 16), tokens(2, 7, 10, seed=1)
    assert not CrossAttention(16, 10, 2)(x, context).any()
    layer = filled(CrossAttention(16, 10, 2))
    mask = torch.tensor([[True] * 4 + [False] * 3, [True] * 7])
    out = layer(x, context, mask)
    torch.testing.assert_close(out[:1], layer(x[:1], context[:1, :4]))
    torch.testing.assert_close(out[1:], layer(x[1:], context[1:]))


def test_blind_rows_of_a_visibility_give_zeros_and_no_nan() -> None:
    seen = torch.tensor([[False, False, False], [True, False, True]])
    sees = Visibility.of(seen)
    assert sees.blind.tolist() == [True, False]
    assert sees.mask.tolist() == [[True] * 3, [True, False, True]]
    covered = sees.cover(torch.full((4, 2, 3, 5), float("nan")))
    assert not covered[:, 0].any()
    assert covered[:, 1].isnan().all()


def make_exchange() -> tuple[Exchange, Side, Side]:
    layer = filled(Exchange(16, 12, 8, 2))
    assert isinstance(layer, Exchange)
    a = Side(tokens(2, 4, 16), rotary_table(torch.tensor([0.1, 0.1, 0.6, 0.6]), 4, *PERIODS))
    b = Side(tokens(2, 3, 12, seed=1), rotary_table(torch.tensor([0.2, 0.4, 0.7]), 4, *PERIODS))
    return layer, a, b


def test_an_exchange_reads_the_other_side_as_far_as_it_is_seen() -> None:
    layer, a, b = make_exchange()
    sees_b = Visibility.of(torch.tensor([[False] * 3, [True, False, False], [True, True, False], [True] * 3]))
    sees_a = Visibility.of(torch.tensor([[True] * 4, [False] * 4, [False, False, True, True]]))
    a, b = Side(a.tokens, a.table, sees_b), Side(b.tokens, b.table, sees_a)
    to_a, to_b = layer(a, b)
    assert (to_a.shape, to_b.shape) == (a.tokens.shape, b.tokens.shape)
    # a query that sees nothing reads zeros, so that only the bias of the output is left
    assert torch.equal(to_a[:, 0], layer.out_a.bias.expand(2, -1))
    assert torch.equal(to_b[:, 1], layer.out_b.bias.expand(2, -1))
    changed = b.tokens.clone()
    changed[:, 2] += 1
    again, _ = layer(a, Side(changed, b.table, sees_a))
    assert torch.equal(again[:, :3], to_a[:, :3])
    assert not torch.allclose(again[:, 3], to_a[:, 3])


def test_an_exchange_that_sees_all_equals_one_without_masks_and_goes_by_time_differences() -> None:
    layer, a, b = make_exchange()
    plain = layer(a, b)
    all_seen = layer(
        Side(a.tokens, a.table, Visibility.of(torch.ones(4, 3, dtype=torch.bool))),
        Side(b.tokens, b.table, Visibility.of(torch.ones(3, 4, dtype=torch.bool))),
    )
    shifted = layer(
        Side(a.tokens, rotary_table(torch.tensor([2.1, 2.1, 2.6, 2.6]), 4, *PERIODS)),
        Side(b.tokens, rotary_table(torch.tensor([2.2, 2.4, 2.7]), 4, *PERIODS)),
    )
    for mine, seen, later in zip(plain, all_seen, shifted, strict=True):
        torch.testing.assert_close(mine, seen)
        torch.testing.assert_close(mine, later, rtol=1e-3, atol=1e-4)  # float32 seconds at a period of 0.1 s


@pytest.mark.parametrize(("width", "num_heads"), [(16, 3), (12, 4), (16, 0)])
def test_heads_must_be_whole_and_even(width: int, num_heads: int) -> None:
    with pytest.raises(ShapeError, match="heads of an even width"):
        head_width(width, num_heads)
    assert head_width(24, 4) == 6
