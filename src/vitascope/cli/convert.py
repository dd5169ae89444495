"""`vitascope convert`: a public model into the other layout, or with other element types."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitascope.cli.reporting import print_json, say, stderr_console
from vitascope.core.errors import choice

DTYPES = {"keep": "", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def convert(
    model: Annotated[str, typer.Argument(help="Folder, file, or OWNER/NAME[@REVISION] of the hub.")],
    output: Annotated[Path, typer.Argument(help="Folder to make, or the file of an LTX-Video model.")],
    layout: Annotated[str, typer.Option(help="diffusers, or original for that of the authors.")] = "diffusers",
    dtype: Annotated[str, typer.Option(help="keep, fp32, bf16 or fp16.")] = "keep",
    variant: Annotated[str, typer.Option(help='Which of several weights in a folder, such as "fp16".')] = "",
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read tensors of .pth files too.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the files as JSON on stdout.")] = False,
) -> None:
    """Write a public model in the layout of diffusers or of its authors; weights stream from file to file."""
    import torch
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from vitascope.tasks.convert import LAYOUTS, Target, convert_model, left_out, place_of
    from vitascope.tasks.discover import discover
    from vitascope.tasks.load import model_place

    name = choice("layout", layout, LAYOUTS)
    kind = DTYPES[choice("dtype", dtype, DTYPES)]
    found = discover(model_place(model), allow_pickle=allow_pickle, variant=variant)
    target = Target(output, "original" if name == "original" else "diffusers", getattr(torch, kind) if kind else None)
    notes, place = left_out(found, target.layout), place_of(found, target)
    console = stderr_console()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        job = bar.add_task(str(place), total=None)
        made = convert_model(
            found, target, lambda what, done, total: bar.update(job, description=what, completed=done, total=total)
        )
    if json_output:
        print_json({"output": str(place), "files": [str(path) for path in made], "notes": notes})
    else:
        say("\n".join([*map(str, made), *(f"note: {note}" for note in notes)]))
