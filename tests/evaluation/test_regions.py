"""Connected regions of masks, against scipy and simple figures."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from vitascope.evaluation.regions import box_blur, fill_holes, grow, label, region_of, regions, shrink


@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 14), st.integers(1, 14), st.floats(0.1, 0.9))
def test_labels_are_those_of_scipy(seed: int, frames: int, height: int, width: int, density: float) -> None:
    mask = np.random.default_rng(seed).random((frames, height, width)) < density
    labels, count = label(mask)
    total = 0
    for mine, frame in zip(labels, mask, strict=True):
        theirs, number = ndimage.label(frame, structure=np.ones((3, 3)))  # pyright: ignore[reportGeneralTypeIssues]
        total += number
        pairs = set(zip(mine.ravel().tolist(), theirs.ravel().tolist(), strict=True))
        assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
    assert count == total


def test_holes_are_filled_and_the_outside_is_not() -> None:
    ring = np.zeros((9, 9), np.bool_)
    ring[2:7, 2:7] = True
    ring[4, 4] = False
    ring[0, 0] = True
    filled = fill_holes(ring)
    assert filled[4, 4]
    assert filled.sum() == 26


def test_growing_and_shrinking_a_square() -> None:
    mask = np.zeros((1, 11, 11), np.bool_)
    mask[0, 3:8, 3:8] = True
    assert grow(mask, 1).sum() == 49
    assert shrink(mask, 1).sum() == 9
    assert shrink(np.ones((1, 4, 4), np.bool_), 1).all()


def test_blur_keeps_a_constant_and_the_mean_of_a_point() -> None:
    image = np.zeros((7, 7), np.float32)
    image[3, 3] = 9
    assert np.allclose(box_blur(image, 1)[2:5, 2:5], 1)
    assert np.allclose(box_blur(np.full((5, 5), 2, np.float32), 2), 2)


def test_regions_come_largest_first_with_box_and_centre() -> None:
    mask = np.zeros((10, 12), np.bool_)
    mask[1:3, 1:3] = True
    mask[5:9, 4:12] = True
    found = regions(mask, 2)
    assert [region.area_px for region in found] == [32, 4]
    assert found[0].box == (5, 4, 9, 12)
    assert found[0].touches_border
    assert not found[1].touches_border
    assert region_of(mask[:4]).centre_xy == (2.0, 2.0)
