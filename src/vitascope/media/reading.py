"""Pictures, video and sound from files. T frames, H and W px, N samples; RGB uint8 and mono float32 in [-1, 1]."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import av
import numpy as np
import torch
from av.audio.resampler import AudioResampler
from av.container import InputContainer
from av.sidedata.sidedata import Type as SideData
from PIL import Image, ImageOps
from torch import Tensor

from vitascope.core.errors import MediaError
from vitascope.media.files import check_readable, read_errors
from vitascope.media.frames import fit_samples


@dataclass(frozen=True)
class ReadLimits:
    """What is refused rather than decoded: px per side, bytes of decoded frames, seconds of sound."""

    side_px: int = 8192
    decoded_bytes: int = 4 * 2**30
    duration_s: float = 3600.0


LIMITS = ReadLimits()


@dataclass(frozen=True)
class Clip:
    """A video file in memory: frames (T, 3, H, W) uint8 at a constant rate, and its sound (N,) or None.

    The sound covers the frames exactly: sample 0 is heard when frame 0 appears, and N = ceil(T / fps * sample_rate_hz).
    """

    frames: Tensor
    fps: float
    samples: Tensor | None
    sample_rate_hz: int | None

    @property
    def duration_s(self) -> float:
        """Seconds that the frames are shown for."""
        return self.frames.shape[0] / self.fps


def read_image(path: Path | str, limits: ReadLimits = LIMITS) -> Tensor:
    """A picture (3, H, W) uint8, turned upright by its EXIF tag, transparency over black, 16 bits scaled to 8."""
    path = check_readable(path)
    with read_errors(path, "a picture"), Image.open(path) as image:
        _check_size(path, *image.size, limits)
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I") or upright.mode == "F":
            grey = np.asarray(upright, dtype=np.float64) / (257.0 if upright.mode.startswith("I") else 1.0)
            upright = Image.fromarray(grey.clip(0, 255).round().astype(np.uint8))
        rgba = upright.convert("RGBA")
        rgb = Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba).convert("RGB")
        return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous()


def read_video(
    path: Path | str,
    num_frames: int | None = None,
    sample_rate_hz: int | None = None,
    limits: ReadLimits = LIMITS,
) -> Clip:
    """A video with its sound.

    `num_frames` stops after as many frames; `sample_rate_hz` resamples the sound (None: as the file has it). A file of
    varying frame rate is brought to its average rate by its time stamps. Raises MediaError for a file that is missing,
    damaged, without a picture, or beyond `limits`.
    """
    path = check_readable(path)
    with read_errors(path, "a video"):
        with av.open(path) as container:
            frames, times_s, fps = _decode_frames(path, container, num_frames, limits)
        duration_s = frames.shape[0] / fps
        with av.open(path) as container:
            if not container.streams.audio:
                return Clip(frames, fps, None, None)
            rate_hz = sample_rate_hz or container.streams.audio[0].rate
            samples = _decode_samples(path, container, rate_hz, times_s[0], duration_s, limits)
        return Clip(frames, fps, fit_samples(samples, ceil(duration_s * rate_hz - 1e-6)), rate_hz)


def read_audio(path: Path | str, sample_rate_hz: int, limits: ReadLimits = LIMITS) -> Tensor:
    """The sound of an audio or video file, mixed to one channel and resampled: (N,) float32 in [-1, 1]."""
    path = check_readable(path)
    with read_errors(path, "sound"), av.open(path) as container:
        if not container.streams.audio:
            raise MediaError(f"{path} has no sound")
        samples = _decode_samples(path, container, sample_rate_hz, None, None, limits)
        if not len(samples):
            raise MediaError(f"{path} has no sound")
        return samples


def read_metadata(path: Path | str) -> dict[str, str]:
    """The tags of a file, with keys in lower case (Matroska and WebM keep them in capitals)."""
    path = check_readable(path)
    if path.suffix.lower() == ".gif":
        return _gif_tags(path)
    with read_errors(path, "a video"), av.open(path) as container:
        return {key.lower(): value for key, value in container.metadata.items()}


def _gif_tags(path: Path) -> dict[str, str]:
    """Tags are kept as a JSON object in the comment of a GIF; any other comment is the tag "comment"."""
    with read_errors(path, "a picture"), Image.open(path) as image:
        comment = image.info.get("comment", b"")
    text = comment.decode("utf-8", "replace") if isinstance(comment, bytes) else str(comment)
    try:
        tags = json.loads(text)
    except ValueError:
        tags = None
    if isinstance(tags, dict):
        return {str(key).lower(): str(value) for key, value in tags.items()}
    return {"comment": text} if text else {}


def _decode_frames(
    path: Path, container: InputContainer, num_frames: int | None, limits: ReadLimits
) -> tuple[Tensor, list[float], float]:
    """Frames (T, 3, H, W), the time of each in seconds, and the rate."""
    if not container.streams.video:
        raise MediaError(f"{path} has no picture")
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    _check_size(path, stream.width, stream.height, limits)
    rate = stream.average_rate or stream.guessed_rate
    pictures: list[Tensor] = []
    times_s: list[float] = []
    num_bytes = 0
    for frame in container.decode(stream):
        pixels = torch.from_numpy(frame.to_ndarray(format="rgb24"))
        num_bytes += pixels.numel()
        if num_bytes > limits.decoded_bytes:
            raise MediaError(
                f"{path} is too long: more than {limits.decoded_bytes / 2**30:.1f} GiB of frames "
                f"({len(pictures)} were read)"
            )
        pictures.append(_upright(pixels, frame))
        times_s.append(float(frame.time) if frame.time is not None else len(times_s) / float(rate or 25))
        if num_frames is not None and len(pictures) >= num_frames:
            break
    if not pictures:
        raise MediaError(f"{path} has no picture")
    frames = torch.stack(pictures).permute(0, 3, 1, 2).contiguous()
    fps = float(rate) if rate and _is_regular(times_s, float(rate)) else _average_rate(times_s)
    return (frames if _is_regular(times_s, fps) else _constant_rate(frames, times_s, fps)), times_s, fps


def _upright(pixels: Tensor, frame: av.VideoFrame) -> Tensor:
    """Pixels (H, W, 3) turned as the file's display matrix asks (videos of phones)."""
    turns = round(float(frame.rotation) / 90) % 4 if SideData.DISPLAYMATRIX in frame.side_data else 0
    return torch.rot90(pixels, turns) if turns else pixels


def _average_rate(times_s: list[float]) -> float:
    span_s = times_s[-1] - times_s[0]
    return (len(times_s) - 1) / span_s if span_s > 0 else 25.0


def _is_regular(times_s: list[float], fps: float) -> bool:
    """Whether each frame comes within half a step of its place on the grid of 1 / fps."""
    return all(abs(time_s - times_s[0] - index / fps) <= 0.5 / fps for index, time_s in enumerate(times_s))


def _constant_rate(frames: Tensor, times_s: list[float], fps: float) -> Tensor:
    """Frames (T, ...) of any times held along the grid of 1 / fps."""
    times = torch.tensor(times_s, dtype=torch.float64) - times_s[0]
    count = max(1, round(float(times[-1]) * fps) + 1)
    shown = torch.searchsorted(times, torch.arange(count, dtype=torch.float64) / fps + 1e-6, right=True) - 1
    return frames[shown.clamp(0, len(times_s) - 1)]


def _decode_samples(
    path: Path,
    container: InputContainer,
    rate_hz: int,
    origin_s: float | None,
    duration_s: float | None,
    limits: ReadLimits,
) -> Tensor:
    """Sound (N,), from `origin_s` on the file's clock (None: from its first sample), placed by its time stamps.

    Stops `duration_s` after the origin.
    """
    if rate_hz < 1:
        raise MediaError(f"a sample rate of {rate_hz} Hz cannot be made")
    longest_s = limits.duration_s if duration_s is None else duration_s
    pieces: list[Tensor] = []
    first_s: float | None = None
    num_samples = 0
    for piece, time_s in _resampled(container, rate_hz):
        first_s = time_s if first_s is None else first_s
        pieces.append(piece)
        num_samples += len(piece)
        lead_s = 0.0 if origin_s is None else first_s - origin_s
        if num_samples / rate_hz + lead_s > longest_s:
            if duration_s is None:
                raise MediaError(f"{path} is too long: more than {longest_s:.0f} s of sound")
            break
    samples = torch.cat(pieces) if pieces else torch.zeros(0)
    if not bool(samples.isfinite().all()):
        raise MediaError(f"{path} has samples that are not numbers")
    shift = 0 if origin_s is None or first_s is None else round((first_s - origin_s) * rate_hz)
    samples = torch.cat([samples.new_zeros(shift), samples]) if shift > 0 else samples[-shift:]
    return samples.clamp(-1, 1)


def _resampled(container: InputContainer, rate_hz: int) -> Iterator[tuple[Tensor, float]]:
    """Pieces of sound (n,) at rate_hz, the mean of all channels, and the file's time of the frame each comes from."""
    resampler = AudioResampler(format="fltp", rate=rate_hz)
    time_s = 0.0
    for frame in container.decode(audio=0):
        time_s = float(frame.time) if frame.time is not None else time_s
        for piece in resampler.resample(frame):
            yield torch.from_numpy(piece.to_ndarray()).mean(0), time_s
    for piece in resampler.resample(None):
        yield torch.from_numpy(piece.to_ndarray()).mean(0), time_s


def _check_size(path: Path, width_px: int, height_px: int, limits: ReadLimits) -> None:
    if max(width_px, height_px) > limits.side_px:
        raise MediaError(f"{path} is too large: {width_px} x {height_px} px; at most {limits.side_px} px a side")
