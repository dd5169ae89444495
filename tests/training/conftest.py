"""Untrained codecs of a few thousand weights, and what is made with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vitascope.core.shapes import ClipFormat
from vitascope.models.codecs.causal_video.config import CausalVideoConfig, Level
from vitascope.models.codecs.causal_video.model import CausalVideoCodec
from vitascope.models.codecs.waveform.config import WaveformConfig, WaveLevel
from vitascope.models.codecs.waveform.model import WaveformCodec
from vitascope.training.checkpoints import list_checkpoints, read_checkpoint, write_checkpoint
from vitascope.training.codecs import CodecFiles
from vitascope.training.pool import PoolSpec
from vitascope.weights.checkpoint import save_checkpoint
from vitascope.world.casting import SceneMix

VIDEO = CausalVideoConfig(
    latent_channels=4, patch_px=2, levels=(Level(8, 1, 1), Level(8, 1, 1, (4, 2, 2))), preview_channels=4, preview_px=2
)
AUDIO = WaveformConfig(
    latent_channels=6, levels=(WaveLevel(8, 16, decoder_blocks=1), WaveLevel(8, 20, decoder_blocks=1))
)


@pytest.fixture(scope="session")
def tiny_presets() -> tuple[CausalVideoConfig, WaveformConfig]:
    """Configurations of the codecs: strides 4 and 4 channels, a hop of 320 and 6 channels."""
    return VIDEO, AUDIO


@pytest.fixture(scope="session")
def codec_files(tmp_path_factory: pytest.TempPathFactory) -> CodecFiles:
    """Both codecs as they are before training."""
    folder = tmp_path_factory.mktemp("codecs")
    files = CodecFiles(folder / "video_codec.safetensors", folder / "audio_codec.safetensors")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_checkpoint(files.video, CausalVideoCodec(VIDEO).state_dict(), "causal_video", VIDEO)
        save_checkpoint(files.audio, WaveformCodec(AUDIO).state_dict(), "waveform", AUDIO)
    return files


@pytest.fixture
def pool_spec(codec_files: CodecFiles) -> PoolSpec:
    """Six clips of 32 x 32 px and 9 frames in shards of 3."""
    fmt = ClipFormat(width_px=32, height_px=32, num_frames=9)
    return PoolSpec(codec_files.digests(), SceneMix(), fmt, num_clips=6, shard_clips=3)


def _assert_same(a: Any, b: Any, where: str = "state") -> None:
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=where)
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            _assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for place, (one, other) in enumerate(zip(a, b, strict=True)):
            _assert_same(one, other, f"{where}[{place}]")
    else:
        assert a == b, where


@pytest.fixture
def losses_that_resume(tmp_path: Path) -> Callable[[Callable[[], Any], Callable[[Any, int], list[float]]], list[float]]:
    """The losses of four steps by a trainer that is made and takes steps so. Fails unless two steps, a checkpoint and
    two more by another one give the same, and the same state, to the bit."""

    def check(make: Callable[[], Any], take: Callable[[Any, int], list[float]]) -> list[float]:
        whole, first, second = make(), make(), make()
        losses = take(whole, 4)
        assert take(first, 2) == losses[:2]
        write_checkpoint(tmp_path, 2, first.state_dict(), keep=1)
        second.load_state_dict(read_checkpoint(list_checkpoints(tmp_path)[-1][1]))
        assert take(second, 2) == losses[2:]
        _assert_same(second.state_dict(), whole.state_dict())
        return losses

    return check


@pytest.fixture
def assert_same() -> Callable[[Any, Any], None]:
    """Fails, naming the place, unless two nests of dicts, lists and tensors are equal to the bit."""
    return _assert_same
