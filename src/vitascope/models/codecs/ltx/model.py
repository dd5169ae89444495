"""The LTX-Video codec: a clip becomes latents of 8 frames x 32 x 32 px, and back.

B clips, C channels, T frames (N latent frames), H and W px (h and w cells); layers work channels-last,
(B, T, H, W, C). The first frame is a latent frame of its own. Source: HaCohen et al. 2024 (LTX-Video), section 2.

The decoder of the published codecs sees the frames to come. It still works in chunks of time with the result of the
whole clip: each convolution gives a frame when it has seen the next, and at the end the layers give what they hold
back. Memory is that of a chunk and of two frames a convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import prod

import torch
from torch import Tensor, nn

from vitascope.core.errors import InputError
from vitascope.core.random import generator as seeded
from vitascope.core.shapes import VideoStrides, check_frames, check_latents
from vitascope.models.codecs.ltx.config import Layer, LTXCodecConfig, decoder_layers, encoder_layers
from vitascope.models.codecs.ltx.layers import (
    NOTHING,
    Given,
    Grow,
    Out,
    Pack,
    ResidualBlock,
    TimestepVectors,
    pack,
    unpack,
)
from vitascope.nn.causal_conv import stretches
from vitascope.nn.time_conv import TimeConv3d, TimeStream

TIMESTEP = 0.05
NOISE_SCALE = 0.025
"""How noisy a conditioned decoder is told that its latents are, and how much noise they get; of the published use."""


UNLIMITED = 2**31
"""Frames at a time."""


class Encoder(nn.Module):
    """Frames (B, T, H, W, 3) to the means of the latents (B, N, h, w, C)."""

    def __init__(self, config: LTXCodecConfig) -> None:
        super().__init__()
        self.patch_px, self.latent_channels = config.patch_px, config.latent_channels
        self.layers = nn.ModuleList(
            _build(layer, config.encoder_causal, config.eps, residual=False) for layer in encoder_layers(config)
        )

    def run(self, frames: Tensor, chunk: int) -> Iterator[Tensor]:
        """`chunk` frames at a time after the first; 0 takes the whole clip."""
        # within a patch columns vary slower than rows
        parts = (_swapped(pack(_swapped(part), self._patch)) for part in stretches(frames, chunk))
        for moments in run_layers(self.layers, [NOTHING] * len(self.layers), parts, chunk):
            # the last channel is the variance of all
            yield moments[..., : self.latent_channels]

    @property
    def _patch(self) -> tuple[int, int, int]:
        return 1, self.patch_px, self.patch_px


class Decoder(nn.Module):
    """Latents (B, N, h, w, C) to frames (B, T, H, W, 3)."""

    def __init__(self, config: LTXCodecConfig) -> None:
        super().__init__()
        self.config = config
        self.plan = decoder_layers(config)
        self.layers = nn.ModuleList(self._layer(layer) for layer in self.plan)
        vectors: list[nn.Module] = []
        if config.timestep_conditioning:
            vectors = [TimestepVectors(stage.channels, 4) for stage in config.decoder]
            vectors.append(TimestepVectors(config.decoder[-1].channels, 2))
            self.register_buffer("timestep_scale", torch.tensor(1000.0))
        self.vectors = nn.ModuleList(vectors)

    def run(self, latents: Tensor, given: Sequence[Given], chunk: int) -> Iterator[Tensor]:
        """`chunk` latent frames at a time after the first; 0 takes the whole clip."""
        patch = (1, self.config.patch_px, self.config.patch_px)
        for cells in run_layers(self.layers, given, stretches(latents, chunk), chunk):
            yield _swapped(unpack(_swapped(cells), patch))

    def given(self, timesteps_B: Tensor, size: tuple[int, int], generator: torch.Generator) -> list[Given]:
        """What each layer gets for latents of h x w cells: timesteps in 0..1, noise in the order of the layers."""
        vectors: list[Tensor] = []
        if self.vectors:
            scaled_B = timesteps_B * self.get_buffer("timestep_scale")
            vectors = [embed(scaled_B) for embed in self.vectors]
        out = []
        for layer in self.plan:
            noise = None
            if layer.kind == "residual" and self.config.decoder[layer.stage].inject_noise:
                planes = [_randn([side * layer.scale for side in size], generator, timesteps_B) for _ in range(2)]
                noise = torch.stack(planes)
            stage = -1 if layer.kind == "out" else layer.stage
            modulated = bool(vectors) and layer.kind in ("residual", "out")
            out.append(Given(vectors[stage] if modulated else None, noise, layer.scale))
        return out

    def _layer(self, layer: Layer) -> nn.Module:
        config, stage = self.config, self.config.decoder[layer.stage]
        timesteps = config.timestep_conditioning
        residual, noise = stage.step == "residual", stage.inject_noise
        return _build(layer, config.decoder_causal, config.eps, residual, timesteps=timesteps, noise=noise)


class LTXCodec(nn.Module):
    """`core.protocols.VideoCodec`; whole, or a few latent frames at a time with the same result."""

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: LTXCodecConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latent_std", torch.ones(config.latent_channels))

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
        check_frames(frames.shape, self.strides)
        raw = torch.cat(list(self.encoder.run(frames.movedim(1, -1), chunk * self.strides.time)), 1)
        return self.normalise(raw.movedim(-1, 1))

    def normalise(self, raw: Tensor) -> Tensor:
        """The encoder's own latents (B, C, N, h, w) to unit scale."""
        mean, std = self._statistics(raw)
        return ((raw.movedim(1, -1) - mean) / std).movedim(-1, 1)

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        mean, std = self._statistics(latents)
        return (latents.movedim(1, -1) * std + mean).movedim(-1, 1)

    @property
    def conditioned(self) -> bool:
        """`codecs.decoding.Conditioned`."""
        return self.config.timestep_conditioning

    def decode(
        self,
        latents: Tensor,
        chunk: int = 1,
        timestep: float = TIMESTEP,
        noise_scale: float = NOISE_SCALE,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Latents (B, C, 1 + k, h, w) to frames (B, 3, 1 + k*time, H, W), about [-1, 1]; `chunk` as in `encode`.

        A conditioned decoder gets (1 - noise_scale) latents + noise_scale noise and is told the timestep, both in
        [0, 1]; one without has no use for them. Noise comes from `generator`, or from a fixed seed, the same for every
        clip.
        Raises ShapeError and InputError.
        """
        return torch.cat(list(self.stream(latents, chunk, timestep, noise_scale, generator)), 2)

    def stream(
        self,
        latents: Tensor,
        chunk: int = 1,
        timestep: float = TIMESTEP,
        noise_scale: float = NOISE_SCALE,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """`decode` piece by piece. A causal decoder gives the first frame, then those of `chunk` latent frames at a
        time; one that looks ahead gives its first frames when it has seen what they depend on."""
        raw, given = self.prepare(latents, timestep, noise_scale, generator)
        for frames in self.decoder.run(raw.movedim(1, -1), given, chunk):
            yield frames.movedim(-1, 1)

    def tile_decoder(
        self,
        latents: Tensor,
        timestep: float = TIMESTEP,
        noise_scale: float = NOISE_SCALE,
        generator: torch.Generator | None = None,
    ) -> Callable[[slice, slice, int], Iterator[Tensor]]:
        """Rows and columns of latents and a `chunk` to `stream` of that tile (`codecs.decoding.Tiles`). Every tile gets
        its part of the noise that the whole frame gets."""
        raw, given = self.prepare(latents, timestep, noise_scale, generator)

        def decode(rows: slice, columns: slice, chunk: int) -> Iterator[Tensor]:
            own = [layer.crop(rows, columns) for layer in given]
            for frames in self.decoder.run(raw[..., rows, columns].movedim(1, -1), own, chunk):
                yield frames.movedim(-1, 1)

        return decode

    def prepare(
        self, latents: Tensor, timestep: float, noise_scale: float, generator: torch.Generator | None
    ) -> tuple[Tensor, list[Given]]:
        """The decoder's own input: latents without normalisation and with noise, (B, C, N, h, w), and what each layer
        is given."""
        check_latents(latents.shape, self.latent_channels)
        for name, value in (("timestep", timestep), ("noise_scale", noise_scale)):
            if not 0 <= value <= 1:
                raise InputError(f"{name} must lie in [0, 1], got {value}")
        alike, generator = generator is None, seeded(0) if generator is None else generator
        raw = self.denormalise(latents)
        if self.config.timestep_conditioning:
            shape = (1 if alike else len(raw), *latents.shape[1:])
            raw = torch.lerp(raw, _randn(shape, generator, raw), noise_scale)
        timesteps_B = raw.new_full((len(raw),), timestep)
        return raw, self.decoder.given(timesteps_B, (raw.shape[3], raw.shape[4]), generator)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each latent channel."""
        return self.latent_mean.to(like.dtype), (self.latent_std / self.config.scaling).to(like.dtype)


def run_layers(layers: nn.ModuleList, given: Sequence[Given], parts: Iterable[Tensor], chunk: int) -> Iterator[Tensor]:
    """All layers over one part of a clip after the other, at most `chunk` frames each; then what the layers hold back.

    0 says that the one part is the clip. Otherwise memory follows the part, at the end as before it: what the layers
    give up there is cut wherever it would become larger than a part does anywhere.
    """
    stream = TimeStream(ending=chunk == 0)
    shapes: dict[int, tuple[int, ...]] = {}

    def apply(index: int, x: Tensor) -> Tensor:
        layer, shapes[index] = layers[index], tuple(x.shape)
        return layer(x, stream, given[index]) if isinstance(layer, (ResidualBlock, Out)) else layer(x, stream)

    def onward(x: Tensor, start: int, limits: Sequence[int], ending: bool) -> Iterator[Tensor]:
        for index, limit in enumerate(limits[start:], start):
            *earlier, x = x.split(limit, 1) if x.shape[1] else [x]
            for part in earlier:
                yield from onward(part, index, limits, False)
            stream.ending = ending
            x = apply(index, x)
        if x.shape[1]:
            yield x

    x = None
    for x in parts:
        yield from onward(x, 0, [UNLIMITED] * len(layers), chunk == 0)
    if chunk and x is not None:
        rates = list(_rates(layers, chunk))
        sizes = [rate * prod(shape[2:]) for rate, (_, shape) in zip(rates, sorted(shapes.items()), strict=True)]
        # as many frames as make what goes in and what comes out no larger than the largest
        wide = [max(sizes[index : index + 2]) for index in range(len(sizes))]
        limits = [max(1, int(rate * max(sizes) / size)) for rate, size in zip(rates, wide, strict=True)]
        yield from onward(x[:, :0], 0, limits, True)


def _rates(layers: nn.ModuleList, chunk: int) -> Iterator[float]:
    """Frames in front of each layer for `chunk` frames in front of the first."""
    rate = float(chunk)
    for layer in layers:
        yield rate
        if isinstance(layer, Grow):
            rate *= layer.BLOCK[0]
        elif isinstance(layer, Pack):
            rate /= layer.block[0]
        elif isinstance(layer, TimeConv3d):
            rate /= layer.stride[0]


def _build(
    layer: Layer, causal: bool, eps: float, residual: bool, timesteps: bool = False, noise: bool = False
) -> nn.Module:
    channels, out_channels = layer.in_channels, layer.out_channels
    match layer.kind:
        case "in" | "conv":
            return TimeConv3d(channels, out_channels, causal, layer.stride)
        case "pack":
            return Pack(channels, out_channels, layer.stride, causal)
        case "grow":
            return Grow(channels, out_channels, causal, residual)
        case "out":
            return Out(channels, out_channels, causal, timesteps)
        case "residual" | "change":
            return ResidualBlock(channels, out_channels, causal, eps, timesteps, noise)


def _swapped(x: Tensor) -> Tensor:
    """Rows and columns change places."""
    return x.transpose(2, 3)


def _randn(shape: Sequence[int], generator: torch.Generator, like: Tensor) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device).to(like)
