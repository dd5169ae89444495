"""The LTX-Video denoiser: full attention over video tokens, each with its own noise level, and text by cross-attention.

B clips, L tokens (T h w), S text tokens, D width. Source: HaCohen et al. 2024 (LTX-Video), section 2. Noise levels
stand where the paper has timesteps: t = 1000 level. Positions are seconds and px, so frame rate and size are known
to the model.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import pi

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitascope.core.protocols import FULL, Capabilities, Passage, State, TemporalStrategy, check_call
from vitascope.core.tracks import VIDEO, TextContext, Track, Tracks
from vitascope.models.ltx.config import LTXConfig
from vitascope.nn.attention import AttentionKind, CrossAttention, KeysValues, SelfAttention
from vitascope.nn.checkpointing import run_layer
from vitascope.nn.embeddings import normal_table, timestep_features
from vitascope.nn.feed_forward import FeedForward
from vitascope.nn.modulation import add_gated, modulated_layer_norm, modulated_rms_norm
from vitascope.nn.patches import patchify, token_levels, unpatchify
from vitascope.ops.attention import Attend, attend
from vitascope.ops.rope import RotaryTable
from vitascope.parallel.tokens import WHOLE, Sharing

BLOCK_VECTORS = 6
"""Shift, scale and gate of the self-attention and of the feed-forward."""
PATCH = (1, 1, 1)
NUM_SINUSOIDS = 256
KIND = AttentionKind(bias=True, norm="all", eps=1e-5, pairs="per_head")


class LTXBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward; the first and last are modulated by the noise level."""

    def __init__(self, config: LTXConfig) -> None:
        super().__init__()
        width, heads = config.width, config.num_heads
        self.eps = config.eps
        self.offsets = normal_table(BLOCK_VECTORS, width, std=width**-0.5)
        self.attention = SelfAttention(width, heads, heads, KIND)
        self.cross = CrossAttention(width, width, heads, KIND)
        self.feed_forward = FeedForward(width, 4 * width)

    def forward(
        self,
        x_BLD: Tensor,
        vectors_BL6D: Tensor,
        memory: KeysValues,
        mask_BS: Tensor | None,
        table: RotaryTable,
        read: Attend = attend,
        alone: bool = False,
    ) -> Tensor:
        """vectors: (B, 1|L, 6, D). read: how tokens read each other. alone: see `core.protocols.Layer`."""
        gate_a, shift_f, scale_f, gate_f = (self.offsets[2:] + vectors_BL6D[..., 2:, :]).unbind(-2)
        y = self.modulated(x_BLD, vectors_BL6D)
        x_BLD = add_gated(x_BLD, gate_a, self.attention(y, table, read=read, alone=alone))
        x_BLD = x_BLD + self.cross.read(x_BLD, memory, mask_BS)
        y = modulated_rms_norm(x_BLD, shift_f, scale_f, self.eps)
        return add_gated(x_BLD, gate_f, self.feed_forward(y))

    def modulated(self, x_BLD: Tensor, vectors_BL6D: Tensor) -> Tensor:
        """What the self-attention reads."""
        shift, scale = (self.offsets[:2] + vectors_BL6D[..., :2, :]).unbind(-2)
        return modulated_rms_norm(x_BLD, shift, scale, self.eps)


class LTXDenoiser(nn.Module):
    """`core.protocols.Denoiser`. `gradient_checkpointing` trades a second forward pass per block for memory.

    A text that `prepare` has seen carries the keys and values of all blocks, and calls with it skip that work.
    """

    def __init__(self, config: LTXConfig, *, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = gradient_checkpointing
        width = config.width
        self.embed = nn.Linear(config.in_channels, width)
        self.level_in, self.level_out = nn.Linear(NUM_SINUSOIDS, width), nn.Linear(width, width)
        self.vectors = nn.Linear(width, BLOCK_VECTORS * width)
        self.text_in, self.text_out = nn.Linear(config.text_width, width), nn.Linear(width, width)
        self.blocks = nn.ModuleList(LTXBlock(config) for _ in range(config.depth))
        self.head_offsets = normal_table(2, width, std=width**-0.5)
        self.head = nn.Linear(width, config.out_channels)

    def begin(self) -> None:
        """`core.protocols.Begins`."""
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)

    @property
    def capabilities(self) -> Capabilities:
        """What this model can take."""
        return Capabilities((VIDEO,), "velocity", "cell")

    @property
    def patch(self) -> tuple[int, int, int]:
        """Frames, rows and columns of latents in a token."""
        return PATCH

    @property
    def regions(self) -> list[nn.Module]:
        """The parts that are worth compiling, each on its own."""
        return list(self.blocks)

    def prepare(self, text: TextContext) -> TextContext:
        """The text with the keys and values of every block: what a clip needs once and not at every step."""
        words = text.embeddings.to(self.text_in.weight.dtype)
        embedded = self.text_out(F.gelu(self.text_in(words), approximate="tanh"))
        parts: list[Tensor] = []
        for block in self.blocks:
            assert isinstance(block, LTXBlock)
            parts += block.cross.keys_values(embedded)
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

        `times_s` of the track are when each latent frame begins. sharing: how processes share the tokens; each of them
        gives the whole result. Raises CapabilityError for what the model does not take.
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
        """`forward`, taken apart; the signal is what the first self-attention reads."""
        check_call(self.capabilities, tracks, camera, strategy)
        track, dtype = tracks[VIDEO], self.embed.weight.dtype
        tokens_BLV = patchify(track.values.to(dtype), PATCH).flatten(1, 2)
        share = sharing.of(tokens_BLV.shape[1])
        x_BLD = self.embed(share.split(tokens_BLV))
        level_BLD, vectors_BL6D = self._modulation(share.split(self._levels(track)), dtype)
        text = text if text.prepared else self.prepare(text)
        table = share.split_table(self._table(track))
        mask, saving, read = text.mask, self.gradient_checkpointing, share.attend

        def layer(block: nn.Module, memory: KeysValues, state: State, alone: bool = False) -> State:
            return (run_layer(saving, block, state[0], vectors_BL6D, memory, mask, table, read, alone),)

        def finish(state: State) -> dict[str, Tensor]:
            (x_BLD,) = state
            assert x_BLD is not None
            shift, scale = (self.head_offsets.float() + level_BLD.float().unsqueeze(-2)).unbind(-2)
            out = share.join(self.head(modulated_layer_norm(x_BLD, shift, scale).to(dtype)))
            shape = (len(out), self.config.out_channels, *track.values.shape[2:])
            return {VIDEO: unpatchify(out, PATCH, shape).to(track.values.dtype)}

        def signal(state: State) -> Tensor:
            first = self.blocks[0]
            assert isinstance(first, LTXBlock)
            assert state[0] is not None
            return first.modulated(state[0], vectors_BL6D)

        memories = zip(text.prepared[::2], text.prepared[1::2], strict=True)
        layers = tuple(partial(layer, block, memory) for block, memory in zip(self.blocks, memories, strict=True))
        return (x_BLD,), Passage(layers, finish, signal)

    def _levels(self, track: Track) -> Tensor:
        """(B, 1|L): one level for a clip, or one for each token."""
        levels_BTN, (frames, rows, columns) = token_levels(track, PATCH), track.values.shape[2:]
        if levels_BTN.shape[2] > 1:
            levels_BTN = levels_BTN.expand(-1, frames, -1)
        per_frame = rows * columns if levels_BTN.shape[1] > 1 else -1
        return levels_BTN.expand(-1, -1, per_frame).flatten(1)

    def _modulation(self, levels_BL: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The embedded level (B, 1|L, D) and the blocks' vectors (B, 1|L, 6, D)."""
        features = timestep_features(1000.0 * levels_BL, NUM_SINUSOIDS).to(dtype)
        level_BLD = self.level_out(F.silu(self.level_in(features)))
        return level_BLD, self.vectors(F.silu(level_BLD)).unflatten(-1, (BLOCK_VECTORS, -1))

    def _table(self, track: Track) -> RotaryTable:
        """Angles pi / 2 theta^(i / (n - 1)) (2 p - 1) for i < n = D / 6 and positions p in time, rows and columns; all
        three of a frequency stand side by side, and what D / 6 leaves over is not turned. (L, H, E / 2)."""
        config, (frames, rows, columns) = self.config, track.values.shape[2:]
        device, num = track.values.device, self.config.width // 6
        seconds, *pixels = config.base
        axes = [track.times_s.to(device).float() / seconds] + [
            torch.arange(size, device=device).float() * (config.spatial_px / base)
            for size, base in zip((rows, columns), pixels, strict=True)
        ]
        grid_L3 = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(frames * rows * columns, 3)
        frequencies = config.theta ** torch.linspace(0.0, 1.0, num, device=device) * (pi / 2)
        angles = (frequencies[:, None] * (2 * grid_L3 - 1)[:, None]).flatten(1)
        angles = F.pad(angles, (config.width // 2 - 3 * num, 0)).unflatten(-1, (config.num_heads, -1))
        return angles.cos(), angles.sin()
