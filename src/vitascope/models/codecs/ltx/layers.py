"""Layers of the LTX codec.

B clips, T frames, H and W rows and columns, C channels; activations are channels-last, (B, T, H, W, C). Every layer
takes a `TimeStream`: chunks of time give what the whole clip gives.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitascope.nn.embeddings import normal_table, timestep_features
from vitascope.nn.norms import LayerNorm
from vitascope.nn.resample import Block
from vitascope.nn.time_conv import TimeConv3d, TimeStream

EPS = 1e-8
NUM_SINUSOIDS = 256


@dataclass(frozen=True)
class Given:
    """What a layer of the decoder gets beside its input, for a whole run.

    vectors: (B, n, C) shifts and scales that the timestep sets. noise: (2, H, W), one plane for each convolution of a
    block, the same for all clips, frames and channels; `scale` of its rows belong to a latent row.
    """

    vectors: Tensor | None = None
    noise: Tensor | None = None
    scale: int = 1

    def crop(self, rows: slice, columns: slice) -> Given:
        """For a tile of these latent rows and columns."""
        if self.noise is None:
            return self
        rows, columns = (slice(part.start * self.scale, part.stop * self.scale) for part in (rows, columns))
        return replace(self, noise=self.noise[:, rows, columns])


NOTHING = Given()


def activate(x: Tensor, shift_BC: Tensor | None = None, scale_BC: Tensor | None = None) -> Tensor:
    """SiLU of x / rms(x) (1 + scale) + shift, over the last axis, with one temporary the size of x."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    y = x * torch.rsqrt(length.square() / x.shape[-1] + EPS).to(x.dtype)
    if shift_BC is not None and scale_BC is not None:
        y = y.mul_(1 + scale_BC[:, None, None, None]).add_(shift_BC[:, None, None, None])
    return F.silu(y, inplace=True)


class ResidualBlock(nn.Module):
    """norm, SiLU, convolution, twice, around a skip; (B, T, H, W, C) to the same with `out_channels`."""

    def __init__(
        self, channels: int, out_channels: int, causal: bool, eps: float, timesteps: bool = False, noise: bool = False
    ) -> None:
        super().__init__()
        self.conv1 = TimeConv3d(channels, out_channels, causal)
        self.conv2 = TimeConv3d(out_channels, out_channels, causal)
        self.offsets = normal_table(4, channels, std=channels**-0.5) if timesteps else None
        self.noise1 = nn.Parameter(torch.zeros(channels)) if noise else None
        self.noise2 = nn.Parameter(torch.zeros(channels)) if noise else None
        same = channels == out_channels
        self.norm = nn.Identity() if same else LayerNorm(channels, eps)
        self.shortcut = nn.Identity() if same else nn.Linear(channels, out_channels)

    def forward(self, x: Tensor, stream: TimeStream, given: Given = NOTHING) -> Tensor:
        shift1, scale1, shift2, scale2 = _vectors(self.offsets, given, 4)
        h = self.conv1(activate(x, shift1, scale1), stream)
        if self.noise1 is not None and given.noise is not None:
            h = h.add_(given.noise[0, :, :, None] * self.noise1)
        h = self.conv2(activate(h, shift2, scale2), stream)
        if self.noise2 is not None and given.noise is not None:
            h = h.add_(given.noise[1, :, :, None] * self.noise2)
        return h.add_(self.shortcut(self.norm(stream.take(self, x, h.shape[1]))))


class Pack(nn.Module):
    """A convolution whose blocks of cells become channels, beside means over groups of the block's values."""

    def __init__(self, channels: int, out_channels: int, block: Block, causal: bool) -> None:
        super().__init__()
        self.block, self.out_channels = block, out_channels
        self.conv = TimeConv3d(channels, out_channels // prod(block), causal)

    def forward(self, x: Tensor, stream: TimeStream) -> Tensor:
        time = self.block[0]
        if time > 1 and stream.begins(self, x):
            x = torch.cat([x[:, :1].expand(-1, time - 1, -1, -1, -1), x], 1)
        h = stream.windows((self, "whole blocks"), self.conv(x, stream), time, time)
        x = pack(stream.take((self, "shortcut"), x, h.shape[1]), self.block)
        return pack(h, self.block).add_(x.unflatten(-1, (self.out_channels, -1)).mean(-1))


class Grow(nn.Module):
    """A convolution whose channels become blocks of 2 x 2 x 2 cells; the clip's first frame becomes one frame.

    `residual` adds the input, unfolded alike and repeated over the channels.
    """

    BLOCK: Block = (2, 2, 2)

    def __init__(self, channels: int, out_channels: int, causal: bool, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        self.conv = TimeConv3d(channels, out_channels * prod(self.BLOCK), causal)

    def forward(self, x: Tensor, stream: TimeStream) -> Tensor:
        h = self.conv(x, stream)
        shown = unpack(stream.take(self, x, h.shape[1]), self.BLOCK) if self.residual else None
        h = unpack(h, self.BLOCK)
        if shown is not None:
            h.unflatten(-1, (-1, shown.shape[-1])).add_(shown.unsqueeze(-2))
        return h[:, 1:] if stream.begins((self, "first frame"), h) else h


class Out(nn.Module):
    """norm, SiLU and the last convolution."""

    def __init__(self, channels: int, out_channels: int, causal: bool, timesteps: bool = False) -> None:
        super().__init__()
        self.conv = TimeConv3d(channels, out_channels, causal)
        self.offsets = normal_table(2, channels, std=channels**-0.5) if timesteps else None

    def forward(self, x: Tensor, stream: TimeStream, given: Given = NOTHING) -> Tensor:
        return self.conv(activate(x, *_vectors(self.offsets, given, 2)), stream)


class TimestepVectors(nn.Module):
    """Timesteps (B,) in 0..1000 to `num` vectors, (B, num, C)."""

    def __init__(self, channels: int, num: int) -> None:
        super().__init__()
        self.num = num
        self.rise, self.out = nn.Linear(NUM_SINUSOIDS, num * channels), nn.Linear(num * channels, num * channels)

    def forward(self, timesteps_B: Tensor) -> Tensor:
        features = timestep_features(timesteps_B, NUM_SINUSOIDS).to(self.rise.weight.dtype)
        return self.out(F.silu(self.rise(features))).unflatten(-1, (self.num, -1))


def pack(x: Tensor, block: Block) -> Tensor:
    """(B, T*t, H*h, W*w, C) -> (B, T, H, W, C*t*h*w); unlike `space_to_depth`, channels vary slowest."""
    t, h, w = block
    batch, frames, height, width, channels = x.shape
    x = x.reshape(batch, frames // t, t, height // h, h, width // w, w, channels)
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(batch, frames // t, height // h, width // w, channels * t * h * w)


def unpack(x: Tensor, block: Block) -> Tensor:
    """(B, T, H, W, C*t*h*w) -> (B, T*t, H*h, W*w, C); the inverse of `pack`."""
    t, h, w = block
    batch, frames, height, width, channels = x.shape
    x = x.reshape(batch, frames, height, width, channels // (t * h * w), t, h, w)
    x = x.permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(batch, frames * t, height * h, width * w, channels // (t * h * w))


def _vectors(offsets: Tensor | None, given: Given, num: int) -> tuple[Tensor | None, ...]:
    if offsets is None or given.vectors is None:
        return (None,) * num
    return (given.vectors + offsets).unbind(1)
