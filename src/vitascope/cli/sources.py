"""The files that a clip is made from: read once, and the format that follows from them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING

from vitascope.cli.reporting import say
from vitascope.core.errors import InputError, ShapeError

if TYPE_CHECKING:
    from torch import Tensor

    from vitascope.core.shapes import ClipFormat
    from vitascope.media.reading import Clip
    from vitascope.tasks.pipeline import Pipeline
    from vitascope.tasks.request import Given, Keyframe


@dataclass(frozen=True)
class Sources:
    """The files a clip is made from, and the name of a camera move; recorded in its recipe."""

    image: str = ""
    keyframes: tuple[str, ...] = ()
    audio: str = ""
    video: str = ""
    extend: str = ""
    camera: str = ""
    shots: tuple[str, ...] = ()


@dataclass(frozen=True)
class Lengths:
    """What the command line says of the format; None where it says nothing."""

    seconds: float | None = None
    num_frames: int | None = None
    width: int | None = None
    height: int | None = None
    fps: float | None = None

    @property
    def fixed(self) -> bool:
        """Whether a length was asked for."""
        return self.seconds is not None or self.num_frames is not None


@dataclass(frozen=True)
class Material:
    """What the files hold: pictures at times, clips at times with their strength and file, sound (N,) at the model's
    rate, clips to give sound to and to extend."""

    keyframes: tuple[Keyframe, ...] = ()
    shots: tuple[tuple[float, Clip, float, str], ...] = ()
    audio: Tensor | None = None
    video: Clip | None = None
    extend: Clip | None = None


def read_material(sources: Sources, sample_rate_hz: int) -> Material:
    """Read the files of `sources`. Raises MediaError or InputError."""
    from vitascope.media.reading import read_audio, read_image, read_video
    from vitascope.tasks.request import Keyframe

    keyframes = [Keyframe(0.0, read_image(sources.image), 1.0, sources.image)] if sources.image else []
    for text in sources.keyframes:
        time_s, path, strength = parse_keyframe(text)
        keyframes.append(Keyframe(time_s, read_image(path), strength, path))
    video = read_video(sources.video) if sources.video else None
    if video is not None and (video.frames.shape[-1] % 2 or video.frames.shape[-2] % 2):
        height, width = video.frames.shape[-2:]
        raise ShapeError(f"{sources.video} is {width} x {height} px; to be written again both must be even")
    shots = []
    for text in sources.shots:
        time_s, path, strength = parse_keyframe(text)
        shots.append((time_s, read_video(path), strength, path))
    return Material(
        tuple(keyframes),
        tuple(shots),
        read_audio(sources.audio, sample_rate_hz) if sources.audio else None,
        video,
        read_video(sources.extend, sample_rate_hz=sample_rate_hz) if sources.extend else None,
    )


def parse_keyframe(text: str) -> tuple[float, str, float]:
    """TIME:FILE[:STRENGTH] to its parts; colons inside FILE are kept. Raises InputError."""
    from vitascope.tasks.request import is_number

    time, _, rest = text.partition(":")
    path, _, strength = rest.rpartition(":")
    if not path or not is_number(strength):
        path, strength = rest, "1"
    if not is_number(time) or not path:
        raise InputError(f"keyframe {text!r} is not TIME:FILE[:STRENGTH], for example 1.0:ball.png:0.8")
    return float(time), path, float(strength)


def clip_format(pipeline: Pipeline, lengths: Lengths, material: Material) -> ClipFormat:
    """The format asked for, over that of the material, over the pipeline's own.

    A clip to extend gives its size. A clip to give sound to, or a sound, gives its length, rounded up to whole latent
    frames. Raises InputError (ShapeError) for what does not fit.
    """
    base = pipeline.defaults.clip
    if lengths.seconds is not None and lengths.num_frames is not None:
        raise InputError("give --seconds or --num-frames, not both")
    if material.extend is not None:
        height, width = material.extend.frames.shape[-2:]
        base = replace(base, width_px=width, height_px=height)
    fmt = replace(
        base,
        width_px=base.width_px if lengths.width is None else lengths.width,
        height_px=base.height_px if lengths.height is None else lengths.height,
        fps=base.fps if lengths.fps is None else lengths.fps,
    )
    pipeline.check_format(fmt)
    if lengths.num_frames is not None:
        fmt = replace(fmt, num_frames=lengths.num_frames)
    elif lengths.seconds is not None:
        fmt = replace(fmt, num_frames=_asked_frames(pipeline, lengths.seconds, fmt.fps, material.extend is not None))
    else:
        fmt = replace(fmt, num_frames=_source_frames(pipeline, fmt, material))
    pipeline.check_format(fmt)
    if material.video is not None and lengths.fixed and fmt.duration_s > material.video.duration_s + 1 / fmt.fps:
        raise InputError(f"{fmt.duration_s:.3f} s are asked for, the given video has {material.video.duration_s:.3f} s")
    return fmt


def _asked_frames(pipeline: Pipeline, seconds: float, fps: float, added: bool) -> int:
    """Frames of `seconds`; where they are `added` to a clip, its last one and as many new ones, a stride or more."""
    frames = pipeline.frames_for(seconds, fps)
    return max(frames, 1 + pipeline.video_codec.strides.time) if added else frames


def _source_frames(pipeline: Pipeline, fmt: ClipFormat, material: Material) -> int:
    """As long as the given video, or as the given sound up to the model's own length, else the model's own length."""
    own, stride = fmt.num_frames, pipeline.video_codec.strides.time
    if material.video is not None:
        return _covering(material.video.duration_s * fmt.fps, stride)
    if material.audio is None:
        return own
    frames = len(material.audio) / fmt.sample_rate_hz * fmt.fps
    needed = _covering(frames + 1 if material.extend is not None else frames, stride)
    if needed > own:
        say(f"note: the first {own / fmt.fps:.3f} s of the sound are used; --seconds asks for more")
    return min(own, needed)


def _covering(frames: float, stride: int) -> int:
    """The smallest 1 + k * stride that is at least `frames`."""
    return 1 + max(0, ceil((frames - 1) / stride - 1e-6)) * stride


def given_of(material: Material, camera: str, fmt: ClipFormat, time_stride: int = 1) -> Given:
    """What is known of a clip of format `fmt`. time_stride: of the model, to whose steps shots are cut."""
    from vitascope.media.frames import fit, fit_samples, resample_frames
    from vitascope.tasks.camera import named_camera_path
    from vitascope.tasks.request import Given, Shot

    video = None
    shots = []
    for time_s, clip, strength, path in material.shots:
        count = max(1, min(fmt.num_frames, round(clip.duration_s * fmt.fps)))
        count = 1 + (count - 1) // time_stride * time_stride
        frames = resample_frames(clip.frames, clip.fps, fmt.fps, count)
        shots.append(Shot(time_s, fit(frames, fmt.width_px, fmt.height_px), strength, path))
    if material.video is not None:
        frames = resample_frames(material.video.frames, material.video.fps, fmt.fps, fmt.num_frames)
        video = fit(frames, fmt.width_px, fmt.height_px)
    return Given(
        material.keyframes,
        audio=None if material.audio is None else fit_samples(material.audio, fmt.num_samples),
        video=video,
        camera=named_camera_path(camera, fmt) if camera else None,
        shots=tuple(shots),
    )
