"""Rotary positions: rotations whose products depend on the difference of positions alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vitascope.core.errors import ShapeError
from vitascope.ops.rope import axial_table, grid_table, index_table, periods_to_frequencies, rotary_table, rotate

PERIODS = (0.1, 100.0)


def vectors(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@given(shift=st.floats(-20, 20))
def test_scores_depend_on_the_difference_of_positions(shift: float) -> None:
    positions = torch.tensor([0.0, 0.33, 1.7, 4.0])
    q, k = vectors(2, 4, 3, 8)

    def scores(offset: float) -> Tensor:
        table = rotary_table(positions + offset, 8, *PERIODS)
        return torch.einsum("lhe,she->hls", rotate(q, table), rotate(k, table))

    # float32 positions near 24 s are off by 1e-6 s, which at the shortest period of 0.1 s turns a pair by 6e-5
    torch.testing.assert_close(scores(shift), scores(0.0), rtol=0, atol=1e-3)


def test_a_rotation_keeps_lengths_and_dtype_and_turns_by_the_period() -> None:
    x = vectors(5, 2, 6)
    table = rotary_table(torch.arange(5) * 0.7, 6, *PERIODS)
    torch.testing.assert_close(rotate(x, table).norm(dim=-1), x.norm(dim=-1))
    assert rotate(x.bfloat16(), table).dtype == torch.bfloat16
    # one pair with a period of 2 s: after 0.5 s a quarter turn, after 2 s where it was
    pair = torch.tensor([1.0, 0.0]).expand(3, 1, 2)
    turned = rotate(pair, rotary_table(torch.tensor([0.0, 0.5, 2.0]), 2, 2.0, 2.0))[:, 0]
    torch.testing.assert_close(turned, torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), rtol=0, atol=1e-6)


@given(st.integers(2, 40), st.floats(0.01, 10), st.floats(1.0, 1000))
def test_frequencies_are_geometric_between_the_given_periods(num: int, low: float, factor: float) -> None:
    periods = 2 * torch.pi / periods_to_frequencies(num, low, low * factor).double()
    assert periods[0].item() == pytest.approx(low, rel=1e-4)
    assert periods[-1].item() == pytest.approx(low * factor, rel=1e-4)
    ratios = periods[1:] / periods[:-1]
    torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios), rtol=1e-4, atol=1e-4)


def test_axes_share_the_pairs_of_a_head() -> None:
    rows, columns = torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([0.0, 1.0, 0.0, 1.0])
    cos, sin = axial_table([rows, columns], 8, *PERIODS)
    assert cos.shape == sin.shape == (4, 4)
    for part, axis in ((slice(0, 2), rows), (slice(2, 4), columns)):
        expected = rotary_table(axis, 4, *PERIODS)
        assert torch.equal(cos[:, part], expected[0])
        assert torch.equal(sin[:, part], expected[1])


def test_scores_of_places_depend_on_both_differences() -> None:
    rows, columns = (axis.flatten() for axis in torch.meshgrid(torch.arange(3.0), torch.arange(4.0), indexing="ij"))
    x = vectors(1, 1, 8).expand(12, 1, 8)
    turned = rotate(x, axial_table([rows, columns], 8, 2.0, 10.0))[:, 0]
    scores = (turned @ turned.T).view(3, 4, 3, 4)
    torch.testing.assert_close(scores[0, 0, 1, 2], scores[1, 1, 2, 3])
    assert not torch.isclose(scores[0, 0, 1, 2], scores[0, 0, 2, 1])


def test_widths_that_do_not_fit_are_refused_with_the_nearest() -> None:
    with pytest.raises(ShapeError, match="got 7; nearest: 6, 8"):
        rotary_table(torch.zeros(1), 7, *PERIODS)
    with pytest.raises(ShapeError, match="heads of 6 cannot be divided between 2"):
        axial_table([torch.zeros(1)] * 2, 6, *PERIODS)


def test_neighbours_are_the_halves_in_another_order() -> None:
    x, table = torch.randn(2, 5, 3, 8), index_table(torch.arange(5), 8)
    apart = torch.cat([x[..., 0::2], x[..., 1::2]], -1)  # neighbours brought to the two halves
    turned = rotate(apart, table)
    expected = torch.stack(turned.chunk(2, -1), -1).flatten(-2)
    torch.testing.assert_close(rotate(x, table, neighbours=True), expected)


def test_a_table_per_head_turns_each_head_by_its_own() -> None:
    x, tables = torch.randn(2, 5, 3, 8), [index_table(torch.arange(5), 8, theta) for theta in (10.0, 100.0, 1e4)]
    stacked = torch.stack([cos for cos, _ in tables], 1), torch.stack([sin for _, sin in tables], 1)
    turned = rotate(x, stacked, per_head=True)
    for head, table in enumerate(tables):
        torch.testing.assert_close(turned[:, :, head : head + 1], rotate(x[:, :, head : head + 1], table))


def test_index_tables_have_their_angles_in_double_precision() -> None:
    cos, sin = index_table(torch.tensor([0, 1, 1000]), 6, 10_000.0)
    angles = [[n * 10_000.0 ** (-i / 3) for i in range(3)] for n in (0, 1, 1000)]
    torch.testing.assert_close(cos, torch.tensor(angles, dtype=torch.float64).cos().float(), rtol=0, atol=1e-7)
    torch.testing.assert_close(sin, torch.tensor(angles, dtype=torch.float64).sin().float(), rtol=0, atol=1e-7)


def test_a_grid_of_tables_gives_each_axis_its_share_of_the_pairs() -> None:
    sizes, widths = (2, 3, 4), (4, 2, 6)
    tables = [index_table(torch.arange(n), width) for n, width in zip(sizes, widths, strict=True)]
    cos, sin = grid_table(tables)
    assert cos.shape == sin.shape == (24, 6)
    for place, (t, h, w) in enumerate((t, h, w) for t in range(2) for h in range(3) for w in range(4)):
        expected = torch.cat([tables[0][0][t], tables[1][0][h], tables[2][0][w]])
        assert torch.equal(cos[place], expected)
