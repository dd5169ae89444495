"""Clips to files, frame by frame, with sound and the recipe inside. T frames, H and W px, N samples."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol, Self, cast

import av
import numpy as np
import torch
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.error import FFmpegError
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from av.video.stream import VideoStream
from PIL import Image
from torch import Tensor

from vitascope.core.errors import InputError, MediaError, ShapeError
from vitascope.core.shapes import nearest_multiples
from vitascope.media.files import atomic_file, check_writable, write_errors

_AUDIO_BLOCK = 4096


@dataclass(frozen=True)
class Container:
    """One kind of file: the muxer, the codecs and their options; sound None where the kind has none."""

    muxer: str
    video_codec: str
    audio_codec: str | None
    video_options: Mapping[str, str]
    muxer_options: Mapping[str, str]


# Macroblock-tree rate control reads memory that nobody has written: on small frames one encoding in five came out with
# other bytes. Without it 120 of 120 agreed.
_X264 = {"crf": "16", "preset": "medium", "x264-params": "mbtree=0"}
CONTAINERS: dict[str, Container] = {
    ".mp4": Container("mp4", "libx264", "aac", _X264, {"movflags": "use_metadata_tags"}),
    ".mov": Container("mov", "libx264", "aac", _X264, {"movflags": "use_metadata_tags"}),
    ".mkv": Container("matroska", "libx264", "aac", _X264, {}),
    ".webm": Container("webm", "libvpx-vp9", "libopus", {"crf": "20", "b": "0", "cpu-used": "4"}, {}),
    ".gif": Container("gif", "gif", None, {}, {}),
}
"""By suffix, what a clip can be written as."""


def check_output(path: Path | str) -> Path:
    """The path, if a clip can be written there now; else MediaError. To be asked before the work is done, not after."""
    path = Path(path)
    _container(path)
    return check_writable(path)


def write_clip(
    path: Path | str,
    frames: Tensor,
    fps: float,
    samples: Tensor | None = None,
    sample_rate_hz: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write frames (T, 3, H, W) uint8 and sound (N,) in [-1, 1] as one file. See ClipWriter."""
    if samples is not None and sample_rate_hz is None:
        raise InputError("samples need their sample_rate_hz")
    _check_frames(frames)
    height_px, width_px = frames.shape[-2:]
    rate_hz = sample_rate_hz if samples is not None else None
    with ClipWriter(path, width_px, height_px, fps, sample_rate_hz=rate_hz, metadata=metadata) as writer:
        writer.write_frames(frames)
        if samples is not None:
            writer.write_samples(samples)


class ClipWriter:
    """Writes one clip as it comes: frames and samples in any order and in pieces of any length.

    A context manager: leaving it in peace puts the file in place; on any exception nothing is left behind. The kind of
    file follows the suffix (CONTAINERS). `sample_rate_hz` None means a silent clip; sound is written at 48 kHz (or 44.1
    kHz if it comes at that), and a GIF drops it. `metadata` becomes the tags of the file. The same frames, samples and
    tags give the same bytes. Raises ShapeError for odd sizes (chroma is halved), MediaError where the file cannot be
    written.
    """

    def __init__(
        self,
        path: Path | str,
        width_px: int,
        height_px: int,
        fps: float,
        *,
        sample_rate_hz: int | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._path = Path(path)
        self._kind = _container(self._path)
        if not fps > 0:
            raise ShapeError(f"a frame rate must be positive, got {fps}")
        if sample_rate_hz is not None and sample_rate_hz < 1:
            raise ShapeError(f"a sample rate must be positive, got {sample_rate_hz} Hz")
        if self._kind.muxer != "gif":
            _check_even(width_px, "width")
            _check_even(height_px, "height")
        self._size = (height_px, width_px)
        self._fps = Fraction(fps).limit_denominator(1001)
        self._sample_rate_hz = sample_rate_hz
        self._metadata = dict(metadata or {})
        self._stack = ExitStack()
        self._sink: _Sink | None = None

    def __enter__(self) -> Self:
        file = self._stack.enter_context(atomic_file(self._path))
        with self._stack, write_errors(self._path):
            if self._kind.muxer == "gif":
                self._sink = _GifSink(file, self._fps, self._metadata)
            else:
                self._sink = _AvSink(file, self._kind, self._size, self._fps, self._sample_rate_hz, self._metadata)
            self._stack = self._stack.pop_all()
        return self

    def write_frames(self, frames: Tensor) -> None:
        """Append frames (T, 3, H, W) uint8 of the clip's size."""
        _check_frames(frames)
        if tuple(frames.shape[-2:]) != self._size:
            raise ShapeError(
                f"frames are {frames.shape[-1]} x {frames.shape[-2]} px, "
                f"the clip is {self._size[1]} x {self._size[0]} px"
            )
        with write_errors(self._path):
            self._open_sink().frames(frames.permute(0, 2, 3, 1).contiguous().cpu().numpy())

    def write_samples(self, samples: Tensor) -> None:
        """Append sound (N,) in [-1, 1] (clipped beyond). Raises InputError for a clip opened without sound."""
        if self._sample_rate_hz is None:
            raise InputError("this clip was opened without sound; give ClipWriter a sample_rate_hz")
        if samples.ndim != 1:
            raise ShapeError(f"sound is mono, of shape (N,), got {tuple(samples.shape)}")
        data = samples.detach().to("cpu", torch.float32)
        if not bool(data.isfinite().all()):
            raise InputError("the samples hold values that are not numbers")
        with write_errors(self._path):
            self._open_sink().samples(data.clamp(-1, 1).numpy())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            sink, self._sink = self._open_sink(), None
            if error is None:
                with write_errors(self._path):
                    sink.finish()
                self._stack.pop_all().close()
            else:
                sink.abandon()
                self._stack.pop_all().__exit__(kind, error, trace)

    def _open_sink(self) -> _Sink:
        if self._sink is None:
            raise MediaError(f"{self._path} is not open for writing; use ClipWriter in a with statement")
        return self._sink


class _Sink(Protocol):
    """Where pictures (T, H, W, 3) uint8 and samples (N,) float32 go."""

    def frames(self, pictures: np.ndarray) -> None: ...
    def samples(self, samples: np.ndarray) -> None: ...
    def finish(self) -> None: ...
    def abandon(self) -> None: ...


class _HonestFile:
    """The file as FFmpeg writes to it. PyAV drops some errors of a file on the way: the first is kept to be raised."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._error: OSError | None = None

    def write(self, data: bytes) -> int:
        if self._error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self._error = error
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def check(self) -> None:
        if self._error is not None:
            raise self._error


class _AvSink:
    """Encoders and a muxer of FFmpeg, writing into a Python file."""

    def __init__(
        self,
        file: BinaryIO,
        kind: Container,
        size: tuple[int, int],
        fps: Fraction,
        sample_rate_hz: int | None,
        metadata: Mapping[str, str],
    ) -> None:
        self._file = _HonestFile(file)
        self._container = av.open(self._file, "w", format=kind.muxer, options=dict(kind.muxer_options))
        self._container.metadata.update(metadata)
        video = self._container.add_stream(kind.video_codec, rate=fps, options=dict(kind.video_options))
        self._video = cast(VideoStream, video)
        self._video.height, self._video.width = size
        self._video.pix_fmt = "yuv420p"
        context = self._video.codec_context
        context.thread_count = (
            1  # x264 with several threads gives other bytes from run to run, and from machine to machine
        )
        context.color_range = ColorRange.MPEG
        context.colorspace = Colorspace.ITU709
        context.color_primaries = ColorPrimaries.BT709
        context.color_trc = ColorTrc.BT709
        self._fps = fps
        self._num_frames = 0
        self._audio: AudioStream | None = None
        if sample_rate_hz is not None and kind.audio_codec is not None:
            rate_hz = 44100 if sample_rate_hz == 44100 and kind.audio_codec == "aac" else 48000
            audio = self._container.add_stream(kind.audio_codec, rate=rate_hz, layout="mono")
            self._audio = cast(AudioStream, audio)
            self._audio.bit_rate = 128_000
            self._resampler = AudioResampler(format="fltp", layout="mono", rate=rate_hz)
            self._input_rate_hz = sample_rate_hz
            self._num_samples = 0

    def frames(self, pictures: np.ndarray) -> None:
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
            frame.pts = self._num_frames
            frame.time_base = 1 / self._fps
            self._num_frames += 1
            self._container.mux(self._video.encode(frame))
            self._file.check()

    def samples(self, samples: np.ndarray) -> None:
        if self._audio is None:
            return
        for start in range(0, len(samples), _AUDIO_BLOCK):
            frame = av.AudioFrame.from_ndarray(samples[None, start : start + _AUDIO_BLOCK], format="flt", layout="mono")
            frame.sample_rate = self._input_rate_hz
            frame.time_base = Fraction(1, self._input_rate_hz)
            frame.pts = self._num_samples
            self._num_samples += frame.samples
            for piece in self._resampler.resample(frame):
                self._container.mux(self._audio.encode(piece))
            self._file.check()

    def finish(self) -> None:
        if not self._num_frames:
            raise MediaError("a clip without frames cannot be written")
        if self._audio is not None:
            for piece in self._resampler.resample(None):
                self._container.mux(self._audio.encode(piece))
            self._container.mux(self._audio.encode(None))
        self._container.mux(self._video.encode(None))
        self._container.close()
        self._file.check()

    def abandon(self) -> None:
        try:
            self._container.close()
        except (FFmpegError, OSError):
            return  # what made us give up is being raised already


class _GifSink:
    """An animated GIF: a palette per frame, delays in hundredths of a second that on average keep the clip's time."""

    def __init__(self, file: BinaryIO, fps: Fraction, metadata: Mapping[str, str]) -> None:
        self._file = file
        self._fps = fps
        self._comment = json.dumps(dict(metadata)).encode() if metadata else b""
        self._images: list[Image.Image] = []

    def frames(self, pictures: np.ndarray) -> None:
        self._images += [Image.fromarray(picture).quantize(256, dither=Image.Dither.NONE) for picture in pictures]

    def samples(self, samples: np.ndarray) -> None:
        return  # GIF has no sound

    def finish(self) -> None:
        if not self._images:
            raise MediaError("a clip without frames cannot be written")
        ends = [round((index + 1) * 100 / self._fps) for index in range(len(self._images))]
        delays_ms = [10 * (end - start) for start, end in zip([0, *ends], ends, strict=False)]
        first, *rest = self._images
        first.save(
            self._file, "GIF", save_all=True, append_images=rest, duration=delays_ms, loop=0, comment=self._comment
        )

    def abandon(self) -> None:
        self._images.clear()


def _container(path: Path) -> Container:
    kind = CONTAINERS.get(path.suffix.lower())
    if kind is None:
        shown = path.suffix or "no suffix"
        raise MediaError(f"{path} cannot be written as a clip ({shown}); valid suffixes: {', '.join(CONTAINERS)}")
    return kind


def _check_frames(frames: Tensor) -> None:
    if frames.ndim != 4 or frames.shape[1] != 3 or frames.dtype != torch.uint8:
        raise ShapeError(f"frames must be (T, 3, H, W) uint8, got {tuple(frames.shape)} {frames.dtype}")


def _check_even(size_px: int, name: str) -> None:
    if size_px < 2 or size_px % 2:
        near = ", ".join(map(str, nearest_multiples(size_px, 2)))
        raise ShapeError(f"{name} {size_px} px cannot be encoded: it must be even; nearest: {near}")
