"""Simple plots as pictures (3, H, W) uint8, drawn with Pillow so that the base install can make them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vitascope.core.errors import InputError
from vitascope.media.pictures import from_image

_COLOURS = ((38, 98, 190), (210, 80, 40), (40, 150, 90), (140, 70, 170), (200, 150, 20), (90, 90, 100))
_INK = (30, 30, 35)
_GRID = (225, 225, 228)


@dataclass(frozen=True)
class PlotStyle:
    """Words and size of a plot; `log_y` draws powers of ten, `y_range` None fits the data."""

    title: str = ""
    x_label: str = ""
    y_label: str = ""
    width_px: int = 640
    height_px: int = 400
    log_y: bool = False
    y_range: tuple[float, float] | None = None


PLAIN = PlotStyle()


def line_plot(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], style: PlotStyle = PLAIN) -> Tensor:
    """Curves by name, each (x values, y values); points not finite (under log_y: not positive) are left out."""
    points = {name: _usable(xs, ys, style.log_y) for name, (xs, ys) in series.items()}
    every = [point for curve in points.values() for point in curve]
    if not every:
        raise InputError("there is nothing to plot: no series has a finite point")
    x_range = _widen(min(x for x, _ in every), max(x for x, _ in every))
    canvas = _Canvas(style, x_range, _y_range([y for _, y in every], style))
    canvas.x_ticks()
    for colour, curve in zip(_cycle(len(points)), points.values(), strict=True):
        pixels = [canvas.place(x, y) for x, y in curve]
        if len(pixels) > 1:
            canvas.draw.line(pixels, fill=colour, width=2, joint="curve")
        for x, y in pixels if len(pixels) < 40 else ():
            canvas.draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)
    canvas.legend(list(points))
    return from_image(canvas.image)


def bar_plot(values: Mapping[str, float], style: PlotStyle = PLAIN) -> Tensor:
    """One bar per name, from zero, with its value above it."""
    usable = {name: float(value) for name, value in values.items() if math.isfinite(value)}
    if not usable:
        raise InputError("there is nothing to plot: no value is finite")
    low, high = style.y_range or _widen(min(0.0, *usable.values()), max(0.0, *usable.values()) * 1.1)
    canvas = _Canvas(style, (0.0, float(len(usable))), (low, high))
    for index, (name, value) in enumerate(usable.items()):
        left, top = canvas.place(index + 0.15, max(value, 0.0))
        right, bottom = canvas.place(index + 0.85, min(value, 0.0))
        canvas.draw.rectangle((left, top, right, max(bottom, top + 1)), fill=_COLOURS[0])
        canvas.text((left + right) / 2, top - 9, f"{value:.3g}", "mm")
        canvas.text((left + right) / 2, canvas.bottom + 10 + 12 * (index % 2 if len(usable) > 6 else 0), name, "mm")
    return from_image(canvas.image)


class _Canvas:
    """Paper, axes and the mapping from values to px."""

    def __init__(self, style: PlotStyle, x_range: tuple[float, float], y_range: tuple[float, float]) -> None:
        self.image = Image.new("RGB", (style.width_px, style.height_px), (255, 255, 255))
        self.draw = ImageDraw.Draw(self.image)
        self.font = ImageFont.load_default(size=11)
        self.style, self.x_range, self.y_range = style, x_range, y_range
        self.left, self.top = 62, 34
        self.right, self.bottom = style.width_px - 16, style.height_px - 50
        self.text(style.width_px / 2, 14, style.title, "mm")
        self.text((self.left + self.right) / 2, style.height_px - 12, style.x_label, "mm")
        self.text(6, 24, style.y_label, "lm")
        for value in _ticks(*y_range):
            y = self._y(value)
            self.draw.line((self.left, y, self.right, y), fill=_GRID)
            self.text(self.left - 5, y, f"{10**value:.3g}" if style.log_y else f"{value:.4g}", "rm")
        self.draw.rectangle((self.left, self.top, self.right, self.bottom), outline=_INK)

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Px of a point (y already a logarithm under log_y)."""
        low, high = self.x_range
        return self.left + (x - low) / (high - low) * (self.right - self.left), self._y(y)

    def x_ticks(self) -> None:
        for value in _ticks(*self.x_range):
            x, _ = self.place(value, self.y_range[0])
            self.draw.line((x, self.bottom, x, self.bottom + 4), fill=_INK)
            self.text(x, self.bottom + 12, f"{value:.6g}", "mm")

    def legend(self, names: Sequence[str]) -> None:
        for index, (name, colour) in enumerate(zip(names, _cycle(len(names)), strict=True)):
            y = self.top + 12 + 15 * index
            self.draw.line((self.right - 22, y, self.right - 8, y), fill=colour, width=3)
            self.text(self.right - 28, y, name, "rm")

    def text(self, x: float, y: float, text: str, anchor: str) -> None:
        if text:
            self.draw.text((x, y), text, fill=_INK, font=self.font, anchor=anchor)

    def _y(self, value: float) -> float:
        low, high = self.y_range
        share = min(1.0, max(0.0, (value - low) / (high - low)))
        return self.bottom - share * (self.bottom - self.top)


def _usable(xs: Sequence[float], ys: Sequence[float], log_y: bool) -> list[tuple[float, float]]:
    if len(xs) != len(ys):
        raise InputError(f"a curve needs as many x as y values, got {len(xs)} and {len(ys)}")
    pairs = [(float(x), float(y)) for x, y in zip(xs, ys, strict=True)]
    pairs = [(x, y) for x, y in pairs if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log_y)]
    return [(x, math.log10(y)) for x, y in pairs] if log_y else pairs


def _y_range(ys: Sequence[float], style: PlotStyle) -> tuple[float, float]:
    if style.y_range is None:
        return _widen(min(ys), max(ys))
    low, high = style.y_range
    return (math.log10(low), math.log10(high)) if style.log_y else (low, high)


def _widen(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _cycle(count: int) -> list[tuple[int, int, int]]:
    return [_COLOURS[index % len(_COLOURS)] for index in range(count)]


def _ticks(low: float, high: float) -> list[float]:
    """About five round values in [low, high]."""
    raw = (high - low) / 5
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    return [index * step for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
