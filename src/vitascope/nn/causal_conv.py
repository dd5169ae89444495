"""Convolution that sees only the past, with a cache of its last inputs so that chunks equal the whole.

B batch, C channels, T frames, H and W rows and columns. Activations are channels-last, (B, T, H, W, C), the layout in
which 3-D convolutions run at the full matrix-product rate on a CPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kernel = tuple[int, int, int]


class TailCache:
    """The last inputs of every causal layer of one stream, along axis 1.

    A layer asks for its history with `follow`, or with `extend`, which gives zeros where a fresh stream has none: that
    is what the whole-clip call pads with, so pushing a clip chunk by chunk gives what one call gives.
    """

    def __init__(self) -> None:
        self._tails: dict[nn.Module, Tensor] = {}

    def extend(self, layer: nn.Module, x: Tensor, history: int) -> Tensor:
        """`x` with the `history` steps (axis 1) that came before it in front; remembers the new last steps."""
        known = self.follow(layer, x, history)
        return _after_zeros(known, history + x.shape[1])

    def follow(self, layer: nn.Module, x: Tensor, history: int) -> Tensor:
        """As `extend`, without the steps that a young stream does not have."""
        tail = self._tails.get(layer)
        known = x if tail is None else torch.cat([tail, x], dim=1)
        self._tails[layer] = known[:, max(0, known.shape[1] - history) :].clone()
        return known

    def is_fresh(self, layer: nn.Module) -> bool:
        """Whether the layer has seen nothing of this stream yet."""
        return layer not in self._tails

    def num_bytes(self) -> int:
        """Memory that the stream holds between chunks."""
        return sum(tail.numel() * tail.element_size() for tail in self._tails.values())


class CausalConv3d(nn.Conv3d):
    """3-D convolution of stride 1: zero padding of the same size in space, past only in time.

    (B, T, H, W, C_in) -> (B, T, H, W, C_out). `kernel` is (time, height, width), height and width odd.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: Kernel = (3, 3, 3)) -> None:
        super().__init__(in_channels, out_channels, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))
        self.history = kernel[0] - 1

    def forward(self, input: Tensor, cache: TailCache | None = None) -> Tensor:
        known = input if cache is None or not self.history else cache.follow(self, input, self.history)
        zeros = self.history + input.shape[1] - known.shape[1]
        if zeros and input.shape[1] == 1:
            # taps that meet nothing but zeros are left out
            return self._conv_forward(known.movedim(-1, 1), self.weight[:, :, zeros:], self.bias).movedim(1, -1)
        return super().forward(_after_zeros(known, known.shape[1] + zeros).movedim(-1, 1)).movedim(1, -1)


def _after_zeros(x: Tensor, steps: int) -> Tensor:
    """`x` (B, t, H, W, C) made `steps` long by zeros in front."""
    missing = steps - x.shape[1]
    return F.pad(x, (0, 0) * (x.ndim - 2) + (missing, 0)) if missing else x
