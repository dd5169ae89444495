"""Shares with their intervals, and offsets boiled down."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitascope.evaluation.statistics import OffsetSummary, Share, wilson_interval


def test_wilson_interval_matches_the_published_example() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3: 81 of 263 gives 0.2553 to 0.3662.
    low, high = wilson_interval(81, 263)
    assert low == pytest.approx(0.2553, abs=5e-5)
    assert high == pytest.approx(0.3662, abs=5e-5)
    assert wilson_interval(0, 0) == (0.0, 1.0)


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_holds_the_share(counts: tuple[int, int]) -> None:
    successes, total = counts
    low, high = wilson_interval(successes, total)
    # A rounding error of the square root may leave the end points 0 and 1 by a few ulp.
    assert 0 <= low <= successes / total + 1e-12
    assert successes / total - 1e-12 <= high <= 1


def test_share_counts_and_says_so_in_json() -> None:
    share = Share.of([True, False, True, True])
    assert (share.successes, share.total, share.value) == (3, 4, 0.75)
    assert share.as_dict()["n"] == 4
    assert math.isnan(Share.of([]).value)
    assert Share.of([]).as_dict()["value"] is None


def test_offsets_keep_their_sign_and_lose_it_where_that_is_asked_for() -> None:
    told = OffsetSummary.of([-30.0, 10.0, 10.0, 50.0, -20.0], num_missed=2, num_extra=1)
    assert (told.num_matched, told.num_missed, told.num_extra) == (5, 2, 1)
    assert told.median_signed_ms == 10.0
    assert told.median_ms == 20.0
    assert told.p95_ms == pytest.approx(46.0)  # numpy's linear rule: 30 + 0.8 * 20
    assert OffsetSummary.of([], 3, 0).median_ms is None
