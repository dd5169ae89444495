"""Who may read whom: causality between latent frames and audio tokens, in seconds.

T video frames (of tokens), A audio tokens. Every token stands for a stretch of time [start, end). The rules, for the
strategies "causal" and "window":

- a video frame reads frames up to its own (in a window: `TemporalStrategy`), by index;
- anything that audio takes part in is decided by ends: a token reads another only if the other ends no later, to
  within TOLERANCE_S. As this order is transitive, no chain of layers carries anything back from the future;
- for windows an audio token counts as belonging to the first video frame that ends no earlier than it. It reads and is
  read as that frame would be. Without a video track there are no frames to count, and a window is plain causality.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitascope.core.errors import ShapeError
from vitascope.core.protocols import TemporalStrategy
from vitascope.nn.attention import Visibility

TOLERANCE_S = 1e-3


@dataclass(frozen=True)
class Spans:
    """Centre and end in seconds of every token along time, each (T,)."""

    centres: Tensor
    ends: Tensor

    @staticmethod
    def of(times_s: Tensor, patch: int) -> Spans:
        """Of tokens that each cover `patch` neighbours of the latents centred at `times_s` (T * patch,).

        Raises ShapeError if they do not fill whole tokens.
        """
        if times_s.shape[0] % patch:
            raise ShapeError(f"{times_s.shape[0]} latents along time do not fill tokens of {patch}")
        times = times_s.float()
        return Spans(times.unflatten(0, (-1, patch)).mean(1), _ends(times)[patch - 1 :: patch])


def _ends(times: Tensor) -> Tensor:
    """Ends of touching stretches with these centres.

    All stretches but the first have one length, except that the first of a clip (the lone first frame of a causal
    codec) may be shorter: it begins at 0 where that fits.
    """
    if times.shape[0] == 1:
        return 2 * times
    gaps = times.diff()
    half = gaps[1:2] / 2 if times.shape[0] > 2 else gaps - torch.minimum(times[:1], gaps / 2)
    return times + torch.cat([gaps[:1] - half, half, gaps[1:] / 2])


@dataclass(frozen=True)
class Masks:
    """Masks of a call, None where everything is seen: video over time (T, T), audio (A, A), and the exchanges."""

    video: Tensor | None = None
    audio: Tensor | None = None
    video_sees_audio: Visibility | None = None
    audio_sees_video: Visibility | None = None


def build_masks(strategy: TemporalStrategy, video: Spans | None, audio: Spans | None, cells: int) -> Masks:
    """The masks of `strategy`; `cells` video tokens a frame stand side by side in the exchanges."""
    if strategy.kind == "full":
        return Masks()
    over_time = None if video is None else _by_index(_indices(video), _indices(video), strategy)
    if audio is None:
        return Masks(video=over_time)
    if video is None:
        return Masks(audio=_ends_by(audio, audio))
    of_audio = torch.searchsorted(video.ends + TOLERANCE_S, audio.ends.contiguous())
    of_video = _indices(video)
    return Masks(
        over_time,
        _by_index(of_audio, of_audio, strategy) & _ends_by(audio, audio),
        Visibility.of((_by_index(of_video, of_audio, strategy) & _ends_by(video, audio)).repeat_interleave(cells, 0)),
        Visibility.of((_by_index(of_audio, of_video, strategy) & _ends_by(audio, video)).repeat_interleave(cells, 1)),
    )


def _indices(video: Spans) -> Tensor:
    return torch.arange(video.ends.shape[0], device=video.ends.device)


def _by_index(reader: Tensor, read: Tensor, strategy: TemporalStrategy) -> Tensor:
    """(readers, read): whether a frame index may read another."""
    behind = reader[:, None] - read[None, :]
    if strategy.kind == "causal":
        return behind >= 0
    anchors = read % strategy.anchor_every == 0
    return (behind >= 0) & ((behind < strategy.window) | anchors[None, :])


def _ends_by(reader: Spans, read: Spans) -> Tensor:
    """(readers, read): whether the one read ends no later than the reader."""
    return read.ends[None, :] <= reader.ends[:, None] + TOLERANCE_S
