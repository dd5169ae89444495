"""The trained codecs that the denoiser's data go through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from vitascope.core.errors import CheckpointError
from vitascope.core.protocols import AudioCodec, VideoCodec
from vitascope.models.codecs.causal_video.config import CausalVideoConfig
from vitascope.models.codecs.causal_video.model import CausalVideoCodec
from vitascope.models.codecs.waveform.config import WaveformConfig
from vitascope.models.codecs.waveform.model import WaveformCodec
from vitascope.weights.checkpoint import Checkpoint, file_digest, load_checkpoint, load_into
from vitascope.weights.config import config_from_dict


@dataclass(frozen=True)
class Codecs:
    """The two codecs, on their device."""

    video: VideoCodec
    audio: AudioCodec


@dataclass(frozen=True)
class CodecFiles:
    """Where the weights of the two codecs are."""

    video: Path
    audio: Path

    def digests(self) -> dict[str, str]:
        """Content hashes by name. Raises CheckpointError when a file cannot be read."""
        return {"video_codec": file_digest(self.video), "audio_codec": file_digest(self.audio)}

    def load(self, device: torch.device) -> Codecs:
        """The codecs with their weights, in fp32 and eval mode, without gradients. Raises CheckpointError."""
        video = _load(self.video, {"causal_video": _causal_video}, device)
        audio = _load(self.audio, {"waveform": _waveform}, device)
        assert isinstance(video, CausalVideoCodec)
        assert isinstance(audio, WaveformCodec)
        return Codecs(video, audio)


def _causal_video(checkpoint: Checkpoint) -> nn.Module:
    return CausalVideoCodec(config_from_dict(CausalVideoConfig, checkpoint.config))


def _waveform(checkpoint: Checkpoint) -> nn.Module:
    return WaveformCodec(config_from_dict(WaveformConfig, checkpoint.config))


def _load(path: Path, families: dict[str, Callable[[Checkpoint], nn.Module]], device: torch.device) -> nn.Module:
    checkpoint = load_checkpoint(path)
    if checkpoint.family not in families:
        known = ", ".join(families)
        raise CheckpointError(f"{path} holds a model of family {checkpoint.family!r}, but one of {known} is needed")
    model = families[checkpoint.family](checkpoint)
    load_into(model, checkpoint.tensors, name=path.name)
    return model.eval().requires_grad_(False).to(device)
