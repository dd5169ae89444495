"""What a request says about guidance, levels and step caches, end to end against LTX-Video in diffusers."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.hooks.first_block_cache import FirstBlockCacheConfig, apply_first_block_cache
from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode, LayerSkipConfig, _apply_layer_skip_hook
from torch import Tensor

from vitascope.caches.steps import StepCaching
from vitascope.core.errors import CapabilityError, InputError
from vitascope.core.random import generator
from vitascope.core.shapes import ClipFormat
from vitascope.core.tracks import VIDEO
from vitascope.diffusion.samplers import Step
from vitascope.tasks.generate import generate, generate_batch, sample
from vitascope.tasks.long import generate_any_length
from vitascope.tasks.pipeline import Pipeline
from vitascope.tasks.request import SETTINGS, GenerateRequest, Given
from vitascope.tasks.settings import recipe_of
from vitascope.weights.config import config_from_dict

FORMAT = ClipFormat(96, 64, 25.0, 17)
REQUEST = GenerateRequest("a red ball bounces", format=FORMAT, seed=3, num_inference_steps=5, guidance_scale=4.0)


def our_latents(pipeline: Pipeline, request: GenerateRequest) -> Tensor:
    return sample(pipeline, [request]).tracks[VIDEO].values


def their_latents(theirs: Any, **options: Any) -> Tensor:
    """Of both kinds of pipeline, (1, C, N, h, w), from the noise that ours draws."""
    fmt = FORMAT
    given = {
        "prompt": REQUEST.prompt, "negative_prompt": "", "width": fmt.width_px, "height": fmt.height_px,
        "num_frames": fmt.num_frames, "frame_rate": 25, "num_inference_steps": 5, "guidance_scale": 4.0,
        "generator": generator(3, VIDEO), "output_type": "latent",
    }  # fmt: skip
    out = theirs(**given | options).frames
    return out if out.ndim == 5 else theirs._unpack_latents(out, 3, 2, 3)


def differ(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", ["text", "conditions"])
def test_rescaled_guidance_equals_that_of_diffusers(name: str, ltx: Any) -> None:
    theirs, ours = ltx[name]
    expected = their_latents(theirs, guidance_rescale=0.7)
    assert differ(our_latents(ours, replace(REQUEST, guidance_rescale=0.7)), expected) < 1e-4
    # it is the velocity that is rescaled there, and that makes a difference
    own = ours.defaults
    on_x0 = replace(ours, defaults=replace(own, guidance=replace(own.guidance, rescale_on="x0")))
    assert differ(our_latents(on_x0, replace(REQUEST, guidance_rescale=0.7)), expected) > 1e-3
    assert differ(our_latents(ours, REQUEST), expected) > 1e-3


def test_guidance_holds_within_its_interval_alone(ltx: Any) -> None:
    """Levels 1, 0.8, 0.6, 0.4, 0.2; diffusers is told a scale that counts as 1 outside."""
    theirs, ours = ltx["text"]
    nearly_1, levels = 1 + 1e-9, [0.8, 0.6, 0.4, 0.2, 0.0]

    def change(pipe: Any, index: int, timestep: Any, values: Any) -> Any:
        pipe._guidance_scale = 4.0 if 0.3 < levels[index] < 0.7 else nearly_1
        return values

    expected = their_latents(theirs, guidance_scale=nearly_1, callback_on_step_end=change)
    out = our_latents(ours, replace(REQUEST, guidance_interval=(0.3, 0.7)))
    assert differ(out, expected) < 1e-4
    assert differ(our_latents(ours, REQUEST), expected) > 0.01


@pytest.mark.parametrize("how", ["attention", "block"])
def test_spatio_temporal_guidance_equals_layers_disabled_by_diffusers(how: Any, ltx: Any) -> None:
    theirs, ours = ltx["text"]
    transformer, scale = theirs.transformer, 1.5
    worse = deepcopy(transformer)
    if how == "block":
        _apply_layer_skip_hook(worse, LayerSkipConfig([1]))
    else:
        attention = worse.transformer_blocks[1].attn1
        plain_attention = attention.forward

        def alone(*args: Any, **named: Any) -> Any:
            with AttentionScoreSkipFunctionMode():
                return plain_attention(*args, **named)

        attention.forward = alone
    plain = transformer.forward

    def guided(**named: Any) -> Any:
        """With w on top of it, uncond + w (cond - uncond) + s (cond - perturbed)."""
        uncond, cond = plain(**named)[0].chunk(2)
        perturbed = worse(**named)[0].chunk(2)[1]
        return (torch.cat([uncond, cond + scale / 4.0 * (cond - perturbed)]),)

    transformer.forward = guided
    try:
        expected = their_latents(theirs)
    finally:
        del transformer.forward
    asked = replace(REQUEST, stg_scale=scale, stg_layers=(1,), stg_by=how)
    assert differ(our_latents(ours, asked), expected) < 1e-4
    assert differ(our_latents(ours, REQUEST), expected) > 0.01


@pytest.mark.parametrize("levels", [(1.0, 0.9937, 0.9, 0.725), (1.0, 0.5, 0.0)])
def test_levels_are_those_of_the_request(levels: tuple[float, ...], ltx: Any) -> None:
    theirs, ours = ltx["conditions"]
    expected = their_latents(theirs, timesteps=[1000 * level for level in levels if level])
    request = replace(REQUEST, levels=levels, num_inference_steps=None)
    assert differ(our_latents(ours, request), expected) < 1e-4
    assert recipe_of(ours, request)["num_inference_steps"] == len([level for level in levels if level])


def test_a_step_cache_answers_as_that_of_diffusers(ltx: Any) -> None:
    theirs, ours = ltx["text"]
    plain = theirs.transformer
    theirs.transformer = type(plain).from_config(plain.config).eval()  # a copy would share the state of its hooks
    theirs.transformer.load_state_dict(plain.state_dict())
    apply_first_block_cache(theirs.transformer, FirstBlockCacheConfig(threshold=0.3))
    try:
        expected = their_latents(theirs, guidance_scale=1.0, num_inference_steps=20)
    finally:
        theirs.transformer = plain
    request = replace(REQUEST, guidance_scale=1.0, num_inference_steps=20)
    caching = StepCaching("first_block", 0.3, 0, 0)
    assert differ(our_latents(ours, replace(request, step_cache=caching)), expected) < 1e-4
    made = sample(ours, [replace(request, step_cache=caching)])
    assert 0 < made.skipped_share < 0.65  # of 20 x 3 blocks, at most 19 x 2
    assert differ(our_latents(ours, request), expected) > 1e-3


@pytest.mark.parametrize("kind", ["first_block", "tea"])
def test_at_threshold_0_a_clip_is_the_same_bit_for_bit(kind: Any, ltx: Any) -> None:
    ours = ltx["text"].ours
    asked = replace(REQUEST, stg_scale=1.0, stg_layers=(0,), step_cache=StepCaching(kind, 0.0, 0, 0))
    assert torch.equal(our_latents(ours, asked), our_latents(ours, replace(asked, step_cache=None)))
    assert sample(ours, [asked]).skipped_share == 0


def test_the_pocket_architecture_skips_blocks_too_window_by_window(pipeline: Pipeline) -> None:
    fmt = replace(pipeline.defaults.clip, num_frames=13)
    request = GenerateRequest("wind", format=fmt, step_cache=StepCaching("tea", 5.0, 1, 1), num_inference_steps=4)
    made = generate_any_length(pipeline, request)
    assert made.skipped_share == pytest.approx(0.5)  # two of four steps, in both windows
    assert generate(pipeline, replace(request, format=pipeline.defaults.clip)).skipped_share == pytest.approx(0.5)
    assert generate_any_length(pipeline, replace(request, step_cache=None)).skipped_share == 0


def test_settings_of_a_recipe_make_the_same_request_again(ltx: Any) -> None:
    request = replace(
        REQUEST, levels=(1.0, 0.5), num_inference_steps=None, guidance_rescale=0.2, guidance_interval=(0.1, 0.9),
        stg_scale=1.0, stg_layers=(1, 2), stg_by="block", step_cache=StepCaching("tea", 0.2, 2, 3),
    )  # fmt: skip
    recipe = recipe_of(ltx["text"].ours, request)
    again = config_from_dict(GenerateRequest, {name: recipe[name] for name in SETTINGS})
    assert recipe_of(ltx["text"].ours, replace(again, format=FORMAT)) == recipe
    assert again.step_cache == StepCaching("tea", 0.2, 2, 3)
    assert (again.levels, again.stg_layers, again.stg_by) == ((1.0, 0.5), (1, 2), "block")


def test_bad_options_are_refused(ltx: Any) -> None:
    ours = ltx["text"].ours
    for options, message in (
        ({"levels": (0.5, 0.7)}, "must fall"),
        ({"levels": (1.0, 0.5)}, "those of 2 steps, not of 5"),
        ({"levels": ()}, "two or more levels"),
        ({"stg_scale": -1.0}, r"lies in \[0, 30\]"),
    ):
        with pytest.raises(InputError, match=message):
            replace(REQUEST, **options)
    for options, message in (
        ({"stg_scale": 1.0}, "needs the layers"),
        ({"stg_scale": 1.0, "stg_layers": (3,)}, r"some of 0\.\.2"),
        ({"guidance_rescale": 2.0}, "between 0 and 1"),
        ({"guidance_interval": (0.9, 0.1)}, "low <= high"),
        ({"levels": (0.9, 0.5), "num_inference_steps": None}, "starts at level 0.9, below cells at level 1"),
    ):
        with pytest.raises(InputError, match=message):
            generate(ours, replace(REQUEST, **options))
    with pytest.raises(InputError, match="share format"):
        generate_batch(ours, [REQUEST, replace(REQUEST, step_cache=StepCaching())])


def test_a_draft_is_made_anew_from_where_the_levels_begin(ltx: Any) -> None:
    ours = ltx["conditions"].ours
    draft = torch.randn(8, 3, 2, 3, generator=torch.Generator().manual_seed(1))
    steps: list[Step] = []
    asked = replace(REQUEST, given=Given(draft=draft), levels=(0.4, 0.2), num_inference_steps=None)
    generate(ours, asked, steps.append)
    noise = torch.randn(1, 8, 3, 2, 3, generator=generator(3, VIDEO))
    expected = 0.6 * draft + 0.4 * noise  # one step from 0.4 to 0.2 goes half of the way to x0
    torch.testing.assert_close(steps[0].tracks[VIDEO].values, (expected + steps[0].x0[VIDEO]) / 2)
    with pytest.raises(InputError, match="below 1"):
        generate(ours, replace(asked, levels=(1.0, 0.5)))
    with pytest.raises(InputError, match=r"the draft of such a clip is \(8, 3, 2, 3\)"):
        generate(ours, replace(asked, given=Given(draft=draft[:, :2])))
    with pytest.raises(CapabilityError, match="without sound"):
        generate(ours, replace(asked, given=Given(draft=draft, audio=torch.zeros(8))))
