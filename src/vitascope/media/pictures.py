"""Contact sheets and spectrograms, as pictures (3, H, W) uint8, and writing a picture to a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vitascope.core.errors import MediaError, ShapeError
from vitascope.media.files import atomic_file, write_errors
from vitascope.media.frames import resize

PICTURE_SUFFIXES: dict[str, str] = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_GAP_PX = 4
_TEXT_PX = 12
_PAPER = (250, 250, 250)
_INK = (20, 20, 25)
_HEAT = ((0, 0, 12), (70, 15, 110), (190, 50, 85), (250, 150, 40), (252, 252, 190))
"""Colours of a spectrogram, quiet to loud."""


def write_picture(path: Path | str, picture: Tensor) -> None:
    """Write (3, H, W) uint8 as PNG, JPEG or WebP, by suffix. Raises MediaError where it cannot be written."""
    path = Path(path)
    kind = PICTURE_SUFFIXES.get(path.suffix.lower())
    if kind is None:
        raise MediaError(f"{path} cannot be written as a picture; valid suffixes: {', '.join(PICTURE_SUFFIXES)}")
    with atomic_file(path) as file, write_errors(path):
        to_image(picture).save(file, kind, **({"quality": 92} if kind == "JPEG" else {}))


def to_image(picture: Tensor) -> Image.Image:
    """(3, H, W) uint8 as a Pillow image. Raises ShapeError for anything else."""
    if picture.ndim != 3 or picture.shape[0] != 3 or picture.dtype != torch.uint8:
        raise ShapeError(f"a picture must be (3, H, W) uint8, got {tuple(picture.shape)} {picture.dtype}")
    return Image.fromarray(picture.permute(1, 2, 0).contiguous().cpu().numpy())


def from_image(image: Image.Image) -> Tensor:
    """A Pillow image as (3, H, W) uint8."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def contact_sheet(
    clips: Sequence[Tensor],
    captions: Sequence[str] = (),
    sounds: Sequence[Tensor | None] = (),
    *,
    num_columns: int = 8,
    sample_rate_hz: int = 16000,
    frame_height_px: int | None = None,
) -> Tensor:
    """One row per clip (T, 3, H, W) uint8: `num_columns` frames spread evenly over it, the first and last among them.

    `captions` stand above the rows, spectrograms of `sounds` (N,) below; frames are scaled to `frame_height_px`.
    """
    if not clips:
        raise ShapeError("a contact sheet needs at least one clip")
    rows = []
    for index, clip in enumerate(clips):
        shown = _spread(clip, num_columns)
        if frame_height_px is not None:
            shown = resize(shown, max(1, round(clip.shape[-1] * frame_height_px / clip.shape[-2])), frame_height_px)
        sound = sounds[index] if index < len(sounds) else None
        rows.append(_row(shown, captions[index] if index < len(captions) else "", sound, sample_rate_hz))
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), _PAPER)
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return from_image(sheet)


def _spread(clip: Tensor, num_columns: int) -> Tensor:
    if clip.ndim != 4 or clip.shape[0] < 1:
        raise ShapeError(f"a clip must be (T, 3, H, W) with T at least 1, got {tuple(clip.shape)}")
    count = max(1, min(num_columns, clip.shape[0]))
    return clip[torch.linspace(0, clip.shape[0] - 1, count).round().long()]


def _row(frames: Tensor, caption: str, sound: Tensor | None, sample_rate_hz: int) -> Image.Image:
    """Caption, frames side by side, spectrogram."""
    count, _, height, width = frames.shape
    inner = count * (width + _GAP_PX) - _GAP_PX
    font = ImageFont.load_default(size=_TEXT_PX)
    lines = wrap(caption, max(8, int(inner / (_TEXT_PX * 0.52)))) if caption else []
    text_px = len(lines) * (_TEXT_PX + 3)
    sound_px = 0 if sound is None else max(32, height // 3)
    total = _GAP_PX + text_px + height + (sound_px + _GAP_PX if sound_px else 0) + _GAP_PX
    row = Image.new("RGB", (inner + 2 * _GAP_PX, total), _PAPER)
    draw = ImageDraw.Draw(row)
    for number, line in enumerate(lines):
        draw.text((_GAP_PX, _GAP_PX // 2 + number * (_TEXT_PX + 3)), line, fill=_INK, font=font)
    top = _GAP_PX + text_px
    for number, frame in enumerate(frames):
        row.paste(to_image(frame), (_GAP_PX + number * (width + _GAP_PX), top))
    if sound is not None:
        strip = spectrogram_picture(sound, sample_rate_hz, inner, sound_px)
        row.paste(to_image(strip), (_GAP_PX, top + height + _GAP_PX))
    return row


def spectrogram_picture(
    samples: Tensor, sample_rate_hz: int, width_px: int = 640, height_px: int = 160, floor_db: float = -80.0
) -> Tensor:
    """Short-time spectrum of (N,) samples: time to the right, frequency (mel-like: linear to 1 kHz, then log) upwards.

    Levels from `floor_db` to 0 dB, where 0 dB is a sine of full scale.
    """
    if samples.ndim != 1:
        raise ShapeError(f"sound is mono, of shape (N,), got {tuple(samples.shape)}")
    if width_px < 1 or height_px < 1:
        raise ShapeError(f"a picture of {width_px} x {height_px} px cannot be made; both must be at least 1")
    window = torch.hann_window(max(64, round(0.032 * sample_rate_hz)))
    data = samples.detach().to("cpu", torch.float32)
    size = window.numel()
    padded = torch.nn.functional.pad(data, (size // 2, size // 2 + size))
    hop = max(1, data.numel() // width_px)
    power = torch.stft(padded, size, hop, window=window, center=False, return_complex=True).abs()
    level_db = 20 * torch.log10(power * 2 / window.sum() + 1e-10)
    mel_top = 2595 * np.log10(1 + sample_rate_hz / 2 / 700)
    edges_hz = 700 * (10 ** (torch.linspace(0, float(mel_top), height_px) / 2595) - 1)
    bins = (edges_hz / (sample_rate_hz / 2) * (level_db.shape[0] - 1)).round().long().flip(0)
    last = max(0, min(level_db.shape[1] - 1, data.numel() // hop))
    columns = torch.linspace(0, last, width_px).round().long()
    heat = ((level_db[bins][:, columns] - floor_db) / -floor_db).clamp(0, 1)
    return _heat_colours(heat)


def _heat_colours(heat: Tensor) -> Tensor:
    """(H, W) in [0, 1] to (3, H, W) uint8 along the scale."""
    scale = torch.tensor(_HEAT, dtype=torch.float32)
    position = heat * (len(scale) - 1)
    low = position.floor().long().clamp(0, len(scale) - 2)
    share = (position - low)[..., None]
    return (scale[low] * (1 - share) + scale[low + 1] * share).round().to(torch.uint8).permute(2, 0, 1).contiguous()
