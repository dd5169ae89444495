"""Every family: written, found by its name, built from its configuration, and the same model again."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vitascope.core.errors import CheckpointError, InputError
from vitascope.models import FAMILIES, build_model, load_model
from vitascope.models.codecs.causal_video.config import CausalVideoConfig
from vitascope.models.codecs.causal_video.config import Level as VideoLevel
from vitascope.models.codecs.ltx.config import DecoderStage, EncoderStage, LTXCodecConfig
from vitascope.models.codecs.mochi.config import MochiCodecConfig
from vitascope.models.codecs.wan.config import WanCodecConfig
from vitascope.models.codecs.waveform.config import WaveAttention, WaveformConfig, WaveLevel
from vitascope.models.factorised.config import FactorisedConfig
from vitascope.models.ltx.config import LTXConfig
from vitascope.models.ltx_upsampler.config import LTXUpsamplerConfig
from vitascope.models.mochi.config import MochiConfig
from vitascope.models.text.bytes.config import BytesConfig
from vitascope.models.wan.config import WanConfig
from vitascope.training.codecs import CodecFiles
from vitascope.weights.checkpoint import load_checkpoint, save_checkpoint
from vitascope.weights.config import config_to_dict

CONFIGS: dict[str, Any] = {
    "causal_video": CausalVideoConfig(4, (VideoLevel(8, 1, 1), VideoLevel(8, 1, 1, (2, 2, 2))), 2, preview_px=2),
    "waveform": WaveformConfig(4, (WaveLevel(8, 4), WaveLevel(8, 2)), attention=WaveAttention(2, 4)),
    "bytes": BytesConfig(16, 1, 2, byte_width=8),
    "factorised": FactorisedConfig(16, 1, 2, 8, 2, 16, exchange_layers=(0,), base_grid=(2, 3)),
    "wan": WanConfig(12, 1, 1, 16, text_width=8, image_width=8, image_positions=3, in_channels=36, frequency_width=8),
    "ltx": LTXConfig(12, 1, 1, 4, 4, 8),
    "mochi": MochiConfig(16, 8, 2, 1, text_width=16, frequency_width=8, text_sees="text"),
    "wan_codec": WanCodecConfig(4, (1, 2), (True,), 1, 2, (0.1, 0.2), (1.0, 2.0)),
    "ltx_codec": LTXCodecConfig(
        (EncoderStage(8, 1, "both"), EncoderStage(8, 1)),
        (DecoderStage(8, 1), DecoderStage(8, 1, "residual", 1, True)),
        latent_channels=4,
        timestep_conditioning=True,
    ),
    "ltx_upsampler": LTXUpsamplerConfig(4, 32, 1),
    "mochi_codec": MochiCodecConfig((32, 32), (32, 32), (2,), (1, 1, 1), (False, True, True)),
}

OWN = ("causal_video", "waveform", "bytes")
"""Families that are built with their weights."""


def write(folder: Path, family: str, half: bool = False) -> tuple[Path, nn.Module]:
    torch.manual_seed(1)
    model = FAMILIES[family].build(config_to_dict(CONFIGS[family]))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    tensors = {name: value.half() if half else value for name, value in model.state_dict().items()}
    path = folder / f"{family}.safetensors"
    save_checkpoint(path, tensors, family, CONFIGS[family])
    return path, model


def test_every_family_is_looked_at() -> None:
    assert set(CONFIGS) == set(FAMILIES)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_comes_back_whole(family: str, half: bool, tmp_path: Path) -> None:
    path, model = write(tmp_path, family, half)
    loaded: Any = load_model(path)
    assert type(loaded) is type(model)
    assert loaded.config == CONFIGS[family]
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    for name, value in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == torch.float32
        assert torch.equal(loaded.state_dict()[name], value.half().float() if half else value), name


@pytest.mark.parametrize("family", FAMILIES)
def test_files_that_do_not_fit_are_refused(family: str, tmp_path: Path) -> None:
    path, _ = write(tmp_path, family)
    checkpoint = load_checkpoint(path)
    lacking = dict(list(checkpoint.tensors.items())[1:])
    save_checkpoint(path, lacking, family, checkpoint.config)
    with pytest.raises(CheckpointError, match=next(iter(checkpoint.tensors))):
        load_model(path)
    save_checkpoint(path, checkpoint.tensors, family, {**checkpoint.config, "colour": "red"})
    with pytest.raises(CheckpointError, match="colour"):
        load_model(path)


def test_unknown_and_wrong_families_are_refused_by_name(tmp_path: Path) -> None:
    path, _ = write(tmp_path, "bytes")
    checkpoint = load_checkpoint(path)
    save_checkpoint(tmp_path / "other.safetensors", checkpoint.tensors, "unet", checkpoint.config)
    with pytest.raises(InputError, match="family 'unet' is not known; valid values: causal_video, waveform, bytes"):
        load_model(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="no checkpoint file"):
        load_model(tmp_path / "none.safetensors")


def test_codec_files_are_refused_in_each_others_place(tmp_path: Path) -> None:
    video, audio = (write(tmp_path, family)[0] for family in ("causal_video", "waveform"))
    codecs = CodecFiles(video, audio).load(torch.device("cpu"))
    assert codecs.video.latent_channels == codecs.audio.latent_channels == 4
    assert set(CodecFiles(video, audio).digests()) == {"video_codec", "audio_codec"}
    for files in (CodecFiles(audio, audio), CodecFiles(video, video)):
        with pytest.raises(CheckpointError, match=r"family '(causal_video|waveform)', but"):
            files.load(torch.device("cpu"))


@dataclass(frozen=True)
class Other:
    width: int = 3


def test_a_configuration_of_another_family_is_refused(tmp_path: Path) -> None:
    path, _ = write(tmp_path, "bytes")
    checkpoint = load_checkpoint(path)
    save_checkpoint(path, checkpoint.tensors, "factorised", Other())
    with pytest.raises(CheckpointError, match="lacks keys: depth"):
        build_model(load_checkpoint(path))


def test_a_model_on_the_meta_device_needs_no_compiler() -> None:
    # torch draws random tables of the meta device in Python and imports its compiler for that: seconds of a start
    script = """
        import json, sys, torch
        from vitascope.models import FAMILIES

        with torch.device("meta"):
            for family, config in json.loads(sys.argv[1]).items():
                FAMILIES[family].build(config)
                assert not {"torch._dynamo", "sympy"} & set(sys.modules), family
    """
    published = {name: config_to_dict(CONFIGS[name]) for name in CONFIGS if name not in OWN}
    assert "wan" in published
    command = [sys.executable, "-c", textwrap.dedent(script), json.dumps(published)]
    subprocess.run(command, check=True, capture_output=True)
