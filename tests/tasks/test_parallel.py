"""Whole clips on two processes against one: the small model of our own and a published one, loaded by each process."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import vitascope.tasks.published
from vitascope.core.errors import CapabilityError, InputError, PromptError
from vitascope.core.protocols import KeepsTexts
from vitascope.core.shapes import ClipFormat
from vitascope.core.tracks import VIDEO, TextContext
from vitascope.diffusion.samplers import Step
from vitascope.models import named
from vitascope.models.codecs.ltx.model import LTXCodec
from vitascope.models.codecs.wan import keys as wan_codec_keys
from vitascope.models.codecs.wan.config import WanCodecConfig
from vitascope.models.codecs.wan.model import WanCodec
from vitascope.models.ltx.model import LTXDenoiser
from vitascope.models.ltx_upsampler.model import LTXUpsampler
from vitascope.models.published import PUBLISHED
from vitascope.models.wan import keys as wan_keys
from vitascope.models.wan.config import WanConfig
from vitascope.models.wan.model import WanDenoiser
from vitascope.parallel.launch import joined
from vitascope.parallel.ranks import Ranks
from vitascope.tasks.generate import generate
from vitascope.tasks.load import load_pipeline
from vitascope.tasks.parallel import SharedKeeper, load_parallel
from vitascope.tasks.pipeline import Pipeline
from vitascope.tasks.preview import preview_frames
from vitascope.tasks.request import GenerateRequest
from vitascope.tasks.two_passes import TwoPasses, generate_in_two_passes, load_upsampler
from vitascope.weights.keys import KeyTable, convert

COUNT = 2
PROMPT = "a red ball bounces"
REQUESTS = {
    "own": GenerateRequest(PROMPT, format=ClipFormat(32, 32, num_frames=9), seed=3),
    "published": GenerateRequest(PROMPT, format=ClipFormat(48, 48, 16.0, 9), seed=3, num_inference_steps=3),
    "in two passes": GenerateRequest(PROMPT, format=ClipFormat(96, 96, 25.0, 9), seed=3, num_inference_steps=2),
}
CASES = (("tensor", "own"), ("tensor", "published"), ("ulysses", "published"), ("ring", "published"))
TWO_PASSES = ("tensor", "ring")
DENOISER = WanConfig(width=24, depth=2, num_heads=2, hidden=40, text_width=16, frequency_width=32)
CODEC = WanCodecConfig(base=8, blocks=1)


class Words:
    """A text encoder in place of T5, which would take longer to import than all the rest: it counts its calls."""

    width = 16

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, prompts: Sequence[str]) -> TextContext:
        if "" in prompts[:1]:
            raise PromptError("say something")
        self.asked += prompts
        rows = [torch.randn((5, 16), generator=torch.Generator().manual_seed(len(prompt))) for prompt in prompts]
        return TextContext(torch.stack(rows), torch.ones(len(prompts), 5, dtype=torch.bool))

    def missing(self, prompts: Sequence[str]) -> list[str]:
        return list(prompts)

    def fill(self, prompts: Sequence[str]) -> None:
        self.asked += [f"fill {prompt}" for prompt in prompts]


def made(pipeline: Pipeline, request: GenerateRequest, watch: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and frames; `watch` looks at a preview after each step."""
    steps: list[Step] = []

    def report(step: Step) -> None:
        steps.append(step)
        if watch:
            preview_frames(pipeline, step)

    clip = generate(pipeline, request, report).clip
    return steps[-1].tracks[VIDEO].values, clip.frames


def clip(kind: str, folder: str, request: GenerateRequest, ranks: Ranks) -> dict[str, Any]:
    """The sums of what was made here and, on the first process, how far it is from what one alone makes."""
    many = load_parallel(folder, kind, ranks, "fp32")
    latents, frames = made(many, request, watch=ranks.is_first)
    found: dict[str, Any] = {"sums": [float(latents.double().sum()), int(frames.sum(dtype=torch.int64))]}
    if ranks.is_first:
        expected, shown = made(load_pipeline(folder, "cpu", "fp32"), request)
        assert shown.float().std() > 1
        found["latents"] = float((latents - expected).norm() / expected.norm())
        found["levels"] = int((frames.int() - shown.int()).abs().max())
    return found


def two_passes(kind: str, folder: str, ranks: Ranks) -> dict[str, Any]:
    """As `clip`, in two passes."""
    request, passes = REQUESTS["in two passes"], TwoPasses(levels=(0.9, 0.5))
    upsampler = load_upsampler(folder)
    clip = generate_in_two_passes(load_parallel(folder, kind, ranks, "fp32"), upsampler, request, passes).clip
    found: dict[str, Any] = {"sum": int(clip.frames.sum(dtype=torch.int64))}
    if ranks.is_first:
        shown = generate_in_two_passes(load_pipeline(folder, "cpu", "fp32"), upsampler, request, passes).clip.frames
        assert shown.float().std() > 1
        found["levels"] = int((clip.frames.int() - shown.int()).abs().max())
    return found


def refusals(folders: dict[str, str], ranks: Ranks) -> list[str]:
    said = []
    acts: tuple[Callable[[], object], ...] = (
        lambda: load_parallel(folders["own"], "pipeline", ranks),
        lambda: load_parallel(folders["own"], "ring", ranks),
        lambda: load_parallel(folders["published"], "ring", ranks, "fp32").text_encoder([""]),
    )
    for act in acts:
        try:
            act()
        except (InputError, CapabilityError, PromptError) as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def texts(folder: str, ranks: Ranks) -> list[str]:
    """What this process's own encoder is asked for when all ask."""
    many = load_parallel(folder, "ring", ranks, "fp32")
    assert isinstance(many.text_encoder, SharedKeeper)
    assert isinstance(many.text_encoder, KeepsTexts)
    many.text_encoder.fill(["wind"])
    assert many.text_encoder(["wind"]).embeddings.shape == (1, 5, 16)
    assert isinstance(many.text_encoder.encoder, Words)
    return many.text_encoder.encoder.asked


def work(result: Path, own: str, published: str, ltx: str) -> None:
    folders = {"own": own, "published": published}
    vitascope.tasks.published.open_t5 = lambda *given, **named: Words()
    with joined(os.environ, "cpu", patience_s=240.0) as ranks:
        found: dict[str, Any] = {
            f"{kind}, {which}": clip(kind, folders[which], REQUESTS[which], ranks) for kind, which in CASES
        }
        found |= {f"{kind}, in two passes": two_passes(kind, ltx, ranks) for kind in TWO_PASSES}
        found["refusals"] = refusals(folders, ranks)
        found["texts"] = texts(published, ranks)
    result.write_text(json.dumps(found))


def write_part(folder: Path, model: nn.Module, table: KeyTable, config: dict[str, Any]) -> None:
    """A random model as diffusers writes it."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.5)
    folder.mkdir()
    weights = convert(table, model.state_dict(), writing=True)
    kept = {name: weight.detach().contiguous() for name, weight in weights.items()}
    save_file(kept, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Wan pipeline in the layout of diffusers, without a text encoder."""
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    theirs = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 16, "freq_dim": 32, "ffn_dim": 40}
    theirs |= {"num_layers": 2, "_class_name": "WanTransformer3DModel"}
    write_part(folder / "transformer", WanDenoiser(DENOISER), wan_keys.diffusers_keys(DENOISER), theirs)
    coded = {"base_dim": 8, "num_res_blocks": 1, "_class_name": "AutoencoderKLWan"}
    write_part(folder / "vae", WanCodec(CODEC), wan_codec_keys.diffusers_keys(CODEC), coded)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"flow_shift": 3.0}))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    return folder


@pytest.fixture(scope="module")
def ltx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An LTX-Video pipeline with an up-sampler in the layout of diffusers, without a text encoder."""
    folder = tmp_path_factory.mktemp("ltx")
    torch.manual_seed(0)
    wide: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16}
    wide |= {"num_layers": 2, "caption_channels": 16, "in_channels": 8, "out_channels": 8}
    slim: dict[str, Any] = {"latent_channels": 8, "block_out_channels": [8] * 4, "layers_per_block": [1] * 5}
    slim |= {f"decoder_{key}": value for key, value in slim.items() if key != "latent_channels"}
    doubled = [True, True, True, False]
    slim |= {"spatio_temporal_scaling": doubled, "decoder_spatio_temporal_scaling": doubled}
    enlarging = {"in_channels": 8, "mid_channels": 32, "num_blocks_per_stage": 1}
    parts: tuple[tuple[str, str, Any, dict[str, Any]], ...] = (
        ("transformer", "LTXVideoTransformer3DModel", LTXDenoiser, wide),
        ("vae", "AutoencoderKLLTXVideo", LTXCodec, slim),
        ("latent_upsampler", "LTXLatentUpsamplerModel", LTXUpsampler, enlarging),
    )
    for place, name, kind, values in parts:
        config = named(PUBLISHED[name].config)({"_class_name": name, **values})
        write_part(folder / place, kind(config), named(PUBLISHED[name].keys)(config), {"_class_name": name, **values})
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({}))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "LTXConditionPipeline"}))
    return folder


@pytest.fixture(scope="module")
def found(in_processes: Callable[..., list[Any]], tiny_model: Path, published: Path, ltx: Path) -> list[Any]:
    return in_processes(__file__, COUNT, arguments=(str(tiny_model), str(published), str(ltx)))


@pytest.mark.parametrize(("kind", "which"), CASES)
def test_a_clip_is_that_of_one_process(kind: str, which: str, found: list[Any]) -> None:
    first, second = (result[f"{kind}, {which}"] for result in found)
    # a few steps of fp32 sums in another order, each amplified by the guidance; a level is 1/255 of the range
    assert first["latents"] < 1e-4
    assert first["levels"] <= 1
    assert first["sums"] == second["sums"], "the processes made different clips"


@pytest.mark.parametrize("kind", TWO_PASSES)
def test_a_clip_in_two_passes_is_that_of_one_process(kind: str, found: list[Any]) -> None:
    first, second = (result[f"{kind}, in two passes"] for result in found)
    assert first["levels"] <= 1
    assert first["sum"] == second["sum"]


def test_what_cannot_be_made_is_refused_on_every_process(found: list[Any]) -> None:
    assert found[0]["refusals"] == found[1]["refusals"]
    unknown, tokens, prompt = found[0]["refusals"]
    assert unknown == "InputError: kind of sharing 'pipeline' is not known; valid values: tensor, ulysses, ring"
    assert tokens.startswith("CapabilityError: FactorisedDenoiser does not share tokens between processes")
    assert prompt == "PromptError: say something"


def test_texts_are_encoded_by_the_first_process_alone(found: list[Any]) -> None:
    assert [result["texts"] for result in found] == [["fill wind", "wind"], []]


if __name__ == "__main__":
    work(Path(sys.argv[1]), *sys.argv[2:])
