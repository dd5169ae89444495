"""Floor 4: model families, one folder each, by the name that their checkpoints carry.

To add a family: a folder with its configuration and model (a denoiser has presets too), and a line in FAMILIES.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitascope.core.errors import choice
from vitascope.weights.checkpoint import Checkpoint, load_checkpoint, load_into
from vitascope.weights.config import config_from_dict


@dataclass(frozen=True)
class Family:
    """Where the model and the configuration of a family are: "module:class", imported when they are needed.

    presets: "module:name" of configurations by name, which is what can be trained as a denoiser.
    """

    model: str
    config: str
    presets: str = ""

    def build(self, config: dict[str, Any]) -> nn.Module:
        """The model of a stored configuration, with fresh weights. Raises CheckpointError for keys that do not fit."""
        return named(self.model)(config_from_dict(named(self.config), config))


FAMILIES: dict[str, Family] = {
    "causal_video": Family(
        "vitascope.models.codecs.causal_video.model:CausalVideoCodec",
        "vitascope.models.codecs.causal_video.config:CausalVideoConfig",
    ),
    "waveform": Family(
        "vitascope.models.codecs.waveform.model:WaveformCodec",
        "vitascope.models.codecs.waveform.config:WaveformConfig",
    ),
    "bytes": Family(
        "vitascope.models.text.bytes.model:ByteTextEncoder",
        "vitascope.models.text.bytes.config:BytesConfig",
    ),
    "factorised": Family(
        "vitascope.models.factorised.model:FactorisedDenoiser",
        "vitascope.models.factorised.config:FactorisedConfig",
        "vitascope.models.factorised.presets:PRESETS",
    ),
    "wan": Family(
        "vitascope.models.wan.model:WanDenoiser",
        "vitascope.models.wan.config:WanConfig",
        "vitascope.models.wan.presets:PRESETS",
    ),
    "ltx": Family(
        "vitascope.models.ltx.model:LTXDenoiser",
        "vitascope.models.ltx.config:LTXConfig",
        "vitascope.models.ltx.presets:PRESETS",
    ),
    "mochi": Family(
        "vitascope.models.mochi.model:MochiDenoiser",
        "vitascope.models.mochi.config:MochiConfig",
        "vitascope.models.mochi.presets:PRESETS",
    ),
    "ltx_upsampler": Family(
        "vitascope.models.ltx_upsampler.model:LTXUpsampler",
        "vitascope.models.ltx_upsampler.config:LTXUpsamplerConfig",
    ),
    "wan_codec": Family(
        "vitascope.models.codecs.wan.model:WanCodec", "vitascope.models.codecs.wan.config:WanCodecConfig"
    ),
    "ltx_codec": Family(
        "vitascope.models.codecs.ltx.model:LTXCodec", "vitascope.models.codecs.ltx.config:LTXCodecConfig"
    ),
    "mochi_codec": Family(
        "vitascope.models.codecs.mochi.model:MochiCodec", "vitascope.models.codecs.mochi.config:MochiCodecConfig"
    ),
}


DENOISERS = tuple(name for name, family in FAMILIES.items() if family.presets)
"""The families of denoisers: each can be trained, and stand in a folder of ours."""


def build_model(checkpoint: Checkpoint, name: str = "") -> nn.Module:
    """The model of a checkpoint with its weights, in eval mode and without gradients.

    Raises InputError for a family that is not known, CheckpointError for weights that do not fit.
    """
    family = FAMILIES[choice("family", checkpoint.family, FAMILIES)]
    model = family.build(checkpoint.config)
    load_into(model, checkpoint.tensors, name=name)
    return model.eval().requires_grad_(False)


def load_model(path: str | Path, device: torch.device | str = "cpu") -> nn.Module:
    """The model in a file, in fp32, on `device`. Raises CheckpointError (InputError for an unknown family)."""
    return build_model(load_checkpoint(path), Path(path).name).to(device)


def named(place: str) -> Any:
    """What is called "module:name"; the module is imported."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)
