"""The Mochi 1 denoiser: a wide video stream and a slim text stream that meet in one attention.

B clips, L video tokens (T h w), S words, D width of the video stream, C of the text stream, H heads of E. Source: Genmo
2024 (Mochi 1, model card and released configuration). The network was trained to count time from noise (0) to clip
(1000) and to predict the way there, so levels and velocity are turned round at the door.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitascope.core.protocols import FULL, Capabilities, Passage, State, TemporalStrategy, check_call
from vitascope.core.tracks import VIDEO, TextContext, Track, Tracks
from vitascope.models.mochi.config import MochiConfig
from vitascope.nn.attention import KeysValues
from vitascope.nn.checkpointing import run_layer
from vitascope.nn.embeddings import timestep_features
from vitascope.nn.feed_forward import FeedForward
from vitascope.nn.modulation import modulated_layer_norm
from vitascope.nn.norms import RMSNorm, rms_norm
from vitascope.nn.patches import check_patch, patchify, unpatchify
from vitascope.ops.attention import attend
from vitascope.ops.rope import RotaryTable, rotate
from vitascope.parallel.tokens import WHOLE, AttendJoint, Sharing, attend_jointly

QK_EPS = 1e-5


class Stream(nn.Module):
    """One stream of a block: its modulation, projections to and from the attention, and feed-forward.

    `last` is the text stream of the last block: it is read, and nothing is written back to it.
    """

    def __init__(self, config: MochiConfig, width: int, last: bool = False) -> None:
        super().__init__()
        each = config.width // config.num_heads
        self.eps, self.each, self.last = config.eps, each, last
        self.modulation = nn.Linear(config.width, width if last else 4 * width)
        self.qkv = nn.Linear(width, 3 * config.width, bias=False)
        self.norm_q, self.norm_k = RMSNorm(each, QK_EPS), RMSNorm(each, QK_EPS)
        self.out = None if last else nn.Linear(config.width, width)
        hidden = 4 * width * 2 // 3
        self.feed_forward = None if last else FeedForward(width, hidden, "swiglu", bias=False)

    def project(self, x_BLC: Tensor, vectors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (B, L, H, E)."""
        q, k, v = self.qkv(self.modulated(x_BLC, vectors)).unflatten(-1, (-1, self.each)).chunk(3, -2)
        return self.norm_q(q), self.norm_k(k), v

    def modulated(self, x_BLC: Tensor, vectors: tuple[Tensor, ...]) -> Tensor:
        """What the attention reads."""
        return rms_norm(x_BLC, self.eps, 1 + vectors[0].float())

    def vectors(self, condition_BD: Tensor) -> tuple[Tensor, ...]:
        """Scale and gate of the attention, then of the feed-forward, (B, 1, C) each; one scale in the last."""
        return self.modulation(F.silu(condition_BD)).unsqueeze(1).chunk(1 if self.last else 4, -1)

    def forward(self, x_BLC: Tensor, condition_BD: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """A stream that reads itself alone: what leaves this block (the last one changes nothing), keys and values."""
        vectors = self.vectors(condition_BD)
        q, k, v = self.project(x_BLC, vectors)
        return x_BLC if self.last else self.finish(x_BLC, attend(q, k, v, mask).flatten(-2), vectors), k, v

    def finish(self, x_BLC: Tensor, read_BLD: Tensor, vectors: tuple[Tensor, ...]) -> Tensor:
        """The stream after what it read, and after its feed-forward."""
        assert self.out is not None
        assert self.feed_forward is not None
        _, gate_a, scale_f, gate_f = (vector.float() for vector in vectors)
        x_BLC = x_BLC + rms_norm(self.out(read_BLD), self.eps, gate_a.tanh())
        y = rms_norm(x_BLC, self.eps, 1 + scale_f)
        return x_BLC + rms_norm(self.feed_forward(y), self.eps, gate_f.tanh())


class MochiBlock(nn.Module):
    """Both streams through one attention."""

    def __init__(self, config: MochiConfig, last: bool) -> None:
        super().__init__()
        self.text_sees = config.text_sees
        self.video, self.text = Stream(config, config.width), Stream(config, config.stream_width, last)

    def compile(self, *args: Any, **named: Any) -> None:
        """As that of every module; where text sees text alone, its stream is called by itself."""
        super().compile(*args, **named)
        if self.text_sees == "text":
            self.text.compile(*args, **named)

    def forward(
        self,
        x_BLD: Tensor,
        text: Tensor | KeysValues,
        condition_BD: Tensor,
        seen_BS: Tensor,
        table: RotaryTable,
        read: AttendJoint = attend_jointly,
        alone: bool = False,
    ) -> tuple[Tensor, ...]:
        """Both streams, each seeing all of the video and the words `seen_BS`. Given keys and values in place of a text
        stream, the video stream alone, which reads them. read: how they meet. alone: see `core.protocols.Layer`; the
        one attention reads the text too, and is left out whole."""
        video = self.video.vectors(condition_BD)
        mine = self._turned(x_BLD, video, table)
        if not isinstance(text, Tensor):
            found = mine[2] if alone else read(mine, (text[0][:, :0], *text), seen_BS)[0]
            return (self.video.finish(x_BLD, found.flatten(-2), video),)
        vectors = self.text.vectors(condition_BD)
        q, k, v = self.text.project(text, vectors)
        words = (q[:, :0] if self.text.last else q, k, v)
        found, told = (mine[2], v) if alone else read(mine, words, seen_BS)
        x_BLD = self.video.finish(x_BLD, found.flatten(-2), video)
        return x_BLD, text if self.text.last else self.text.finish(text, told.flatten(-2), vectors)

    def _turned(self, x_BLD: Tensor, vectors: tuple[Tensor, ...], table: RotaryTable) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.video.project(x_BLD, vectors)
        return rotate(q, table, neighbours=True, per_head=True), rotate(k, table, neighbours=True, per_head=True), v


class TextPool(nn.Module):
    """One vector of a text: its mean asks all its words, and itself. (B, S, text_width) to (B, D)."""

    def __init__(self, config: MochiConfig) -> None:
        super().__init__()
        inside = config.text_width
        self.each = inside // config.pool_heads
        self.q, self.kv, self.out = (
            nn.Linear(inside, inside),
            nn.Linear(inside, 2 * inside),
            nn.Linear(inside, config.width),
        )

    def forward(self, words_BSW: Tensor, mask_BS: Tensor) -> Tensor:
        """`mask_BS` is True where a word is real."""
        share = mask_BS.to(words_BSW.dtype).unsqueeze(-1)
        mean = (words_BSW * (share / share.sum(1, keepdim=True).clamp_min(1))).sum(1, keepdim=True)
        seen = F.pad(mask_BS, (1, 0), value=True)[:, None, None]
        q = self.q(mean).unflatten(-1, (-1, self.each))
        k, v = self.kv(torch.cat([mean, words_BSW], 1)).unflatten(-1, (-1, self.each)).chunk(2, -2)
        return self.out(attend(q, k, v, seen).flatten(-2)[:, 0])


class MochiDenoiser(nn.Module):
    """`core.protocols.Denoiser`. `gradient_checkpointing` trades a second forward pass per block for memory."""

    def __init__(self, config: MochiConfig, *, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = gradient_checkpointing
        width, heads = config.width, config.num_heads
        self.embed = nn.Linear(config.patch_values, width)
        self.level_in, self.level_out = nn.Linear(config.frequency_width, width), nn.Linear(width, width)
        self.text, self.pool = nn.Linear(config.text_width, config.stream_width), TextPool(config)
        self.frequencies = nn.Parameter(torch.zeros(3, heads, width // heads // 2))
        last = config.depth - 1
        self.blocks = nn.ModuleList(MochiBlock(config, index == last) for index in range(config.depth))
        self.head_modulation, self.head = nn.Linear(width, 2 * width), nn.Linear(width, config.patch_values)

    @torch.no_grad()
    def begin(self) -> None:
        """`core.protocols.Begins`. Pairs of a head turn by time, rows and columns in turn, from one radian a position
        down to a hundredth."""
        for parameter in self.head.parameters():
            parameter.zero_()
        pair = torch.arange(self.frequencies.shape[2])
        speed = 0.01 ** (pair // 3 / max(1, (len(pair) - 1) // 3))
        self.frequencies.copy_(torch.where(pair % 3 == torch.arange(3)[:, None, None], speed, 0.0))

    @property
    def capabilities(self) -> Capabilities:
        """What this model can take."""
        return Capabilities((VIDEO,), "velocity", "clip")

    @property
    def patch(self) -> tuple[int, int, int]:
        """Frames, rows and columns of latents in a token."""
        return self.config.patch_sizes

    @property
    def regions(self) -> list[nn.Module]:
        """The parts that are worth compiling, each on its own."""
        return list(self.blocks)

    def prepare(self, text: TextContext) -> TextContext:
        """What a clip needs of its text once: the pooled vector and the embedded words or, where text sees text alone,
        the keys and values of every block."""
        words = text.embeddings.to(self.text.weight.dtype)
        pooled, y_BSC = self.pool(words, text.mask), self.text(words)
        if self.config.text_sees == "all":
            return replace(text, prepared=(pooled, y_BSC))
        parts: list[Tensor] = [pooled]
        for block in self.blocks:
            y_BSC, k, v = _block(block).text(y_BSC, pooled, text.mask[:, None, None])
            parts += (k, v)
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

        sharing: how processes share the video tokens; each has all words and gives the whole result. Raises
        CapabilityError for what the model does not take, ShapeError for sizes that do not fill the patches.
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
        """`forward`, taken apart; the signal is what the first attention reads of the video. The state has a stream of
        text only where text sees video."""
        check_call(self.capabilities, tracks, camera, strategy)
        track, config, dtype = tracks[VIDEO], self.config, self.embed.weight.dtype
        check_patch(VIDEO, tuple(track.values.shape[2:]), config.patch_sizes)
        text = text if text.prepared else self.prepare(text)
        pooled, *rest = text.prepared
        level_B = track.noise.flatten(1).amax(1)
        features = timestep_features(1000.0 * (1.0 - level_B), config.frequency_width).to(dtype)
        condition = self.level_out(F.silu(self.level_in(features))) + pooled
        tokens_BLV = patchify(track.values.to(dtype), config.patch_sizes).flatten(1, 2)
        share = sharing.of(tokens_BLV.shape[1])
        x_BLD = self.embed(share.split(tokens_BLV))
        around = (condition, text.mask, share.split_table(self._table(track)), share.attend_joint)
        saving, blocks = self.gradient_checkpointing, [_block(module) for module in self.blocks]

        def layer(block: MochiBlock, memory: KeysValues | None, state: State, alone: bool = False) -> State:
            words = state[1] if memory is None else memory
            return run_layer(saving, block, _video(state), words, *around, alone)

        def finish(state: State) -> dict[str, Tensor]:
            scale, shift = self.head_modulation(F.silu(condition)).unsqueeze(1).chunk(2, -1)
            out = share.join(self.head(modulated_layer_norm(_video(state), shift.float(), scale.float()).to(dtype)))
            velocity = -unpatchify(out, config.patch_sizes, tuple(track.values.shape), channels_last=True)
            return {VIDEO: velocity.to(track.values.dtype)}

        def signal(state: State) -> Tensor:
            stream = blocks[0].video
            return stream.modulated(_video(state), stream.vectors(condition))

        if config.text_sees == "all":
            return (x_BLD, rest[0]), Passage(tuple(partial(layer, block, None) for block in blocks), finish, signal)
        memories = zip(rest[::2], rest[1::2], strict=True)
        layers = tuple(partial(layer, block, memory) for block, memory in zip(blocks, memories, strict=True))
        return (x_BLD,), Passage(layers, finish, signal)

    def _table(self, track: Track) -> RotaryTable:
        """(L, H, E / 2): learned frequencies of time, rows and columns; places are centred and scaled to one area."""
        frames, height, width = track.values.shape[2:]
        rows, columns = height // self.config.patch, width // self.config.patch
        scale = (self.config.area / (rows * columns)) ** 0.5
        axes = [torch.arange(frames, device=track.values.device).float()]
        for size in (rows, columns):
            axes.append((torch.arange(size, device=track.values.device) + 0.5 - size / 2) * scale)
        grid = torch.meshgrid(*axes, indexing="ij")
        # products of vectors, for autocast would round those of matrices
        time, row, column = (
            axis.reshape(-1, 1, 1) * own for axis, own in zip(grid, self.frequencies.float(), strict=True)
        )
        angles = time + row + column
        return angles.cos(), angles.sin()


def _block(module: nn.Module) -> MochiBlock:
    assert isinstance(module, MochiBlock)
    return module


def _video(state: State) -> Tensor:
    assert state[0] is not None
    return state[0]
