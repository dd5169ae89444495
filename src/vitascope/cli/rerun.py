"""`vitascope rerun FILE`: make a clip again from the recipe inside its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from vitascope.cli.generate import RECIPE_TAG, Sources, describe, make, read_given, write
from vitascope.cli.reporting import print_json, say
from vitascope.core.errors import MediaError


def rerun(
    file: Annotated[Path, typer.Argument(help="A clip made by vitascope.")],
    output: Annotated[Path | None, typer.Option(help="File to write [FILE with .rerun before its suffix].")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto.")] = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="Print what was made as JSON on stdout.")] = False,
) -> None:
    """Make a clip again from the recipe inside its file: the same model, settings, seed and sources."""
    from vitascope.core.shapes import ClipFormat
    from vitascope.media.writing import check_output
    from vitascope.tasks.load import load_pipeline
    from vitascope.tasks.request import GenerateRequest

    recipe = read_recipe(file)
    target = output or file.with_name(f"{file.stem}.rerun{file.suffix}")
    check_output(target)
    try:
        sources = Sources(**{k: tuple(v) if isinstance(v, list) else v for k, v in recipe["sources"].items()})
        fmt = ClipFormat(recipe["width"], recipe["height"], recipe["fps"], recipe["num_frames"])
        names = ("prompt", "negative_prompt", "seed", "num_inference_steps", "guidance_scale", "sampler")
        settings = {name: recipe[name] for name in names}
        model, weights = recipe["model"], recipe["weights"]
    except (KeyError, TypeError, AttributeError) as error:
        raise MediaError(f"the recipe in {file} is damaged: {error}") from error
    pipeline = load_pipeline(model, device)
    if pipeline.fingerprint != weights:
        say(f"note: {file} was made with other weights of {model}; the new clip will differ")
    if sources.extend:
        fmt = _added(fmt, sources.extend)
    result = make(pipeline, GenerateRequest(format=fmt, given=read_given(sources, fmt), **settings), sources)
    made = write(result, target, sources)
    if json_output:
        print_json(made)
    else:
        say(f"{target}: {describe(result)}")


def read_recipe(file: Path) -> dict[str, Any]:
    """The recipe inside a clip. Raises MediaError when there is none."""
    from vitascope.media.reading import read_metadata

    text = read_metadata(file).get(RECIPE_TAG)
    if text is None:
        raise MediaError(f"{file} holds no recipe: it was not made by vitascope, or was re-encoded since")
    try:
        recipe = json.loads(text)
    except json.JSONDecodeError as error:
        raise MediaError(f"the recipe in {file} is damaged: {error}") from error
    if not isinstance(recipe, dict):
        raise MediaError(f"the recipe in {file} is damaged: it is no object")
    return recipe


def _added(fmt: Any, extended: str) -> Any:
    """The format of what was added: the recipe of an extended clip holds its whole length."""
    from dataclasses import replace

    from vitascope.media.frames import resample_frames
    from vitascope.media.reading import read_video

    clip = read_video(extended)
    return replace(fmt, num_frames=fmt.num_frames - len(resample_frames(clip.frames, clip.fps, fmt.fps)) + 1)
