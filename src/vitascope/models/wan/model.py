"""The Wan 2.1 denoiser: full attention over all video tokens, text (and image) by cross-attention.

B clips, L tokens (t h w), S text tokens, I image tokens, D width, H heads of E. Source: Wan team 2025 (arXiv
2503.20314), section 4.2. Noise levels stand where the paper has timesteps: t = 1000 level.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitascope.core.errors import ShapeError
from vitascope.core.protocols import FULL, Capabilities, Passage, State, TemporalStrategy, check_call
from vitascope.core.tracks import VIDEO, TextContext, Track, Tracks
from vitascope.models.wan.config import WanConfig
from vitascope.nn.attention import AttentionKind, CrossAttention, KeysValues, SelfAttention
from vitascope.nn.checkpointing import run_layer
from vitascope.nn.embeddings import normal_table, timestep_features
from vitascope.nn.feed_forward import FeedForward
from vitascope.nn.modulation import add_gated, modulated_layer_norm
from vitascope.nn.norms import LayerNorm
from vitascope.nn.patches import check_patch, patchify, token_levels, unpatchify
from vitascope.ops.attention import Attend, attend
from vitascope.ops.rope import RotaryTable, grid_table, index_table
from vitascope.parallel.tokens import WHOLE, Sharing

BLOCK_VECTORS = 6
"""Shift, scale and gate of the self-attention and of the feed-forward."""


class Memory(NamedTuple):
    """What a block reads of the text (where `seen`, if not all of it) and, if there is one, of the image."""

    text: KeysValues
    image: KeysValues | None
    seen: Tensor | None = None


class WanCrossAttention(CrossAttention):
    """Text, and image tokens with keys and values of their own; both are read by the same queries and added."""

    def __init__(self, width: int, num_heads: int, kind: AttentionKind, image: bool) -> None:
        super().__init__(width, width, num_heads, kind)
        self.image_kv = nn.Linear(width, 2 * width) if image else None
        self.image_norm_k = kind.make_norm(self.each, num_heads) if image else None

    def remember(self, text_BSD: Tensor, image_BID: Tensor | None) -> Memory:
        """Keys and values of everything there is to read."""
        if image_BID is None or self.image_kv is None or self.image_norm_k is None:
            return Memory(self.keys_values(text_BSD), None)
        k, v = self.image_kv(image_BID).unflatten(-1, (-1, self.each)).chunk(2, -2)
        return Memory(self.keys_values(text_BSD), (self.kind.normalise(self.image_norm_k, k), v))

    def recall(self, x_BLD: Tensor, memory: Memory) -> Tensor:
        """(B, L, D)."""
        q_BLHE = self.queries(x_BLD)
        out = attend(q_BLHE, *memory.text, memory.seen)
        if memory.image is not None:
            out = out + attend(q_BLHE, *memory.image)
        return self.out(out.flatten(-2))


class WanBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward; the first and last are modulated by the noise level."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        width, heads, kind = config.width, config.num_heads, AttentionKind(True, "all", config.eps, "neighbours")
        self.eps = config.eps
        self.offsets = normal_table(BLOCK_VECTORS, width, std=width**-0.5)
        self.attention = SelfAttention(width, heads, heads, kind)
        self.cross_norm = LayerNorm(width, config.eps) if config.cross_norm else nn.Identity()
        self.cross = WanCrossAttention(width, heads, kind, config.image_width > 0 and config.image_apart)
        self.feed_forward = FeedForward(width, config.hidden)

    def forward(
        self,
        x_BLD: Tensor,
        vectors_BL6D: Tensor,
        memory: Memory,
        table: RotaryTable,
        read: Attend = attend,
        alone: bool = False,
    ) -> Tensor:
        """vectors: (B, 1|L, 6, D) in fp32. read: how tokens read each other. alone: see `core.protocols.Layer`."""
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (self.offsets.float() + vectors_BL6D).unbind(-2)
        y = modulated_layer_norm(x_BLD, shift_a, scale_a, self.eps)
        x_BLD = add_gated(x_BLD, gate_a, self.attention(y, table, read=read, alone=alone))
        x_BLD = x_BLD + self.cross.recall(self.cross_norm(x_BLD), memory)
        y = modulated_layer_norm(x_BLD, shift_f, scale_f, self.eps)
        return add_gated(x_BLD, gate_f, self.feed_forward(y))


class ImageEmbedding(nn.Module):
    """Image tokens (B, I, image_width) to (B, I, D)."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        inside = config.image_width
        self.positions = nn.Parameter(torch.zeros(config.image_positions, inside)) if config.image_positions else None
        self.norm_in, self.norm_out = LayerNorm(inside, 1e-5), LayerNorm(config.width, 1e-5)
        self.rise, self.fall = nn.Linear(inside, inside), nn.Linear(inside, config.width)

    def forward(self, tokens_BIW: Tensor) -> Tensor:
        """Raises ShapeError for another number of tokens than the positions are for."""
        if self.positions is not None:
            if tokens_BIW.shape[1] != len(self.positions):
                raise ShapeError(f"{tokens_BIW.shape[1]} image tokens for {len(self.positions)} positions")
            tokens_BIW = tokens_BIW + self.positions
        return self.norm_out(self.fall(F.gelu(self.rise(self.norm_in(tokens_BIW)))))


class WanDenoiser(nn.Module):
    """`core.protocols.Denoiser`. `gradient_checkpointing` trades a second forward pass per block for memory.

    A text that `prepare` has seen carries the keys and values of all blocks, and calls with it skip that work.
    """

    def __init__(self, config: WanConfig, *, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = gradient_checkpointing
        width = config.width
        self.embed = nn.Linear(config.in_values, width)
        self.level_in, self.level_out = nn.Linear(config.frequency_width, width), nn.Linear(width, width)
        self.vectors = nn.Linear(width, BLOCK_VECTORS * width)
        self.text_in, self.text_out = nn.Linear(config.text_width, width), nn.Linear(width, width)
        self.image = ImageEmbedding(config) if config.image_width else None
        self.blocks = nn.ModuleList(WanBlock(config) for _ in range(config.depth))
        self.head_offsets = normal_table(2, width, std=width**-0.5)
        self.head = nn.Linear(width, config.out_values)

    def begin(self) -> None:
        """`core.protocols.Begins`."""
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)

    @property
    def capabilities(self) -> Capabilities:
        """What this model can take."""
        return Capabilities((VIDEO,), "velocity", self.config.noise, condition_channels=self.config.condition_channels)

    @property
    def patch(self) -> tuple[int, int, int]:
        """Frames, rows and columns of latents in a token."""
        return self.config.patch

    @property
    def regions(self) -> list[nn.Module]:
        """The parts that are worth compiling, each on its own."""
        return list(self.blocks)

    def prepare(self, text: TextContext) -> TextContext:
        """The text with the keys and values of every block: what a clip needs once and not at every step."""
        dtype = self.text_in.weight.dtype
        embedded = self.text_out(F.gelu(self.text_in(text.embeddings.to(dtype)), approximate="tanh"))
        image = None if self.image is None or text.image is None else self.image(text.image.to(dtype))
        if image is not None and not self.config.image_apart:
            embedded, image = torch.cat([image, embedded], 1), None
        parts: list[Tensor] = []
        for block in self.blocks:
            assert isinstance(block, WanBlock)
            parts += [part for pair in block.cross.remember(embedded, image) if pair is not None for part in pair]
        return replace(text, prepared=tuple(parts))

    def forward(
        self,
        tracks: Tracks,
        text: TextContext,
        camera: Tensor | None = None,
        strategy: TemporalStrategy = FULL,
        sharing: Sharing = WHOLE,
    ) -> dict[str, Tensor]:
        """The velocity of the video track, in the shape and dtype of its values.

        sharing: how processes share the tokens; each of them gives the whole result. Raises CapabilityError for what
        the model does not take, ShapeError for sizes that do not fill the patches.
        """
        state, passage = self.enter(tracks, text, camera, strategy, sharing)
        return passage.run(state)

    def enter(
        self,
        tracks: Tracks,
        text: TextContext,
        camera: Tensor | None = None,
        strategy: TemporalStrategy = FULL,
        sharing: Sharing = WHOLE,
    ) -> tuple[State, Passage]:
        """`forward`, taken apart; the signal is the embedded level."""
        check_call(self.capabilities, tracks, camera, strategy)
        track, config = tracks[VIDEO], self.config
        check_patch(VIDEO, tuple(track.values.shape[2:]), config.patch)
        values = track.values if track.condition is None else torch.cat([track.values, track.condition], 1)
        dtype = self.embed.weight.dtype
        tokens_BLV = patchify(values.to(dtype), config.patch).flatten(1, 2)
        share = sharing.of(tokens_BLV.shape[1])
        x_BLD = self.embed(share.split(tokens_BLV))
        level_BLD, vectors_BL6D = self._modulation(share.split(self._levels(track)), dtype)
        text = text if text.prepared else self.prepare(text)
        table, read = share.split_table(self._table(values.shape, values.device)), share.attend

        def layer(block: nn.Module, memory: Memory, state: State, alone: bool = False) -> State:
            saving = self.gradient_checkpointing
            return (run_layer(saving, block, state[0], vectors_BL6D, memory, table, read, alone),)

        def finish(state: State) -> dict[str, Tensor]:
            (x_BLD,) = state
            assert x_BLD is not None
            shift, scale = (self.head_offsets.float() + level_BLD.float().unsqueeze(-2)).unbind(-2)
            out = share.join(self.head(modulated_layer_norm(x_BLD, shift, scale, config.eps).to(dtype)))
            shape = (len(values), config.out_channels, *values.shape[2:])
            return {VIDEO: unpatchify(out, config.patch, shape, channels_last=True).to(track.values.dtype)}

        memories = zip(self.blocks, self._memories(text), strict=True)
        layers = tuple(partial(layer, block, memory) for block, memory in memories)
        return (x_BLD,), Passage(layers, finish, lambda state: level_BLD)

    def _levels(self, track: Track) -> Tensor:
        """(B, 1|L): one level for a clip, which is that of its noisiest cell, or one for each token."""
        levels_BTN, frames = token_levels(track, self.config.patch), track.values.shape[2] // self.config.patch[0]
        if self.config.noise == "clip":
            return levels_BTN.flatten(1).amax(1, keepdim=True)
        if levels_BTN.shape[2] > 1:
            levels_BTN = levels_BTN.expand(-1, frames, -1)
        _, ph, pw = self.config.patch
        per_frame = track.values.shape[3] // ph * (track.values.shape[4] // pw)
        return levels_BTN.expand(-1, -1, per_frame).flatten(1) if levels_BTN.shape[1] > 1 else levels_BTN.flatten(1)

    def _modulation(self, levels_BL: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The embedded level (B, 1|L, D) and the blocks' vectors (B, 1|L, 6, D), these in fp32."""
        features = timestep_features(1000.0 * levels_BL, self.config.frequency_width).to(dtype)
        level_BLD = self.level_out(F.silu(self.level_in(features)))
        return level_BLD, self.vectors(F.silu(level_BLD)).unflatten(-1, (BLOCK_VECTORS, -1)).float()

    def _memories(self, text: TextContext) -> list[Memory]:
        parts = list(zip(text.prepared[::2], text.prepared[1::2], strict=True))
        seen = None
        if self.config.masked_text:  # image tokens in front of the words are always seen
            seen = F.pad(text.mask, (parts[0][0].shape[1] - text.mask.shape[1], 0), value=True)[:, None, None]
        if len(parts) == self.config.depth:
            return [Memory(pair, None, seen) for pair in parts]
        return [Memory(text, image, seen) for text, image in zip(parts[::2], parts[1::2], strict=True)]

    def _table(self, shape: torch.Size, device: torch.device) -> RotaryTable:
        """Positions in time, rows and columns; each spatial axis takes a third of the pairs, rounded down."""
        each = self.config.width // self.config.num_heads
        side = 2 * (each // 6)
        sizes = [size // step for size, step in zip(shape[2:], self.config.patch, strict=True)]
        widths = (each - 2 * side, side, side)
        return grid_table(
            [index_table(torch.arange(n, device=device), width) for n, width in zip(sizes, widths, strict=True)]
        )
