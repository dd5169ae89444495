"""Frames and samples made to fit: another size, another rate. Frames are (..., 3, H, W), uint8 or float in [0, 1]."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vitascope.core.errors import InputError, ShapeError, choice

Fit = Literal["crop", "stretch", "pad"]
FITS: tuple[Fit, ...] = ("crop", "stretch", "pad")


def resize(frames: Tensor, width_px: int, height_px: int) -> Tensor:
    """Frames (..., C, H, W) at another size, bicubic, low-passed where they shrink; dtype and range are kept."""
    if width_px < 1 or height_px < 1:
        raise ShapeError(f"a size of {width_px} x {height_px} px cannot be made; both must be at least 1")
    if frames.shape[-2:] == (height_px, width_px):
        return frames
    flat = frames.reshape(-1, *frames.shape[-3:])
    is_bytes = frames.dtype == torch.uint8
    scaled = F.interpolate(flat.float(), size=(height_px, width_px), mode="bicubic", antialias=True)
    scaled = scaled.round().clamp(0, 255).to(torch.uint8) if is_bytes else scaled.clamp(0, 1).to(frames.dtype)
    return scaled.reshape(*frames.shape[:-2], height_px, width_px)


def fit(frames: Tensor, width_px: int, height_px: int, how: Fit = "crop") -> Tensor:
    """Frames (..., C, H, W) brought to exactly height_px x width_px.

    "crop" keeps the proportions and cuts what overhangs, evenly on both sides; "pad" keeps all and adds black;
    "stretch" changes the proportions.
    """
    choice("fit", how, FITS)
    height, width = frames.shape[-2:]
    if how == "stretch" or (height, width) == (height_px, width_px):
        return resize(frames, width_px, height_px)
    ratios = (width_px / width, height_px / height)
    scale = max(ratios) if how == "crop" else min(ratios)
    scaled = resize(frames, max(1, round(width * scale)), max(1, round(height * scale)))
    left, top = (width_px - scaled.shape[-1]) // 2, (height_px - scaled.shape[-2]) // 2
    right, bottom = width_px - scaled.shape[-1] - left, height_px - scaled.shape[-2] - top
    return F.pad(scaled, (left, right, top, bottom))


def resample_frames(frames: Tensor, fps: float, new_fps: float, num_frames: int | None = None) -> Tensor:
    """Frames (T, ...) at another rate: each new frame is the one on screen at the middle of its time.

    The duration is kept to within one frame; `num_frames` cuts the result, or repeats its last frame. Raises InputError
    unless both rates are positive and there is a frame.
    """
    if not (fps > 0 and new_fps > 0):
        raise InputError(f"frame rates must be positive, got {fps} and {new_fps}")
    if frames.shape[0] == 0:
        raise InputError("there are no frames to resample")
    count = num_frames if num_frames is not None else max(1, round(frames.shape[0] / fps * new_fps))
    if count < 1:
        raise InputError(f"at least one frame must be asked for, got {count}")
    middles_s = (torch.arange(count, dtype=torch.float64) + 0.5) / new_fps
    index = (middles_s * fps).floor().long().clamp(0, frames.shape[0] - 1)
    return frames[index]


def fit_samples(samples: Tensor, num_samples: int) -> Tensor:
    """Samples (..., N) cut, or padded with silence, to num_samples at the end."""
    length = samples.shape[-1]
    return samples[..., :num_samples] if length >= num_samples else F.pad(samples, (0, num_samples - length))
