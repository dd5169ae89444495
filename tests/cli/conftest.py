"""Running `vitascope generate` with the tiny model, and files to give it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vitascope.cli.app import main
from vitascope.media.pictures import write_picture
from vitascope.media.writing import write_clip

PROMPT = "a red ball bounces"


@pytest.fixture
def run(tiny_model: Path) -> Callable[..., int]:
    """`vitascope generate` with a prompt (None for none), the tiny model on the CPU and these arguments."""

    def run(*arguments: object, prompt: str | None = PROMPT) -> int:
        words = [] if prompt is None else [prompt]
        return main(["generate", *words, "--model", str(tiny_model), "--device", "cpu", *map(str, arguments)])

    return run


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with picture.png (48 x 40 px), clip.mp4 (32 x 32 px, 14 frames at 12 fps, with sound), fast.mkv (40 x
    24 px, 12 frames at 24 fps, silent), sound.mkv (1 s of sound), and damaged ones."""
    folder = tmp_path / "files"
    folder.mkdir()
    draw = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (14, 3, 32, 32), generator=draw, dtype=torch.uint8)
    tone = torch.sin(torch.arange(18667) * 0.1) * 0.5
    write_picture(folder / "picture.png", frames[0].repeat(1, 2, 2)[:, :40, :48])
    write_clip(folder / "clip.mp4", frames, 12, tone, 16000)
    write_clip(folder / "fast.mkv", frames[:12].repeat(1, 1, 1, 2)[:, :, :24, :40], 24)
    write_clip(folder / "sound.mkv", frames[:12], 12, tone[:16000], 16000)
    whole = (folder / "picture.png").read_bytes()
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    (folder / "noise.mp4").write_bytes(bytes(range(256)) * 20)
    (folder / "empty.wav").write_bytes(b"")
    return folder
