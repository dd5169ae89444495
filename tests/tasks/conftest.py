"""The tiny model, loaded once, and small LTX-Video pipelines of diffusers with the folders that they were saved in."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from vitascope.tasks.load import load_pipeline
from vitascope.tasks.pipeline import Pipeline


@pytest.fixture(scope="session")
def pipeline(tiny_model: Path) -> Pipeline:
    return load_pipeline(str(tiny_model), "cpu", "fp32")


class Pair(NamedTuple):
    """A pipeline of diffusers, and ours from the folder that it wrote."""

    theirs: Any
    ours: Pipeline


@pytest.fixture(scope="session")
def ltx(tmp_path_factory: pytest.TempPathFactory, text_folders: Path) -> dict[str, Pair]:
    """LTX-Video with random weights, three layers and plain levels, as pipeline of "text" and of "conditions"."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl_ltx import AutoencoderKLLTXVideo
    from diffusers.models.transformers.transformer_ltx import LTXVideoTransformer3DModel
    from diffusers.pipelines.ltx.pipeline_ltx import LTXPipeline
    from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXConditionPipeline
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
    from torch import nn
    from transformers import AutoTokenizer, T5EncoderModel

    torch.manual_seed(0)
    widths = (8, 8, 8, 8)
    parts: dict[str, Any] = {
        "transformer": LTXVideoTransformer3DModel(
            in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
            num_layers=3, caption_channels=16,
        ),
        "vae": AutoencoderKLLTXVideo(
            latent_channels=8, block_out_channels=widths, decoder_block_out_channels=widths,
            layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
        ),
    }  # fmt: skip
    for part in parts.values():
        for parameter in part.parameters():
            nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.5)
        part.eval()
    parts["vae"].latents_mean, parts["vae"].latents_std = torch.randn(8), torch.rand(8) + 0.5
    parts["scheduler"] = FlowMatchEulerDiscreteScheduler()
    parts["text_encoder"] = T5EncoderModel.from_pretrained(text_folders / "t5" / "text_encoder")
    parts["tokenizer"] = AutoTokenizer.from_pretrained(text_folders / "t5" / "tokenizer")
    made = {}
    for name, kind in (("text", LTXPipeline), ("conditions", LTXConditionPipeline)):
        theirs, folder = kind(**parts), tmp_path_factory.mktemp(name)
        theirs.set_progress_bar_config(disable=True)
        theirs.save_pretrained(folder)
        made[name] = Pair(theirs, load_pipeline(str(folder), "cpu", "fp32"))
    return made
