"""Clips written and read again: pictures, sound, sync, tags; and what happens when writing fails."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap
from pathlib import Path

import av
import pytest
import torch
from torch import Tensor

from vitascope.core.errors import InputError, MediaError, ShapeError
from vitascope.media.reading import read_metadata, read_video
from vitascope.media.writing import CONTAINERS, ClipWriter, check_output, write_clip

FPS = 12.0
RATE_HZ = 16000
IMPULSES_S = (0.1, 0.5, 1.04, 1.7, 2.0)


def soft_clip(num_frames: int = 25, height: int = 64, width: int = 96) -> Tensor:
    """A soft blob that moves over a gradient, (T, 3, H, W) uint8."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1.5, 1.5, width), indexing="ij")
    frames = []
    for index in range(num_frames):
        blob = torch.exp(-((x + 1 - 2 * index / num_frames) ** 2 + y**2) * 8)
        frames.append(torch.stack([0.2 + 0.7 * blob, 0.3 + 0.2 * x, 0.4 + 0.3 * y * (1 - blob)]))
    return (torch.stack(frames).clamp(0, 1) * 255).round().to(torch.uint8)


def impulses(num_frames: int = 25) -> Tensor:
    samples = torch.zeros(math.ceil(num_frames / FPS * RATE_HZ))
    for time_s in IMPULSES_S:
        if time_s * RATE_HZ >= len(samples):
            break
        samples[round(time_s * RATE_HZ)] = 0.9
    return samples


def psnr(first: Tensor, second: Tensor) -> float:
    return float(10 * torch.log10(255**2 / (first.float() - second.float()).pow(2).mean()))


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm"])
def test_round_trip_keeps_pictures_sound_sync_and_tags(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"clip{suffix}"
    recipe = '{"prompt": "a \\"red\\" ball – bounces", "seed": 7}'
    frames = soft_clip()
    write_clip(path, frames, FPS, impulses(), RATE_HZ, {"vitascope": recipe, "comment": "two\nlines"})
    clip = read_video(path, sample_rate_hz=RATE_HZ)
    assert clip.frames.shape == frames.shape
    assert clip.fps == pytest.approx(FPS)
    assert psnr(clip.frames, frames) > 36
    assert clip.samples is not None
    assert clip.samples.shape == (33334,)
    for time_s in IMPULSES_S:
        start = round((time_s - 0.03) * RATE_HZ)
        heard_s = (start + int(clip.samples[start : start + 960].abs().argmax())) / RATE_HZ
        assert abs(heard_s - time_s) < 0.005
    tags = read_metadata(path)
    assert tags["vitascope"] == recipe
    assert tags["comment"] == "two\nlines"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_mp4_is_h264_yuv420p_bt709_with_aac_at_48_khz(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_clip(path, soft_clip(3), FPS, torch.zeros(4000), RATE_HZ)
    with av.open(path) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert (video.codec_context.name, video.pix_fmt, int(video.codec_context.colorspace)) == ("h264", "yuv420p", 1)
        assert (audio.codec_context.name, audio.rate, audio.layout.name) == ("aac", 48000, "mono")
        assert container.duration is not None


@pytest.mark.parametrize("colour", [(220, 40, 40), (50, 80, 230), (240, 220, 50), (10, 10, 10), (240, 240, 240)])
def test_flat_colours_come_back(tmp_path: Path, colour: tuple[int, int, int]) -> None:
    frames = torch.tensor(colour, dtype=torch.uint8)[None, :, None, None].expand(2, 3, 32, 32)
    write_clip(tmp_path / "flat.mp4", frames, FPS)
    assert (read_video(tmp_path / "flat.mp4").frames.int() - frames.int()).abs().max() <= 3


def test_gif_keeps_frames_time_and_tags(tmp_path: Path) -> None:
    frames = soft_clip(13)
    write_clip(tmp_path / "clip.gif", frames, FPS, impulses(13), RATE_HZ, {"vitascope": "{}"})
    clip = read_video(tmp_path / "clip.gif")
    assert clip.frames.shape == frames.shape
    assert clip.duration_s == pytest.approx(13 / FPS, abs=0.02)
    assert psnr(clip.frames, frames) > 30
    assert clip.samples is None
    assert read_metadata(tmp_path / "clip.gif") == {"vitascope": "{}"}


def test_the_same_clip_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("first", "second"):
        write_clip(tmp_path / f"{name}.mp4", soft_clip(8), FPS, impulses(8), RATE_HZ, {"vitascope": "{}"})
    assert (tmp_path / "first.mp4").read_bytes() == (tmp_path / "second.mp4").read_bytes()


def test_streaming_in_pieces_gives_the_same_clip_as_at_once(tmp_path: Path) -> None:
    frames, samples = soft_clip(10), torch.rand(13334, generator=torch.Generator().manual_seed(0)) * 0.2
    write_clip(tmp_path / "once.mp4", frames, FPS, samples, RATE_HZ)
    with ClipWriter(tmp_path / "pieces.mp4", 96, 64, FPS, sample_rate_hz=RATE_HZ) as writer:
        for index in range(0, 10, 3):
            writer.write_frames(frames[index : index + 3])
            writer.write_samples(samples[index * 1334 : (index + 3) * 1334])
    once, pieces = read_video(tmp_path / "once.mp4"), read_video(tmp_path / "pieces.mp4")
    assert torch.equal(once.frames, pieces.frames)
    assert once.samples is not None
    assert pieces.samples is not None
    assert (once.samples - pieces.samples).abs().max() < 0.02


def test_a_single_frame_and_a_fractional_rate(tmp_path: Path) -> None:
    write_clip(tmp_path / "one.mp4", soft_clip(1), 24000 / 1001)
    clip = read_video(tmp_path / "one.mp4")
    assert clip.frames.shape[0] == 1
    write_clip(tmp_path / "five.mp4", soft_clip(5), 24000 / 1001)
    assert read_video(tmp_path / "five.mp4").fps == pytest.approx(24000 / 1001)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_an_exception_leaves_no_file(tmp_path: Path, suffix: str, error: type[BaseException]) -> None:
    writer = ClipWriter(tmp_path / f"clip{suffix}", 96, 64, FPS, sample_rate_hz=RATE_HZ)
    with pytest.raises(error), writer:
        writer.write_frames(soft_clip(3))
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_gives_one_error_and_no_file(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk; one process tries all, as starting one is dear."""
    script = f"""
        import pathlib, resource, torch
        from vitascope.core.errors import MediaError
        from vitascope.media.writing import write_clip
        folder = pathlib.Path({str(tmp_path)!r})
        noise = torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8)
        for limit in (200, 6000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            for suffix in (".mp4", ".mkv", ".webm", ".gif"):
                try:
                    write_clip(folder / f"clip{{suffix}}", noise, 12.0, torch.rand(8000), 16000)
                except MediaError as error:
                    print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) == 8
    assert all("cannot be written: the file would exceed the size limit" in line for line in lines)
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"valid suffixes: \.mp4, \.mov"):
        check_output(tmp_path / "clip.avi")
    with pytest.raises(MediaError, match="does not exist"):
        check_output(tmp_path / "no" / "clip.mp4")
    with pytest.raises(ShapeError, match="width 97 px cannot be encoded: it must be even; nearest: 96, 98"):
        ClipWriter(tmp_path / "clip.mp4", 97, 64, FPS)
    with pytest.raises(ShapeError, match="frame rate"):
        ClipWriter(tmp_path / "clip.mp4", 96, 64, 0)
    with pytest.raises(ShapeError, match="uint8"):
        write_clip(tmp_path / "clip.mp4", soft_clip(2).float(), FPS)
    with pytest.raises(InputError, match="sample_rate_hz"):
        write_clip(tmp_path / "clip.mp4", soft_clip(2), FPS, torch.zeros(10))
    with pytest.raises(InputError, match="not numbers"):
        write_clip(tmp_path / "clip.mp4", soft_clip(2), FPS, torch.full((10,), math.nan), RATE_HZ)
    with pytest.raises(MediaError, match="without frames"), ClipWriter(tmp_path / "clip.mp4", 96, 64, FPS):
        pass
    with pytest.raises(MediaError, match="not open"):
        ClipWriter(tmp_path / "clip.mp4", 96, 64, FPS).write_frames(soft_clip(1))
    with pytest.raises(ShapeError, match="96 x 64"), ClipWriter(tmp_path / "clip.mp4", 64, 64, FPS) as writer:
        writer.write_frames(soft_clip(1))
    assert list(tmp_path.iterdir()) == []


def test_every_container_has_its_encoders() -> None:
    for kind in CONTAINERS.values():
        assert kind.video_codec in av.codecs_available
        assert kind.audio_codec is None or kind.audio_codec in av.codecs_available
