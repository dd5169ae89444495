"""What lies behind the stage: layers at depths, each drawn by formula, so that no camera move ever finds an edge.

A layer is drawn in coordinates that are those of the frame when the camera is at rest (half frame heights, x right, y
down); the camera scales and shifts them by the layer's depth. T frames (1 where the camera is static), H and W rows and
columns. Everything is smooth over a pixel, and random things depend on the scene's seed and their own place alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, tau

import torch
from torch import Tensor

from vitascope.core.random import generator
from vitascope.world.motion import ground_y
from vitascope.world.scene import PLAIN_BACKGROUNDS, Scene

Colour = tuple[float, float, float]


@dataclass(frozen=True)
class View:
    """A layer's coordinates at the pixels: x (T, 1, W), y (T, H, 1), and the size of a pixel, px (T, 1, 1)."""

    x: Tensor
    y: Tensor
    px: Tensor


@dataclass(frozen=True)
class Extent:
    """The part of a layer where there is anything to draw, in the layer's coordinates."""

    left: float = -inf
    top: float = -inf
    right: float = inf
    bottom: float = inf


@dataclass(frozen=True)
class Layer:
    """One layer: its depth in world units, how it is drawn and where.

    `draw(view)` gives the colour in 0..255, broadcastable to (T, 3, H, W), and the cover (T, H, W) in [0, 1], or None
    where the layer covers everything. Pixels outside `extent` are never asked for. Where the cover is above `solid`, a
    pixel counts as the layer's own for the ground truth.
    """

    depth: float
    draw: Callable[[View], tuple[Tensor, Tensor | None]]
    extent: Extent = Extent()
    solid: float = 0.5


@dataclass(frozen=True)
class Floor:
    """A level floor at height `y`, seen in perspective before a wall at depth `wall`, both in world units.

    `draw(x, z, reach)` gives the colour, broadcastable to (T, 3, H, W), at the place (x, z) (T, H, W) of the floor,
    where a pixel is `reach` (T, H, 1) wide.
    """

    y: float
    wall: float
    draw: Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Backdrop:
    """Layers from far to near, and a floor drawn over them where there is one."""

    layers: tuple[Layer, ...]
    floor: Floor | None = None


def backdrop(scene: Scene) -> Backdrop:
    """The backdrop of a scene. Plain backgrounds are one layer of their exact colour."""
    if scene.background in PLAIN_BACKGROUNDS:
        return Backdrop((Layer(20.0, _plain(PLAIN_BACKGROUNDS[scene.background])),))
    return _DRAWN[scene.background](scene)


def _colour(colour: Colour, like: Tensor) -> Tensor:
    return like.new_tensor(colour).view(1, 3, 1, 1)


def _blend(first: Colour, second: Colour, share: Tensor) -> Tensor:
    """From the first colour (share 0) to the second (share 1); share (T, a, b) gives (T, 3, a, b)."""
    return torch.lerp(_colour(first, share), _colour(second, share), share[:, None])


def _edge(inside: Tensor, px: Tensor) -> Tensor:
    """Cover of a pixel whose middle is `inside` an edge by so much."""
    return inside.div(1.4 * px).add_(0.5).clamp_(0.0, 1.0)


def _bell(deviation: Tensor) -> Tensor:
    """exp(-d^2 / 2) in place, cut off at 1e-9 (numbers too small for a normal float32 are very slow on a CPU)."""
    return deviation.square_().mul_(-0.5).clamp_(min=-20.0).exp_()


def _plain(colour: Colour) -> Callable[[View], tuple[Tensor, Tensor | None]]:
    return lambda view: (_colour(colour, view.x), None)


# Starry sky


def _starry_sky(scene: Scene) -> Backdrop:
    seed = scene.seed
    moon_x, moon_y = torch.rand(2, generator=generator(seed, "moon")).tolist()
    moon_x, moon_y = 0.3 + 0.5 * moon_x, -0.75 + 0.2 * moon_y
    halo = Extent(moon_x - 0.6, moon_y - 0.6, moon_x + 0.6, moon_y + 0.6)
    ridge = Ridge("night", 0.80, 0.09, 0.8, (9.0, 13.0, 26.0), (5.0, 8.0, 16.0))
    return Backdrop(
        (
            Layer(60.0, lambda view: (_night(view), None)),
            Layer(50.0, lambda view: _stars(view, seed, "far", cell=0.36, size=0.011), Extent(bottom=0.95), solid=0.2),
            Layer(45.0, lambda view: _moon(view, moon_x, moon_y), halo),
            Layer(9.0, lambda view: _stars(view, seed, "near", cell=0.85, size=0.017), Extent(bottom=0.95), solid=0.2),
            Layer(5.0, lambda view: _ridge(view, seed, ridge), ridge.extent),
        )
    )


def _night(view: View) -> Tensor:
    return _blend((7.0, 9.0, 28.0), (34.0, 44.0, 92.0), ((view.y + 1.0) / 1.9).clamp(0.0, 1.0) ** 1.5)


def _stars(view: View, seed: int, name: str, cell: float, size: float) -> tuple[Tensor, Tensor]:
    """Stars of varied brightness, one to a cell of the sky, each a round Gaussian: cover = sum of bright * gy * gx."""
    column, row = _cells(view.x, cell), _cells(view.y, cell)
    rows, columns = torch.meshgrid(row, column, indexing="ij")
    random = place_noise(rows.flatten(), columns.flatten(), seed, name)
    x = (columns.flatten() + 0.1 + 0.8 * random[0]) * cell
    y = (rows.flatten() + 0.1 + 0.8 * random[1]) * cell
    bright = 0.2 + 1.1 * random[2] ** 2
    width = torch.maximum(size * (0.7 + 0.6 * random[2]), 0.56 * view.px)
    across = _bell((view.x - x[:, None]) / width.transpose(1, 2))
    down = _bell((view.y - y) / width).mul_(bright)
    return _colour((238.0, 242.0, 255.0), x), torch.bmm(down, across).clamp_(max=1.0)


def _moon(view: View, x: float, y: float) -> tuple[Tensor, Tensor]:
    """A full moon with a glow."""
    radius = 0.13
    distance = torch.sqrt((view.x - x) ** 2 + (view.y - y) ** 2)
    glow = 0.32 * torch.exp(-((distance / (2.1 * radius)) ** 2))
    return _colour((236.0, 232.0, 208.0), distance), torch.maximum(glow, 0.92 * _edge(radius - distance, view.px))


def _cells(coordinate: Tensor, cell: float) -> Tensor:
    """Numbers of all cells that a pixel of any frame lies in, or next to."""
    low, high = torch.aminmax(coordinate)
    return torch.arange(int(low.item() // cell) - 1, int(high.item() // cell) + 2, device=coordinate.device)


def place_noise(row: Tensor, column: Tensor, seed: int, name: str) -> Tensor:
    """Three random numbers in [0, 1) for every cell, (3, N), that depend on the cell, the seed and the name alone."""
    salt = int(torch.randint(1 << 30, (1,), generator=generator(seed, "cells", name)))
    word = (row.long() * 0x9E3779B1 + column.long() * 0x85EBCA77 + salt) & 0xFFFFFFFF
    numbers = []
    for _ in range(3):
        for factor in (0x7FEB352D, 0x2C1B3C6D):
            word = ((word ^ (word >> 15)) * factor) & 0xFFFFFFFF
        numbers.append((word & 0xFFFFFF).float() / 0x1000000)
    return torch.stack(numbers)


# Green hills


@dataclass(frozen=True)
class Ridge:
    """A chain of hills: its name (for the seed), mean height, swing, waves in a half frame, and colours from the top to
    the foot."""

    name: str
    height: float
    swing: float
    waves: float
    top: Colour
    foot: Colour

    @property
    def extent(self) -> Extent:
        return Extent(top=self.height - 1.1 * self.swing)


def _green_hills(scene: Scene) -> Backdrop:
    seed = scene.seed
    far = Ridge("far", 0.22, 0.12, 1.1, (132, 176, 164), (110, 160, 132))
    middle = Ridge("middle", 0.45, 0.11, 0.9, (104, 168, 92), (70, 132, 66))
    near = Ridge("near", 0.74, 0.09, 0.7, (70, 138, 54), (38, 88, 34))
    return Backdrop(
        (
            Layer(60.0, lambda view: (_day(view), None)),
            Layer(40.0, lambda view: _clouds(view, seed), Extent(bottom=0.12)),
            Layer(24.0, lambda view: _ridge(view, seed, far), far.extent),
            Layer(10.0, lambda view: _ridge(view, seed, middle), middle.extent),
            Layer(4.0, lambda view: _ridge(view, seed, near), near.extent),
        )
    )


def _day(view: View) -> Tensor:
    return _blend((94.0, 156.0, 222.0), (206.0, 228.0, 240.0), ((view.y + 1.0) / 1.3).clamp(0.0, 1.0))


def _clouds(view: View, seed: int) -> tuple[Tensor, Tensor]:
    """Soft clouds, each of a few wide Gaussians in a cell of the sky."""
    cell_x, cell_y = 1.1, 0.6
    column = _cells(view.x, cell_x)
    row = torch.tensor([-2, -1], device=column.device)
    rows, columns = torch.meshgrid(row, column, indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()
    random = place_noise(rows, columns, seed, "clouds")
    x = (columns + 0.15 + 0.7 * random[0]) * cell_x
    y = (rows + 0.35 + 0.4 * random[1]) * cell_y
    size = 0.6 + 0.6 * random[2]
    puffs = ((-0.17, 0.02, 0.10, 0.6), (0.0, -0.04, 0.13, 0.8), (0.16, 0.01, 0.11, 0.7), (0.0, 0.05, 0.26, 0.5))
    shift_x, shift_y, width, strength = torch.tensor(puffs, device=x.device).T[:, :, None]
    x, y, width = (x + shift_x * size).flatten(), (y + shift_y * size).flatten(), (width * size).flatten()
    strength, height = strength.expand(-1, len(size)).flatten(), (0.05 * size).repeat(len(puffs))
    across = _bell((view.x - x[:, None]) / width[:, None])
    down = _bell((view.y - y) / height).mul_(strength)
    return _colour((250.0, 252.0, 255.0), x), torch.bmm(down, across).clamp_(max=0.9)


def _ridge(view: View, seed: int, ridge: Ridge) -> tuple[Tensor, Tensor]:
    """Everything below a line of three waves, from the top's colour to the foot's."""
    phase = torch.rand(3, generator=generator(seed, "ridge", ridge.name)).tolist()
    line = torch.full_like(view.x, ridge.height)
    for share, ratio, turn in zip((0.6, 0.3, 0.16), (1.0, 2.17, 4.31), phase, strict=True):
        line += ridge.swing * share * torch.sin(view.x * (ridge.waves * ratio * tau / 2) + tau * turn)
    tone = ((view.y - ridge.height + ridge.swing) / 0.5).clamp(0.0, 1.0)
    return _blend(ridge.top, ridge.foot, tone), _edge(view.y - line, view.px)


# Brick wall


_COURSE, _BRICK, _JOINT = 0.25, 0.56, 0.022
_BRICK_TABLE = 32


def _brick_wall(scene: Scene) -> Backdrop:
    return Backdrop((Layer(2.5, lambda view: (_bricks(view, scene.seed), None)),))


def _bricks(view: View, seed: int) -> Tensor:
    """Courses of bricks, every other one shifted by half a brick; each brick has its own tone."""
    course = view.y / _COURSE + 0.5
    number = course.floor()
    level = _edge((0.5 - (course - number - 0.5).abs()) * _COURSE - _JOINT, view.px)
    odd = number.remainder(2.0)
    along = view.x / _BRICK
    upright, index = [], []
    for shift in (0.0, 0.5):
        place = along + shift
        index.append(place.floor())
        upright.append(_edge((0.5 - (place - index[-1] - 0.5).abs()) * _BRICK - _JOINT, view.px))
    brick = level * torch.where(odd > 0, upright[1], upright[0])
    tones = torch.rand(_BRICK_TABLE, _BRICK_TABLE, generator=generator(seed, "bricks")).to(view.x.device)
    row = number.remainder(_BRICK_TABLE).long()
    pair = [tones[row, column.remainder(_BRICK_TABLE).long()] for column in index]
    tone = torch.where(odd > 0, pair[1], pair[0])
    light = 1.0 - 0.1 * view.y.clamp(-1.5, 1.5)
    fields = torch.stack([light.expand_as(brick), light * brick, light * brick * tone], 1)
    colours = fields.new_tensor([[152, 138, 126], [-36, -66, -72], [26, 14, 12]])
    return torch.einsum("kc,tkhw->tchw", colours, fields)


# Checkered floor


_TILE = 0.75
_HAZE = 0.055
"""How fast the contrast of the tiles fades with every unit of distance, squared."""


def _checkered_floor(scene: Scene) -> Backdrop:
    """The floor is where bouncing subjects land, if there are any."""
    grounds = [ground_y(subject) for subject in scene.subjects if subject.motion == "bounces"]
    floor = Floor(max(0.6, *grounds) if grounds else 0.78, wall=4.5, draw=_checkers)
    return Backdrop((Layer(floor.wall, lambda view: (_panelled_wall(view, floor), None)),), floor)


def _panelled_wall(view: View, floor: Floor) -> Tensor:
    """A wall with wide upright panels and a skirting board."""
    foot = floor.y * 4.0 / (4.0 + floor.wall)
    tone = ((view.y + 1.2) / 1.6).clamp(0.0, 1.0)
    wall = _blend((92.0, 104.0, 128.0), (168.0, 172.0, 178.0), tone)
    groove = torch.exp(-0.5 * ((torch.remainder(view.x + 0.25, 0.5) - 0.25) / (0.012 + 0.5 * view.px)) ** 2)
    wall = wall - 26.0 * groove[:, None] * _edge(foot - 0.06 - view.y, view.px)[:, None]
    return torch.lerp(wall, _colour((74.0, 66.0, 66.0), wall), _edge(view.y - foot + 0.05, view.px)[:, None])


def _checkers(x: Tensor, z: Tensor, reach: Tensor) -> Tensor:
    """Light and dark tiles, which pale with distance."""
    wave = _square_wave(x, reach).mul_(_square_wave(z, 3.0 * reach))
    wave = wave.mul_(0.42 / (1.0 + _HAZE * (z + 1.0).clamp(min=0.0) ** 2)).add_(0.5)
    return _blend((62.0, 62.0, 78.0), (206.0, 200.0, 188.0), wave)


def _square_wave(place: Tensor, reach: Tensor) -> Tensor:
    """+1 on even tiles, -1 on odd ones, with edges about `reach` wide."""
    triangle = torch.remainder(place / _TILE, 2.0).sub_(1.0).abs_().sub_(0.5)
    return (triangle * (_TILE / (0.9 * reach))).clamp_(-1.0, 1.0)


_DRAWN: dict[str, Callable[[Scene], Backdrop]] = {
    "starry sky": _starry_sky,
    "checkered floor": _checkered_floor,
    "green hills": _green_hills,
    "brick wall": _brick_wall,
}
