"""Decoding a clip in bounded memory: a few latent frames at a time, tile by tile, straight to 8-bit frames.

B clips, C latent channels, N latent frames, h and w cells, T frames, H and W px. Chunks of time give what the whole
clip gives. Tiles give what the whole frame gives only where the codec's reach is a third of their overlap or less; else
they come close to it, the closer the larger the overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from vitascope.core.errors import CapabilityError, CheckpointError, InputError
from vitascope.core.protocols import VideoCodec
from vitascope.core.shapes import pixel_frames
from vitascope.nn.footprint import is_finite
from vitascope.nn.tiling import Tiling, blend_weights, spans

TileDecoder = Callable[[slice, slice, int], Iterator[Tensor]]
"""Rows and columns of latents, and latent frames at a time, to the frames of that tile, piece by piece."""


@runtime_checkable
class Streams(Protocol):
    """A codec that decodes piece by piece: `chunk` latent frames at a time, 0 for all; without one, as `decode` does.
    The pieces (B, 3, t, H, W), one after the other, are the clip."""

    def stream(self, latents: Tensor, chunk: int = ...) -> Iterator[Tensor]: ...


@runtime_checkable
class Tiles(Protocol):
    """A codec whose frames can be cut into tiles."""

    def tile_decoder(self, latents: Tensor) -> TileDecoder: ...


@runtime_checkable
class Conditioned(Protocol):
    """A codec whose decoder may be told how noisy its latents are."""

    @property
    def conditioned(self) -> bool: ...


@dataclass(frozen=True)
class Decoding:
    """How a clip is decoded.

    chunk: latent frames at a time, 0 for all, None for what the codec does by itself. tiling: None for whole frames.
    timestep, noise_scale: what a conditioned decoder is told, and the share of noise in its latents, both in [0, 1];
    None for the codec's own, and for as much noise as the timestep says where only that is given. Raises InputError for
    other values.
    """

    chunk: int | None = None
    tiling: Tiling | None = None
    timestep: float | None = None
    noise_scale: float | None = None

    def __post_init__(self) -> None:
        for name in ("timestep", "noise_scale"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise InputError(f"the {name} of a decoder lies in [0, 1], got {value}")
        if self.chunk is not None and self.chunk < 0:
            raise InputError(f"chunk must be 0 (the whole clip) or more latent frames, got {self.chunk}")


AS_IT_IS = Decoding()


def check_decoding(codec: VideoCodec, how: Decoding) -> None:
    """Raise CapabilityError for what the codec does not offer."""
    name = type(codec).__name__
    if how.chunk is not None and not isinstance(codec, Streams):
        raise CapabilityError(f"{name} decodes whole clips only: leave the chunk away")
    if how.tiling is not None and not isinstance(codec, Tiles):
        raise CapabilityError(f"{name} decodes whole frames only: leave the tiling away")
    if _told(how) and not (isinstance(codec, Conditioned) and codec.conditioned):
        raise CapabilityError(f"{name} is not conditioned on noise: leave decode_timestep and decode_noise_scale away")


def decode_frames(codec: VideoCodec, latents: Tensor, how: Decoding = AS_IT_IS) -> Tensor:
    """Latents (B, C, 1 + k, h, w) to frames (B, T, 3, H, W) uint8 on the CPU.

    The pieces are rounded as they come, so no clip of floating-point pixels stands in the device's memory; with tiles
    one stands in the machine's. Raises CapabilityError for what the codec does not offer, CheckpointError for
    frames that are no finite numbers.
    """
    check_decoding(codec, how)
    if how.tiling is not None and isinstance(codec, Tiles):
        whole = _blend(codec, latents, how, how.tiling)
        return _collect(whole.split(1, 2), _num_frames(codec, latents))
    return _collect(_pieces(codec, latents, how), _num_frames(codec, latents))


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels about [-1, 1] to 8 bits, with one temporary their size."""
    return pixels.float().clamp(-1, 1).add_(1.0).mul_(127.5).round_().to(torch.uint8)


def _told(how: Decoding) -> dict[str, float]:
    """Arguments for a conditioned decoder."""
    if how.timestep is None:
        return {} if how.noise_scale is None else {"noise_scale": how.noise_scale}
    return {"timestep": how.timestep, "noise_scale": how.timestep if how.noise_scale is None else how.noise_scale}


def _pieces(codec: VideoCodec, latents: Tensor, how: Decoding) -> Iterator[Tensor]:
    if not isinstance(codec, Streams):
        decode: Callable[..., Tensor] = codec.decode
        yield decode(latents, **_told(how))
        return
    chunk = {} if how.chunk is None else {"chunk": how.chunk}
    stream: Callable[..., Iterator[Tensor]] = codec.stream
    yield from stream(latents, **chunk, **_told(how))


def _num_frames(codec: VideoCodec, latents: Tensor) -> int:
    return pixel_frames(latents.shape[2], codec.strides.time)


def _collect(pieces: Iterator[Tensor] | tuple[Tensor, ...], num_frames: int) -> Tensor:
    """Pieces (B, 3, t, H, W) as one clip of 8-bit frames."""
    frames: Tensor | None = None
    done = 0
    for piece in pieces:
        if frames is None:
            frames = torch.empty(len(piece), num_frames, 3, *piece.shape[3:], dtype=torch.uint8)
        if not is_finite(piece):
            raise CheckpointError("the codec gives frames that are no finite numbers: its weights may be damaged")
        frames[:, done : done + piece.shape[2]] = to_uint8(piece).movedim(1, 2).cpu()
        done += piece.shape[2]
    assert frames is not None
    assert done == num_frames
    return frames


def _blend(codec: VideoCodec, latents: Tensor, how: Decoding, tiling: Tiling) -> Tensor:
    """Pixels (B, 3, T, H, W) in fp32 on the CPU, tile by tile and each tile piece by piece."""
    assert isinstance(codec, Tiles)
    make: Callable[..., TileDecoder] = codec.tile_decoder
    decoder, strides, chunk = make(latents, **_told(how)), codec.strides, 1 if how.chunk is None else how.chunk
    batch, _, _, height, width = latents.shape
    row_spans, column_spans = spans(height, tiling), spans(width, tiling)
    size = (height * strides.height, width * strides.width)
    total = torch.zeros(batch, 3, _num_frames(codec, latents), *size)
    across = list(zip(column_spans, blend_weights(column_spans, strides.width), strict=True))
    for rows, down in zip(row_spans, blend_weights(row_spans, strides.height), strict=True):
        for columns, weights in across:
            share, done = (down[:, None] * weights), 0
            place = total[..., rows.slice(strides.height), columns.slice(strides.width)]
            for piece in decoder(rows.slice(), columns.slice(), chunk):
                target = place[:, :, done : done + piece.shape[2]]
                target.add_(piece.float().mul(share.to(piece.device)).cpu())
                done += piece.shape[2]
    return total
