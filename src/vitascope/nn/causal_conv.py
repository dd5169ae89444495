"""Convolution that sees only the past, with a cache of its last inputs so that chunks equal the whole.

B batch, C channels, T frames, H and W rows and columns. Activations are channels-last, (B, T, H, W, C), the layout in
which 3-D convolutions run at the full matrix-product rate on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitascope.core.errors import InputError

Kernel = tuple[int, int, int]


class TailCache:
    """The last inputs of every causal layer of one stream, along axis 1.

    A layer asks for its history with `follow`, or with `extend`, which gives zeros where a fresh stream has none: that
    is what the whole-clip call pads with, so pushing a clip chunk by chunk gives what one call gives.
    """

    def __init__(self) -> None:
        self._tails: dict[nn.Module, _Tail] = {}
        self._space: Tensor | None = None
        self._slabs = _Slabs()

    def extend(self, layer: nn.Module, x: Tensor, history: int) -> Tensor:
        """`x` with the `history` steps (axis 1) that came before it in front; remembers the new last steps."""
        known = self.follow(layer, x, history)
        return _after_zeros(known, history + x.shape[1])

    def follow(self, layer: nn.Module, x: Tensor, history: int) -> Tensor:
        """As `extend`, without the steps that a young stream does not have."""
        tail = self._tails.get(layer)
        return self._remember(layer, x if tail is None else torch.cat([tail.known, x], dim=1), history)

    def bands(self, layer: nn.Module, x: Tensor, history: int, edge: int) -> Iterator[tuple[slice, Tensor]]:
        """What `follow` gives of a stream that has begun, some rows at a time and without gradients: which rows of `x`,
        and these with `edge` more on either side, zeros beyond the picture, in memory that the next ones are put in.

        So nothing as large as the history is ever there twice. The layer's history goes on after the last band.
        """
        if self._tails[layer].steps.shape[1] < history:  # begun with gradients
            self._remember(layer, self._tails[layer].known, history)
        tail, num = self._tails[layer].known, x.shape[2]
        frames = tail.shape[1] + x.shape[1]
        size = len(x) * frames * x.shape[3:].numel() * x.element_size()
        count = -(-num * size // (CPU_BAND_BYTES if x.device.type == "cpu" else GPU_BAND_BYTES))
        each = -(-num // max(1, min(num, count)))
        for start in range(0, num, each):
            stop = min(start + each, num)
            band = self._room((len(x), frames, stop - start + 2 * edge, *x.shape[3:]), x)
            first, last = max(0, start - edge), min(num, stop + edge)
            inside = slice(first - start + edge, last - start + edge)
            band[:, :, : inside.start], band[:, :, inside.stop :] = 0, 0
            band[:, : tail.shape[1], inside], band[:, tail.shape[1] :, inside] = (
                tail[:, :, first:last],
                x[:, :, first:last],
            )
            yield slice(start, stop), band
        self._go_on(layer, x, history)

    def is_fresh(self, layer: nn.Module) -> bool:
        """Whether the layer has seen nothing of this stream yet."""
        return layer not in self._tails

    def num_bytes(self) -> int:
        """Memory that the stream holds between chunks."""
        return sum(tail.steps.numel() * tail.steps.element_size() for tail in self._tails.values())

    def _room(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Memory of that shape, with whatever is in it, until somebody asks again."""
        size = prod(shape)
        if self._space is None or self._space.numel() < size or self._space.dtype != like.dtype:
            self._space = None  # given back before there is a larger one
            self._space = like.new_empty(size)
        return self._space[:size].view(shape)

    def _remember(self, layer: nn.Module, known: Tensor, history: int) -> Tensor:
        """Keep the last steps, in the place of those before where no gradient is wanted: memory that stays where it is
        is not broken into pieces by what comes and goes beside it."""
        last, tail = known[:, max(0, known.shape[1] - history) :], self._tails.get(layer)
        if torch.is_grad_enabled():
            self._tails[layer] = _Tail(last.clone(), last.shape[1])
            return known
        if tail is None or tail.steps.shape != (len(last), history, *last.shape[2:]):
            tail = self._tails[layer] = _Tail(self._slabs.take((len(last), history, *last.shape[2:]), last), 0)
        tail.seen = last.shape[1]
        tail.known.copy_(last)
        return known

    def _go_on(self, layer: nn.Module, x: Tensor, history: int) -> None:
        """Put `x` behind the layer's tail, which moves up frame by frame."""
        tail, new = self._tails[layer], min(history, x.shape[1])
        for step in range(history - new):
            tail.steps[:, step] = tail.steps[:, step + new]
        tail.steps[:, history - new :] = x[:, x.shape[1] - new :]
        tail.seen = min(history, tail.seen + new)


CPU_BAND_BYTES, GPU_BAND_BYTES = 4 << 20, 256 << 20
"""Of the rows that a convolution of a stream reads at a time."""
SLAB_BYTES = 33 << 20
"""More than what the C library ever takes from its heap (32 MiB): a slab is a mapping of its own."""
SLAB_SHARE = 2**20
"""Bytes from which a tail is worth a place in a slab."""


class _Slabs:
    """Memory for what stays long while much comes and goes: on a CPU it would break the heap into pieces that nothing
    large fits into any more, a quarter of the peak of a decoder."""

    def __init__(self) -> None:
        self._free: Tensor | None = None

    def take(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An empty tensor of that shape, as `like.new_empty` gives it."""
        size = prod(shape) * like.element_size()
        if like.device.type != "cpu" or not SLAB_SHARE <= size <= SLAB_BYTES:
            return like.new_empty(shape)
        if self._free is None or len(self._free) < size:
            self._free = like.new_empty(SLAB_BYTES, dtype=torch.uint8)
        place, self._free = self._free[:size], self._free[-(-size // 64) * 64 :]
        return place.view(like.dtype).view(shape)


def check_chunk(chunk: int) -> None:
    """Raise InputError unless a clip can be worked out that many frames at a time."""
    if chunk < 0:
        raise InputError(f"chunk must be 0 (the whole clip) or more, got {chunk}")


def stretches(x: Tensor, size: int, dim: int = 1) -> Iterator[Tensor]:
    """Along `dim`: the first, then `size` at a time; all at once for 0. Raises InputError for less."""
    check_chunk(size)
    if size == 0:
        yield x
        return
    yield x.narrow(dim, 0, 1)
    for start in range(1, x.shape[dim], size):
        yield x.narrow(dim, start, min(size, x.shape[dim] - start))


@dataclass
class _Tail:
    """The last `seen` of `steps` (B, history, H, W, C) have been seen."""

    steps: Tensor
    seen: int

    @property
    def known(self) -> Tensor:
        """(B, seen, H, W, C), a view."""
        return self.steps[:, self.steps.shape[1] - self.seen :]


class CausalConv3d(nn.Conv3d):
    """3-D convolution of stride 1: zero padding of the same size in space, past only in time.

    (B, T, H, W, C_in) -> (B, T, H, W, C_out). `kernel` is (time, height, width), height and width odd.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: Kernel = (3, 3, 3)) -> None:
        super().__init__(in_channels, out_channels, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))
        self.history = kernel[0] - 1

    def forward(self, input: Tensor, cache: TailCache | None = None) -> Tensor:
        above, beside = self.kernel_size[1] // 2, self.kernel_size[2] // 2
        if cache is None or not self.history:
            return self._over(input, input.shape[1], (0, above, beside))
        if torch.is_grad_enabled() or cache.is_fresh(self):
            return self._over(cache.follow(self, input, self.history), input.shape[1], (0, above, beside))
        out: Tensor | None = None
        for rows, band in cache.bands(self, input, self.history, above):
            here = self._over(band, input.shape[1], (0, 0, beside))
            if here.shape[2] == input.shape[2]:
                out = here
                continue
            out = here.new_empty(*here.shape[:2], *input.shape[2:4], here.shape[-1]) if out is None else out
            out[:, :, rows] = here
        assert out is not None
        return out

    def _over(self, known: Tensor, frames: int, padding: Kernel) -> Tensor:
        """The last `frames` of `known`, of which there may be too few for the kernel."""
        zeros, weight = self.history + frames - known.shape[1], self.weight
        if zeros and frames == 1:
            weight = weight[:, :, zeros:]  # taps that meet nothing but zeros are left out
        else:
            known = _after_zeros(known, known.shape[1] + zeros)
        return F.conv3d(known.movedim(-1, 1), weight, self.bias, padding=padding).movedim(1, -1)


def _after_zeros(x: Tensor, steps: int) -> Tensor:
    """`x` (B, t, H, W, C) made `steps` long by zeros in front."""
    missing = steps - x.shape[1]
    return F.pad(x, (0, 0) * (x.ndim - 2) + (missing, 0)) if missing else x
