"""Decoding on several processes: each has a strip of the rows of every frame, and the result is that of whole frames.

B clips, C latent channels, N latent frames, h x w cells.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vitascope.core.errors import CapabilityError
from vitascope.core.protocols import Normalises, VideoCodec
from vitascope.core.shapes import VideoStrides, check_latents
from vitascope.models.codecs.causal_video.model import CausalVideoCodec
from vitascope.models.codecs.decoding import Conditioned
from vitascope.models.codecs.ltx.model import NOISE_SCALE, TIMESTEP, LTXCodec
from vitascope.models.codecs.mochi.model import MochiCodec
from vitascope.models.codecs.wan.model import Double, FrameAttention, WanCodec
from vitascope.nn.causal_conv import CausalConv3d
from vitascope.nn.edge_conv import EdgeConv3d, FrameGroupNorm
from vitascope.nn.time_conv import TimeConv3d
from vitascope.parallel.ranks import Ranks
from vitascope.parallel.strips import Reach, Strips, Told, read_of_frames, shared_frames, total_of_frames

WAYS: dict[type[nn.Module], Callable[[Any], Reach | Told]] = {
    CausalConv3d: lambda layer: Reach(layer.kernel_size[1] // 2),
    EdgeConv3d: lambda layer: Reach(layer.kernel_size[1] // 2),
    TimeConv3d: lambda layer: Reach(layer.kernel_size[1] // 2),
    Double: lambda layer: Reach(1, 2),
    FrameAttention: lambda layer: Told("read", read_of_frames),
    FrameGroupNorm: lambda layer: Told("total", total_of_frames),
}
"""The layers of decoders that read other rows than their own; all others work row by row."""


def _decode_ltx(
    codec: LTXCodec, latents: Tensor, rows: slice, timestep: float = TIMESTEP, noise_scale: float = NOISE_SCALE
) -> Tensor:
    """The noise that the decoder adds is that of whole frames, the same on all processes."""
    raw, given = codec.prepare(latents, timestep, noise_scale, None)
    own = [layer.crop(rows, slice(0, latents.shape[4])) for layer in given]
    cells = raw[:, :, :, rows].movedim(1, -1)
    return torch.cat(list(codec.decoder.run(cells, own, 1)), 1).movedim(-1, 1)


def _decode(codec: VideoCodec, latents: Tensor, rows: slice) -> Tensor:
    return codec.decode(latents[:, :, :, rows])


DECODES: dict[type[nn.Module], Callable[..., Tensor]] = {
    WanCodec: _decode,
    CausalVideoCodec: _decode,
    MochiCodec: _decode,
    LTXCodec: _decode_ltx,
}
"""How some rows (codec, latents, rows) of latents are decoded while the layers are shared; a conditioned codec is also
told `timestep` and `noise_scale`."""


class SharedCodec:
    """`core.protocols.VideoCodec` that decodes on several processes; each encodes alone. Raises CapabilityError for a
    codec that is not in DECODES."""

    def __init__(self, codec: VideoCodec, ranks: Ranks) -> None:
        if not isinstance(codec, nn.Module) or type(codec) not in DECODES:
            valid = ", ".join(kind.__name__ for kind in DECODES)
            raise CapabilityError(f"{type(codec).__name__} does not decode on several processes; valid: {valid}")
        self.codec, self.ranks = codec, ranks
        decoder = codec.get_submodule("decoder")
        self._layers = [(layer, WAYS[type(layer)](layer)) for layer in decoder.modules() if type(layer) in WAYS]

    @property
    def strides(self) -> VideoStrides:
        return self.codec.strides

    @property
    def latent_channels(self) -> int:
        return self.codec.latent_channels

    def encode(self, frames: Tensor) -> Tensor:
        """As the codec does, on every process."""
        return self.codec.encode(frames)

    @property
    def conditioned(self) -> bool:
        """`codecs.decoding.Conditioned`: as the codec is."""
        return isinstance(self.codec, Conditioned) and self.codec.conditioned

    def decode(self, latents: Tensor, **told: float) -> Tensor:
        """Latents (B, C, 1 + k, h, w), the same on all processes, to frames (B, 3, 1 + k*time, H, W) on each of them.

        told: `timestep` and `noise_scale` of a conditioned codec, in [0, 1]; without them its own. Raises ShapeError
        for strips with fewer rows than a layer reads to each side, or none.
        """
        check_latents(latents.shape, self.latent_channels)
        strips = Strips.of(latents.shape[3], self.ranks)
        with shared_frames(self._layers, strips):
            frames = DECODES[type(self.codec)](self.codec, latents, self.ranks.own(strips.sizes), **told)
        return self.ranks.gather(frames, [size * self.strides.height for size in strips.sizes], 3)

    def preview(self, latents: Tensor) -> Tensor:
        """Frames by the codec's preview, or its decoder, on this process alone: one may ask and the others not."""
        return getattr(self.codec, "preview", self.codec.decode)(latents)


class SharedScaledCodec(SharedCodec):
    """`SharedCodec` of one that `core.protocols.Normalises`: every process brings all latents to the other scale."""

    def __init__(self, codec: VideoCodec, ranks: Ranks) -> None:
        super().__init__(codec, ranks)
        assert isinstance(codec, Normalises)
        self.normalise, self.denormalise = codec.normalise, codec.denormalise


def share_codec(codec: VideoCodec, ranks: Ranks) -> SharedCodec:
    """The codec for several processes, with all that it offers beside frames and latents."""
    return (SharedScaledCodec if isinstance(codec, Normalises) else SharedCodec)(codec, ranks)
