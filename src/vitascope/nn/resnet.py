"""Residual blocks of the convolutional codecs. Activations (B, T, H, W, C): batch, frames, rows, columns, channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitascope.nn.causal_conv import CausalConv3d, Kernel, TailCache
from vitascope.ops.parts import part_size


class ChannelNorm(nn.Module):
    """Root-mean-square norm over the channels (last axis) of each cell, so that neither time nor tiles mix."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        if torch.is_grad_enabled():
            return x * self._scale(x) * weight
        out = torch.empty_like(x)
        rows = part_size(x, -3)
        for part, place in zip(x.split(rows, -3), out.split(rows, -3), strict=True):
            torch.mul(part, self._scale(part), out=place).mul_(weight)
        return out

    def _scale(self, x: Tensor) -> Tensor:
        mean_square = x.float().square().mean(dim=-1, keepdim=True)
        return torch.rsqrt(mean_square + self.eps).to(x.dtype)


def silu(x: Tensor) -> Tensor:
    """SiLU of a tensor that nobody else needs: in its place where no gradient is wanted."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class ResidualBlock(nn.Module):
    """norm, SiLU, causal convolution, twice, around a skip. (B, T, H, W, C) -> the same shape, or `out_channels`."""

    def __init__(
        self, channels: int, kernel: Kernel = (3, 3, 3), out_channels: int | None = None, eps: float = 1e-6
    ) -> None:
        super().__init__()
        out_channels = channels if out_channels is None else out_channels
        self.norm1 = ChannelNorm(channels, eps)
        self.conv1 = CausalConv3d(channels, out_channels, kernel)
        self.norm2 = ChannelNorm(out_channels, eps)
        self.conv2 = CausalConv3d(out_channels, out_channels, kernel)
        self.shortcut = nn.Identity() if channels == out_channels else nn.Linear(channels, out_channels)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, cache: TailCache | None = None) -> Tensor:
        h = self.conv1(silu(self.norm1(x)), cache)
        h = self.conv2(silu(self.norm2(h)), cache)
        return self.shortcut(x) + h if torch.is_grad_enabled() else h.add_(self.shortcut(x))
