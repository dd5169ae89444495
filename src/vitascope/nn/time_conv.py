"""3-D convolution whose clip goes on as its first and last frame, whole or in chunks of time with the same result.

B batch, T frames, H and W rows and columns, C channels; activations are channels-last, (B, T, H, W, C). A layer that
looks ahead gives each frame once it has seen the frames after it, so what comes out of a chunk may be fewer frames than
went in, or none; nothing is worked out twice.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor, nn

from vitascope.nn.resample import Block


class TimeStream:
    """What the layers of one run hold back between chunks, along axis 1, each under its own key.

    `ending` says that what a layer is given now is the end of the clip. A whole clip is a stream of one chunk that is
    both its beginning and its end.
    """

    def __init__(self, ending: bool = False) -> None:
        self.ending = ending
        self._held: dict[Hashable, Tensor] = {}
        self._begun: set[Hashable] = set()

    def begins(self, key: Hashable, x: Tensor) -> bool:
        """Whether `x` has the first frames that were ever asked about under this key."""
        if key in self._begun or not x.shape[1]:
            return False
        self._begun.add(key)
        return True

    def windows(self, key: Hashable, x: Tensor, size: int, step: int = 1, edges: tuple[int, int] = (0, 0)) -> Tensor:
        """The frames, those held back and then `x`, that fill windows of `size` frames, `step` apart; holds the rest.

        edges: how often the clip's first frame is shown again before it, and its last frame after it.
        """
        held = self._held.pop(key, None)
        if self.begins(key, x):
            held = _again(x[:, :1], edges[0])
        parts = [x] if held is None else [held, x]
        if self.ending and edges[1]:
            last = x if x.shape[1] or held is None else held
            parts.append(_again(last[:, -1:], edges[1]))
        frames = _joined(parts)
        num = max(0, (frames.shape[1] - size) // step + 1)
        self._hold(key, frames[:, num * step :])
        return frames[:, : size + (num - 1) * step if num else 0]

    def take(self, key: Hashable, x: Tensor, num: int) -> Tensor:
        """The next `num` of the frames held back and then `x`; holds the rest."""
        held = self._held.pop(key, None)
        frames = x if held is None else _joined([held, x])
        self._hold(key, frames[:, num:])
        return frames[:, :num]

    def num_bytes(self) -> int:
        """Memory that the stream holds between chunks."""
        return sum(held.numel() * held.element_size() for held in self._held.values())

    def _hold(self, key: Hashable, frames: Tensor) -> None:
        if frames.shape[1] and not self.ending:
            # a view would keep the whole chunk alive
            self._held[key] = frames.clone()


class TimeConv3d(nn.Conv3d):
    """3 x 3 x 3 taps: zeros around a frame, the first frame before the clip and, unless `causal`, the last after it.

    (B, T, H, W, C_in) -> (B, T', H', W', C_out), one frame in `stride[0]`; with `causal` it sees the past alone.
    Without a stream the input is the whole clip.
    """

    def __init__(self, in_channels: int, out_channels: int, causal: bool, stride: Block = (1, 1, 1)) -> None:
        super().__init__(in_channels, out_channels, (3, 3, 3), stride, (0, 1, 1))
        self.edges = (2, 0) if causal else (1, 1)

    def forward(self, input: Tensor, stream: TimeStream | None = None) -> Tensor:
        stream = TimeStream(ending=True) if stream is None else stream
        x = stream.windows(self, input, 3, self.stride[0], self.edges)
        if not x.shape[1]:
            size = [-(-side // step) for side, step in zip(x.shape[2:4], self.stride[1:], strict=True)]
            return x.new_empty(len(x), 0, *size, self.out_channels)
        return super().forward(x.movedim(-1, 1)).movedim(1, -1)


def _again(frame: Tensor, num: int) -> Tensor:
    return frame.expand(-1, num, -1, -1, -1)


def _joined(parts: list[Tensor]) -> Tensor:
    """Along axis 1, without a copy where only one has frames."""
    filled = [part for part in parts if part.shape[1]]
    return torch.cat(filled, 1) if len(filled) > 1 else (filled or parts)[0]
