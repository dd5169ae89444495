"""`vitascope evaluate`: measure a model on held-out prompts and seeds, from pixels and samples alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitascope.cli.reporting import plain, print_json, say, stderr_console
from vitascope.core.errors import InputError, MediaError

if TYPE_CHECKING:
    from vitascope.evaluation.producing import ClipSource, ModelSource

Advance = Callable[[str, int, int], None]
_TABLE_COLUMNS = 150


def evaluate(
    output_dir: Annotated[Path, typer.Option(help="Folder for clips and report; clips in it are not made again.")],
    group: Annotated[
        list[str] | None,
        typer.Option(
            help="single, pairs, camera, sounds, bounces, audio_to_video, video_to_audio, keyframes, diversity, codec; "
            "repeatable. By default all that the model can do."
        ),
    ] = None,
    num_prompts: Annotated[int | None, typer.Option(min=1, help="Prompts of each group, instead of its own.")] = None,
    model: Annotated[str, typer.Option(help="Model: pocket, or a folder.")] = "pocket",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Another seed gives other prompts and clips.")] = 0,
    num_inference_steps: Annotated[int | None, typer.Option(help="Steps of the sampler.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="w in uncond + w (cond - uncond).")] = None,
    sampler: Annotated[str | None, typer.Option(help="euler, heun, dpmpp_2m, unipc or few_step.")] = None,
    ground_truth: Annotated[
        bool, typer.Option("--ground-truth", help="Judge the world's own clips instead of a model's: the ceiling.")
    ] = False,
    through_codec: Annotated[
        bool, typer.Option("--through-codec", help="With --ground-truth: after a pass through the model's codecs.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
) -> None:
    """Measure a model on held-out prompts and seeds, from pixels and samples alone.

    Writes evaluation.json (prompts and seeds included), contact_sheet.png, shares.png and offsets.png.
    """
    from vitascope.evaluation.prompts import all_cases
    from vitascope.evaluation.suite import run_suite, table_rows, write_report

    groups = list(dict.fromkeys(group or []))
    if through_codec and not ground_truth:
        raise InputError("--through-codec goes with --ground-truth")
    _check_groups(groups)
    sampling = (num_inference_steps, guidance_scale, sampler)
    if ground_truth and sampling != (None, None, None):
        raise InputError("--num-inference-steps, --guidance-scale and --sampler do not go with --ground-truth")
    if ground_truth:
        source = _true_source(model, device, through_codec)
    else:
        source = _model_source(model, device, sampling)
        groups = _judged(groups, model, source.left_out())
    _make_folder(output_dir)
    cases = all_cases(groups, num_prompts, seed, source.fmt)
    with _progress() as advance:
        results = run_suite(source, cases, output_dir, advance)
    settings: dict[str, Any] = {"source": source.identity, "seed": seed, "format": plain(source.fmt)}
    settings |= dict(zip(("num_inference_steps", "guidance_scale", "sampler"), sampling, strict=True))
    report = plain(write_report({k: _finite(v) for k, v in results.items()}, settings, output_dir))
    if json_output:
        print_json(report)
    else:
        _print_table(table_rows(results))
        say(f"evaluation.json and contact_sheet.png in {output_dir}")


def _finite(result: Any) -> Any:
    """A result whose rows are plain JSON values."""
    from dataclasses import replace

    return replace(result, rows=plain(result.rows), measures=plain(result.measures))


def _check_groups(groups: Sequence[str]) -> None:
    from vitascope.core.errors import choice
    from vitascope.evaluation.prompts import GROUPS

    for name in groups:
        choice("group", name, GROUPS)


def _judged(groups: Sequence[str], model: str, left_out: Mapping[str, str]) -> list[str]:
    """The groups that are asked for, or all that say something about the model. Raises CapabilityError for one that
    does not and was asked for by name."""
    from vitascope.core.errors import CapabilityError
    from vitascope.evaluation.prompts import GROUPS

    valid = [name for name in GROUPS if name not in left_out]
    for name in groups:
        if name in left_out:
            raise CapabilityError(
                f"{model} {left_out[name]}: group {name!r} cannot be judged; valid: {', '.join(valid)}"
            )
    if left_out and not groups:
        for reason in dict.fromkeys(left_out.values()):
            names = [name for name, why in left_out.items() if why == reason]
            say(f"{model} {reason}: left out {', '.join(names)}")
    return list(groups) or valid


def _true_source(model: str, device: str, through_codec: bool) -> ClipSource:
    from vitascope.core.shapes import ClipFormat
    from vitascope.evaluation.producing import WorldSource, load_codecs

    codecs = load_codecs(model, device) if through_codec else None
    if codecs is not None and codecs.audio is None:
        say(f"{model} has no audio codec: sound is judged as the world makes it")
    return WorldSource(ClipFormat(), codecs)


def _model_source(model: str, device: str, sampling: tuple[int | None, float | None, str | None]) -> ModelSource:
    from vitascope.diffusion.samplers import sampler_named
    from vitascope.evaluation.producing import ModelSource
    from vitascope.tasks.load import load_pipeline

    if sampling[2] is not None:
        sampler_named(sampling[2])
    pipeline = load_pipeline(model, device)
    return ModelSource(pipeline, pipeline.defaults.clip, *sampling)


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MediaError(f"the folder {path} cannot be made: {error.strerror}") from None


@contextmanager
def _progress() -> Iterator[Advance]:
    """A bar for every group, with the time left, on a terminal; nothing elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    console = stderr_console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        jobs: dict[str, TaskID] = {}

        def advance(group: str, done: int, total: int) -> None:
            if group not in jobs:
                jobs[group] = bar.add_task(group, total=total)
            bar.update(jobs[group], completed=done)

        yield advance


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    """The measures on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(header_style="bold")
    for name in ("group", "measure", "value", "95% interval or spread", "n", "target met"):
        table.add_column(name, no_wrap=True)
    last = ""
    for row in rows:
        if last and row[0] != last:
            table.add_section()
        table.add_row(*("" if index == 0 and row[0] == last else text for index, text in enumerate(row)))
        last = row[0]
    console = Console()
    (console if console.is_terminal else Console(width=_TABLE_COLUMNS)).print(table)
