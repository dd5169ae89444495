"""Denoisers on several processes: tokens shared (any of Wan, LTX and Mochi), or matrices (these and the factorised).

Every process is given the whole call and gives the whole result, so nothing above knows. Sharing tokens makes a step
faster and leaves a process with all weights; sharing matrices leaves it with its part of them, and exchanges more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from vitascope.core.errors import CapabilityError
from vitascope.core.protocols import FULL, Capabilities, Denoiser, TemporalStrategy
from vitascope.core.tracks import TextContext, Tracks
from vitascope.models.ltx.model import LTXDenoiser
from vitascope.models.mochi.model import MochiDenoiser, Stream
from vitascope.models.wan.model import WanCrossAttention, WanDenoiser
from vitascope.nn.attention import CrossAttention, Exchange, SelfAttention
from vitascope.nn.feed_forward import FeedForward
from vitascope.parallel.matrices import Cut, Divider
from vitascope.parallel.ranks import Ranks
from vitascope.parallel.tokens import Sharing

SHARES_TOKENS = (WanDenoiser, LTXDenoiser, MochiDenoiser)


class SharedDenoiser:
    """`core.protocols.Denoiser` whose tokens several processes share.

    Raises CapabilityError for a family that cannot, ShapeError for heads that do not fit the sharing and, when called,
    for fewer tokens than processes.
    """

    def __init__(self, denoiser: Denoiser, sharing: Sharing) -> None:
        if not isinstance(denoiser, SHARES_TOKENS):
            raise CapabilityError(
                f"{type(denoiser).__name__} does not share tokens between processes; valid: Wan, LTX and Mochi; "
                "tensor divides the matrices of any"
            )
        sharing.check_heads(denoiser.config.num_heads, denoiser.config.num_heads)
        self.denoiser, self.sharing = denoiser, sharing

    @property
    def capabilities(self) -> Capabilities:
        """Those of the denoiser."""
        return self.denoiser.capabilities

    def prepare(self, text: TextContext) -> TextContext:
        """As the denoiser does: every process has all words."""
        return self.denoiser.prepare(text)

    def __call__(
        self,
        tracks: Tracks,
        text: TextContext,
        camera: Tensor | None = None,
        strategy: TemporalStrategy = FULL,
    ) -> dict[str, Tensor]:
        """What the denoiser alone would give, on every process."""
        return self.denoiser(tracks, text, camera, strategy, self.sharing)


def _self_attention(layer: SelfAttention, place: str, divide: Divider) -> None:
    (heads, key_heads, _), each = layer.head_counts, layer.each
    divide.rows(layer, place, "qkv", divide.cut(0, layer.head_counts, each))
    divide.columns(layer, place, "out", divide.cut(1, [heads], each))
    if layer.kind.norm == "all":
        divide.norm(layer, place, "norm_q", divide.cut(0, [heads], each))
        if key_heads > 1 or heads == 1:
            divide.norm(layer, place, "norm_k", divide.cut(0, [key_heads], each))
    layer.kind = divide.kind(layer.kind, heads)
    q, k, v = (own.stop - own.start for own in divide.cut(0, layer.head_counts).ranges)
    layer.head_counts = (q, k, v)


def _cross_attention(layer: CrossAttention, place: str, divide: Divider) -> None:
    each, heads = layer.each, layer.q.out_features // layer.each
    divide.rows(layer, place, "q", divide.cut(0, [heads], each))
    divide.rows(layer, place, "kv", divide.cut(0, [heads] * 2, each))
    divide.columns(layer, place, "out", divide.cut(1, [heads], each))
    for name in ("norm_q", "norm_k") if layer.kind.norm == "all" else ():
        divide.norm(layer, place, name, divide.cut(0, [heads], each))


def _wan_cross_attention(layer: WanCrossAttention, place: str, divide: Divider) -> None:
    each, heads = layer.each, layer.q.out_features // layer.each
    _cross_attention(layer, place, divide)
    if layer.image_kv is not None:
        divide.rows(layer, place, "image_kv", divide.cut(0, [heads] * 2, each))
        divide.norm(layer, place, "image_norm_k", divide.cut(0, [heads], each))


def _exchange(layer: Exchange, place: str, divide: Divider) -> None:
    each, heads = layer.each, layer.out_a.in_features // layer.each
    for side in ("a", "b"):
        divide.rows(layer, place, f"qkv_{side}", divide.cut(0, [heads] * 3, each))
        divide.columns(layer, place, f"out_{side}", divide.cut(1, [heads], each))


def _stream(layer: Stream, place: str, divide: Divider) -> None:
    each, heads = layer.each, layer.qkv.out_features // layer.each // 3
    divide.rows(layer, place, "qkv", divide.cut(0, [heads] * 3, each))
    if layer.out is not None:
        divide.columns(layer, place, "out", divide.cut(1, [heads], each))


def _mochi(model: MochiDenoiser, place: str, divide: Divider) -> None:
    divide.parameter(model, place, "frequencies", divide.cut(1, [model.config.num_heads]))


def _feed_forward(layer: FeedForward, place: str, divide: Divider) -> None:
    hidden = layer.fall.in_features
    parts = [hidden] * (layer.rise.out_features // hidden)
    divide.rows(layer, place, "rise", divide.cut(0, parts, what="hidden units"))
    divide.columns(layer, place, "fall", divide.cut(1, [hidden], what="hidden units"))


DIVISIONS: dict[type[nn.Module], Callable[[Any, str, Divider], None]] = {
    SelfAttention: _self_attention,
    CrossAttention: _cross_attention,
    WanCrossAttention: _wan_cross_attention,
    Exchange: _exchange,
    Stream: _stream,
    MochiDenoiser: _mochi,
    FeedForward: _feed_forward,
}
"""How the layers of denoisers are divided; what is not named here is small, and every process has it whole."""


def divide_matrices(denoiser: nn.Module, ranks: Ranks) -> dict[str, Cut]:
    """Leave this process its heads and hidden units of every layer, in place; what it keeps of each weight, by name.

    On the meta device this costs nothing, and the weights can then be loaded as they are cut. Raises ShapeError where a
    layer has fewer heads or hidden units than there are processes, CapabilityError where it is divided, quantised or
    adapted already; the denoiser is then useless.
    """
    divide = Divider(ranks)
    for place, layer in list(denoiser.named_modules()):
        act = DIVISIONS.get(type(layer))
        if act is not None:
            act(layer, place, divide)
    return divide.cuts
