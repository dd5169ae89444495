"""`vitascope train RECIPE`: run a training recipe, resume it, extend it."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from vitascope.core.errors import InputError
from vitascope.core.freed_memory import keep_freed_memory
from vitascope.training.loop import Progress, RunOptions, RunResult, newest_step, run
from vitascope.training.recipe import read_recipe
from vitascope.training.stage import stage_kind


def train(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (TOML), for example recipes/pocket_denoiser.toml.")],
    output_dir: Annotated[Path | None, typer.Option(help="Folder of the run [runs/RECIPE NAME].")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps in all; more than before extends a run.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto.")] = "auto",
    seed: Annotated[int | None, typer.Option(help="Seed, instead of the recipe's.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE of the recipe, repeatable.")] = None,
    allow_recipe_change: Annotated[bool, typer.Option("--allow-recipe-change", help="Resume all the same.")] = False,
    stop_at: Annotated[int | None, typer.Option(help="Stop, resumable, after this many steps in all.")] = None,
) -> None:
    """Train a part of the model by a recipe. Ctrl-C writes a checkpoint and ends cleanly."""
    settings = list(set_ or [])
    settings += [f"loop.num_steps={steps}"] if steps is not None else []
    settings += [f"seed={seed}"] if seed is not None else []
    folder = output_dir if output_dir is not None else Path("runs") / recipe.stem
    console = Console(stderr=True)
    result = train_recipe(recipe, folder, settings, _Choices(device, resume, allow_recipe_change, stop_at), console)
    summary = {"step": result.step, "reason": result.reason, "exported": [str(path) for path in result.exported]}
    sys.stdout.write(json.dumps(summary) + "\n")


@dataclass(frozen=True)
class _Choices:
    device: str
    resume: bool
    allow_recipe_change: bool
    stop_at: int | None


def train_recipe(
    recipe_file: Path, folder: Path, settings: list[str], choices: _Choices, console: Console
) -> RunResult:
    """Read the recipe, build its stage and run it, with progress on `console`."""
    recipe = read_recipe(recipe_file, lambda name: stage_kind(name).options, settings)
    where = torch_device(choices.device)
    if where.type == "cpu":
        keep_freed_memory()
    step = newest_step(folder)
    if choices.resume and step is None:
        console.print(f"no checkpoint in {folder}: starting at step 0")
    stage = stage_kind(recipe.stage).build(recipe, where)
    with _stop_on_signals() as stopped, _Display(console, recipe.stage) as display:
        options = RunOptions(
            folder,
            where,
            resume=choices.resume,
            allow_recipe_change=choices.allow_recipe_change,
            stop_at=choices.stop_at,
            should_stop=lambda: bool(stopped),
            report=display.report,
        )
        return run(stage, recipe, options)


def torch_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is one. Raises InputError naming what is there."""
    there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name == "auto":
        return torch.device("cuda" if len(there) > 1 else "cpu")
    if name not in there and not (name == "cuda" and len(there) > 1):
        raise InputError(f"device {name!r} is not there; valid values: auto, {', '.join(there)}")
    return torch.device(name)


@contextmanager
def _stop_on_signals() -> Iterator[list[int]]:
    """Collect the first SIGINT or SIGTERM in the yielded list; a second one acts as usual."""
    received: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, before[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Display:
    """A progress bar on a terminal, one line per report elsewhere."""

    def __init__(self, console: Console, name: str) -> None:
        self._console = console
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(name, total=None, note="")

    def __enter__(self) -> _Display:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def report(self, progress: Progress) -> None:
        """Show where the run is."""
        self._bar.update(self._task, completed=progress.step, total=progress.num_steps)
        if progress.metrics and not progress.event:
            m = progress.metrics
            left_s = (progress.num_steps - progress.step) * m.get("s_per_step", 0.0)
            note = f"loss {m['loss']:.4g}  {m['samples_per_s']:.1f} samples/s  {left_s / 60:.0f} min left"
            self._bar.update(self._task, note=note)
            if not self._console.is_terminal:
                self._say(progress, note)
        elif progress.event:
            figures = "  ".join(f"{name} {value:.4g}" for name, value in progress.metrics.items())
            self._say(progress, f"{progress.event}  {figures}")

    def _say(self, progress: Progress, text: str) -> None:
        line = f"step {progress.step}/{progress.num_steps}  {text}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
