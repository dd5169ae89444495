"""What is judged: a clip as pixels and samples, wherever it came from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vitascope.core.errors import ShapeError

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Footage:
    """A clip: frames (T, 3, H, W) uint8, samples (N,) float32 in [-1, 1] or None, frames and samples a second."""

    frames: Tensor
    audio: Tensor | None
    fps: float
    sample_rate_hz: int = 16000

    def __post_init__(self) -> None:
        if self.frames.ndim != 4 or self.frames.shape[1] != 3:
            raise ShapeError(f"frames must be (T, 3, H, W), got {tuple(self.frames.shape)}")
        if self.audio is not None and self.audio.ndim != 1:
            raise ShapeError(f"audio must be (N,), got {tuple(self.audio.shape)}")

    @property
    def pixels(self) -> Floats:
        """Frames as (T, H, W, 3) float32 in [0, 255]."""
        return self.frames.detach().cpu().permute(0, 2, 3, 1).float().numpy()

    @property
    def samples(self) -> Floats:
        """Samples (N,) float32; empty when the clip is silent by construction."""
        return np.zeros(0, np.float32) if self.audio is None else self.audio.detach().cpu().float().numpy()
