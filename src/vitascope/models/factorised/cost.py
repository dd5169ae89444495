"""What a factorised denoiser costs: parameters, and operations of one call, from its configuration alone.

Every matrix of the model is one `_Map` (rows it is applied to, inputs, outputs), so that one table gives both counts.
B clips, T frames of tokens, N tokens a frame, A audio tokens, S words.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from vitascope.core.errors import ShapeError
from vitascope.core.shapes import (
    VideoStrides,
    latent_frames,
    latent_size,
    nearest_multiples,
    num_audio_latents,
)
from vitascope.models.factorised.block import AUDIO_VECTORS, EXCHANGE_VECTORS, VIDEO_VECTORS
from vitascope.models.factorised.config import FactorisedConfig
from vitascope.models.factorised.local import LOCAL_VECTORS
from vitascope.models.factorised.presets import PRESETS
from vitascope.nn.embeddings import CAMERA_NUMBERS, CameraEmbedding, LevelEmbedding

NUM_WORDS = 16
LATENTS_PER_S = 50.0
STRIDES = VideoStrides(4, 8, 8)
"""Of `cost_table`: words of a prompt, and the rates of the pocket codecs, whose latents the presets read."""


@dataclass(frozen=True)
class _Sizes:
    """Clips, frames, tokens a frame, audio tokens and words of a call; all 0 to count parameters alone."""

    clips: int = 0
    frames: int = 0
    cells: int = 0
    audio: int = 0
    words: int = 0

    @property
    def video_rows(self) -> int:
        return self.clips * self.frames * self.cells

    @property
    def audio_rows(self) -> int:
        return self.clips * self.audio


@dataclass(frozen=True)
class _Map:
    """A matrix applied to `rows` vectors; the biases' additions are not counted as operations."""

    rows: int
    inputs: int
    outputs: int
    bias: bool = True

    @property
    def num_parameters(self) -> int:
        return (self.inputs + self.bias) * self.outputs

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inputs * self.outputs


@dataclass(frozen=True)
class _Scores:
    """Attention of `queries` to `keys`, `batch` times, all heads together `width` wide: two products."""

    batch: int
    queries: int
    keys: int
    width: int

    @property
    def flops(self) -> int:
        return 4 * self.batch * self.queries * self.keys * self.width


@dataclass(frozen=True)
class _Vectors:
    """Parameters that are added or multiplied, not matrices."""

    num_parameters: int


_Part = _Map | _Scores | _Vectors


@dataclass(frozen=True)
class CostRow:
    """A preset: its parameters and the operations of one call for one clip of the stated size (fp operations, a
    multiply-add is two)."""

    name: str
    num_parameters: int
    width_px: int
    height_px: int
    num_frames: int
    num_tokens: int
    flops: int


def num_parameters(config: FactorisedConfig) -> int:
    """Parameters of `FactorisedDenoiser(config)`."""
    return sum(part.num_parameters for part in _parts(config, _Sizes()) if not isinstance(part, _Scores))


def forward_flops(
    config: FactorisedConfig, batch: int, frames: int, rows: int, cols: int, num_audio: int, num_words: int
) -> int:
    """Operations of matrix products and attention in one call, a multiply-add counted as two.

    frames, rows, cols: of video latents; num_audio: audio latents; num_words: words of the longest prompt. Both tracks
    (those the model has), a noise level per latent frame and audio latent as tasks give them, full attention, no camera
    path. Raises ShapeError for sizes that do not fill the patches.
    """
    (pt, ph, pw), pa = config.patch, config.audio_patch
    sizes = _Sizes(
        batch,
        _tokens(frames, pt, "latent frames"),
        _tokens(rows, ph, "latent rows") * _tokens(cols, pw, "latent columns"),
        _tokens(num_audio, pa, "audio latents"),
        num_words,
    )
    return sum(part.flops for part in _parts(config, sizes) if not isinstance(part, _Vectors))


def cost_table(side_px: int | None = None, num_frames: int = 25, fps: float = 12.0) -> list[CostRow]:
    """Every preset at `side_px` x `side_px` px, or each at the size its base grid stands for, with NUM_WORDS words.

    Raises ShapeError for sizes that do not fit.
    """
    return [_row(name, config, side_px, num_frames, fps) for name, config in PRESETS.items()]


def _row(name: str, config: FactorisedConfig, side_px: int | None, num_frames: int, fps: float) -> CostRow:
    pt, ph, pw = config.patch
    height_px = config.base_grid[0] * ph * STRIDES.height if side_px is None else side_px
    width_px = config.base_grid[1] * pw * STRIDES.width if side_px is None else side_px
    frames = latent_frames(num_frames, STRIDES.time)
    rows, cols = (latent_size(height_px, STRIDES.height, "height"), latent_size(width_px, STRIDES.width, "width"))
    num_audio = num_audio_latents(num_frames / fps, LATENTS_PER_S, config.audio_patch)
    flops = forward_flops(config, 1, frames, rows, cols, num_audio, NUM_WORDS)
    tokens = (frames // pt) * (rows // ph) * (cols // pw) + num_audio // config.audio_patch
    return CostRow(name, num_parameters(config), width_px, height_px, num_frames, tokens, flops)


def _tokens(size: int, patch: int, name: str) -> int:
    if size % patch:
        near = ", ".join(map(str, nearest_multiples(size, patch)))
        raise ShapeError(f"{size} {name} do not fill patches of {patch}; nearest: {near}")
    return size // patch


def _parts(config: FactorisedConfig, sizes: _Sizes) -> Iterator[_Part]:
    """Every parameter and product of the model."""
    yield _Vectors(config.text_width)
    if config.num_classes:
        yield _Vectors((config.num_classes + 1) * config.text_width)
    more = EXCHANGE_VECTORS if config.exchanges else 0
    if config.video_channels:
        yield _Vectors(config.base_grid[0] * config.base_grid[1] * config.width)
        if config.camera:
            features = CAMERA_NUMBERS * (1 + 2 * CameraEmbedding.NUM_OCTAVES)
            yield from (_Map(0, features, config.width), _Map(0, config.width, config.width), _Vectors(config.width))
        levels = sizes.clips * sizes.frames
        yield from _ends(
            config, sizes, config.width, config.patch_values, (sizes.video_rows, levels), VIDEO_VECTORS + more
        )
        if config.local_channels:
            yield from _local(config, sizes)
    if config.audio_channels:
        values = config.audio_channels * config.audio_patch
        rows = (sizes.audio_rows, sizes.audio_rows)
        yield from _ends(config, sizes, config.audio_width, values, rows, AUDIO_VECTORS + more)
    for index in range(config.depth):
        exchanges = index in config.exchanges
        if config.video_channels:
            yield from _video_block(config, sizes, exchanges)
        if config.audio_channels:
            yield from _audio_block(config, sizes, exchanges)
        if exchanges:
            yield from _exchange(config, sizes)


def _ends(
    config: FactorisedConfig, sizes: _Sizes, width: int, values: int, rows: tuple[int, int], num_vectors: int
) -> Iterator[_Part]:
    """Embedding, condition and head of a track; `rows` are its tokens and its conditions."""
    tokens, conditions = rows
    yield _Map(tokens, values, width)
    yield _Map(conditions, LevelEmbedding.NUM_SINUSOIDS, width)
    yield _Map(conditions, width, width)
    yield _Map(sizes.clips, config.text_width, width)
    if config.modulation == "shared":
        yield _Map(conditions, width, num_vectors * width)
    yield _Map(conditions, width, 2 * width)
    yield _Map(tokens, width, values)


def _local(config: FactorisedConfig, sizes: _Sizes) -> Iterator[_Part]:
    """Convolutions around the layers: those on the way down, then those on the way up."""
    channels, (_, ph, pw), width = config.local_channels, config.patch, config.width
    latents = sizes.video_rows * ph * pw
    for way, blocks in enumerate(config.local_blocks):
        entry, exit_ = (config.video_channels, channels[0]), (channels[0], config.video_channels)
        yield _convolution(latents, *(exit_ if way else entry))
        for level, count in enumerate(channels):
            for _ in range(blocks):
                yield _Map(sizes.clips * sizes.frames, width, LOCAL_VECTORS * count)
                yield from [_convolution(latents // 4**level, count, count)] * 2
        for level, (above, below) in enumerate(pairwise(channels), start=1):
            yield _Map(latents // 4**level, *((below, 4 * above) if way else (4 * above, below)))
        last = channels[-1] * ph * pw // 4 ** (len(channels) - 1)
        yield _Map(sizes.video_rows, *((width, last) if way else (last, width)))


def _convolution(places: int, inputs: int, outputs: int) -> _Map:
    return _Map(places, 9 * inputs, outputs)


def _video_block(config: FactorisedConfig, sizes: _Sizes, exchanges: bool) -> Iterator[_Part]:
    width, heads, rows = config.width, config.num_heads, sizes.video_rows
    yield _modulation(config, width, VIDEO_VECTORS + EXCHANGE_VECTORS * exchanges, sizes.clips * sizes.frames)
    yield from _self_attention(config, width, heads, rows)
    yield _Scores(sizes.clips * sizes.frames, sizes.cells, sizes.cells, width)
    yield from _self_attention(config, width, heads, rows)
    yield _Scores(sizes.clips * sizes.cells, sizes.frames, sizes.frames, width)
    yield from _cross_attention(config, sizes, width, heads, rows)
    yield _Scores(sizes.clips, sizes.frames * sizes.cells, sizes.words, width)
    yield from _feed_forward(config, width, config.hidden, rows)


def _audio_block(config: FactorisedConfig, sizes: _Sizes, exchanges: bool) -> Iterator[_Part]:
    width, heads, rows = config.audio_width, config.audio_heads, sizes.audio_rows
    yield _modulation(config, width, AUDIO_VECTORS + EXCHANGE_VECTORS * exchanges, rows)
    yield from _self_attention(config, width, heads, rows)
    yield _Scores(sizes.clips, sizes.audio, sizes.audio, width)
    yield from _cross_attention(config, sizes, width, heads, rows)
    yield _Scores(sizes.clips, sizes.audio, sizes.words, width)
    yield from _feed_forward(config, width, config.audio_hidden, rows)


def _exchange(config: FactorisedConfig, sizes: _Sizes) -> Iterator[_Part]:
    inner = config.audio_width
    for rows, width in ((sizes.video_rows, config.width), (sizes.audio_rows, config.audio_width)):
        yield _Map(rows, width, 3 * inner, bias=False)
        yield _Vectors(2 * (inner // config.audio_heads))
        yield _Map(rows, inner, width)
        yield _Scores(sizes.clips, sizes.frames * sizes.cells, sizes.audio, inner)


def _modulation(config: FactorisedConfig, width: int, num: int, rows: int) -> _Part:
    return _Map(rows, width, num * width) if config.modulation == "own" else _Vectors(num * width)


def _self_attention(config: FactorisedConfig, width: int, heads: int, rows: int) -> Iterator[_Part]:
    each = width // heads
    yield _Map(rows, width, (heads + 2 * config.key_heads(heads)) * each, bias=False)
    yield _Vectors(2 * each)
    yield _Map(rows, width, width)


def _cross_attention(config: FactorisedConfig, sizes: _Sizes, width: int, heads: int, rows: int) -> Iterator[_Part]:
    yield _Map(rows, width, width, bias=False)
    yield _Map(sizes.clips * sizes.words, config.text_width, 2 * width, bias=False)
    yield _Vectors(2 * (width // heads))
    yield _Map(rows, width, width)


def _feed_forward(config: FactorisedConfig, width: int, hidden: int, rows: int) -> Iterator[_Part]:
    yield _Map(rows, width, (1 if config.feed_forward == "gelu" else 2) * hidden)
    yield _Map(rows, hidden, width)
