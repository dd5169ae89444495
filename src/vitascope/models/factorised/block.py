"""Blocks of the factorised denoiser.

B batch, T frames of tokens, N tokens a frame, A audio tokens, S text tokens, D video width, C audio width.
Modulation vectors are (B, 1|T, 1|N, D) and (B, 1|A, C): as small as the noise levels allow.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from vitascope.models.factorised.config import FactorisedConfig
from vitascope.models.factorised.timing import Masks
from vitascope.nn.attention import CrossAttention, Exchange, SelfAttention, Side
from vitascope.nn.feed_forward import FeedForward
from vitascope.nn.modulation import OffsetModulation, OwnModulation, modulate
from vitascope.nn.norms import layer_norm
from vitascope.ops.rope import RotaryTable

VIDEO_VECTORS = 9
AUDIO_VECTORS = 6
EXCHANGE_VECTORS = 3
"""Modulation vectors of a block: shift, scale and gate of every branch; an exchange adds three more at the end."""


@dataclass(frozen=True)
class Surroundings:
    """What every layer of one call is given: conditions, text, rotary tables and masks."""

    text_BSX: Tensor
    text_mask_BS: Tensor
    video_condition: Tensor | None = None
    audio_condition: Tensor | None = None
    space_table: RotaryTable | None = None
    time_table: RotaryTable | None = None
    audio_table: RotaryTable | None = None
    exchange_tables: tuple[RotaryTable, RotaryTable] | None = None
    masks: Masks = field(default_factory=Masks)


def make_modulation(config: FactorisedConfig, width: int, num: int) -> OwnModulation | OffsetModulation:
    """The modulation of a block by `config.modulation`."""
    return OwnModulation(width, width, num) if config.modulation == "own" else OffsetModulation(width, num)


class VideoBlock(nn.Module):
    """Spatial attention in every frame, temporal attention at every place, text, (after an exchange) feed-forward."""

    def __init__(self, config: FactorisedConfig, exchanges: bool) -> None:
        super().__init__()
        width, heads = config.width, config.num_heads
        self.modulation = make_modulation(config, width, VIDEO_VECTORS + EXCHANGE_VECTORS * exchanges)
        self.space = SelfAttention(width, heads, config.key_heads(heads))
        self.time = SelfAttention(width, heads, config.key_heads(heads))
        self.text = CrossAttention(width, config.text_width, heads)
        self.feed_forward = FeedForward(width, config.hidden, config.feed_forward)

    def attend(self, x_BTND: Tensor, vectors: tuple[Tensor, ...], around: Surroundings, alone: bool = False) -> Tensor:
        """The attentions. Tokens are transposed for the one over time, not heads: rows of D stay whole."""
        batch, frames = x_BTND.shape[:2]
        shift, scale, gate = vectors[0:3]
        y = modulate(layer_norm(x_BTND), shift, scale).flatten(0, 1)
        x_BTND = x_BTND + gate * self.space(y, around.space_table, alone=alone).unflatten(0, (batch, frames))
        shift, scale, gate = vectors[3:6]
        # Of one clip the transposed tokens would stay a view, for which a linear map copies its weights row by row.
        y = modulate(layer_norm(x_BTND), shift, scale).transpose(1, 2).contiguous().flatten(0, 1)
        y = self.time(y, around.time_table, around.masks.video, alone=alone)
        x_BTND = x_BTND + gate * y.unflatten(0, (batch, -1)).transpose(1, 2)
        y = self.text(layer_norm(x_BTND).flatten(1, 2), around.text_BSX, around.text_mask_BS)
        return x_BTND + y.view_as(x_BTND)

    def feed(self, x_BTND: Tensor, vectors: tuple[Tensor, ...]) -> Tensor:
        """The feed-forward."""
        shift, scale, gate = vectors[6:9]
        return x_BTND + gate * self.feed_forward(modulate(layer_norm(x_BTND), shift, scale))


class AudioBlock(nn.Module):
    """Attention over time, text, and (after an exchange) feed-forward."""

    def __init__(self, config: FactorisedConfig, exchanges: bool) -> None:
        super().__init__()
        width, heads = config.audio_width, config.audio_heads
        self.modulation = make_modulation(config, width, AUDIO_VECTORS + EXCHANGE_VECTORS * exchanges)
        self.time = SelfAttention(width, heads, config.key_heads(heads))
        self.text = CrossAttention(width, config.text_width, heads)
        self.feed_forward = FeedForward(width, config.audio_hidden, config.feed_forward)

    def attend(self, x_BAC: Tensor, vectors: tuple[Tensor, ...], around: Surroundings, alone: bool = False) -> Tensor:
        """The attentions."""
        shift, scale, gate = vectors[0:3]
        y = modulate(layer_norm(x_BAC), shift, scale)
        x_BAC = x_BAC + gate * self.time(y, around.audio_table, around.masks.audio, alone=alone)
        return x_BAC + self.text(layer_norm(x_BAC), around.text_BSX, around.text_mask_BS)

    def feed(self, x_BAC: Tensor, vectors: tuple[Tensor, ...]) -> Tensor:
        """The feed-forward."""
        shift, scale, gate = vectors[3:6]
        return x_BAC + gate * self.feed_forward(modulate(layer_norm(x_BAC), shift, scale))


class Layer(nn.Module):
    """A block of each track and, in some layers, the exchange between them."""

    def __init__(self, config: FactorisedConfig, exchanges: bool) -> None:
        super().__init__()
        self.video = VideoBlock(config, exchanges) if config.video_channels else None
        self.audio = AudioBlock(config, exchanges) if config.audio_channels else None
        self.exchange = (
            Exchange(config.width, config.audio_width, config.audio_width, config.audio_heads) if exchanges else None
        )

    def forward(
        self, video_BTND: Tensor | None, audio_BAC: Tensor | None, around: Surroundings, alone: bool = False
    ) -> tuple[Tensor | None, Tensor | None]:
        """Both tracks, or None for one that the call is without. alone: see `core.protocols.Layer`; tracks still read
        each other."""
        video_vectors: tuple[Tensor, ...] = ()
        audio_vectors: tuple[Tensor, ...] = ()
        if self.video is not None and video_BTND is not None:
            video_vectors = self.video.modulation(around.video_condition)
            video_BTND = self.video.attend(video_BTND, video_vectors, around, alone)
        if self.audio is not None and audio_BAC is not None:
            audio_vectors = self.audio.modulation(around.audio_condition)
            audio_BAC = self.audio.attend(audio_BAC, audio_vectors, around, alone)
        if self.exchange is not None and video_BTND is not None and audio_BAC is not None:
            video_BTND, audio_BAC = self._exchange(
                (video_BTND, video_vectors[VIDEO_VECTORS:]), (audio_BAC, audio_vectors[AUDIO_VECTORS:]), around
            )
        if self.video is not None and video_BTND is not None:
            video_BTND = self.video.feed(video_BTND, video_vectors)
        if self.audio is not None and audio_BAC is not None:
            audio_BAC = self.audio.feed(audio_BAC, audio_vectors)
        return video_BTND, audio_BAC

    def modulated(self, video_BTND: Tensor | None, audio_BAC: Tensor | None, around: Surroundings) -> Tensor:
        """What the first attention reads of the video or, without video, of the audio."""
        if self.video is not None and video_BTND is not None:
            return modulate(layer_norm(video_BTND), *self.video.modulation(around.video_condition)[:2])
        assert self.audio is not None
        assert audio_BAC is not None
        return modulate(layer_norm(audio_BAC), *self.audio.modulation(around.audio_condition)[:2])

    def _exchange(
        self,
        video: tuple[Tensor, tuple[Tensor, ...]],
        audio: tuple[Tensor, tuple[Tensor, ...]],
        around: Surroundings,
    ) -> tuple[Tensor, Tensor]:
        assert self.exchange is not None
        assert around.exchange_tables is not None
        (x_BTND, (shift_v, scale_v, gate_v)), (y_BAC, (shift_a, scale_a, gate_a)) = video, audio
        video_table, audio_table = around.exchange_tables
        masks = around.masks
        to_video, to_audio = self.exchange(
            Side(modulate(layer_norm(x_BTND), shift_v, scale_v).flatten(1, 2), video_table, masks.video_sees_audio),
            Side(modulate(layer_norm(y_BAC), shift_a, scale_a), audio_table, masks.audio_sees_video),
        )
        return x_BTND + gate_v * to_video.view_as(x_BTND), y_BAC + gate_a * to_audio
