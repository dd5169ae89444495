"""The Mochi 1 video codec.

B clips, C channels, T frames (N latent frames), H and W rows and columns; layers work channels-last, (B, T, H, W, C).
The first frame is a picture of its own: steps that shrink time see it repeated, and a causal layer sees it repeated
before it. The decoder is causal convolutions and norms of single frames, so it runs a frame at a time with the last two
frames of every convolution kept: at 480 x 848 px these tails are 5.3 GB in fp32 however long the clip is, where an
activation of all frames takes 0.2 GB a frame, and there are several. The frames are not cut into tiles: a tile has
other means and variances than its frame, so the norms would show the seams. Source: Genmo 2024, Mochi 1 preview
(github.com/genmoai/mochi).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitascope.core.errors import ShapeError
from vitascope.core.shapes import VideoStrides, check_frames, check_latents, nearest_multiples
from vitascope.models.codecs.mochi.config import GROUP, Layer, Lead, MochiCodecConfig
from vitascope.nn.causal_conv import check_chunk, stretches
from vitascope.nn.edge_conv import EdgeCache, FrameGroupNorm, GroupResidualBlock
from vitascope.nn.resample import Block, depth_to_space, space_to_depth
from vitascope.ops.attention import attend

OCTAVES = (6, 7)
"""Each pixel value v is seen as v and as sine and cosine of 2 pi 2^octave v."""
CELLS = 1024
"""Places whose attention over time is worked out together: more do not go faster, and need more memory."""


class FourierLift(nn.Linear):
    """Frames (B, T, H, W, 3) and their Fourier features (fp32) to channels."""

    def __init__(self, channels: int) -> None:
        super().__init__(3 * (1 + 2 * len(OCTAVES)), channels)

    def forward(self, input: Tensor, cache: EdgeCache | None = None) -> Tensor:
        x = input.float()
        octaves = torch.tensor(OCTAVES, dtype=x.dtype, device=x.device)
        waves = (x.unsqueeze(-1) * (2.0**octaves * (2 * torch.pi))).flatten(-2)
        return super().forward(torch.cat([x, waves.sin(), waves.cos()], -1).to(input.dtype))


class TimeAttention(nn.Module):
    """Every place attends to itself in this frame and those before it: heads of 32 channels, queries and keys of
    length 1. With a cache, what it kept of the frames before is seen too."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = FrameGroupNorm(GROUP, channels)
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, cache: EdgeCache | None = None) -> Tensor:
        batch, frames, height, width, _ = x.shape
        normed, result = self.norm(x), torch.empty_like(x)
        rows = max(1, CELLS // (batch * width))
        for start in range(0, height, rows):
            band = slice(start, min(start + rows, height))
            # laid out by place: of a view, torch would multiply frame by frame with a copy of the weight for each
            places = self.qkv(normed[:, :, band].movedim(1, 3).contiguous()).flatten(0, 2)
            q_ALHE, k_ASHE, v_ASHE = places.unflatten(-1, (3, -1, GROUP)).unbind(2)
            q_ALHE, k_ASHE = F.normalize(q_ALHE, dim=-1), F.normalize(k_ASHE, dim=-1)
            if cache is not None:
                k_ASHE, v_ASHE = cache.keep(self, start, torch.stack([k_ASHE, v_ASHE], 2)).unbind(2)
            num_keys = k_ASHE.shape[1]
            seen_LS = torch.ones(frames, num_keys, dtype=torch.bool, device=x.device).tril(num_keys - frames)
            read = self.out(attend(q_ALHE, k_ASHE, v_ASHE, seen_LS).flatten(-2))
            result[:, :, band] = x[:, :, band] + read.unflatten(0, (batch, -1, width)).movedim(3, 1)
        return result


class Shrink(nn.Module):
    """`steps` frames of 2 x 2 cells become one cell. Frames that do not fill the steps are the first of a clip, where
    the first one is repeated in front."""

    def __init__(self, channels: int, outputs: int, steps: int) -> None:
        super().__init__()
        self.block: Block = (steps, 2, 2)
        self.linear = nn.Linear(prod(self.block) * channels, outputs)

    def forward(self, x: Tensor, cache: EdgeCache) -> Tensor:
        lead = -x.shape[1] % self.block[0]
        x = torch.cat([x[:, :1].expand(-1, lead, *x.shape[2:]), x], 1) if lead else x
        return self.linear(space_to_depth(x, self.block))


class Grow(nn.Module):
    """One cell becomes `steps` frames of 2 x 2 cells; of the first frame, only the last of them (lead "step")."""

    def __init__(self, channels: int, outputs: int, steps: int, lead: Lead) -> None:
        super().__init__()
        self.block: Block = (steps, 2, 2)
        self.dropped = steps - 1 if lead == "step" else 0
        self.linear = nn.Linear(channels, prod(self.block) * outputs)

    def forward(self, x: Tensor, cache: EdgeCache) -> Tensor:
        grown = depth_to_space(self.linear(x), self.block)
        return grown[:, self.dropped :] if cache.begin(self) else grown


class Encoder(nn.Module):
    """Frames (B, T, H, W, 3) to moments (B, N, h, w, 2C)."""

    def __init__(self, config: MochiCodecConfig) -> None:
        super().__init__()
        self.lift = FourierLift(config.encoder_channels[0])
        self.layers = nn.ModuleList(_module(layer, config.lead) for layer in config.encoder_layers())
        self.norm_out = FrameGroupNorm(GROUP, config.encoder_channels[-1])
        self.linear_out = nn.Linear(config.encoder_channels[-1], 2 * config.latent_channels, bias=False)

    def forward(self, x: Tensor, chunk: int = 1) -> Tensor:
        """A whole clip, stretch by stretch: the layers up to an attention go over it `chunk` frames (of their result)
        at a time, the attention then sees them all, a few rows at a time.

        One activation is held whole, and two more while it is replaced. Frame by frame through all layers would hold
        keys and values of every attention instead, at full size as much as eight such activations.
        """
        attentive = groupby([self.lift, *self.layers], lambda layer: isinstance(layer, TimeAttention))
        for over_time, stretch in attentive:
            layers, cache = list(stretch), EdgeCache()
            if over_time:
                x = _run(layers, x, None)
            else:
                steps = prod(layer.block[0] for layer in layers if isinstance(layer, Shrink))
                x = torch.cat([_run(layers, part, cache) for part in stretches(x, chunk * steps)], 1)
        return self._moments(x)

    def push(self, x: Tensor, cache: EdgeCache) -> Tensor:
        """The next frames of a stream, through all layers at once."""
        return self._moments(_run([self.lift, *self.layers], x, cache))

    def _moments(self, x: Tensor) -> Tensor:
        return self.linear_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Latents (B, N, h, w, C) to frames (B, T, H, W, 3)."""

    def __init__(self, config: MochiCodecConfig) -> None:
        super().__init__()
        self.lift = nn.Linear(config.latent_channels, config.decoder_channels[-1])
        self.layers = nn.ModuleList(_module(layer, config.lead) for layer in config.decoder_layers())
        self.linear_out = nn.Linear(config.decoder_channels[0], 3)

    def push(self, x: Tensor, cache: EdgeCache, chunk: int = 1) -> Iterator[Tensor]:
        """The frames of the next latents of a stream; no layer takes more than `chunk` frames at once (0: all)."""
        for part in _flow(list(self.layers), self.lift(x), cache, chunk):
            yield self.linear_out(F.silu(part))


class MochiCodec(nn.Module):
    """`core.protocols.VideoCodec`; whole, or a few frames at a time with the same result."""

    def __init__(self, config: MochiCodecConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    @property
    def strides(self) -> VideoStrides:
        return self.config.strides

    @property
    def latent_channels(self) -> int:
        return self.config.latent_channels

    def encode(self, frames: Tensor, chunk: int = 1) -> Tensor:
        """Frames (B, 3, 1 + k*time, H, W) in [-1, 1] to latents (B, C, 1 + k, h, w): the posterior's mean, normalised.

        `chunk` frames of a level are worked out at a time; 0 takes the whole clip. Raises ShapeError, naming the
        nearest valid sizes, when the frames do not fit the strides.
        """
        check_frames(frames.shape, self.strides)
        return self._normalise(self.encoder(frames.movedim(1, -1), chunk))

    def encode_stream(self, parts: Iterable[Tensor]) -> Iterator[Tensor]:
        """`encode` of a clip that comes in parts: 1 + k*time frames first, then k*time each; latents of each part.

        Attention reads all that came before, so memory grows with the clip; whole clips need less in `encode`. Raises
        ShapeError as `encode` does.
        """
        cache, time = EdgeCache(), self.strides.time
        for index, frames in enumerate(parts):
            check_frames(frames.shape if index == 0 else (*frames.shape[:2], 1, *frames.shape[3:]), self.strides)
            if index and (frames.shape[2] < 1 or frames.shape[2] % time):
                nearest = ", ".join(map(str, nearest_multiples(frames.shape[2], time)))
                raise ShapeError(f"{frames.shape[2]} frames do not fit: later parts have {time}k; nearest: {nearest}")
            yield self._normalise(self.encoder.push(frames.movedim(1, -1), cache))

    def decode(self, latents: Tensor, chunk: int = 1) -> Tensor:
        """Latents (B, C, 1 + k, h, w) to frames (B, 3, 1 + k*time, H, W), about [-1, 1]; `chunk` as in `encode`."""
        return torch.cat(list(self.stream(latents, chunk)), 2)

    def stream(self, latents: Tensor, chunk: int = 1) -> Iterator[Tensor]:
        """`decode` piece by piece, up to `chunk` frames each."""
        check_latents(latents.shape, self.latent_channels)
        cache, surplus = EdgeCache(), self.strides.time - 1 if self.config.lead == "end" else 0
        check_chunk(chunk)
        for part in latents.split(chunk or latents.shape[2], 2):
            mean, std = self._statistics(part)
            for frames in self.decoder.push(part.movedim(1, -1) * std + mean, cache, chunk):
                shown = frames[:, surplus:]
                surplus = max(0, surplus - frames.shape[1])
                if shown.shape[1]:
                    yield shown.movedim(-1, 1)

    def _normalise(self, moments: Tensor) -> Tensor:
        mean, std = self._statistics(moments)
        return ((moments.chunk(2, -1)[0] - mean) / std).movedim(-1, 1)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each latent channel."""
        return like.new_tensor(self.config.latent_mean), like.new_tensor(self.config.latent_std)


def _module(layer: Layer, lead: Lead) -> nn.Module:
    match layer.kind:
        case "residual":
            return GroupResidualBlock(layer.channels, GROUP)
        case "attention":
            return TimeAttention(layer.channels)
        case "shrink":
            return Shrink(layer.channels, layer.outputs, layer.steps)
        case "grow":
            return Grow(layer.channels, layer.outputs, layer.steps, lead)


def _run(layers: Sequence[nn.Module], x: Tensor, cache: EdgeCache | None) -> Tensor:
    for layer in layers:
        x = layer(x, cache)
    return x


def _flow(layers: Sequence[nn.Module], x: Tensor, cache: EdgeCache, chunk: int) -> Iterator[Tensor]:
    """`x` through the layers, up to `chunk` frames at a time: what is more is split and goes on part by part."""
    for index, layer in enumerate(layers):
        if 0 < chunk < x.shape[1]:
            for part in x.split(chunk, 1):
                yield from _flow(layers[index:], part, cache, chunk)
            return
        x = layer(x, cache)
    yield x
