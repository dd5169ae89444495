"""The shape of a factorised denoiser."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal, get_args

from vitascope.core.errors import InputError, choice
from vitascope.core.protocols import Prediction
from vitascope.nn.attention import head_width
from vitascope.nn.feed_forward import KINDS, FeedForwardKind

Positions = Literal["learned", "rotary"]
ModulationKind = Literal["own", "shared"]
AttentionKind = Literal["multi_head", "multi_query"]
StrategyKind = Literal["full", "causal", "window"]


@dataclass(frozen=True)
class FactorisedConfig:
    """A factorised denoiser: a video track of `width`, an audio track of `audio_width`; 0 channels where one is absent.

    patch: latent frames, rows and columns a video token covers; audio_patch: audio latents a token covers.
    base_grid: rows and columns of tokens that the learned spatial positions are stored for.
    positions: "learned" (spatial table, sinusoids of seconds) or "rotary" (added to these in the attentions over space
    and time). Audio and exchanges are always rotary in seconds, with periods from min_period_s to max_period_s.
    exchange_layers: layers where the tracks read each other; None: the later half.
    modulation: "own" (a projection per block) or "shared" (one for all blocks, and learned offsets).
    local_channels: channels of the levels of convolutions around the layers (`local.LocalDown`), the first one at the
    latents' own size and each next one at half of it; none by default. local_blocks: of each level, on the way down to
    the tokens and on the way up.
    num_classes: above 0 the model holds an embedding of class labels (`FactorisedDenoiser.label_context`).
    Raises InputError (ShapeError for head widths) where values contradict each other.
    """

    width: int
    depth: int
    num_heads: int
    audio_width: int
    audio_heads: int
    text_width: int
    video_channels: int = 16
    audio_channels: int = 32
    patch: tuple[int, int, int] = (1, 4, 4)
    audio_patch: int = 4
    base_grid: tuple[int, int] = (4, 4)
    feed_forward: FeedForwardKind = "gelu"
    feed_forward_ratio: float = 4.0
    attention: AttentionKind = "multi_head"
    positions: Positions = "learned"
    modulation: ModulationKind = "own"
    exchange_layers: tuple[int, ...] | None = None
    local_channels: tuple[int, ...] = ()
    local_blocks: tuple[int, int] = (1, 2)
    min_period_s: float = 0.1
    max_period_s: float = 100.0
    num_classes: int = 0
    camera: bool = True
    prediction: Prediction = "x0"
    strategies: tuple[StrategyKind, ...] = ("full", "causal", "window")

    def __post_init__(self) -> None:
        if not self.video_channels and not self.audio_channels:
            raise InputError("a denoiser needs a video track, an audio track or both")
        if self.depth < 1 or min(self.patch) < 1 or self.audio_patch < 1 or min(self.base_grid) < 1:
            raise InputError("depth, patch, audio_patch and base_grid must be positive")
        for name, value, valid in (
            ("feed_forward", self.feed_forward, KINDS),
            ("attention", self.attention, get_args(AttentionKind)),
            ("positions", self.positions, get_args(Positions)),
            ("modulation", self.modulation, get_args(ModulationKind)),
            ("prediction", self.prediction, get_args(Prediction)),
            *(("strategy", kind, get_args(StrategyKind)) for kind in self.strategies),
        ):
            choice(name, value, valid)
        if self.video_channels and self.positions == "rotary" and head_width(self.width, self.num_heads) % 4:
            raise InputError("rotary positions over rows and columns need heads whose width is a multiple of 4")
        self._check_local()
        if self.exchange_layers is not None and not set(self.exchange_layers) <= set(range(self.depth)):
            raise InputError(f"exchange_layers must lie in 0..{self.depth - 1}, got {self.exchange_layers}")
        if self.exchange_layers and not (self.video_channels and self.audio_channels):
            raise InputError("exchange_layers need both tracks")

    def _check_local(self) -> None:
        """Raise InputError unless the local levels lead from latents to tokens."""
        if not self.local_channels:
            return
        halvings = 2 ** (len(self.local_channels) - 1)
        if min(*self.local_channels, *self.local_blocks) < 1 or not self.video_channels:
            raise InputError("local_channels and local_blocks are positive numbers, for a video track")
        if self.patch[0] != 1 or self.patch[1] % halvings or self.patch[2] % halvings:
            raise InputError(
                f"{len(self.local_channels)} local levels need a patch of 1 frame and a multiple of {halvings} rows "
                f"and columns, got {self.patch}"
            )

    @staticmethod
    def fitting(video_channels: int, audio_channels: int, text_width: int) -> dict[str, int]:
        """The fields that follow from the latents and the text that a model reads."""
        return {"video_channels": video_channels, "audio_channels": audio_channels, "text_width": text_width}

    @property
    def exchanges(self) -> frozenset[int]:
        """The layers in which the tracks read each other."""
        if not (self.video_channels and self.audio_channels):
            return frozenset()
        return frozenset(range(self.depth // 2, self.depth) if self.exchange_layers is None else self.exchange_layers)

    @property
    def hidden(self) -> int:
        """Units of the video feed-forward."""
        return round(self.width * self.feed_forward_ratio)

    @property
    def audio_hidden(self) -> int:
        """Units of the audio feed-forward."""
        return round(self.audio_width * self.feed_forward_ratio)

    @property
    def patch_values(self) -> int:
        """Numbers in a video token."""
        return self.video_channels * prod(self.patch)

    def key_heads(self, num_heads: int) -> int:
        """Key heads of a self-attention with `num_heads` query heads."""
        return 1 if self.attention == "multi_query" else num_heads
