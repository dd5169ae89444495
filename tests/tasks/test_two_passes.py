"""A clip in two passes against the three pipelines that diffusers has for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.pipelines.ltx.modeling_latent_upsampler import LTXLatentUpsamplerModel
from diffusers.pipelines.ltx.pipeline_ltx_latent_upsample import LTXLatentUpsamplePipeline
from torch import Tensor, nn

from vitascope.caches.steps import StepCaching
from vitascope.core.errors import CapabilityError, CheckpointError, InputError, ShapeError
from vitascope.core.memory import held_bytes
from vitascope.core.random import derive_seed, generator
from vitascope.core.shapes import ClipFormat
from vitascope.core.tracks import VIDEO
from vitascope.diffusion.samplers import Step
from vitascope.models.ltx_upsampler.config import LTXUpsamplerConfig
from vitascope.models.ltx_upsampler.model import LTXUpsampler
from vitascope.tasks.fitting import Fitted, MemoryLimit
from vitascope.tasks.generate import generate
from vitascope.tasks.load import load_pipeline
from vitascope.tasks.memory import MemoryPlan
from vitascope.tasks.pipeline import Pipeline
from vitascope.tasks.request import GenerateRequest, Given
from vitascope.tasks.two_passes import (
    TwoPasses,
    generate_in_two_passes,
    load_upsampler,
    match_statistics,
    plan_sizes,
    tone_map,
)

FORMAT = ClipFormat(96, 64, 25.0, 9)
REQUEST = GenerateRequest("a red ball bounces", format=FORMAT, seed=3, levels=(1.0, 0.9, 0.5), guidance_scale=2.0)


@pytest.fixture(scope="session")
def upsampler(tmp_path_factory: pytest.TempPathFactory, ltx: Any) -> tuple[Any, LTXUpsampler]:
    """The pipeline of diffusers, and ours from its folder."""
    torch.manual_seed(1)
    model: Any = LTXLatentUpsamplerModel(in_channels=8, mid_channels=32, num_blocks_per_stage=1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    theirs: Any = LTXLatentUpsamplePipeline(ltx["conditions"].theirs.vae, model.eval())
    folder = tmp_path_factory.mktemp("upsampler")
    theirs.save_pretrained(folder)
    return theirs, load_upsampler(folder)


def their_latents(theirs: Any, seed: int, width: int, height: int, **options: Any) -> Tensor:
    return theirs(
        prompt=REQUEST.prompt, negative_prompt="", width=width, height=height, num_frames=9, frame_rate=25,
        guidance_scale=2.0, generator=generator(seed, VIDEO), output_type="latent", **options,
    ).frames  # fmt: skip


@pytest.mark.parametrize(("adain", "tone"), [(1.0, 0.6), (0.3, 0.0), (0.0, 1.0)])
def test_both_passes_equal_those_of_diffusers(adain: float, tone: float, ltx: Any, upsampler: Any) -> None:
    pair, (enlarging, ours) = ltx["conditions"], upsampler
    passes = TwoPasses(2 / 3, (0.9094, 0.725), adain, tone)
    steps: list[Step] = []
    made = generate_in_two_passes(pair.ours, ours, REQUEST, passes, steps.append)
    first = their_latents(pair.theirs, 3, 64, 32, timesteps=[1000.0, 900.0, 500.0])
    assert first.shape == steps[2].tracks[VIDEO].values.shape
    grown = enlarging(
        latents=first, width=128, height=64, adain_factor=adain, tone_map_compression_ratio=tone, output_type="latent"
    ).frames
    # their second pass drops the first of its steps
    second = their_latents(
        pair.theirs, derive_seed(3, "second pass"), 128, 64, timesteps=[1000.0, 909.4, 725.0],
        denoise_strength=0.99, latents=grown,
    )  # fmt: skip
    out = steps[-1].tracks[VIDEO].values
    assert (out - second).norm() / second.norm() < 1e-4
    assert [(step.index, step.num_steps) for step in steps] == [(index, 5) for index in range(5)]
    assert made.clip.frames.shape == (9, 3, 64, 96)
    assert {"denoise", "enlarge", "decode"} <= set(made.seconds)
    assert made.recipe["two_passes"]["levels"] == [0.9094, 0.725]
    assert (made.recipe["width"], made.recipe["height"]) == (96, 64)


def test_the_cache_counts_over_both_passes(ltx: Any, upsampler: Any) -> None:
    request = replace(REQUEST, step_cache=StepCaching("tea", 100.0, 0, 0))
    made = generate_in_two_passes(ltx["conditions"].ours, upsampler[1], request, TwoPasses(levels=(0.9, 0.5)))
    assert made.skipped_share == pytest.approx(3 / 5)  # all but the first step of each


@pytest.mark.parametrize("together", [True, False])
def test_a_limit_of_memory_holds_for_both_passes(
    together: bool, ltx: Any, upsampler: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, plans, passes = ltx["conditions"], list[MemoryPlan](), TwoPasses(levels=(0.9, 0.5))
    expected = generate_in_two_passes(pair.ours, upsampler[1], REQUEST, passes).clip.frames
    upsampler[0].save_pretrained(tmp_path)
    if not together:  # as with large weights
        monkeypatch.setattr("vitascope.tasks.memory._all_together", lambda costs, limit: None)
    limit = MemoryLimit(held_bytes(torch.device("cpu")) + 500 * 10**6, on_plan=plans.append)
    limited = load_pipeline(pair.ours.name, "cpu", "fp32", memory=limit)
    assert isinstance(limited.memory, Fitted)
    with pytest.raises(InputError, match="the up-sampler comes by load_upsampler"):
        generate_in_two_passes(limited, upsampler[1], REQUEST, passes)
    made = generate_in_two_passes(limited, load_upsampler(tmp_path, memory=limited.memory), REQUEST, passes)
    assert torch.equal(made.clip.frames, expected)
    (plan,) = plans
    assert plan.together == together
    assert [stage.name for stage in plan.stages] == ["text", "denoise", "enlarge", "decode"]
    assert made.memory is not None
    assert set(made.memory.measured) == {"text", "denoise", "enlarge", "decode"}
    assert [name for name, part in limited.memory.parts.items() if part.present] == (
        ["denoiser", "video_codec", "latent_upsampler"] if together else ["video_codec"]
    )
    # the same pipeline makes clips in one pass after it
    plain = replace(REQUEST, format=replace(FORMAT, width_px=64))
    assert torch.equal(generate(limited, plain).clip.frames, generate(pair.ours, plain).clip.frames)


def test_statistics_and_tones() -> None:
    draw = torch.Generator().manual_seed(0)
    latents, reference = torch.randn(2, 3, 2, 4, 4, generator=draw), 3 + 2 * torch.randn(2, 3, 2, 2, 2, generator=draw)
    full = match_statistics(latents, reference, 1.0)
    for reduce in (torch.mean, torch.std):
        torch.testing.assert_close(reduce(full, (2, 3, 4)), reduce(reference, (2, 3, 4)))
    torch.testing.assert_close(match_statistics(latents, reference, 0.25), 0.75 * latents + 0.25 * full)
    assert torch.equal(match_statistics(latents, reference, 0.0), latents)
    assert torch.equal(tone_map(latents, 0.0), latents)
    pressed = tone_map(torch.tensor([0.01, 3.0]), 1.0)
    assert pressed[0] > 0.0095
    assert 1.2 < pressed[1] < 1.3


@pytest.mark.parametrize(("share", "small"), [(2 / 3, (448, 320)), (0.5, (352, 256)), (1.0, (704, 512))])
def test_sizes_are_whole_tokens(share: float, small: tuple[int, int], ltx: Any) -> None:
    first, second = plan_sizes(ltx["conditions"].ours, ClipFormat(704, 512, 25.0, 9), share)
    assert (first.width_px, first.height_px) == small
    assert (second.width_px, second.height_px) == (2 * small[0], 2 * small[1])


def test_what_does_not_go_in_two_passes_is_refused(
    ltx: Any, upsampler: Any, pipeline: Pipeline, tmp_path: Path
) -> None:
    ours, (_, model) = ltx["conditions"].ours, upsampler
    with pytest.raises(CapabilityError, match="makes sound"):
        generate_in_two_passes(pipeline, model, replace(REQUEST, format=pipeline.defaults.clip))
    bare: Any = SimpleNamespace(strides=ours.video_codec.strides, latent_channels=8)
    with pytest.raises(CapabilityError, match="no latents that an up-sampler knows"):
        generate_in_two_passes(replace(ours, video_codec=bare), model, REQUEST)
    for config, message in (
        (LTXUpsamplerConfig(6, 32, 1), "has 6 latent channels"),
        (LTXUpsamplerConfig(8, 32, 1, time=True), "enlarges time"),
    ):
        with pytest.raises(CheckpointError, match=message):
            generate_in_two_passes(ours, LTXUpsampler(config), REQUEST)
    with pytest.raises(ShapeError, match="height 32 px is too small for two passes; at least 49 px"):
        generate_in_two_passes(ours, model, replace(REQUEST, format=replace(FORMAT, height_px=32)))
    with pytest.raises(InputError, match="neither a draft nor a video"):
        generate_in_two_passes(ours, model, replace(REQUEST, given=Given(draft=torch.zeros(8, 2, 2, 3))))
    bad: list[dict[str, Any]] = [{"share": 0.0}, {"levels": (1.0, 0.5)}, {"levels": (0.5, 0.7)}, {"adain": 1.5}]
    bad += [{"tone_map": -0.1}]
    for options in bad:
        with pytest.raises(InputError):
            TwoPasses(**options)
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_upsampler(tmp_path)
