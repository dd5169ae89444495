"""Denoisers of every family in small: they learn, go on exactly, are validated, and load again as a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
import torch

from vitascope.core.errors import CapabilityError, CheckpointError, InputError
from vitascope.core.shapes import ClipFormat
from vitascope.core.tracks import VIDEO
from vitascope.models import DENOISERS, load_model
from vitascope.tasks.generate import generate
from vitascope.tasks.load import load_pipeline
from vitascope.tasks.request import GenerateRequest, Given, Keyframe
from vitascope.training.codecs import CodecFiles
from vitascope.training.loop import RunOptions, Trainer, run
from vitascope.training.recipe import Recipe, read_recipe, recipe_from_table
from vitascope.training.stage import stage_kind
from vitascope.training.stages.denoiser_export import usual_defaults

CPU = torch.device("cpu")
RECIPES = Path(__file__).parents[2] / "recipes"
Table = dict[str, Any]

MOCHI = {"width": 24, "stream_width": 12, "depth": 2, "num_heads": 2, "patch": 2, "area": 16.0, "frequency_width": 16}
WAN = {"width": 24, "depth": 2, "num_heads": 2, "hidden": 32, "frequency_width": 16, "patch": [1, 2, 2]}
MODELS: dict[str, tuple[str, Table]] = {
    "mochi": ("mochi", MOCHI),
    "mochi, text alone": ("mochi", {**MOCHI, "text_sees": "text"}),
    "wan": ("wan", WAN),
    "wan from a picture": ("wan", {**WAN, "in_channels": 12, "noise": "clip"}),
    "ltx": ("ltx", {"width": 24, "depth": 2, "num_heads": 2}),
    "factorised without sound": (
        "factorised",
        {"width": 16, "depth": 2, "num_heads": 2, "audio_channels": 0, "base_grid": [2, 2]},
    ),
}
each_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture
def table(codec_files: CodecFiles, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Table]:
    """The section [denoiser] for one of MODELS, with changes."""
    pools = tmp_path_factory.getbasetemp() / "pools"  # built once for all tests: the name is that of the content

    def make(name: str, **changes: Any) -> Table:
        family, model = MODELS[name]
        return {
            "family": family,
            "batch_size": 3,
            "model": model,
            "text": {"width": 16, "depth": 1, "num_heads": 2, "byte_width": 8},
            "video_codec": str(codec_files.video),
            "audio_codec": str(codec_files.audio),
            "clip": {"width_px": 32, "height_px": 32, "num_frames": 9},
            "pool": {"num_clips": 6, "shard_clips": 3, "folder": str(pools)},
            "condition": {"causal": 0.0},
            "validation": {"num_shown": 1, "num_videos": 1, "num_scored": 2, "num_steps": 2},
            **changes,
        }

    return make


def make_recipe(options: Table, **loop: Any) -> Recipe:
    settings = {"num_steps": 4, "log_every": 1, "save_every": 100, "validate_every": 100, **loop}
    sections = {"optimizer": {"name": "muon", "learning_rate": 1e-2}, "schedule": {"warmup_steps": 1}}
    values = {"stage": "denoiser", "seed": 7, **sections, "loop": settings, "denoiser": options}
    return recipe_from_table(values, lambda stage: stage_kind(stage).options)


def make_trainer(recipe: Recipe) -> Trainer:
    stage: Any = stage_kind("denoiser").build(recipe, CPU)
    stage.prepare(lambda text: None)
    return Trainer(stage, recipe, CPU)


def take(trainer: Trainer, num_steps: int) -> list[float]:
    steps = range(trainer.step, trainer.step + num_steps)
    return [float(trainer.take_step([trainer.stage.batch(step)])["loss"]) for step in steps]


def loss_of_one_batch(trainer: Trainer) -> float:
    with torch.no_grad():
        return float(trainer.stage.loss(trainer.stage.batch(0), torch.Generator().manual_seed(0))[0])


@each_model
def test_the_loss_falls_on_a_few_clips(name: str, table: Callable[..., Table]) -> None:
    trainer = make_trainer(make_recipe(table(name), num_steps=25))
    before = loss_of_one_batch(trainer)
    take(trainer, 25)
    # It begins as a head of zeros gives it, at about the square of the velocity or of the clip.
    assert loss_of_one_batch(trainer) < 0.8 * before


@each_model
def test_resumed_equals_uninterrupted(
    name: str, table: Callable[..., Table], losses_that_resume: Callable[..., list[float]]
) -> None:
    recipe = make_recipe(table(name, focus=1.0))
    assert len(losses_that_resume(lambda: make_trainer(recipe), take)) == 4


@each_model
def test_what_a_run_exports_is_a_model_that_makes_silent_clips(
    name: str, table: Callable[..., Table], tmp_path: Path
) -> None:
    recipe = make_recipe(table(name), num_steps=2)
    stage: Any = stage_kind("denoiser").build(recipe, CPU)
    run(stage, recipe, RunOptions(tmp_path))
    figures = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][-1]
    assert all(isfinite(value) for value in figures.values() if isinstance(value, float))
    tasks = {key for key in figures if key.endswith("_video") and not key.startswith("level")}
    by_frame = {"image_video", "keyframes_video", "still_video", "extend_video"}
    pictured = name == "wan from a picture"
    expected = {"text_video"} | (set() if name.startswith("mochi") else by_frame)
    assert tasks == ({"image_beside_video"} if pictured else expected)
    assert "level_0.5_video" in figures
    assert not any(key.endswith("_audio") for key in figures)
    shown = {path.name for path in (tmp_path / "validation/step_00000002").iterdir()}
    assert shown == {"samples.png", "sample_00.mp4"}

    folder = tmp_path / "export"
    assert not (folder / "audio_codec.safetensors").exists()
    trained = dict(stage.model.get_submodule("denoiser").named_parameters())
    for key, value in load_model(folder / "denoiser.safetensors").named_parameters():  # averaged, in half precision
        assert torch.allclose(value, trained[key], atol=0.05), key
    fmt, given = ClipFormat(32, 32, num_frames=9), Given()
    request = GenerateRequest("a red ball", format=fmt, num_inference_steps=2)
    for precision in ("fp32", "bf16"):
        pipeline = load_pipeline(str(folder), "cpu", precision)
        if pictured:
            with pytest.raises(InputError, match="starts from a picture: give an image or a keyframe"):
                generate(pipeline, request)
            given = Given((Keyframe(0.0, torch.full((3, 32, 32), 99, dtype=torch.uint8)),))
        made = generate(pipeline, replace(request, given=given))
        assert made.clip.frames.shape == (9, 3, 32, 32)
        assert made.clip.samples is None
    assert pipeline.tracks == (VIDEO,)
    defaults = usual_defaults(stage.options.clip, stage.can)
    assert pipeline.defaults == defaults
    assert (defaults.guidance.scale, dict(defaults.guidance.cross_modal)) == (2.5, {})

    (folder / "pipeline.json").write_text(json.dumps({"num_inference_steps": 3, "overlap_frames": 5}))
    stage.export(stage.model, folder)  # what somebody has chosen stays
    assert load_pipeline(str(folder), "cpu", "fp32").defaults.num_inference_steps == 3


@each_model
def test_a_batch_holds_what_the_model_takes(name: str, table: Callable[..., Table]) -> None:
    trainer = make_trainer(make_recipe(table(name)))
    batch = dict(trainer.stage.batch(0))
    assert {"video", "video_levels", "video_marked"} <= set(batch)
    assert not any(key.startswith("audio") for key in batch)
    assert ("camera" in batch) == name.startswith("factorised")
    if name == "wan from a picture":
        mask, opening = batch["beside"].split([4, 4], 1)
        assert mask.shape == opening.shape == batch["video"].shape
        assert mask[:, :, 0].all()  # the first latent frame is one frame, which is known
        assert not mask[:, :, 1:].any()
        # the first latent frame does not know of those after it, and they do not show what the clip does
        torch.testing.assert_close(opening[:, :, 0], batch["video"][:, :, 0].float(), rtol=0, atol=0)
        assert not torch.equal(opening[:, :, 1:], batch["video"][:, :, 1:].float())
        assert batch["video_marked"].all()
    if name.startswith("mochi"):  # one level for a clip, of which every cell counts
        levels = torch.cat([trainer.stage.batch(index)["video_levels"] for index in range(8)])
        assert (levels == levels[:, :1]).all()
        assert batch["video_marked"].all()


def test_only_tasks_that_the_model_can_be_given_are_taken(table: Callable[..., Table]) -> None:
    build: Any = stage_kind("denoiser").build
    for name, task, valid in (
        ("mochi", "image", "text"),
        ("mochi", "audio_to_video", "text"),
        ("wan", "one_track", "text, image, keyframes, still, extend"),
        ("ltx", "video_to_audio", "text, image, keyframes, still, extend"),
    ):
        with pytest.raises(InputError, match=f"cannot be given the task '{task}'; valid values: {valid}$"):
            build(make_recipe(table(name, tasks={"text": 0.5, task: 0.1})), CPU)
        build(make_recipe(table(name, tasks={"text": 0.5, task: 0.0})), CPU)
    usual = build(make_recipe(table("ltx")), CPU)
    assert list(usual.options.tasks) == ["text", "image", "keyframes", "still", "extend"]


def test_a_level_for_each_frame_makes_more_tasks_possible(table: Callable[..., Table]) -> None:
    family, model = MODELS["wan"]
    stage: Any = stage_kind("denoiser").build(make_recipe(table("wan", model={**model, "noise": "clip"})), CPU)
    assert family == "wan"
    assert list(stage.options.tasks) == ["text"]
    assert stage.options.noise.per_frame_share == 0.0


@pytest.mark.parametrize(
    ("name", "changes", "error", "words"),
    [
        (
            "mochi",
            {"family": "mochy"},
            InputError,
            "family 'mochy' is not known; valid values: factorised, wan",
        ),
        ("mochi", {"preset": "small"}, InputError, "denoiser.preset 'small' is not known; valid values: pocket"),
        ("mochi", {"model": {"hidden": 3}}, CheckpointError, "MochiConfig has unknown keys: hidden; valid keys: width"),
        ("mochi", {"condition": {"causal": 0.1}}, InputError, r"strategies full, not causal: set causal = 0"),
        ("wan", {"condition": {"causal": 0.0, "window": 0.1}}, InputError, r"not window: set window = 0"),
        ("wan", {"model": {"in_channels": 9}}, CapabilityError, "reads 5 channels beside its .* these are 8"),
        ("wan from a picture", {"tasks": {"text": 1.0}}, InputError, "cannot be given the task 'text'.* image_beside$"),
        ("wan from a picture", {"model": {"image_width": 8}}, CapabilityError, r"leave out model\.image_width"),
        (
            "factorised without sound",
            {"model": {"video_channels": 0, "audio_channels": 6, "local_channels": []}},
            CapabilityError,
            "has a video track; got audio",
        ),
        ("ltx", {"condition": {"causal": 0.7, "window": 0.6}}, InputError, "shares of one whole"),
        ("ltx", {"condition": {"causal": 0.0, "anchor_every": 0}}, InputError, "anchor_every must be positive"),
        ("ltx", {"num_words": 80}, InputError, "num_words must lie in 1..64"),
        ("ltx", {"tasks": {"text": 0.0}}, InputError, "at least one task must have a positive weight"),
    ],
)
def test_what_a_family_cannot_do_is_refused(
    name: str, changes: Table, error: type[Exception], words: str, table: Callable[..., Table]
) -> None:
    options = table(name)
    model = {**options["model"], **changes.get("model", {})}
    with pytest.raises(error, match=words):
        stage_kind("denoiser").build(make_recipe({**options, **changes, "model": model}), CPU)


def test_a_denoiser_starts_from_a_file_of_its_own_family(table: Callable[..., Table], tmp_path: Path) -> None:
    trainer = make_trainer(make_recipe(table("mochi")))
    take(trainer, 1)
    path = next(path for path in trainer.export(tmp_path) if path.stem == "denoiser")
    stage: Any = stage_kind("denoiser").build(make_recipe(table("mochi", denoiser=str(path))), CPU)
    expected = load_model(path).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in stage.net.denoiser.state_dict().items())
    with pytest.raises(CheckpointError, match="'mochi', but 'ltx' is needed"):
        stage_kind("denoiser").build(make_recipe(table("ltx", denoiser=str(path))), CPU)


@pytest.mark.parametrize("family", DENOISERS)
def test_every_family_has_a_pocket_preset(family: str) -> None:
    """What a recipe that names the family alone trains: small, on the latents of the pocket codecs."""
    table = {"stage": "denoiser", "denoiser": {"family": family, "condition": {"causal": 0.0}}}
    recipe = recipe_from_table(table, lambda stage: stage_kind(stage).options)
    stage: Any = stage_kind("denoiser").build(recipe, CPU)
    assert sum(parameter.numel() for parameter in stage.net.denoiser.parameters()) < 15e6
    assert stage.net.denoiser.patch[0] == 1


def test_the_dual_stream_recipes_differ_in_what_text_sees_alone_and_share_the_pocket_s_pool() -> None:
    names = ("pocket_dual_joint", "pocket_dual_asymmetric", "pocket_denoiser")
    joint, asymmetric, pocket = (
        read_recipe(RECIPES / f"{name}.toml", lambda stage: stage_kind(stage).options, ["denoiser.text_encoder="])
        for name in names
    )
    assert asymmetric.changes_from(joint.to_dict()) == ["options.model.text_sees: 'all' -> 'text'"]
    stages: list[Any] = [stage_kind("denoiser").build(recipe, CPU) for recipe in (joint, asymmetric, pocket)]
    assert len({stage.spec.digest for stage in stages}) == 1
    assert {stage.options.pool.folder for stage in stages} == {"pools"}
    assert {stage.spec.num_clips for stage in stages} == {10240}
    counts = [sum(parameter.numel() for parameter in stage.net.denoiser.parameters()) for stage in stages]
    assert counts[0] == counts[1] == pytest.approx(counts[2], rel=0.15)
