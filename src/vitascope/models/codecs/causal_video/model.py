"""Causal 3-D video codec with a KL bottleneck.

B batch, C latent channels, T frames (N latent frames), H and W px (h and w cells); encoder and decoder work
channels-last, the codec's own methods speak (B, C, T, H, W). A latent frame holds `time` frames
and depends on no later one. The first frame is shown `time` times in front of the encoder and `time` - 1 of the
decoder's first frames are dropped, so 1 + k * time frames become 1 + k latent frames and a picture becomes one.

Source: the causal 3-D autoencoders of current video models (Wan, Mochi, CogVideoX); norms over channels alone, so that
chunks and tiles are exact; sub-pixel up-sampling (Shi et al. 2016) instead of transposed convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from math import prod

import torch
from torch import Tensor, nn

from vitascope.core.shapes import VideoStrides, check_frames, check_latents
from vitascope.models.codecs.causal_video.config import CausalVideoConfig
from vitascope.models.codecs.causal_video.preview import PreviewDecoder
from vitascope.nn.causal_conv import CausalConv3d, TailCache
from vitascope.nn.resample import Block, depth_to_space, space_to_depth
from vitascope.nn.resnet import ChannelNorm, ResidualBlock


class Downsample(nn.Module):
    """A block of cells becomes one: a linear map of the whole block, around a shortcut that averages groups of it.

    Source of the shortcut: residual autoencoding in DC-AE (Chen et al. 2024).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: Block) -> None:
        super().__init__()
        self.stride = stride
        self.out_channels = out_channels
        self.project = nn.Linear(in_channels * prod(stride), out_channels)

    def forward(self, x: Tensor) -> Tensor:
        block = space_to_depth(x, self.stride)
        return self.project(block) + block.unflatten(-1, (self.out_channels, -1)).mean(-1)


class Upsample(nn.Module):
    """One cell becomes a block of cells: the inverse arrangement, its shortcut repeating each value."""

    def __init__(self, in_channels: int, out_channels: int, stride: Block) -> None:
        super().__init__()
        self.stride = stride
        self.repeats = out_channels * prod(stride) // in_channels
        self.project = nn.Linear(in_channels, out_channels * prod(stride))

    def forward(self, x: Tensor) -> Tensor:
        return depth_to_space(self.project(x) + x.repeat_interleave(self.repeats, dim=-1), self.stride)


class Encoder(nn.Module):
    """Frames (B, N*time, H, W, 3) to posterior moments (B, N, h, w, 2C).

    The mean is that of the convolutions plus a linear map of the cell's own pixels (see `start_from_components`).
    """

    def __init__(self, config: CausalVideoConfig) -> None:
        super().__init__()
        self.patch: Block = (1, config.patch_px, config.patch_px)
        first = config.levels[0]
        self.conv_in = CausalConv3d(3 * config.patch_px**2, first.channels, config.kernel)
        layers: list[nn.Module] = _blocks(first.channels, first.encoder_blocks, config.kernel)
        for above, level in pairwise(config.levels):
            layers.append(Downsample(above.channels, level.channels, level.stride))
            layers += _blocks(level.channels, level.encoder_blocks, config.kernel)
        self.layers = nn.ModuleList(layers)
        self.norm_out = ChannelNorm(config.levels[-1].channels)
        self.conv_out = CausalConv3d(config.levels[-1].channels, 2 * config.latent_channels, config.kernel)
        self.cell = config.cell
        self.linear = nn.Linear(3 * prod(config.cell), config.latent_channels)

    def forward(self, frames: Tensor, cache: TailCache | None = None) -> Tensor:
        h = self.conv_in(space_to_depth(frames, self.patch), cache)
        for layer in self.layers:
            h = layer(h, cache) if isinstance(layer, ResidualBlock) else layer(h)
        moments = self.conv_out(nn.functional.silu(self.norm_out(h)), cache)
        mean, log_variance = moments.chunk(2, dim=-1)
        return torch.cat([mean + self.linear(space_to_depth(frames, self.cell)), log_variance], dim=-1)


class Decoder(nn.Module):
    """Raw latents (B, N, h, w, C) to frames (B, N*time, H, W, 3)."""

    def __init__(self, config: CausalVideoConfig) -> None:
        super().__init__()
        self.patch: Block = (1, config.patch_px, config.patch_px)
        last = config.levels[-1]
        self.conv_in = CausalConv3d(config.latent_channels, last.channels, config.kernel)
        layers: list[nn.Module] = _blocks(last.channels, last.decoder_blocks, config.kernel)
        for level, above in pairwise(reversed(config.levels)):
            layers.append(Upsample(level.channels, above.channels, level.stride))
            layers += _blocks(above.channels, above.decoder_blocks, config.kernel)
        self.layers = nn.ModuleList(layers)
        self.norm_out = ChannelNorm(config.levels[0].channels)
        self.conv_out = CausalConv3d(config.levels[0].channels, 3 * config.patch_px**2, config.kernel)
        self.cell = config.cell
        self.linear = nn.Linear(config.latent_channels, 3 * prod(config.cell))

    def forward(self, latents: Tensor, cache: TailCache | None = None) -> Tensor:
        h = self.conv_in(latents, cache)
        for layer in self.layers:
            h = layer(h, cache) if isinstance(layer, ResidualBlock) else layer(h)
        h = self.conv_out(nn.functional.silu(self.norm_out(h)), cache)
        return depth_to_space(h, self.patch) + depth_to_space(self.linear(latents), self.cell)


class CausalVideoCodec(nn.Module):
    """Encoder, decoder, preview decoder and the statistics that bring latents to mean 0 and unit scale per channel."""

    def __init__(self, config: CausalVideoConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.preview_decoder = PreviewDecoder(config)
        self.latent_mean: Tensor
        self.latent_std: Tensor
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latent_std", torch.ones(config.latent_channels))

    @property
    def strides(self) -> VideoStrides:
        return self.config.strides

    @property
    def latent_channels(self) -> int:
        return self.config.latent_channels

    def posterior(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance, each (B, C, N, h, w) and not normalised, of frames (B, 3, 1 + k*time, H, W)."""
        check_frames(frames.shape, self.strides)
        moments = self.encoder(self.lead_in(frames).movedim(1, -1)).movedim(-1, 1)
        mean, log_variance = moments.chunk(2, dim=1)
        return mean, log_variance.clamp(-20, 10)

    def encode(self, frames: Tensor) -> Tensor:
        """Frames (B, 3, 1 + k*time, H, W) in [-1, 1] to normalised latents (B, C, 1 + k, h, w): the posterior's mean.

        Raises ShapeError, naming the nearest valid sizes, when the frames do not fit the strides.
        """
        return self.normalise(self.posterior(frames)[0])

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents (B, C, 1 + k, h, w) to frames (B, 3, 1 + k*time, H, W), about [-1, 1]."""
        return next(self.stream(latents))

    def stream(self, latents: Tensor, chunk: int = 0) -> Iterator[Tensor]:
        """`decode` piece by piece: the frames of `chunk` latent frames at a time, or of all (0)."""
        check_latents(latents.shape, self.latent_channels)
        cache, skipped = TailCache() if chunk else None, self.strides.time - 1
        for part in latents.split(chunk or latents.shape[2], 2):
            frames = self.decoder(self.denormalise(part).movedim(1, -1), cache).movedim(-1, 1)
            yield frames[:, :, skipped:]
            skipped = 0

    def tile_decoder(self, latents: Tensor) -> Callable[[slice, slice, int], Iterator[Tensor]]:
        """Rows and columns of latents and a `chunk` to `stream` of that tile (`codecs.decoding.Tiles`)."""
        return lambda rows, columns, chunk: self.stream(latents[..., rows, columns], chunk)

    def preview(self, latents: Tensor) -> Tensor:
        """Normalised latents (B, C, 1 + k, h, w) to small frames (B, 3, 1 + k*time, h*preview_px, w*preview_px)."""
        check_latents(latents.shape, self.latent_channels)
        frames = self.preview_decoder(self.denormalise(latents).movedim(1, -1)).movedim(-1, 1)
        return frames[:, :, self.strides.time - 1 :]

    @torch.no_grad()
    def start_from_components(self, frames: Tensor) -> None:
        """Let the linear paths be the principal components of the cells of `frames` (B, 3, 1 + k*time, H, W) and the
        convolutions add nothing yet: training starts from the best linear codec, with latents of unit scale."""
        pixels = space_to_depth(self.lead_in(frames).movedim(1, -1), self.config.cell).flatten(0, -2).double()
        mean = pixels.mean(dim=0)
        centred = pixels - mean
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(pixels))
        scale = values[-self.latent_channels :].clamp(min=1e-8).sqrt()
        basis = vectors[:, -self.latent_channels :]
        to_latent = (basis / scale).T
        self.encoder.linear.weight.copy_(to_latent)
        self.encoder.linear.bias.copy_(-to_latent @ mean)
        self.decoder.linear.weight.copy_(basis * scale)
        self.decoder.linear.bias.copy_(mean)
        for conv in (self.encoder.conv_out, self.decoder.conv_out):
            nn.init.zeros_(conv.weight)
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)
        assert self.encoder.conv_out.bias is not None
        self.encoder.conv_out.bias[self.latent_channels :] = -4.0

    def lead_in(self, frames: Tensor) -> Tensor:
        """Frames with the first one shown `time` - 1 times more in front."""
        return torch.cat([frames[:, :, :1].expand(-1, -1, self.strides.time - 1, -1, -1), frames], dim=2)

    def normalise(self, raw: Tensor) -> Tensor:
        return (raw - _per_channel(self.latent_mean, raw)) / _per_channel(self.latent_std, raw)

    def denormalise(self, latents: Tensor) -> Tensor:
        return latents * _per_channel(self.latent_std, latents) + _per_channel(self.latent_mean, latents)


def _blocks(channels: int, count: int, kernel: Block) -> list[nn.Module]:
    return [ResidualBlock(channels, kernel) for _ in range(count)]


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).view(-1, 1, 1, 1)
