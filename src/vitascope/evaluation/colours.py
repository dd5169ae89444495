"""What colours things have: densities over RGB of every background and every palette colour.

RGB is cut into 32^3 cells. The density of a thing is the share of its pixels in each cell, measured on the world's own
paint (no subject before a background, no background behind a subject) and smoothed, so that blur, noise and coding move
a pixel by a few cells without making it impossible.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vitascope.core.shapes import ClipFormat
from vitascope.evaluation.footage import Floats
from vitascope.evaluation.prototypes import prototypes
from vitascope.world.render import render
from vitascope.world.scene import BACKGROUNDS, COLOURS, DRAWN_BACKGROUNDS, PLAIN_BACKGROUNDS, SHAPES, Scene, Subject

CELLS = 32
_NARROW, _WIDE = 0.8, 2.5
"""Deviations in cells of the two kernels of the smoothing."""
_WIDE_SHARE = 0.15
_FLOOR = 1e-7
_NUM_SEEDS = 16
_ATTITUDES = ("stays still", "spins")


@dataclass(frozen=True)
class ColourModel:
    """Log densities over the 32^3 cells: of the 8 backgrounds (8, 32768) and of the 9 palette colours (9, 32768)."""

    backgrounds: Floats
    palette: Floats

    def background_scores(self, pixels: Floats) -> Floats:
        """Mean log density of pixels (..., 3) in [0, 255] under each background, (8,)."""
        return self.backgrounds[:, cell_index(pixels).ravel()].mean(1)

    def foreground(self, pixels: Floats, background: str) -> Floats:
        """Log odds (...) that pixels (..., 3) are paint of some subject rather than `background`."""
        odds = self.palette.max(0) - self.backgrounds[BACKGROUNDS.index(background)]
        return odds[cell_index(pixels)]

    def likeliest_colour(self, pixels: Floats) -> NDArray[np.int64]:
        """Number of the likeliest palette colour of each pixel (..., 3)."""
        return self.palette.argmax(0)[cell_index(pixels)]

    def colour_odds(self, pixels: Floats, first: int, second: int) -> Floats:
        """Log odds (...) of one palette colour against another at pixels (..., 3)."""
        return (self.palette[first] - self.palette[second])[cell_index(pixels)]


def cell_index(pixels: Floats) -> NDArray[np.int64]:
    """Number of the cell that each pixel (..., 3) in [0, 255] lies in."""
    cells = (np.clip(pixels, 0, 255) * (CELLS / 256)).astype(np.int64)
    return (cells[..., 0] * CELLS + cells[..., 1]) * CELLS + cells[..., 2]


def build_colour_model() -> ColourModel:
    """Measure the densities. Takes a fraction of a second."""
    backgrounds = np.stack([_log_density(_background_pixels(name)) for name in BACKGROUNDS])
    palette = np.stack([_log_density(_subject_pixels(colour)) for colour in COLOURS])
    return ColourModel(backgrounds, palette)


def _background_pixels(name: str) -> Floats:
    if name in PLAIN_BACKGROUNDS:
        return np.asarray([PLAIN_BACKGROUNDS[name]], np.float32)
    fmt = ClipFormat(96, 96, num_frames=1)
    clips = render([Scene((), name, seed=seed) for seed in range(_NUM_SEEDS)], fmt)
    assert name in DRAWN_BACKGROUNDS
    return clips.permute(0, 1, 3, 4, 2).reshape(-1, 3).float().numpy()


def _subject_pixels(colour: str) -> Floats:
    """Paint of the five shapes, with and without the marks of spinning, in pixels that they cover wholly."""
    painted = prototypes([Subject(colour, shape, motion=motion) for shape in SHAPES for motion in _ATTITUDES])
    return np.concatenate([each.rgb[each.cover > 0.97] for each in painted])


def _log_density(pixels: Floats) -> Floats:
    counts = np.bincount(cell_index(pixels).ravel(), minlength=CELLS**3).astype(np.float64)
    cube = (counts / counts.sum()).reshape(CELLS, CELLS, CELLS)
    smooth = (1 - _WIDE_SHARE) * _smoothed(cube, _NARROW) + _WIDE_SHARE * _smoothed(cube, _WIDE)
    return np.log(smooth + _FLOOR).astype(np.float32).ravel()


def _smoothed(cube: NDArray[np.float64], deviation: float) -> NDArray[np.float64]:
    place = np.arange(CELLS)
    kernel = np.exp(-0.5 * ((place[:, None] - place[None]) / deviation) ** 2)
    kernel /= kernel.sum(0, keepdims=True)
    for axis in range(3):
        cube = np.moveaxis(np.tensordot(kernel, cube, axes=(1, axis)), 0, axis)
    return cube
