"""Causal convolution that repeats what is at the edge, in time and in space, and a norm of its frames.

Activations are channels-last, (B, T, H, W, C): batch, frames, rows, columns, channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitascope.nn.causal_conv import Kernel, TailCache
from vitascope.nn.resnet import silu
from vitascope.ops.parts import in_parts, part_size

Total = Callable[[Tensor], Tensor]
"""A tensor to its sum over all processes."""


class EdgeCache(TailCache):
    """A `TailCache` whose streams begin with their first step repeated instead of zeros; it can also keep everything,
    as attention over the past needs."""

    def __init__(self) -> None:
        super().__init__()
        self._started: set[nn.Module] = set()
        self._kept: dict[tuple[nn.Module, int], Tensor] = {}

    def extend(self, layer: nn.Module, x: Tensor, history: int) -> Tensor:
        """`x` with the `history` steps (axis 1) that came before it in front; remembers the new last steps."""
        if self.is_fresh(layer):
            self._remember(layer, x[:, :1].expand(-1, history, *x.shape[2:]), history)
        return super().extend(layer, x, history)

    def surround(self, layer: nn.Module, x: Tensor, history: int, rows: int, columns: int) -> Tensor:
        """As `extend`, and with the outermost rows and columns repeated that often on either side.

        Where no gradient is wanted, in memory that is used anew when somebody asks again, and each value is copied
        once: torch's padding changes the layout and back where channels are last.
        """
        if torch.is_grad_enabled():
            known = self.extend(layer, x, history) if history else x
            edges = (columns, columns, rows, rows, 0, 0)
            return F.pad(known.movedim(-1, 1), edges, mode="replicate").movedim(1, -1)
        batch, frames, height, width, channels = x.shape
        shape = (batch, history + frames, height + 2 * rows, width + 2 * columns, channels)
        out = self._room(shape, x)
        middle = out[:, :, rows : rows + height]
        inside = middle[:, :, :, columns : columns + width]
        inside[:, history:] = x
        if history:
            tail = self._tails.get(layer)
            inside[:, :history] = x[:, :1] if tail is None else tail.known
            self._remember(layer, inside, history)
        middle[:, :, :, :columns], middle[:, :, :, columns + width :] = inside[:, :, :, :1], inside[:, :, :, -1:]
        out[:, :, :rows], out[:, :, rows + height :] = middle[:, :, :1], middle[:, :, -1:]
        return out

    def begin(self, layer: nn.Module) -> bool:
        """Whether this is the first time that the layer asks."""
        fresh = layer not in self._started
        self._started.add(layer)
        return fresh

    def keep(self, layer: nn.Module, part: int, x: Tensor) -> Tensor:
        """All that the layer gave for this part (of its rows, say) so far, along axis 1, `x` last."""
        before = self._kept.get((layer, part))
        self._kept[layer, part] = x if before is None else torch.cat([before, x], 1)
        return self._kept[layer, part]

    def num_bytes(self) -> int:
        """Memory that the stream holds between chunks."""
        return super().num_bytes() + sum(x.numel() * x.element_size() for x in self._kept.values())


class EdgeConv3d(nn.Conv3d):
    """3-D convolution of stride 1, (B, T, H, W, C_in) to (B, T, H, W, C_out); `kernel` is odd in height and width.

    Edges are repeated, never zero: those of the frame and, before the first frame of a stream, that frame.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: Kernel = (3, 3, 3)) -> None:
        super().__init__(in_channels, out_channels, kernel)
        self.history, self.rows, self.columns = kernel[0] - 1, kernel[1] // 2, kernel[2] // 2

    def forward(self, input: Tensor, cache: EdgeCache | None = None) -> Tensor:
        cache = EdgeCache() if cache is None else cache
        x = cache.surround(self, input, self.history, self.rows, self.columns)
        return super().forward(x.movedim(-1, 1)).movedim(1, -1)


class FrameGroupNorm(nn.GroupNorm):
    """Group norm over each frame on its own, so that time does not mix; tiles of a frame would: they have other means
    and variances than the whole. Wu and He 2018.

    Worked out on a CPU from values whose mean is taken off first: its kernel for this layout of memory subtracts the
    square of the mean from the mean of the squares, and where a group's values lie close together nothing is left.
    """

    def forward(self, input: Tensor, total: Total | None = None) -> Tensor:
        """total: of a number per frame and group, the sum over the parts of frames that processes share."""
        if total is None and not input.is_cpu:
            frames = input.flatten(0, 1).movedim(-1, 1)
            return super().forward(frames).movedim(1, -1).unflatten(0, input.shape[:2])
        sum_up, bias = total or (lambda part: part), self.bias.float()
        cells = input.shape[2] * input.shape[3] * (self.num_channels // self.num_groups)
        sums_BTG = self._by_group(_sums(lambda part: part, input))
        count_BTG = sum_up(torch.full_like(sums_BTG, cells))
        mean = self._by_channel(sum_up(sums_BTG) / count_BTG)
        variance_BTG = sum_up(self._by_group(_sums(lambda part: (part - mean).square(), input))) / count_BTG
        scale = self._by_channel(torch.rsqrt(variance_BTG + self.eps)) * self.weight.float()
        return in_parts(
            lambda part, mean, scale: torch.addcmul(bias, part.float() - mean, scale).to(part.dtype), input, mean, scale
        )

    def _by_group(self, sums_BTC: Tensor) -> Tensor:
        return sums_BTC.unflatten(-1, (self.num_groups, -1)).sum(-1)

    def _by_channel(self, values_BTG: Tensor) -> Tensor:
        """(B, T, 1, 1, C)."""
        return values_BTG.repeat_interleave(self.num_channels // self.num_groups, -1)[:, :, None, None]


def _sums(work: Callable[[Tensor], Tensor], x_BTHWC: Tensor) -> Tensor:
    """Of `work(x)`, in fp32, over the cells of each frame: (B, T, C); a few rows at a time."""
    parts = x_BTHWC.split(part_size(x_BTHWC, 2), 2)
    return torch.stack([work(part.float()).sum((2, 3)) for part in parts]).sum(0)


class GroupResidualBlock(nn.Module):
    """norm, SiLU, convolution, twice, around a skip; the shape stays."""

    def __init__(self, channels: int, groups: int = 32) -> None:
        super().__init__()
        self.norm1, self.conv1 = FrameGroupNorm(groups, channels), EdgeConv3d(channels, channels)
        self.norm2, self.conv2 = FrameGroupNorm(groups, channels), EdgeConv3d(channels, channels)

    def forward(self, x: Tensor, cache: EdgeCache | None = None) -> Tensor:
        h = self.conv1(silu(self.norm1(x)), cache)
        h = self.conv2(silu(self.norm2(h)), cache)
        return x + h if torch.is_grad_enabled() else h.add_(x)
