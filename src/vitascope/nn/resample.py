"""Moving values between space-time and channels: exact, invertible re-arrangements.

B batch, C channels, T frames, H and W rows and columns, channels last; (t, h, w) the block that becomes one cell.
"""

from __future__ import annotations

from torch import Tensor

Block = tuple[int, int, int]


def space_to_depth(x: Tensor, block: Block) -> Tensor:
    """(B, T*t, H*h, W*w, C) -> (B, T, H, W, t*h*w*C)."""
    t, h, w = block
    if block == (1, 1, 1):
        return x
    batch, frames, height, width, channels = x.shape
    x = x.reshape(batch, frames // t, t, height // h, h, width // w, w, channels)
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(batch, frames // t, height // h, width // w, -1)


def depth_to_space(x: Tensor, block: Block) -> Tensor:
    """(B, T, H, W, t*h*w*C) -> (B, T*t, H*h, W*w, C); the inverse of `space_to_depth`."""
    t, h, w = block
    if block == (1, 1, 1):
        return x
    batch, frames, height, width, _ = x.shape
    x = x.reshape(batch, frames, height, width, t, h, w, -1)
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(batch, frames * t, height * h, width * w, -1)
