"""Files of all kinds read, and damaged ones refused in one line."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from vitascope.core.errors import MediaError
from vitascope.media.reading import ReadLimits, read_audio, read_image, read_metadata, read_video
from vitascope.media.writing import write_clip


def grey_clip(num_frames: int = 6, size: int = 32) -> torch.Tensor:
    levels = torch.linspace(30, 220, num_frames).to(torch.uint8)
    return levels[:, None, None, None].expand(num_frames, 3, size, size)


def write_wav(path: Path, samples: np.ndarray, rate_hz: int) -> None:
    """Samples (channels, N) float32 as 16-bit WAV."""
    layout = "mono" if len(samples) == 1 else "stereo"
    with av.open(path, "w") as container:
        stream = container.add_stream("pcm_s16le", rate=rate_hz, layout=layout)
        data = (samples.T.reshape(1, -1) * 32767).round().astype(np.int16)
        frame = av.AudioFrame.from_ndarray(data, format="s16", layout=layout)
        frame.sample_rate = rate_hz
        frame.time_base = Fraction(1, rate_hz)
        frame.pts = 0
        container.mux([*stream.encode(frame), *stream.encode(None)])


def test_images_are_rgb_upright_and_opaque(tmp_path: Path) -> None:
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[0, 0] = (250, 10, 20)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").shape == (3, 4, 6)
    assert read_image(tmp_path / "a.png")[:, 0, 0].tolist() == [250, 10, 20]

    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    turned = read_image(tmp_path / "turned.png")
    assert turned.shape == (3, 6, 4)
    assert turned[:, 0, 3].tolist() == [250, 10, 20]

    Image.new("RGBA", (4, 4), (200, 100, 50, 0)).save(tmp_path / "clear.png")
    assert (read_image(tmp_path / "clear.png") == 0).all()
    Image.fromarray(np.full((4, 4), 65535, np.uint16)).save(tmp_path / "deep.png")
    assert (read_image(tmp_path / "deep.png") == 255).all()
    Image.new("P", (4, 4)).save(tmp_path / "palette.gif")
    assert read_image(tmp_path / "palette.gif").shape == (3, 4, 4)


@pytest.mark.parametrize("read", [read_image, read_video, lambda path: read_audio(path, 16000)])
def test_missing_empty_and_damaged_files_are_one_line(tmp_path: Path, read, capfd: pytest.CaptureFixture[str]) -> None:
    write_clip(tmp_path / "good.mp4", grey_clip(), 12.0, torch.zeros(8000), 16000)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "good.png")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("not a clip\n" * 50)
    (tmp_path / "noise.png").write_bytes(np.random.default_rng(1).bytes(4000))
    for name in ("good.mp4", "good.png"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / f"half-{name}").write_bytes(data[: len(data) // 3])
    for name in ("missing.mp4", "empty", "text.mp4", "noise.png", "half-good.mp4", "half-good.png", "."):
        with pytest.raises(MediaError) as caught:
            read(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert str(tmp_path) in str(caught.value)
    assert capfd.readouterr().err == ""


def test_what_is_too_large_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    Image.new("L", (9000, 2)).save(tmp_path / "wide.png")
    with pytest.raises(MediaError, match=r"9000 x 2 px; at most 8192 px"):
        read_image(tmp_path / "wide.png")
    write_clip(tmp_path / "clip.mp4", grey_clip(6), 12.0, torch.zeros(8000), 16000)
    with pytest.raises(MediaError, match="too large"):
        read_video(tmp_path / "clip.mp4", limits=ReadLimits(side_px=16))
    with pytest.raises(MediaError, match=r"too long.*\(3 were read\)"):
        read_video(tmp_path / "clip.mp4", limits=ReadLimits(decoded_bytes=3 * 3 * 32 * 32))
    with pytest.raises(MediaError, match="too long: more than 0 s of sound"):
        read_audio(tmp_path / "clip.mp4", 16000, limits=ReadLimits(duration_s=0.2))
    assert read_video(tmp_path / "clip.mp4", num_frames=3, limits=ReadLimits(decoded_bytes=9216)).frames.shape[0] == 3


def test_sound_is_mixed_to_mono_and_resampled(tmp_path: Path) -> None:
    time_s = np.arange(44100) / 44100
    tone = (0.5 * np.sin(2 * np.pi * 440 * time_s)).astype(np.float32)
    write_wav(tmp_path / "tone.wav", np.stack([tone, tone]), 44100)
    samples = read_audio(tmp_path / "tone.wav", 16000)
    assert samples.shape == pytest.approx((16000,), abs=16)
    expected = 0.5 * torch.sin(2 * math.pi * 440 * torch.arange(len(samples)) / 16000)
    assert (samples - expected)[200:-200].abs().max() < 0.01


def test_the_sound_of_a_clip_covers_its_frames(tmp_path: Path) -> None:
    write_clip(tmp_path / "short.mp4", grey_clip(12), 12.0, torch.full((4000,), 0.25), 16000)
    clip = read_video(tmp_path / "short.mp4", sample_rate_hz=16000)
    assert clip.samples is not None
    assert clip.samples.shape == (16000,)
    assert clip.samples[-8000:].abs().max() < 1e-3
    first = read_video(tmp_path / "short.mp4", num_frames=3, sample_rate_hz=16000)
    assert first.samples is not None
    assert first.samples.shape == (4000,)
    assert (first.samples - clip.samples[:4000]).abs().max() < 1e-5
    write_clip(tmp_path / "silent.mp4", grey_clip(2), 12.0)
    assert read_video(tmp_path / "silent.mp4").samples is None
    with pytest.raises(MediaError, match="has no sound"):
        read_audio(tmp_path / "silent.mp4", 16000)
    write_wav(tmp_path / "sound.wav", np.zeros((1, 100), np.float32), 16000)
    with pytest.raises(MediaError, match="has no picture"):
        read_video(tmp_path / "sound.wav")


def test_a_varying_frame_rate_is_held_along_the_average(tmp_path: Path) -> None:
    """Ten frames at 20 a second, then ten at 5: about 8 a second over 2.4 s, each shown as long as it was."""
    path = tmp_path / "varying.mkv"
    times_ms = [50 * index for index in range(10)] + [500 + 200 * index for index in range(10)]
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=20)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for index, time_ms in enumerate(times_ms):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 10 * index + 20, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time_ms, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    clip = read_video(path)
    shown_s = torch.arange(clip.frames.shape[0]) / clip.fps
    index = (clip.frames[:, 0, 16, 16].float() - 20) / 10
    expected = torch.searchsorted(torch.tensor(times_ms) / 1000, shown_s + 1e-6, right=True) - 1
    assert (index - expected).abs().max() < 0.4
    assert clip.duration_s == pytest.approx(2.4, abs=0.2)


def test_tags_of_a_file_without_any_are_empty_or_technical(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.gif")
    assert read_metadata(tmp_path / "plain.gif") == {}
    write_clip(tmp_path / "plain.mp4", grey_clip(2), 12.0)
    assert "vitascope" not in read_metadata(tmp_path / "plain.mp4")
