"""What a run leaves: a folder that makes clips, of the trained parts, the codecs that they were trained with, and a
pipeline.json that says how it is sampled."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from vitascope.core.protocols import Capabilities
from vitascope.core.shapes import ClipFormat
from vitascope.core.tracks import AUDIO
from vitascope.diffusion.guidance import Guidance
from vitascope.diffusion.sampling_schedule import SamplingSchedule
from vitascope.tasks.discover import SETTINGS
from vitascope.tasks.pipeline import Defaults
from vitascope.training.codecs import CodecFiles
from vitascope.weights.checkpoint import save_checkpoint
from vitascope.weights.config import config_to_dict


def usual_defaults(clip: ClipFormat, can: Capabilities) -> Defaults:
    """As the pocket model is sampled; what concerns sound only where there is any."""
    guidance = Guidance(2.5, {AUDIO: 2.0}, {AUDIO: 2.0}) if AUDIO in can.tracks else Guidance(2.5)
    overlap = min(Defaults.overlap_frames, clip.num_frames - 1)
    return Defaults(clip, 24, guidance, schedule=SamplingSchedule(shift=3.0), overlap_frames=max(1, overlap))


def export_parts(folder: Path, parts: Mapping[str, tuple[nn.Module, str]], trained_on: Mapping[str, str]) -> list[Path]:
    """Write the trained parts (a module and its family, by name) in half precision.

    trained_on: what the weights belong to, kept in their files' heads.
    """
    paths = []
    for name, (module, family) in parts.items():
        paths.append(folder / f"{name}.safetensors")
        tensors = {key: value.half() for key, value in module.state_dict().items()}
        save_checkpoint(paths[-1], tensors, family, module.config, trained_on)
    return paths


def complete_folder(folder: Path, files: CodecFiles, defaults: Defaults, can: Capabilities) -> None:
    """Put beside the trained parts the codecs of the tracks that they have, and pipeline.json unless there is one:
    whoever changed it knows better."""
    codecs = {"video_codec": files.video} | ({"audio_codec": files.audio} if AUDIO in can.tracks else {})
    for name, source in codecs.items():
        place = folder / f"{name}.safetensors"
        if not (place.exists() and place.samefile(source)):
            shutil.copyfile(source, place)
    settings = folder / SETTINGS
    if not settings.exists():
        settings.write_text(json.dumps(config_to_dict(defaults), indent=2) + "\n", encoding="utf-8")
