"""The training loop: one for all stages, on CPU or CUDA, exact to the bit over a stop and a resume.

What a step does depends on (recipe, step, state) alone: batches follow from (seed, index), and every random generator,
torch's global one included (for dropout), is seeded again at each micro-batch from (seed, index).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitascope.core.errors import TrainingError
from vitascope.core.random import derive_seed
from vitascope.training.checkpoints import list_checkpoints, read_checkpoint, write_checkpoint
from vitascope.training.data import batches, num_samples, to_device
from vitascope.training.ema import Ema
from vitascope.training.metrics import Means, MetricsLog
from vitascope.training.optimizers import build_optimizers, learning_rate_factor
from vitascope.training.recipe import Recipe
from vitascope.training.stage import Batch, HasInputs, NeedsPreparation, Stage

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Progress:
    """Where a run is: optimiser steps done and in all, the last metrics if any are new, and what else happens."""

    step: int
    num_steps: int
    metrics: dict[str, float] = field(default_factory=dict)
    event: str = ""


@dataclass(frozen=True)
class RunOptions:
    """Where and how a run happens; none of it changes what is learnt.

    resume: go on from the newest checkpoint in `folder`, if there is one. stop_at: end, with a checkpoint, after this
    many optimiser steps in all. should_stop: asked after every step. report: told of every step.
    """

    folder: Path
    device: torch.device = CPU
    resume: bool = False
    allow_recipe_change: bool = False
    stop_at: int | None = None
    should_stop: Callable[[], bool] = lambda: False
    report: Callable[[Progress], None] = lambda progress: None


@dataclass(frozen=True)
class RunResult:
    """How a run ended: "finished", or "interrupted", "out of time", "stopped"; and the files it exported."""

    step: int
    reason: str
    exported: tuple[Path, ...]


def run(stage: Stage, recipe: Recipe, options: RunOptions) -> RunResult:
    """Train `stage` until the recipe's last step or a reason to stop; what it writes goes to the folder.

    Folder: checkpoints/, metrics.jsonl, validation/step_N/, export/. Raises TrainingError when the folder holds another
    run, when the recipe changed, or when losses stay non-finite.
    """
    trainer = Trainer(stage, recipe, options.device)
    state = _state_to_resume(trainer, options)
    if isinstance(stage, NeedsPreparation) and not _prepare(stage, trainer, options):
        return RunResult(trainer.step if state is None else state["counts"][0], "interrupted", ())
    if state is not None:
        trainer.load_state_dict(state)
    options.folder.mkdir(parents=True, exist_ok=True)
    log = MetricsLog(options.folder, trainer.step, recipe.loop.tensorboard)
    try:
        return _run(trainer, options, log)
    finally:
        log.close()


class _Interrupted(Exception):
    """Asked to stop while a stage prepares."""


def _prepare(stage: NeedsPreparation, trainer: Trainer, options: RunOptions) -> bool:
    """Let the stage prepare, with progress; False when asked to stop meanwhile."""

    def say(text: str) -> None:
        options.report(Progress(trainer.step, trainer.recipe.loop.num_steps, event=text))
        if options.should_stop():
            raise _Interrupted

    try:
        stage.prepare(say)
    except _Interrupted:
        return False
    return True


def _state_to_resume(trainer: Trainer, options: RunOptions) -> dict[str, Any] | None:
    found = list_checkpoints(options.folder / "checkpoints")
    if not found:
        return None
    step, path = found[-1]
    if not options.resume:
        raise TrainingError(f"{options.folder} holds a run at step {step}: pass --resume, or another --output-dir")
    state = read_checkpoint(path)
    changes = trainer.recipe.changes_from(state["recipe"])
    if changes and not options.allow_recipe_change:
        raise TrainingError(f"the recipe changed since step {step} ({'; '.join(changes)}): pass --allow-recipe-change")
    inputs = trainer.inputs()
    changed = sorted(n for n in inputs.keys() | state["inputs"].keys() if inputs.get(n) != state["inputs"].get(n))
    if changed and not options.allow_recipe_change:
        raise TrainingError(f"inputs changed since step {step} ({', '.join(changed)}): pass --allow-recipe-change")
    return state


class Trainer:
    """Model, averages, optimisers and step count: what a checkpoint holds, and how one optimiser step moves it."""

    def __init__(self, stage: Stage, recipe: Recipe, device: torch.device) -> None:
        self.stage = stage
        self.recipe = recipe
        self.device = device
        stage.model.to(device).train()
        self.parameters = [parameter for parameter in stage.model.parameters() if parameter.requires_grad]
        self.ema = Ema(stage.model, recipe.ema.decay)
        self.optimizers = build_optimizers(stage.model, recipe.optimizer, device)
        self.step = 0
        self.num_samples = 0
        self.num_skipped = 0
        self._skipped_in_a_row = 0
        self.elapsed_s = 0.0

    def inputs(self) -> dict[str, str]:
        """Content hashes of the files the stage reads."""
        return dict(self.stage.inputs) if isinstance(self.stage, HasInputs) else {}

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on as if nothing had happened."""
        return {
            "recipe": self.recipe.to_dict(),
            "inputs": self.inputs(),
            "model": self.stage.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizers": self.optimizers.state_dict(),
            "counts": [self.step, self.num_samples, self.num_skipped, self._skipped_in_a_row],
            "elapsed_s": self.elapsed_s,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of a checkpoint. Raises TrainingError when it is of another model."""
        try:
            self.stage.model.load_state_dict(state["model"])
            self.ema.load_state_dict(state["ema"])
            self.optimizers.load_state_dict(state["optimizers"])
        except (RuntimeError, KeyError, ValueError) as error:
            raise TrainingError(f"the checkpoint does not fit the model of this recipe: {error}") from error
        self.step, self.num_samples, self.num_skipped, self._skipped_in_a_row = state["counts"]
        self.elapsed_s = state["elapsed_s"]

    def take_step(self, micro_batches: list[Batch]) -> dict[str, Tensor]:
        """One optimiser step on `loop.accumulation` micro-batches; clipping and the EMA act once, on the whole of it.

        A loss or gradient that is not finite leaves the weights as they are; too many in a row raise TrainingError.
        """
        loop = self.recipe.loop
        means = Means()
        total: Tensor | None = None
        for micro, batch in enumerate(micro_batches):
            loss, metrics = self._loss(batch, self.step * loop.accumulation + micro)
            (loss / loop.accumulation).backward()
            total = loss.detach() if total is None else total + loss.detach()
            means.add({"loss": loss, **metrics})
            self.num_samples += num_samples(batch)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, loop.clip_norm or float("inf"))
        factor = learning_rate_factor(self.step, loop.num_steps, self.recipe.schedule)
        assert total is not None
        if isfinite(float(total + norm)):
            self.optimizers.set_factor(factor)
            self.optimizers.step()
            self.ema.update(self.stage.model)
            self._skipped_in_a_row = 0
        else:
            self._skip()
        for parameter in self.parameters:
            parameter.grad = None
        self.step += 1
        return {**means.tensors(), "gradient_norm": norm, "learning_rate": torch.tensor(factor)}

    def _loss(self, batch: Batch, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        seed = derive_seed(self.recipe.seed, "loss", index)
        torch.manual_seed(seed)
        noise = torch.Generator(device=self.device).manual_seed(seed)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.loop.precision == "bf16"):
            return self.stage.loss(to_device(batch, self.device), noise)

    def _skip(self) -> None:
        self.num_skipped += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row > self.recipe.loop.max_skipped_steps:
            raise TrainingError(f"{self._skipped_in_a_row} steps in a row without a finite loss, at step {self.step}")

    def validate(self, folder: Path) -> dict[str, float]:
        """Validation figures of the averaged weights; pictures go to `folder`/step_N."""
        target = folder / f"step_{self.step:08d}"
        target.mkdir(parents=True, exist_ok=True)
        with torch.no_grad():
            return self.stage.validate(self.ema.model(self.stage.model), target, self.step)

    def export(self, folder: Path) -> tuple[Path, ...]:
        """Write the averaged weights as the files that ship."""
        folder.mkdir(parents=True, exist_ok=True)
        with torch.no_grad():
            return tuple(self.stage.export(self.ema.model(self.stage.model), folder))


def _run(trainer: Trainer, options: RunOptions, log: MetricsLog) -> RunResult:
    loop = trainer.recipe.loop
    last = min(loop.num_steps, loop.num_steps if options.stop_at is None else options.stop_at)
    indices = range(trainer.step * loop.accumulation, last * loop.accumulation)
    source = batches(trainer.stage.batch, indices, loop.num_workers, loop.prefetch, trainer.device.type == "cuda")
    means, clock = Means(), _Clock(trainer, options, loop.max_minutes)
    reason = "finished" if last == loop.num_steps else "stopped"
    exported_at = -1
    exported: tuple[Path, ...] = ()
    while trainer.step < last:
        means.add(trainer.take_step([next(source) for _ in range(loop.accumulation)]))
        clock.tick()
        early = clock.reason_to_stop() if trainer.step < last else ""
        ends = bool(early) or trainer.step == last
        if ends or trainer.step % loop.log_every == 0:
            metrics = {**means.take(), **clock.rates(), "skipped": float(trainer.num_skipped)}
            log.write(trainer.step, "train", metrics)
            options.report(Progress(trainer.step, loop.num_steps, metrics))
        else:
            options.report(Progress(trainer.step, loop.num_steps))
        if ends or trainer.step % loop.save_every == 0:
            write_checkpoint(options.folder / "checkpoints", trainer.step, trainer.state_dict(), loop.keep_checkpoints)
        if trainer.step % loop.validate_every == 0 or trainer.step == loop.num_steps:
            options.report(Progress(trainer.step, loop.num_steps, event="validating"))
            figures = trainer.validate(options.folder / "validation")
            log.write(trainer.step, "validate", figures)
            options.report(Progress(trainer.step, loop.num_steps, figures, "validated"))
            exported, exported_at = trainer.export(options.folder / "export"), trainer.step
            clock.skip_pause()
        if early:
            reason = early
            break
    if exported_at != trainer.step:
        exported = trainer.export(options.folder / "export")
    return RunResult(trainer.step, reason, exported)


class _Clock:
    """Time spent training, samples a second since the last report, and the reasons to stop early."""

    def __init__(self, trainer: Trainer, options: RunOptions, max_minutes: float | None) -> None:
        self._trainer = trainer
        self._options = options
        self._limit_s = None if max_minutes is None else max_minutes * 60
        self._start_s = self._last_s = self._report_s = time.monotonic()
        self._report_samples, self._report_step = trainer.num_samples, trainer.step

    def tick(self) -> None:
        now = time.monotonic()
        self._trainer.elapsed_s += now - self._last_s
        self._last_s = now

    def skip_pause(self) -> None:
        """Leave the time since the last tick out of the rates."""
        now = time.monotonic()
        self._report_s += now - self._last_s
        self._last_s = now

    def rates(self) -> dict[str, float]:
        seconds = max(1e-9, self._last_s - self._report_s)
        samples = self._trainer.num_samples - self._report_samples
        steps = max(1, self._trainer.step - self._report_step)
        self._report_s, self._report_samples = self._last_s, self._trainer.num_samples
        self._report_step = self._trainer.step
        return {
            "samples_per_s": samples / seconds,
            "s_per_step": seconds / steps,
            "samples": float(self._trainer.num_samples),
            "elapsed_s": self._trainer.elapsed_s,
        }

    def reason_to_stop(self) -> str:
        if self._options.should_stop():
            return "interrupted"
        out_of_time = self._limit_s is not None and self._last_s - self._start_s >= self._limit_s
        return "out of time" if out_of_time else ""


def newest_step(folder: Path) -> int | None:
    """Step of the newest checkpoint of the run in `folder`, None without one."""
    with suppress(IndexError):
        return list_checkpoints(folder / "checkpoints")[-1][0]
    return None
