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

    A layer asks for its history with `extend`; a fresh stream has zeros there, which is what the whole-clip call pads
    with, so pushing a clip chunk by chunk gives what one call gives.
    """

    def __init__(self) -> None:
        self._tails: dict[nn.Module, Tensor] = {}

    def extend(self, layer: nn.Module, x: Tensor, history: int) -> Tensor:
        """`x` with the `history` steps (axis 1) that came before it in front; remembers the new last steps."""
        tail = self._tails.get(layer)
        if tail is None:
            tail = x.new_zeros(x.shape[0], history, *x.shape[2:])
        extended = torch.cat([tail, x], dim=1)
        self._tails[layer] = extended[:, extended.shape[1] - history :].clone()
        return extended

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
        x = input
        if self.history and cache is not None:
            x = cache.extend(self, x, self.history)
        elif self.history:
            x = F.pad(x, (0, 0, 0, 0, 0, 0, self.history, 0))
        return super().forward(x.movedim(-1, 1)).movedim(1, -1)
