"""Connected regions of masks, by runs: no dependency beyond numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vitascope.evaluation.footage import Floats, Mask

Ints = NDArray[np.int64]


def _runs(mask: Mask) -> tuple[Ints, Ints, Ints]:
    """Horizontal runs of a (R, W) mask: row, first column and one past the last column of each, in reading order."""
    padded = np.pad(mask, ((0, 0), (1, 1))).astype(np.int8)
    change = np.diff(padded, axis=1)
    rows, starts = np.nonzero(change == 1)
    _, ends = np.nonzero(change == -1)
    return rows.astype(np.int64), starts.astype(np.int64), ends.astype(np.int64)


def _touching(rows: Ints, starts: Ints, ends: Ints, rows_per_frame: int) -> tuple[Ints, Ints]:
    """Pairs of runs in successive rows of one frame that overlap or touch at a corner."""
    width = int(ends.max(initial=0)) + 4
    end_key = rows * width + ends
    start_key = rows * width + starts
    above = np.nonzero(rows % rows_per_frame != rows_per_frame - 1)[0]
    first = np.searchsorted(end_key, (rows[above] + 1) * width + starts[above], side="left")
    last = np.searchsorted(start_key, (rows[above] + 1) * width + ends[above], side="right")
    count = np.maximum(last - first, 0)
    upper = np.repeat(above, count)
    step = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    return upper, np.repeat(first, count) + step


def label(mask: Mask) -> tuple[Ints, int]:
    """Label the 8-connected regions of each frame of `mask` (T, H, W): labels 1..n, 0 outside, and n.

    Runs are joined by repeated minimum over touching pairs and pointer jumping (Shiloach and Vishkin 1982).
    """
    frames, height, width = mask.shape
    rows, starts, ends = _runs(mask.reshape(frames * height, width))
    if not len(rows):
        return np.zeros(mask.shape, np.int64), 0
    upper, lower = _touching(rows, starts, ends, height)
    root = np.arange(len(rows))
    while True:
        smaller = np.minimum(root[upper], root[lower])
        joined = root.copy()
        np.minimum.at(joined, root[upper], smaller)
        np.minimum.at(joined, root[lower], smaller)
        while not np.array_equal(joined, joined[joined]):
            joined = joined[joined]
        if np.array_equal(joined, root):
            break
        root = joined
    _, number = np.unique(root, return_inverse=True)
    edges = np.zeros((frames * height, width + 1), np.int64)
    np.add.at(edges, (rows, starts), number + 1)
    np.add.at(edges, (rows, ends), -(number + 1))
    return np.cumsum(edges, axis=1)[:, :width].reshape(mask.shape), int(number.max()) + 1


@dataclass(frozen=True)
class Region:
    """One connected region of one frame: mask (H, W), area, centroid, bounding box (top, left, bottom, right) in px."""

    mask: Mask
    area_px: int
    centre_xy: tuple[float, float]
    box: tuple[int, int, int, int]

    @property
    def touches_border(self) -> bool:
        """Whether the region reaches the edge of the frame."""
        height, width = self.mask.shape
        top, left, bottom, right = self.box
        return top == 0 or left == 0 or bottom == height or right == width


def region_of(mask: Mask) -> Region:
    """The region made of all the pixels of a non-empty (H, W) mask."""
    ys, xs = np.nonzero(mask)
    box = (int(ys.min()), int(xs.min()), int(ys.max()) + 1, int(xs.max()) + 1)
    return Region(mask, len(xs), (float(xs.mean()) + 0.5, float(ys.mean()) + 0.5), box)


def regions(mask: Mask, min_area_px: int) -> list[Region]:
    """Regions of a (H, W) mask of at least `min_area_px`, largest first."""
    labels, _ = label(mask[None])
    areas = np.bincount(labels.ravel())
    areas[0] = 0
    order = np.argsort(-areas)
    return [region_of(labels[0] == i) for i in order if areas[i] >= max(1, min_area_px)]


def fill_holes(mask: Mask) -> Mask:
    """`mask` (H, W) with every part of its outside that does not reach the border of the frame filled."""
    outside, count = label(np.pad(~mask, 1, constant_values=True)[None])
    open_label = outside[0, 0, 0]
    del count
    return (outside[0] != open_label)[1:-1, 1:-1]


def box_blur(image: Floats, radius: int) -> Floats:
    """Mean over (2 radius + 1)^2 pixels of an image (..., H, W), edges repeated."""
    size = 2 * radius + 1
    for axis in (-1, -2) if radius > 0 else ():
        pad = [(0, 0)] * image.ndim
        pad[axis] = (radius, radius)
        padded = np.moveaxis(np.pad(image, pad, mode="edge"), axis, -1)
        length = image.shape[axis]
        total = padded[..., :length].astype(np.float32)
        for step in range(1, size):
            total += padded[..., step : step + length]
        image = np.moveaxis(total / np.float32(size), -1, axis)
    return image


def _spread(mask: Mask, radius: int, join: np.ufunc, outside: bool) -> Mask:
    for axis in (-1, -2):
        pad = [(0, 0)] * mask.ndim
        pad[axis] = (radius, radius)
        padded = np.moveaxis(np.pad(mask, pad, constant_values=outside), axis, -1)
        length = mask.shape[axis]
        total = padded[..., :length].copy()
        for step in range(1, 2 * radius + 1):
            join(total, padded[..., step : step + length], out=total)
        mask = np.moveaxis(total, -1, axis)
    return mask


def grow(mask: Mask, radius: int) -> Mask:
    """`mask` dilated by a square of `radius` px."""
    return _spread(mask, radius, np.logical_or, False)


def shrink(mask: Mask, radius: int) -> Mask:
    """`mask` eroded by a square of `radius` px; the frame's edge does not erode."""
    return _spread(mask, radius, np.logical_and, True)
