"""`vitascope inspect`: what a model is, before it is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from vitascope.cli.reporting import plain, print_json

if TYPE_CHECKING:
    from vitascope.tasks.inspection import PartReport, Report


def inspect(
    model: Annotated[str, typer.Argument(help="Folder, file, or OWNER/NAME[@REVISION] of the hub.")],
    variant: Annotated[str, typer.Option(help='Which of several weights in a folder, such as "fp16".')] = "",
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Open .pth files too.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the whole report as JSON on stdout.")] = False,
) -> None:
    """Tell what a model is: its family and layout, its parts and sizes, whether all tensors fit, and what it takes."""
    from vitascope.tasks.discover import discover
    from vitascope.tasks.inspection import inspect_model
    from vitascope.tasks.load import model_place

    report = inspect_model(discover(model_place(model), allow_pickle=allow_pickle, variant=variant))
    if json_output:
        print_json(plain(report))
        return
    typer.echo(f"{report.path}: {_what(report)}")
    for part in report.parts:
        _show(part)
    if report.defaults:
        own = report.defaults
        size = f"{own['width']}x{own['height']}, {own['num_frames']} frames at {own['fps']:g} fps"
        typer.echo(f"samples {size}, {own['num_inference_steps']} steps, guidance {own['guidance_scale']:g}")
    for role, place in report.encoders.items():
        typer.echo(f"{role}: {place}")
    for place in report.not_read:
        typer.echo(f"not opened, as it is a pickle (--allow-pickle): {place}")


def _what(report: Report) -> str:
    match report.kind:
        case "own":
            return "a model of this package (vitascope evaluate measures it)"
        case "part":
            return "one part of a model"
        case "diffusers":
            return f"{report.pipeline} as diffusers writes it"
        case _:
            return f"files of the model's authors, sampled as {report.pipeline}"


def _show(part: PartReport) -> None:
    dtypes = ", ".join(part.dtypes)
    typer.echo(
        f"  {part.role}: {part.family} ({part.layout} names), {part.num_parameters / 1e6:,.1f} M parameters, "
        f"{_size(part.num_bytes)} as {dtypes}"
    )
    fits = ", ".join(f"{_size(size)} in {name}" for name, size in part.weights_bytes.items())
    typer.echo(f"    weights take {fits}")
    if part.problem:
        typer.echo(f"    cannot be loaded: {part.problem}")


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:,.1f} MB"
