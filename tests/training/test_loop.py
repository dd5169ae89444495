from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitascope.core.errors import TrainingError
from vitascope.core.random import generator
from vitascope.training.checkpoints import list_checkpoints, read_checkpoint
from vitascope.training.data import EpochOrder
from vitascope.training.ema import Ema
from vitascope.training.loop import Progress, RunOptions, RunResult, Trainer, run
from vitascope.training.recipe import Recipe, recipe_from_table
from vitascope.training.stage import Batch

AssertSame = Callable[[Any, Any], None]

CPU = torch.device("cpu")


@dataclass(frozen=True)
class ToyOptions:
    batch_size: int = 4
    num_items: int = 10
    bad_from: int = -1
    bad_to: int = -1


class ToyStage:
    """Two layers with dropout that learn a plane; micro-batches bad_from to bad_to - 1 have a loss of nan."""

    def __init__(self, recipe: Recipe) -> None:
        self.options: ToyOptions = recipe.options
        with torch.random.fork_rng():
            torch.manual_seed(recipe.seed)
            self.net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.GELU(), nn.Linear(8, 1))
        x = torch.randn(self.options.num_items, 6, generator=generator(recipe.seed, "items"))
        self.items = torch.cat([x, x.sum(1, keepdim=True)], 1)
        self.order = EpochOrder(self.options.num_items, recipe.seed)
        self.seen: list[list[int]] = []
        self.inputs = {"items": "hash-a"}

    @property
    def model(self) -> nn.Module:
        return self.net

    def batch(self, index: int) -> Batch:
        items = self.order.items(index, self.options.batch_size)
        return {"items": self.items[items], "names": items, "index": index}

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        self.seen.append(batch["names"])
        x, y = batch["items"][:, :6], batch["items"][:, 6:]
        x = x + 0.1 * torch.randn(x.shape, generator=generator)
        loss = (self.net(x) - y).square().mean()
        if self.options.bad_from <= batch["index"] < self.options.bad_to:
            loss = loss * float("nan")
        return loss, {"noise": x.detach().std()}

    def validate(self, model: nn.Module, folder: Path, step: int) -> dict[str, float]:
        (folder / "figure.txt").write_text(str(step))
        torch.rand(3)  # a validation may use the global generator without changing what follows
        return {"error": float((model(self.items[:, :6]) - self.items[:, 6:]).abs().mean())}

    def export(self, model: nn.Module, folder: Path) -> list[Path]:
        torch.save(model.state_dict(), folder / "toy.pt")
        return [folder / "toy.pt"]


def toy_recipe(**loop: Any) -> Recipe:
    """A recipe of the toy stage; keywords go to [loop], but for the sections named here."""
    sections = {name: loop.pop(name) for name in ("optimizer", "toy", "ema") if name in loop}
    settings = {"num_steps": 12, "save_every": 5, "validate_every": 4, "log_every": 3, **loop}
    table = {"stage": "toy", "schedule": {"warmup_steps": 3}, "loop": settings, **sections}
    return recipe_from_table(table, lambda name: ToyOptions)


def train(recipe: Recipe, folder: Path, **options: Any) -> tuple[ToyStage, RunResult]:
    stage = ToyStage(recipe)
    return stage, run(stage, recipe, RunOptions(folder, **options))


def final_state(folder: Path) -> dict[str, Any]:
    state = read_checkpoint(list_checkpoints(folder / "checkpoints")[-1][1])
    state.pop("elapsed_s")
    return state


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(
    tmp_path: Path, optimizer: str, assert_same: AssertSame
) -> None:
    recipe = toy_recipe(optimizer={"name": optimizer}, accumulation=2)
    whole, _ = train(recipe, tmp_path / "whole")
    first, stopped = train(recipe, tmp_path / "parts", stop_at=7)
    second, finished = train(recipe, tmp_path / "parts", resume=True)
    assert (stopped.step, stopped.reason) == (7, "stopped")
    assert (finished.step, finished.reason) == (12, "finished")
    assert whole.seen == first.seen + second.seen
    assert_same(final_state(tmp_path / "whole"), final_state(tmp_path / "parts"))
    # and the metrics of each step are there once
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts/metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert steps[-1] == 12


def test_resuming_after_a_crash_takes_the_lost_steps_again(tmp_path: Path, assert_same: AssertSame) -> None:
    recipe = toy_recipe()
    whole, _ = train(recipe, tmp_path / "whole")

    class Crash(Exception):
        pass

    def crash(progress: Progress) -> None:
        if progress.step == 9:
            raise Crash

    with pytest.raises(Crash):
        train(recipe, tmp_path / "crashed", report=crash)
    again, _ = train(recipe, tmp_path / "crashed", resume=True)
    assert again.seen == whole.seen[5:]
    assert_same(final_state(tmp_path / "whole"), final_state(tmp_path / "crashed"))
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "crashed")]
    kinds = [[(json.loads(line)["step"], json.loads(line)["kind"]) for line in lines] for lines in logs]
    assert len(set(kinds[1])) == len(kinds[1])
    assert set(kinds[1]) == set(kinds[0])


def test_loader_processes_give_the_same_run(tmp_path: Path, assert_same: AssertSame) -> None:
    train(toy_recipe(), tmp_path / "inline")
    train(toy_recipe(num_workers=2), tmp_path / "workers", stop_at=6)
    train(toy_recipe(num_workers=2), tmp_path / "workers", resume=True)
    one, other = final_state(tmp_path / "inline"), final_state(tmp_path / "workers")
    del one["recipe"], other["recipe"]
    assert_same(one, other)


def test_ema_and_clipping_act_once_per_optimiser_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clipped: list[float] = []
    clip = nn.utils.clip_grad_norm_

    def counted(parameters: Any, max_norm: float) -> torch.Tensor:
        norm = clip(parameters, max_norm)
        clipped.append(float(norm))
        return norm

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", counted)
    trainer = Trainer(ToyStage(toy_recipe(accumulation=3)), toy_recipe(accumulation=3), CPU)
    trainer.take_step([trainer.stage.batch(i) for i in range(3)])
    assert trainer.ema.num_updates == 1
    assert len(clipped) == 1


def test_accumulated_gradient_is_that_of_the_whole_batch_clipped_as_one() -> None:
    recipe = toy_recipe(accumulation=2, clip_norm=0.01, optimizer={"name": "adamw", "eps": 1.0})
    stage = ToyStage(recipe)
    before = {name: p.detach().clone() for name, p in stage.model.named_parameters()}
    trainer = Trainer(stage, recipe, CPU)
    batches = [stage.batch(0), stage.batch(1)]
    losses = [trainer._loss(batch, i)[0] for i, batch in enumerate(batches)]
    gradients = torch.autograd.grad(torch.stack(losses).mean(), list(stage.model.parameters()))
    norm = torch.stack([g.norm() for g in gradients]).norm()
    assert norm > 0.01
    trainer.take_step(batches)
    group = trainer.optimizers.parts["adamw"].param_groups[0]
    assert group["lr"] == pytest.approx(1e-3 / 4)  # first of three warm-up steps
    for (name, parameter), gradient in zip(stage.model.named_parameters(), gradients, strict=True):
        first = gradient * 0.01 / norm  # after bias correction AdamW's first moment is the gradient itself
        decay = 0.01 if parameter.ndim == 2 else 0.0
        expected = before[name] * (1 - group["lr"] * decay) - group["lr"] * first / (first.abs() + 1.0)
        assert torch.allclose(parameter, expected, atol=1e-7), name


def test_losses_that_are_not_finite_are_skipped_then_refused(tmp_path: Path) -> None:
    recipe = toy_recipe(toy={"bad_from": 2, "bad_to": 4}, max_skipped_steps=2)
    _, result = train(recipe, tmp_path / "two")
    state = final_state(tmp_path / "two")
    assert result.reason == "finished"
    assert state["counts"][2] == 2
    assert all(torch.isfinite(value).all() for value in state["model"].values())
    assert state["ema"]["num_updates"] == 10
    with pytest.raises(TrainingError, match="3 steps in a row"):
        train(toy_recipe(toy={"bad_from": 2, "bad_to": 9}, max_skipped_steps=2), tmp_path / "many")


def test_a_changed_recipe_or_input_is_refused_by_name(tmp_path: Path) -> None:
    train(toy_recipe(), tmp_path, stop_at=5)
    changed = toy_recipe(toy={"batch_size": 2}, clip_norm=2.0)
    with pytest.raises(TrainingError, match=r"loop.clip_norm: 1.0 -> 2.0; options.batch_size: 4 -> 2"):
        train(changed, tmp_path, resume=True)
    stage = ToyStage(toy_recipe())
    stage.inputs = {"items": "hash-b"}
    with pytest.raises(TrainingError, match=r"inputs changed since step 5 \(items\)"):
        run(stage, toy_recipe(), RunOptions(tmp_path, resume=True))
    _, result = train(changed, tmp_path, resume=True, allow_recipe_change=True)
    assert result.step == 12


def test_a_folder_with_a_run_is_not_overwritten(tmp_path: Path) -> None:
    train(toy_recipe(), tmp_path, stop_at=5)
    with pytest.raises(TrainingError, match="--resume"):
        train(toy_recipe(), tmp_path)


def test_a_finished_run_can_be_extended(tmp_path: Path) -> None:
    train(toy_recipe(), tmp_path)
    stage, result = train(toy_recipe(num_steps=15), tmp_path, resume=True)
    assert result.step == 15
    assert len(stage.seen) == 3


def test_stops_on_request_and_out_of_time_with_a_checkpoint(tmp_path: Path) -> None:
    polls: list[int] = []

    def should_stop() -> bool:
        polls.append(1)
        return len(polls) == 2

    _, result = train(toy_recipe(), tmp_path / "asked", should_stop=should_stop)
    assert (result.step, result.reason) == (2, "interrupted")
    assert list_checkpoints(tmp_path / "asked/checkpoints")[-1][0] == 2
    _, result = train(toy_recipe(max_minutes=0.0), tmp_path / "time")
    assert (result.step, result.reason) == (1, "out of time")
    _, result = train(toy_recipe(), tmp_path / "time", resume=True)
    assert result.step == 12


def test_writes_metrics_pictures_exports_and_keeps_the_last_checkpoints(tmp_path: Path) -> None:
    _, result = train(toy_recipe(keep_checkpoints=2), tmp_path)
    assert [step for step, _ in list_checkpoints(tmp_path / "checkpoints")] == [10, 12]
    assert sorted(path.name for path in (tmp_path / "validation").iterdir()) == [
        f"step_{step:08d}" for step in (4, 8, 12)
    ]
    assert result.exported == (tmp_path / "export/toy.pt",)
    last = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][-2]
    assert {"loss", "noise", "gradient_norm", "learning_rate", "samples_per_s"} < last.keys()
    assert last["samples"] == 12 * 4


def test_bf16_autocast_keeps_fp32_weights(tmp_path: Path) -> None:
    stage, _ = train(toy_recipe(precision="bf16"), tmp_path)
    assert {p.dtype for p in stage.model.parameters()} == {torch.float32}


def test_ema_follows_its_recurrence_and_copies_buffers() -> None:
    model = nn.BatchNorm1d(2)
    ema = Ema(model, decay=0.5)
    expected = model.weight.detach().clone()
    for n in range(1, 12):
        model.weight.data.add_(1.0)
        model.running_mean = torch.full((2,), float(n))
        ema.update(model)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    averaged = ema.model(model)
    assert isinstance(averaged, nn.BatchNorm1d)
    assert averaged.running_mean is not None
    assert torch.allclose(averaged.weight, expected)
    assert averaged.running_mean.tolist() == [11.0, 11.0]
    assert not averaged.training
    assert model.training


def test_a_wish_to_stop_is_heard_while_a_stage_prepares(tmp_path: Path) -> None:
    said: list[str] = []

    class SlowStage(ToyStage):
        def prepare(self, say: Callable[[str], None]) -> None:
            for text in ("one", "two", "three"):
                said.append(text)
                say(text)

    recipe = toy_recipe()
    options = RunOptions(tmp_path / "run", should_stop=lambda: len(said) > 1)
    assert run(SlowStage(recipe), recipe, options) == RunResult(0, "interrupted", ())
    assert said == ["one", "two"]
    assert not (tmp_path / "run").exists()
