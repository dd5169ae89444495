"""Embeddings of noise levels, seconds, places, cameras and labels. B batch, T latent frames, D width."""

from __future__ import annotations

from math import log

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitascope.core.errors import InputError, ShapeError
from vitascope.core.tracks import TextContext
from vitascope.ops.rope import periods_to_frequencies

CAMERA_NUMBERS = 7
"""Position x, y, z; yaw, pitch, roll in radians; field of view in degrees."""


def sinusoidal(values: Tensor, width: int, min_period: float, max_period: float) -> Tensor:
    """Cosines and sines of `values` (...,) at width / 2 geometric periods, (..., width) in fp32."""
    frequencies = periods_to_frequencies(width // 2, min_period, max_period, values.device)
    angles = values.float().unsqueeze(-1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


def timestep_features(timesteps: Tensor, width: int) -> Tensor:
    """Cosines and sines of timesteps (...,) in 0..1000, (..., width) in fp32, at frequencies 10000^(-2i / width); a
    zero at the end where the width is odd.

    Source: Ho et al. 2020, after Vaswani et al. 2017; the convention of the public checkpoints.
    """
    exponents = torch.arange(width // 2, dtype=torch.float32, device=timesteps.device) / max(1, width // 2)
    angles = timesteps.float().unsqueeze(-1) * torch.exp(-log(10_000.0) * exponents)
    return F.pad(torch.cat([angles.cos(), angles.sin()], -1), (0, width % 2))


def normal_table(*shape: int, std: float = 1.0) -> nn.Parameter:
    """A table of this shape, drawn from a normal distribution.

    Nothing is drawn on the meta device: torch draws there in Python, and imports its compiler for it, which takes
    longer than reading the weights of a large model.
    """
    table = torch.empty(shape)
    return nn.Parameter(table if table.is_meta else torch.randn(shape) * std)


class LevelEmbedding(nn.Module):
    """Noise levels in [0, 1], of any shape (...), to (..., width): sinusoids, then a small MLP."""

    NUM_SINUSOIDS = 128

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.NUM_SINUSOIDS, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, levels: Tensor) -> Tensor:
        return self.mlp(sinusoidal(levels, self.NUM_SINUSOIDS, 0.01, 8.0))


class SpatialPositions(nn.Module):
    """Learned positions on a base grid of rows x columns, (h * w, width) for any other by bicubic resampling."""

    def __init__(self, rows: int, columns: int, width: int) -> None:
        super().__init__()
        self.grid = normal_table(1, width, rows, columns, std=0.02)

    def forward(self, rows: int, columns: int) -> Tensor:
        grid = self.grid
        if grid.shape[-2:] != (rows, columns):
            grid = F.interpolate(grid.float(), (rows, columns), mode="bicubic", align_corners=False)
        return grid[0].flatten(1).T


class CameraEmbedding(nn.Module):
    """Cameras (B, T, 7) to (B, T, width); a clip (or frame) without a camera gets a learned vector.

    The seven numbers are those of CAMERA_NUMBERS. None means that no clip has a camera; NaN anywhere in a frame's seven
    numbers means that this frame has none, so that a batch may mix both. Raises ShapeError for another last axis.
    """

    NUM_OCTAVES = 4

    def __init__(self, width: int) -> None:
        super().__init__()
        num_features = CAMERA_NUMBERS * (1 + 2 * self.NUM_OCTAVES)
        self.mlp = nn.Sequential(nn.Linear(num_features, width), nn.SiLU(), nn.Linear(width, width))
        self.absent = nn.Parameter(torch.zeros(width))

    def forward(self, camera: Tensor | None) -> Tensor:
        if camera is None:
            return self.absent[None, None]
        if camera.ndim != 3 or camera.shape[-1] != CAMERA_NUMBERS:
            raise ShapeError(f"a camera path is (B, T, {CAMERA_NUMBERS}), got {tuple(camera.shape)}")
        missing = camera.isnan().any(-1, keepdim=True)
        numbers = torch.nan_to_num(camera.float())
        numbers = torch.cat([numbers[..., :6], torch.deg2rad(numbers[..., 6:])], -1)
        octaves = numbers.unsqueeze(-1) * 2.0 ** torch.arange(self.NUM_OCTAVES, device=camera.device)
        features = torch.cat([numbers, octaves.sin().flatten(-2), octaves.cos().flatten(-2)], -1)
        return torch.where(missing, self.absent, self.mlp(features))


class LabelEmbedding(nn.Module):
    """Class labels as a text of one token: (B,) integers in [-1, num_classes) to TextContext; -1 is unconditional."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels: Tensor) -> TextContext:
        """Raises InputError for a label out of range."""
        last = self.table.num_embeddings - 2
        if bool(((labels < -1) | (labels > last)).any()):
            raise InputError(f"class labels lie in 0..{last} (-1 for none), got {labels.tolist()}")
        embeddings = self.table(labels + 1).unsqueeze(1)
        return TextContext(embeddings, torch.ones(embeddings.shape[:2], dtype=torch.bool, device=labels.device))
