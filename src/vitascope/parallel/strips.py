"""Frames shared by processes as strips of rows, with the result of whole frames.

What a convolution needs of the rows above and below comes from the neighbours: its input is made longer by these rows
and its output shorter by what the borders of the longer strip have spoilt. The layers themselves do not know; the true
borders of the frame keep the padding of the layer, whatever it is. Activations are (B, T, H, W, C): batch, frames,
rows, columns, channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitascope.core.errors import ShapeError
from vitascope.parallel.ranks import Ranks, share_sizes
from vitascope.parallel.tokens import RingPart

ROWS = 2
"""The axis of an activation that is shared."""


@dataclass(frozen=True)
class Strips:
    """Strips of the rows of latents, `sizes[rank]` of them; of the rows of a level in the same proportion."""

    ranks: Ranks
    sizes: list[int]

    @staticmethod
    def of(num_rows: int, ranks: Ranks) -> Strips:
        """Raises ShapeError for fewer rows than processes."""
        return Strips(ranks, share_sizes(num_rows, ranks.size, "rows of latents"))

    def scaled(self, num_rows: int) -> list[int]:
        """Rows of all strips at the level where this process has `num_rows`."""
        return [size * (num_rows // self.sizes[self.ranks.rank]) for size in self.sizes]


@dataclass(frozen=True)
class Reach:
    """A layer that reads `rows` rows to each side and gives `scale` rows for each."""

    rows: int
    scale: int = 1

    @contextmanager
    def shared(self, layer: nn.Module, strips: Strips) -> Iterator[None]:
        """Within the block the layer gives for a strip what it gives for the frame there."""
        if self.rows == 0:
            yield
            return
        ranks = strips.ranks

        def extend(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
            x = given[0]
            if min(strips.scaled(x.shape[ROWS])) < self.rows:
                raise ShapeError(
                    f"strips of {min(strips.sizes)} rows are too thin: a layer reads {self.rows} to each side"
                )
            above, below = ranks.edges(x, ROWS, self.rows)
            return torch.cat([part for part in (above, x, below) if part is not None], ROWS), *given[1:]

        def crop(module: nn.Module, given: tuple[Any, ...], out: Tensor) -> Tensor:
            surplus = self.rows * self.scale
            first = surplus if ranks.rank else 0
            last = out.shape[ROWS] - (surplus if ranks.rank < ranks.size - 1 else 0)
            return out[:, :, first:last]

        with ExitStack() as hooks:
            hooks.enter_context(layer.register_forward_pre_hook(extend))
            hooks.enter_context(layer.register_forward_hook(crop))
            yield


@dataclass(frozen=True)
class Told:
    """A layer that needs more than neighbours, and takes what stands for it as the argument `name`."""

    name: str
    what: Callable[[Strips, Tensor], Any]

    @contextmanager
    def shared(self, layer: nn.Module, strips: Strips) -> Iterator[None]:
        """Within the block the layer gives for a strip what it gives for the frame there."""

        def tell(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return given, {**named, self.name: self.what(strips, given[0])}

        with layer.register_forward_pre_hook(tell, with_kwargs=True):
            yield


def read_of_frames(strips: Strips, x: Tensor) -> Callable[..., Tensor]:
    """Attention between the cells of a frame, row by row, those of a strip being neighbours: by a ring."""
    return RingPart(strips.ranks, [rows * x.shape[ROWS + 1] for rows in strips.scaled(x.shape[ROWS])]).attend


def total_of_frames(strips: Strips, x: Tensor) -> Callable[[Tensor], Tensor]:
    """Sums over the strips."""
    return strips.ranks.sum


@contextmanager
def shared_frames(layers: Sequence[tuple[nn.Module, Reach | Told]], strips: Strips) -> Iterator[None]:
    """Within the block all these layers work on strips."""
    with ExitStack() as stack:
        for layer, way in layers:
            stack.enter_context(way.shared(layer, strips))
        yield
