"""The trained codecs that the denoiser's data go through."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from vitascope.core.protocols import AudioCodec, VideoCodec
from vitascope.models import build_model
from vitascope.models.codecs.causal_video.model import CausalVideoCodec
from vitascope.models.codecs.waveform.model import WaveformCodec
from vitascope.weights.checkpoint import file_digest, load_checkpoint


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
        video = _load(self.video, "causal_video", device)
        audio = _load(self.audio, "waveform", device)
        assert isinstance(video, CausalVideoCodec)
        assert isinstance(audio, WaveformCodec)
        return Codecs(video, audio)


def _load(path: Path, family: str, device: torch.device) -> nn.Module:
    return build_model(load_checkpoint(path, family=family), path.name).to(device)
