"""Losses of the video codec. Frames are (B, 3, T, H, W) in [-1, 1]."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class VideoCodecWeights:
    """Weights of the terms: absolute error, squared error, spatial and temporal differences, KL and preview."""

    absolute: float = 1.0
    squared: float = 4.0
    edges: float = 0.5
    change: float = 0.5
    kl: float = 5e-4
    preview: float = 0.5


def reconstruction_terms(frames: Tensor, decoded: Tensor) -> dict[str, Tensor]:
    """Absolute and squared error, and absolute errors of the differences between neighbours in space and in time."""
    error = decoded - frames
    rows, columns = error.diff(dim=3).abs().mean(), error.diff(dim=4).abs().mean()
    change = error.diff(dim=2).abs().mean() if error.shape[2] > 1 else error.new_zeros(())
    return {"absolute": error.abs().mean(), "squared": error.square().mean(), "edges": rows + columns, "change": change}


def psnr(mean_squared_error: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB for values in [-1, 1] (peak to peak 2)."""
    return 10.0 * torch.log10(4.0 / mean_squared_error.clamp(min=1e-12))
