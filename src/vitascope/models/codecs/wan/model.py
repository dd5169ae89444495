"""The Wan 2.1 video codec.

B clips, C channels, T frames, H and W rows and columns; layers work channels-last, (B, T, H, W, C). The first frame is
a picture of its own at every level: steps that halve or double time leave it as it is. Source: Wan team 2025 (arXiv
2503.20314), section 4.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitascope.core.shapes import VideoStrides, check_frames, check_latents
from vitascope.models.codecs.wan.config import WanCodecConfig
from vitascope.nn.causal_conv import CausalConv3d, TailCache, stretches
from vitascope.nn.resnet import ChannelNorm, ResidualBlock, silu
from vitascope.ops.attention import Attend, attend

EPS = 1e-24
"""The norms of this codec divide by the length of a cell's vector, whatever it is."""


class FrameAttention(nn.Module):
    """Attention of one head between the cells of a frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels, EPS)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, read: Attend = attend) -> Tensor:
        """read: how the cells read each other; those of a frame may be shared by processes."""
        cells = self.norm(x).flatten(0, 1).flatten(1, 2)
        q, k, v = self.qkv(cells).unsqueeze(-2).chunk(3, -1)
        return x + self.out(read(q, k, v).squeeze(-2)).view_as(x)


class Halve(nn.Module):
    """Half the rows and columns and, with `time`, half the frames after the first."""

    def __init__(self, channels: int, time: bool) -> None:
        super().__init__()
        self.space = nn.Conv2d(channels, channels, 3, stride=2)
        self.time = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if time else None

    def forward(self, x: Tensor, cache: TailCache | None = None) -> Tensor:
        x = _by_frame(lambda frames: self.space(F.pad(frames, (0, 1, 0, 1))), x)
        if self.time is None:
            return x
        # each frame after the first reads three: the last that was read, and two new ones
        fresh = cache is None or cache.is_fresh(self)
        first = x[:, :1] if fresh else x[:, :0]
        read = x if cache is None else cache.follow(self, x, 1)
        if read.shape[1] < 3:
            return first
        return torch.cat([first, _channels_last(self.time, read)], 1)


class Double(nn.Module):
    """Twice the rows and columns and, with `time`, twice the frames after the first; half the channels."""

    def __init__(self, channels: int, time: bool) -> None:
        super().__init__()
        self.space = nn.Conv2d(channels, channels // 2, 3, padding=1)
        self.time = CausalConv3d(channels, 2 * channels, (3, 1, 1)) if time else None

    def forward(self, x: Tensor, cache: TailCache | None = None) -> Tensor:
        if self.time is not None:
            # the first frame is not doubled, and those after it do not see it here
            fresh = cache is None or cache.is_fresh(self.time)
            first, rest = (x[:, :1], x[:, 1:]) if fresh else (x[:, :0], x)
            if rest.shape[1]:
                pairs = self.time(rest, cache).unflatten(-1, (2, -1))
                rest = pairs.movedim(-2, 2).flatten(1, 2)
            elif cache is not None:
                cache.follow(self.time, rest, self.time.history)
            x = torch.cat([first, rest], 1)
        return _by_frame(lambda frames: double_and_convolve(self.space, frames), x)


def double_and_convolve(convolution: nn.Conv2d, x_NCHW: Tensor) -> Tensor:
    """Each cell shown as 2 x 2, then a 3 x 3 convolution: (N, C, H, W) to (N, C', 2H, 2W).

    Of nine taps that meet a doubled cell some meet the same value: each of the four outputs of a cell is a 2 x 2
    convolution with the sums of these taps, 16 products where there were 36.
    """
    weight, (height, width) = convolution.weight, x_NCHW.shape[2:]
    padded = F.pad(x_NCHW, (1, 1, 1, 1))
    out = x_NCHW.new_empty(len(x_NCHW), weight.shape[0], 2 * height, 2 * width).contiguous(
        memory_format=torch.channels_last
    )
    for row in (0, 1):
        for column in (0, 1):
            taps = _merge(_merge(weight.float(), 2, row), 3, column).to(weight.dtype)
            window = padded[:, :, row : row + height + 1, column : column + width + 1]
            out[:, :, row::2, column::2] = F.conv2d(window, taps, convolution.bias)
    return out


def _merge(weight: Tensor, axis: int, side: int) -> Tensor:
    """Three taps to two: the upper output of a cell sees its own value twice below, the lower one twice above."""
    a, b, c = weight.unbind(axis)
    return torch.stack([a, b + c] if side == 0 else [a + b, c], axis)


class Encoder(nn.Module):
    """Frames (B, T, H, W, 3) to moments (B, N, h, w, 2C)."""

    def __init__(self, config: WanCodecConfig) -> None:
        super().__init__()
        channels = config.channels
        self.conv_in = CausalConv3d(3, config.base)
        layers: list[nn.Module] = []
        for level, (above, here) in enumerate(pairwise((config.base, *channels))):
            layers += _residuals(above, here, config.blocks)
            if level < len(config.halve_time):
                layers.append(Halve(here, config.halve_time[level]))
        halving = (place for place, layer in enumerate(layers) if isinstance(layer, Halve) and layer.time is not None)
        self.full_rate = next(halving, len(layers))  # layers before time is halved
        self.layers = nn.ModuleList([*layers, *_middle(channels[-1])])
        self.norm_out = ChannelNorm(channels[-1], EPS)
        self.conv_out = CausalConv3d(channels[-1], 2 * config.latent_channels)

    def forward(self, x: Tensor, cache: TailCache | None = None) -> Tensor:
        """Up to what halves time frame by frame, where a cache hands on what came before."""
        parts = [x] if cache is None else x.split(1, 1)
        early = [_run(self.layers[: self.full_rate], self.conv_in(part, cache), cache) for part in parts]
        x = _run(self.layers[self.full_rate :], torch.cat(early, 1), cache)
        return self.conv_out(silu(self.norm_out(x)), cache)


class Decoder(nn.Module):
    """Latents (B, N, h, w, C) to frames (B, T, H, W, 3)."""

    def __init__(self, config: WanCodecConfig) -> None:
        super().__init__()
        channels, steps = config.decoder_channels[::-1], config.halve_time[::-1]
        self.conv_in = CausalConv3d(config.latent_channels, channels[0])
        layers: list[nn.Module] = _middle(channels[0])
        for level, here in enumerate(channels):
            above = channels[level - 1] // 2 if level else here
            layers += _residuals(above, here, config.blocks + 1)
            if level < len(steps):
                layers.append(Double(here, steps[level]))
        self.layers = nn.ModuleList(layers)
        self.norm_out = ChannelNorm(channels[-1], EPS)
        self.conv_out = CausalConv3d(channels[-1], 3)

    def forward(self, x: Tensor, cache: TailCache | None = None) -> Tensor:
        return self._run(0, self.conv_in(x, cache), cache)

    def _run(self, first: int, x: Tensor, cache: TailCache | None) -> Tensor:
        """From layer `first` on. What doubles time is followed by the rest frame by frame where a cache hands on what
        came before: the large levels hold one frame at a time."""
        for index in range(first, len(self.layers)):
            x = _run(self.layers[index : index + 1], x, cache)
            if cache is not None and isinstance(self.layers[index], Double) and x.shape[1] > 1:
                return torch.cat([self._run(index + 1, frame, cache) for frame in x.split(1, 1)], 1)
        return self.conv_out(silu(self.norm_out(x)), cache)


class WanCodec(nn.Module):
    """`core.protocols.VideoCodec`; whole, or a few latent frames at a time with the same result."""

    def __init__(self, config: WanCodecConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        latent = config.latent_channels
        self.to_moments, self.from_latents = nn.Linear(2 * latent, 2 * latent), nn.Linear(latent, latent)

    @property
    def strides(self) -> VideoStrides:
        return self.config.strides

    @property
    def latent_channels(self) -> int:
        return self.config.latent_channels

    def encode(self, frames: Tensor, chunk: int = 1) -> Tensor:
        """Frames (B, 3, 1 + k*time, H, W) in [-1, 1] to latents (B, C, 1 + k, h, w): the posterior's mean, normalised.

        `chunk` latent frames are worked out at a time, after the first; 0 takes the whole clip. Raises ShapeError,
        naming the nearest valid sizes, when the frames do not fit the strides.
        """
        strides = self.strides
        check_frames(frames.shape, strides)
        cache = TailCache()
        parts = [
            self.to_moments(self.encoder(part.movedim(1, -1), cache)).chunk(2, -1)[0]
            for part in stretches(frames, chunk * strides.time, 2)
        ]
        raw = torch.cat(parts, 1)
        mean, std = self._statistics(raw)
        return ((raw - mean) / std).movedim(-1, 1)

    def decode(self, latents: Tensor, chunk: int = 1) -> Tensor:
        """Latents (B, C, 1 + k, h, w) to frames (B, 3, 1 + k*time, H, W), about [-1, 1]; `chunk` as in `encode`."""
        return torch.cat(list(self.stream(latents, chunk)), 2)

    def stream(self, latents: Tensor, chunk: int = 1) -> Iterator[Tensor]:
        """`decode` piece by piece: the first frame, then the frames of `chunk` latent frames at a time."""
        check_latents(latents.shape, self.latent_channels)
        cache = TailCache()
        for part in stretches(latents, chunk, 2):
            mean, std = self._statistics(part)
            yield self.decoder(self.from_latents(part.movedim(1, -1) * std + mean), cache).movedim(-1, 1)

    def tile_decoder(self, latents: Tensor) -> Callable[[slice, slice, int], Iterator[Tensor]]:
        """Rows and columns of latents and a `chunk` to `stream` of that tile (`codecs.decoding.Tiles`). The attention
        of each frame sees the tile alone."""
        return lambda rows, columns, chunk: self.stream(latents[..., rows, columns], chunk)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each latent channel."""
        return like.new_tensor(self.config.latent_mean), like.new_tensor(self.config.latent_std)


def _run(layers: Iterable[nn.Module], x: Tensor, cache: TailCache | None) -> Tensor:
    for layer in layers:
        x = layer(x) if isinstance(layer, FrameAttention) else layer(x, cache)
    return x


def _residuals(above: int, here: int, count: int) -> list[nn.Module]:
    return [ResidualBlock(above if index == 0 else here, out_channels=here, eps=EPS) for index in range(count)]


def _middle(channels: int) -> list[nn.Module]:
    return [*_residuals(channels, channels, 1), FrameAttention(channels), *_residuals(channels, channels, 1)]


def _by_frame(code: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`code` (N, C, H, W) over all frames of x (B, T, H, W, C)."""
    out = code(x.flatten(0, 1).movedim(-1, 1))
    return out.movedim(1, -1).unflatten(0, x.shape[:2])


def _channels_last(convolution: nn.Conv3d, x: Tensor) -> Tensor:
    return convolution(x.movedim(-1, 1)).movedim(1, -1)
