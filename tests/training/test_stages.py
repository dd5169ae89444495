"""Every stage in small: resumed equals uninterrupted bit for bit, losses are those of record, exports load again."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partialmethod
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
import torch

from vitascope.core.errors import TrainingError
from vitascope.core.tracks import VIDEO
from vitascope.models import load_model
from vitascope.models.codecs.causal_video import config as causal_video
from vitascope.models.codecs.causal_video.config import CausalVideoConfig
from vitascope.models.codecs.waveform import config as waveform
from vitascope.models.codecs.waveform.config import WaveformConfig
from vitascope.tasks.load import load_pipeline
from vitascope.training.checkpoints import write_checkpoint
from vitascope.training.codecs import CodecFiles
from vitascope.training.focus import subject_focus
from vitascope.training.loop import RunOptions, Trainer, run
from vitascope.training.recipe import Recipe, recipe_from_table
from vitascope.training.stage import STAGES, NeedsPreparation, stage_kind
from vitascope.training.stages.audio_codec import AudioCodecStage
from vitascope.training.stages.video_codec import VideoCodecStage, channel_gains, channel_scales

AssertSame = Callable[[Any, Any], None]

CPU = torch.device("cpu")
TEXT = {"width": 16, "depth": 1, "num_heads": 2, "byte_width": 8}
Table = dict[str, Any]


@pytest.fixture
def options(
    tiny_presets: tuple[CausalVideoConfig, WaveformConfig],
    codec_files: CodecFiles,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[str], Table]:
    """The options of each stage, small; the codecs' presets are called "tiny"."""
    monkeypatch.setitem(causal_video.PRESETS, "tiny", tiny_presets[0])
    monkeypatch.setitem(waveform.PRESETS, "tiny", tiny_presets[1])
    # the statistics of latents over fewer clips
    for stage, count in ((VideoCodecStage, 3), (AudioCodecStage, 8)):
        measure = partialmethod(stage._measure_latents, num_clips=count)
        monkeypatch.setattr(stage, "_measure_latents", measure)
    pools = tmp_path_factory.getbasetemp() / "pools"  # built once for all tests: the name is that of the content
    tables: dict[str, Table] = {
        "video_codec": {"preset": "tiny", "batch_size": 4, "clip_px": 32, "crop_px": 16, "crop_frames": 5}
        | {"validation_clips": 2, "recoloured_fraction": 0.5},
        "audio_codec": {"preset": "tiny", "batch_size": 3, "crop_latents": 8, "pool_clips": 5, "varied_fraction": 0.5}
        | {"validation_clips": 2, "scales": {"windows": [64, 256], "mels": [[256, 16]]}},
        "text_encoder": {"batch_size": 6, "text": TEXT, "validation_captions": 16},
        "denoiser": {
            "batch_size": 3,
            "model": {"width": 16, "depth": 2, "num_heads": 2, "audio_width": 8, "audio_heads": 2, "base_grid": [2, 2]}
            | {"strategies": ["full", "causal", "window"]},
            "text": TEXT,
            "video_codec": str(codec_files.video),
            "audio_codec": str(codec_files.audio),
            "clip": {"width_px": 32, "height_px": 32, "num_frames": 9},
            "pool": {"num_clips": 6, "shard_clips": 3, "folder": str(pools)},
            "condition": {"causal": 0.4, "window": 0.2, "window_frames": 2},
            "validation": {"num_shown": 1, "num_videos": 1, "num_scored": 2, "num_steps": 2},
        },
    }
    return lambda name: tables[name]


def make_recipe(name: str, table: Table, **loop: Any) -> Recipe:
    """A recipe with Muon, as the shipped ones."""
    settings = {"num_steps": 4, "log_every": 1, "save_every": 100, "validate_every": 100, **loop}
    sections = {"optimizer": {"name": "muon"}, "schedule": {"warmup_steps": 1}, "loop": settings}
    return recipe_from_table(
        {"stage": name, "seed": 7, **sections, name: table}, lambda stage: stage_kind(stage).options
    )


def make_trainer(recipe: Recipe) -> Trainer:
    stage = stage_kind(recipe.stage).build(recipe, CPU)
    if isinstance(stage, NeedsPreparation):
        stage.prepare(lambda text: None)
    return Trainer(stage, recipe, CPU)


def take(trainer: Trainer, num_steps: int) -> list[float]:
    per_step = trainer.recipe.loop.accumulation
    losses = []
    for step in range(trainer.step, trainer.step + num_steps):
        batches = [trainer.stage.batch(step * per_step + micro) for micro in range(per_step)]
        losses.append(float(trainer.take_step(batches)["loss"]))
    return losses


# Losses of the first four steps with the recipes of this file. A change here is a change of what training does.
GOLDEN = {
    "video_codec": [0.625294, 0.676871, 0.516875, 0.347308],
    "audio_codec": [3.957167, 3.258339, 4.109158, 4.258977],
    "text_encoder": [2.703677, 2.706799, 2.539775, 2.646759],
    "denoiser": [0.975680, 3.127751, 0.740962, 1.175609],
}


@pytest.mark.parametrize("name", STAGES)
def test_resumed_equals_uninterrupted_and_the_losses_of_record(
    name: str, options: Callable[[str], Table], losses_that_resume: Callable[..., list[float]]
) -> None:
    recipe = make_recipe(name, options(name))
    losses = losses_that_resume(lambda: make_trainer(recipe), take)
    # Other machines add in another order, and the pool of the denoiser is in bf16. Muon orthogonalises in bf16, so that
    # its steps differ by up to 1% between machines, of a change of the loss that is itself a part of it.
    assert losses[0] == pytest.approx(GOLDEN[name][0], rel=1e-3)
    assert losses == pytest.approx(GOLDEN[name], rel=5e-3)


@pytest.mark.parametrize("name", STAGES)
def test_a_run_validates_writes_pictures_and_exports_what_loads_again(
    name: str, options: Callable[[str], Table], tmp_path: Path
) -> None:
    recipe = make_recipe(name, options(name), num_steps=2, accumulation=2)
    stage = stage_kind(name).build(recipe, CPU)
    result = run(stage, recipe, RunOptions(tmp_path))
    assert (result.step, result.reason) == (2, "finished")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["train", "train", "validate"]
    numbers = [value for line in lines for value in line.values() if isinstance(value, float)]
    assert all(isfinite(number) for number in numbers)
    shown = {path.name for path in (tmp_path / "validation/step_00000002").iterdir()}
    assert (
        shown
        == {
            "video_codec": {"codec.png"},
            "audio_codec": {"codec.png"},
            "text_encoder": set(),
            "denoiser": {"samples.png", "sample_00.mp4"},
        }[name]
    )
    expected = {"text_encoder", "denoiser"} if name == "denoiser" else {name}
    assert {path.stem for path in result.exported} == expected
    for path in result.exported:
        model = load_model(path)
        assert all(value.isfinite().all() for value in model.state_dict().values())
        part = stage.model.get_submodule({"text_encoder": "text", "denoiser": "denoiser"}.get(path.stem, ""))
        assert type(model) is type(part)
        trained = dict(part.named_parameters())
        for key, value in model.named_parameters():  # averaged, in half precision, beside what was trained
            assert torch.allclose(value, trained[key], atol=0.05), key
    if name == "denoiser":
        pipeline = load_pipeline(str(result.exported[0].parent), "cpu", "fp32")
        assert pipeline.tracks == ("video", "audio")
        assert pipeline.defaults.guidance.cross_modal == {"audio": 2.0}


def test_exported_codecs_have_latents_of_known_scale(options: Callable[[str], Table], tmp_path: Path) -> None:
    for name in ("video_codec", "audio_codec"):
        trainer = make_trainer(make_recipe(name, options(name)))
        (path,) = trainer.export(tmp_path)
        codec: Any = load_model(path)
        if name == "video_codec":
            frames = trainer.stage._frames("statistics", 3)  # type: ignore[attr-defined]
            values = codec.encode(frames).movedim(1, 0).flatten(1)
            # clip by clip or three at once, and statistics in half precision
            scales = values.std(1)
            assert scales.max() == pytest.approx(1.0, rel=5e-3)
            # the balance of 0.5: how much a channel shows goes with the square of its scale
            gains = scales * channel_gains(codec, codec.denormalise(codec.encode(frames)[:1]))
            torch.testing.assert_close(scales, channel_scales(gains, 0.5), rtol=0.1, atol=0)
            torch.testing.assert_close(values.mean(1), torch.zeros(4), rtol=0, atol=5e-3)
        else:
            assert (codec.latent_std > 0).all()
            assert codec.latent_mean.any()


@pytest.mark.parametrize("name", STAGES)
def test_batches_are_a_pure_function_of_the_index(
    name: str, options: Callable[[str], Table], assert_same: AssertSame
) -> None:
    recipe = make_recipe(name, options(name))
    one, other = make_trainer(recipe).stage, make_trainer(recipe).stage
    forward = [one.batch(index) for index in range(3)]
    torch.manual_seed(3)
    for index in (2, 0, 1):
        assert_same(dict(other.batch(index)), dict(forward[index]))
    assert any(not torch.equal(v, forward[1][k]) for k, v in forward[0].items() if isinstance(v, torch.Tensor))


def test_the_video_codec_starts_as_the_best_linear_one(options: Callable[[str], Table]) -> None:
    stage: Any = make_trainer(make_recipe("video_codec", options("video_codec"))).stage
    frames = stage._frames("components", 32)
    codec = stage.codec
    mean, log_variance = codec.posterior(frames)
    values = mean.movedim(1, 0).flatten(1)
    torch.testing.assert_close(values.std(1), torch.ones(4), rtol=1e-3, atol=0)  # principal components, whitened
    torch.testing.assert_close(torch.corrcoef(values), torch.eye(4), rtol=0, atol=1e-3)
    assert (log_variance == -4.0).all()
    mean_error = (codec.decode(codec.encode(frames)) - frames).square().mean()
    assert mean_error < 0.5 * frames.var()


def test_conditions_of_the_denoiser_follow_their_shares(options: Callable[[str], Table]) -> None:
    table = options("denoiser")

    def batch(**condition: float) -> Table:
        return dict(make_trainer(make_recipe("denoiser", {**table, "condition": condition})).stage.batch(0))

    none = batch(camera_share=0.0, empty_share=1.0, causal=1.0, window=0.0)
    assert none["camera"].isnan().all()
    assert none["mask"].sum(1).tolist() == [1, 1, 1]
    assert none["strategy"].kind == "causal"
    every = batch(camera_share=1.0, empty_share=0.0, causal=0.0, window=1.0, window_frames=5, anchor_every=6)
    assert every["camera"].isfinite().all()
    assert (every["mask"].sum(1) > 3).all()
    assert (every["strategy"].kind, every["strategy"].window, every["strategy"].anchor_every) == ("window", 5, 6)


def test_a_still_is_put_in_the_place_of_its_frame(options: Callable[[str], Table]) -> None:
    table = {**options("denoiser"), "tasks": {"still": 1.0}}
    stage: Any = make_trainer(make_recipe("denoiser", table)).stage
    batch = stage.batch(0)
    numbers = stage.order.items(0, 3)
    data = stage.pool.take(numbers)
    rows = torch.arange(3)
    assert torch.equal(batch["video"][rows, :, data["still_frame"]], data["still"])
    assert not batch["video_marked"][rows, data["still_frame"]].any()


def test_the_loss_of_the_denoiser_counts_the_cells_of_subjects_more(options: Callable[[str], Table]) -> None:
    stages: list[Any] = [
        make_trainer(make_recipe("denoiser", {**options("denoiser"), "focus": f})).stage for f in (0.0, 2.0)
    ]
    plain, focused = (stage.batch(0) for stage in stages)
    assert "share" not in plain
    numbers = stages[1].order.items(0, stages[1].options.batch_size)
    for row, number in enumerate(numbers):
        focus = subject_focus(stages[1].pool.scene(number), stages[1].options.clip, stages[1].strides)
        torch.testing.assert_close(focused["share"][row, 0].float(), 1 + 2 * focus, rtol=1e-3, atol=1e-3)
    losses = [
        stage.loss(batch, torch.Generator().manual_seed(0))[1][f"loss_{VIDEO}"]
        for stage, batch in zip(stages, (plain, focused), strict=True)
    ]
    assert losses[0] != losses[1]


def test_a_denoiser_starts_from_the_files_it_is_given(
    options: Callable[[str], Table], tmp_path: Path, assert_same: AssertSame
) -> None:
    text = make_trainer(make_recipe("text_encoder", options("text_encoder")))
    take(text, 1)
    (path,) = text.export(tmp_path)
    table = {**options("denoiser"), "text_encoder": str(path)}
    trainer = make_trainer(make_recipe("denoiser", table))
    expected: Any = load_model(path)
    stage: Any = trainer.stage
    assert_same(dict(stage.net.text.state_dict()), dict(expected.state_dict()))
    assert set(trainer.inputs()) == {"pool", "text_encoder"}


def test_a_run_is_refused_with_other_codecs(options: Callable[[str], Table], tmp_path: Path) -> None:
    trainer = make_trainer(make_recipe("denoiser", options("denoiser")))
    write_checkpoint(tmp_path / "checkpoints", 1, trainer.state_dict(), keep=1)
    other = {**options("denoiser"), "pool": {**options("denoiser")["pool"], "seed": 1}}
    recipe = make_recipe("denoiser", other)
    stage = stage_kind("denoiser").build(recipe, CPU)
    with pytest.raises(TrainingError, match="recipe changed"):
        run(stage, recipe, RunOptions(tmp_path, resume=True))
    same = make_recipe("denoiser", options("denoiser"))
    changed: Any = stage_kind("denoiser").build(same, CPU)
    changed.inputs["pool"] = "another"
    with pytest.raises(TrainingError, match=r"inputs changed since step 1 \(pool\)"):
        run(changed, same, RunOptions(tmp_path, resume=True))
