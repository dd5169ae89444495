"""Pipelines under a limit of memory: the same clips, in less memory, and usable after whatever goes wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vitascope.caches.steps import Kind, StepCaching
from vitascope.core.errors import CheckpointError, InputError
from vitascope.core.freed_memory import release_freed_memory
from vitascope.core.memory import held_bytes
from vitascope.core.shapes import ClipFormat
from vitascope.core.tracks import TextContext
from vitascope.diffusion.guidance import Guidance
from vitascope.diffusion.paths import RectifiedFlow
from vitascope.diffusion.samplers.step import Step
from vitascope.models.codecs.decoding import Decoding, decode_frames
from vitascope.models.codecs.wan.config import WanCodecConfig
from vitascope.models.codecs.wan.model import WanCodec
from vitascope.models.offload.offloaded import Layers
from vitascope.models.offload.stores import FileStore, same_names
from vitascope.models.wan.config import WanConfig
from vitascope.models.wan.model import WanDenoiser
from vitascope.nn.tiling import Tiling
from vitascope.tasks.clips import Clips, clips_of
from vitascope.tasks.fitting import Fitted, MemoryLimit, OnDemand, fit_parts, text_device
from vitascope.tasks.footprint import PipelineCosts
from vitascope.tasks.generate import generate
from vitascope.tasks.load import load_pipeline
from vitascope.tasks.memory import MemoryPlan, choose_plan
from vitascope.tasks.pipeline import Defaults, Pipeline
from vitascope.tasks.preview import preview_frames
from vitascope.tasks.request import GenerateRequest, Given, Keyframe, Shot
from vitascope.tasks.text_cost import TextCost
from vitascope.weights.checkpoint import save_checkpoint
from vitascope.weights.sources import open_source

MB = 10**6
CPU = torch.device("cpu")
# 8 layers of 17 MB
CONFIG = WanConfig(width=512, depth=8, num_heads=8, hidden=2048, in_channels=4, out_channels=4, text_width=32)
CODEC = WanCodecConfig(4, latent_channels=4, blocks=1, latent_mean=(0.0,) * 4, latent_std=(1.0,) * 4)
FORMAT = ClipFormat(64, 32, 16.0, 5)
REQUEST = GenerateRequest("a red ball", format=FORMAT, num_inference_steps=2)


class Words:
    """A text encoder without weights."""

    def __call__(self, prompts: Sequence[str]) -> TextContext:
        words = torch.randn(len(prompts), 7, CONFIG.text_width, generator=torch.Generator().manual_seed(len(prompts)))
        return TextContext(words, torch.ones(words.shape[:2], dtype=torch.bool))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    parts: dict[str, nn.Module] = {"denoiser": WanDenoiser(CONFIG), "video_codec": WanCodec(CODEC)}
    for name, module in parts.items():
        for parameter in module.parameters():
            nn.init.uniform_(parameter, -0.1, 0.1)
        save_checkpoint(folder / f"{name}.safetensors", module.state_dict(), name, {})
    return folder


def limited(folder: Path, limit_mb: int, plans: list[MemoryPlan] | None = None, lossy: bool = False) -> Pipeline:
    """The pipeline under a limit for models alone."""
    with torch.device("meta"):
        denoiser: Any = WanDenoiser(CONFIG).eval().requires_grad_(False)
        codec: Any = WanCodec(CODEC).eval().requires_grad_(False)
    stores = {}
    for name, module in (("denoiser", denoiser), ("video_codec", codec)):
        source = open_source(folder / f"{name}.safetensors")
        stores[name] = FileStore(module.state_dict(), source, same_names(source))
    defaults = Defaults(FORMAT, 2, Guidance(5.0), "euler")
    pipeline = Pipeline("wan", denoiser, Words(), codec, None, RectifiedFlow(), defaults, CPU, torch.float32, (2, 2))
    release_freed_memory()
    told = [] if plans is None else plans
    limit = MemoryLimit(held_bytes(CPU) + limit_mb * MB, lossy, told.append)
    return fit_parts(pipeline, stores, limit, text=TextCost(0, 7, 1, 1, 1))


def kept(pipeline: Pipeline) -> Fitted:
    assert isinstance(pipeline.memory, Fitted)
    return pipeline.memory


def test_less_memory_gives_the_same_clip_and_really_is_less(weights: Path) -> None:
    made, plans = [], list[MemoryPlan]()
    for limit_mb in (1000, 100):
        pipeline = limited(weights, limit_mb, plans)
        made.append(generate(pipeline, REQUEST))
        kept(pipeline).release()
    assert [plan.together for plan in plans] == [True, False]
    assert plans[1].denoising.layers.resident in (1, 2)
    assert torch.equal(made[0].clip.frames, made[1].clip.frames)
    uses = [clip.memory for clip in made]
    assert uses[0] is not None
    assert uses[1] is not None
    whole, less = (use.measured["denoise"] for use in uses if use is not None)
    # 139 MB of weights at least in one; in the other at most the limit, and what the allocator has left lying around
    assert whole > 135 * MB
    assert less < 125 * MB
    assert set(uses[1].measured) == {"text", "denoise", "decode"}
    assert len(uses[1].lines()) == 5


def test_what_is_predicted_follows_the_size_of_the_clip(weights: Path) -> None:
    pipeline = limited(weights, 1000)
    parts = kept(pipeline).parts
    small, large = (PipelineCosts(pipeline, parts, Clips(replace(FORMAT, num_frames=frames))) for frames in (5, 33))
    assert small.denoise(True) > small.denoise(False)
    assert large.denoise(True) > small.denoise(True)
    assert large.decode(large.decodings[0]).working > small.decode(small.decodings[0]).working
    assert small.encode() is None
    reading = PipelineCosts(pipeline, parts, Clips(FORMAT, encoded_frames=5)).encode()
    assert reading is not None
    assert reading.working > 5 * 3 * 64 * 32 * 4


def test_both_branches_are_counted_wherever_guidance_comes_from(weights: Path) -> None:
    pipeline = limited(weights, 1000)
    parts, asked = kept(pipeline).parts, Guidance(1.0, interval=(0.2, 0.8))
    distilled = replace(pipeline, defaults=replace(pipeline.defaults, guidance=asked))
    guided, plain = (PipelineCosts(distilled, parts, Clips(FORMAT, guided=guided)) for guided in (True, False))
    assert guided.denoise(True) == PipelineCosts(pipeline, parts, Clips(FORMAT)).denoise(True)
    assert guided.denoise(True) > plain.denoise(True)


def test_of_many_equal_layers_a_few_tell_what_all_hold(weights: Path) -> None:
    pipeline = limited(weights, 1000)
    costs = PipelineCosts(pipeline, kept(pipeline).parts, Clips(FORMAT))
    whole = costs._call(CONFIG, True).peak
    two, three = (costs._call(replace(CONFIG, depth=depth), True).peak for depth in (2, 3))
    assert three + 5 * (three - two) == whole


def test_what_is_held_from_step_to_step_makes_the_prediction_higher(weights: Path) -> None:
    pipeline = limited(weights, 1000)
    parts = kept(pipeline).parts
    plain = PipelineCosts(pipeline, parts, Clips(FORMAT)).denoise(True)
    # tokens of both branches: 2 latent frames of 2 x 4, 512 numbers each
    state = 2 * 2 * 8 * 512 * 4
    # what was added a step ago, and with a first block what tells the change, of a step ago and of this one
    kinds: tuple[tuple[Kind, float], ...] = (("first_block", 1.9), ("tea", 1.0))
    for kind, least in kinds:
        cached = PipelineCosts(pipeline, parts, Clips(FORMAT, step_cache=kind)).denoise(True)
        assert least * state <= cached - plain <= 6 * state
    perturbed = PipelineCosts(pipeline, parts, Clips(FORMAT, perturbed="block", step_cache="first_block"))
    assert perturbed.denoise(True) > PipelineCosts(pipeline, parts, Clips(FORMAT, step_cache="first_block")).denoise(
        True
    )
    beside = PipelineCosts(pipeline, parts, Clips(FORMAT, beside=2)).denoise(True)
    assert beside > plain
    request = replace(REQUEST, step_cache=StepCaching("tea"), stg_scale=1.0, stg_layers=(2,), stg_by="block")
    assert clips_of(pipeline, [request], True) == Clips(FORMAT, longest=10, step_cache="tea", perturbed="block")
    own = replace(pipeline.defaults, guidance=Guidance(5.0, perturbed=1.0, perturbed_layers=(1,)), keyframes="beside")
    later = replace(pipeline, defaults=own)
    picture = torch.zeros(3, 8, 8, dtype=torch.uint8)
    given = Given((Keyframe(0.0, picture), Keyframe(0.25, picture)), shots=(Shot(0.0, torch.zeros(5, 3, 8, 8)),))
    clips = clips_of(later, [REQUEST, replace(REQUEST, given=given)], True)
    assert clips == Clips(FORMAT, 2, longest=10, encoded_frames=5, beside=1, perturbed="attention")
    assert clips_of(later, [replace(REQUEST, stg_scale=0.0)], True).perturbed is None


def test_a_limit_that_nothing_fits_is_refused_before_any_weight_is_read(weights: Path) -> None:
    pipeline = limited(weights, 30)
    with pytest.raises(InputError, match=r"the stage 'denoise' needs .* guidance scale of 1"):
        generate(pipeline, REQUEST)
    assert not any(part.present for part in kept(pipeline).parts.values())
    with pytest.raises(InputError, match=r"is too little: .* are taken before a model"):
        limited(weights, -200)


def test_a_run_that_is_cancelled_or_fails_leaves_the_pipeline_usable(weights: Path) -> None:
    pipeline = limited(weights, 110)
    expected = generate(pipeline, REQUEST).clip.frames

    def cancel(step: Step) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(pipeline, REQUEST, cancel)
    assert torch.equal(generate(pipeline, REQUEST).clip.frames, expected)
    part = kept(pipeline).parts["denoiser"]
    part.away()

    class Gone:
        slow = True

        def transit_bytes(self, names: Any) -> int:
            return 0

        def read(self, into: Any) -> None:
            raise CheckpointError("the disk is gone")

    store, part.store = part.store, Gone()
    with pytest.raises(CheckpointError, match="the disk is gone"):
        generate(pipeline, REQUEST)
    part.store = store
    assert torch.equal(generate(pipeline, REQUEST).clip.frames, expected)


def test_parts_take_turns_also_for_a_preview_in_the_middle(weights: Path) -> None:
    pipeline = limited(weights, 110)
    parts = kept(pipeline).parts
    expected = generate(pipeline, REQUEST).clip.frames
    seen = []

    def look(step: Step) -> None:
        assert parts["denoiser"].present
        assert not parts["video_codec"].present
        seen.append(preview_frames(pipeline, step))
        assert parts["denoiser"].present

    assert torch.equal(generate(pipeline, REQUEST, look).clip.frames, expected)
    assert torch.equal(seen[-1][0], expected)


def test_a_preview_is_decoded_as_planned(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[MemoryPlan] = []
    pipeline, seen = limited(weights, 110, plans), list[Decoding]()

    def decoded(codec: Any, latents: torch.Tensor, how: Decoding) -> torch.Tensor:
        seen.append(how)
        return decode_frames(codec, latents, how)

    monkeypatch.setattr("vitascope.tasks.preview.decode_frames", decoded)
    tiled = Decoding(1, Tiling(4, 1))
    monkeypatch.setattr(
        "vitascope.tasks.fitting.choose_plan",
        lambda *given, **more: replace(choose_plan(*given, **more), decoding=tiled),
    )

    def look(step: Step) -> None:
        preview_frames(pipeline, step)

    generate(pipeline, REQUEST, look)
    assert plans[0].decoding == tiled
    assert seen == [tiled, tiled]


def test_our_own_pipelines_keep_a_limit_too(tiny_model: Path, pipeline: Pipeline) -> None:
    plans: list[MemoryPlan] = []
    limit = MemoryLimit(held_bytes(CPU) + 400 * MB, on_plan=plans.append)
    under = load_pipeline(str(tiny_model), "cpu", "fp32", memory=limit)
    picture = torch.zeros(3, pipeline.defaults.clip.height_px, pipeline.defaults.clip.width_px, dtype=torch.uint8)
    for given in (Given(), Given((Keyframe(0.0, picture),))):
        request = GenerateRequest("a red ball", format=pipeline.defaults.clip, num_inference_steps=2, given=given)
        for layers in (None, Layers(0), Layers(0, prefetch=False)):
            if layers is not None:
                kept(under).parts["denoiser"].change(layers)
            ours, theirs = generate(under, request).clip, generate(pipeline, request).clip
            assert torch.equal(ours.frames, theirs.frames)
            assert ours.samples is not None
            assert theirs.samples is not None
            assert torch.equal(ours.samples, theirs.samples)
    assert [stage.name for stage in plans[-1].stages] == ["encode", "denoise", "decode"]


def test_what_a_request_takes_is_read_from_it(pipeline: Pipeline) -> None:
    fmt, picture = pipeline.defaults.clip, torch.zeros(3, 8, 8, dtype=torch.uint8)
    plain = GenerateRequest("a ball", format=fmt)
    assert clips_of(pipeline, [plain, plain], True) == Clips(fmt, 2, longest=6)
    worded = replace(plain, negative_prompt="größer als ein Ball")
    assert [clips_of(pipeline, [worded], guided).longest for guided in (True, False)] == [21, 6]
    stride = pipeline.video_codec.strides.time
    # what stands for a latent frame after the first is shown for as long as it lasts
    for time_s, frames in ((0.0, 1), (4 / fmt.fps, 1 + stride)):
        shown = replace(plain, given=Given((Keyframe(time_s, picture),)))
        assert clips_of(pipeline, [shown], False) == Clips(fmt, 1, False, longest=6, encoded_frames=frames)
    assert clips_of(
        replace(pipeline, defaults=replace(pipeline.defaults, keyframes="beside")), [shown], False
    ) == Clips(fmt, 1, False, longest=6, encoded_frames=1, beside=1)
    video = replace(plain, given=Given(video=torch.zeros(fmt.num_frames, 3, 8, 8)))
    assert clips_of(pipeline, [video], False).encoded_frames == fmt.num_frames
    moved = replace(plain, given=Given(camera=torch.zeros(fmt.num_frames, 7)))
    assert clips_of(pipeline, [moved], False).camera


def test_prompts_are_read_on_the_cpu_where_their_encoder_would_fill_the_gpu() -> None:
    text, gpu = TextCost(10_000 * MB, 512, 4096, 10_240, 64), torch.device("cuda")
    assert text_device(text, gpu, MemoryLimit(12_000 * MB)) == gpu
    assert text_device(text, gpu, MemoryLimit(10_000 * MB)) == CPU
    assert text_device(text, CPU, MemoryLimit(100 * MB)) == CPU
    # scores of 64 heads of 512 tokens for two prompts, in fp32, are the most of it
    assert 4 * 64 * 512**2 * 4 < text.working(2, None, torch.bfloat16) < 1000 * MB


def test_the_least_that_is_named_counts_what_planning_left_behind(weights: Path) -> None:
    memory, left, rooms = kept(limited(weights, 1000)), [], list[int]()

    def choose(room: int) -> MemoryPlan:
        rooms.append(room)
        if len(rooms) == 1:
            left.append(bytearray(b"1" * (50 * MB)))
        raise InputError("too little")

    with pytest.raises(InputError, match="too little"):
        memory._settled(choose)
    assert len(rooms) == 2
    assert rooms[1] < rooms[0] - 45 * MB


def test_weights_of_an_image_encoder_are_memory_of_its_own() -> None:
    class Pictures(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            used.append(self.weight.data_ptr())
            return super().forward(input)

    encoder, used = Pictures(4, 4), list[int]()
    mapped, expected = encoder.weight.data_ptr(), encoder.weight.sum().item()
    assert torch.equal(OnDemand(lambda: encoder)(torch.zeros(1, 4))[0], encoder.bias)
    assert used[0] != mapped
    assert encoder.weight.sum().item() == expected


def test_an_image_encoder_is_loaded_for_each_call_and_let_go() -> None:
    loaded = []

    def load() -> Any:
        loaded.append(1)
        return lambda pictures: pictures + 1

    encoder = OnDemand(load)
    assert not loaded
    assert torch.equal(encoder(torch.zeros(1)), torch.ones(1))
    encoder(torch.zeros(1))
    assert len(loaded) == 2
