"""`vitascope rerun FILE`: make a clip again from the recipe inside its file."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitascope.cli.generate import RECIPE_TAG, before, describe, make, write
from vitascope.cli.reporting import print_json, say
from vitascope.cli.sources import Sources, given_of, read_material
from vitascope.core.errors import CheckpointError, InputError, MediaError

if TYPE_CHECKING:
    from vitascope.tasks.request import GenerateRequest


def rerun(
    file: Annotated[Path, typer.Argument(help="A clip made by vitascope.")],
    output: Annotated[Path | None, typer.Option(help="File to write [FILE with .rerun before its suffix].")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto.")] = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="Print what was made as JSON on stdout.")] = False,
) -> None:
    """Make a clip again from the recipe inside its file: the same model, settings, seed and sources."""
    from vitascope.media.writing import check_output
    from vitascope.models.text.cache import user_cache_folder
    from vitascope.tasks.load import Beside, load_pipeline
    from vitascope.weights.config import config_from_dict

    recipe = read_recipe(file)
    target = output or file.with_name(f"{file.stem}.rerun{file.suffix}")
    check_output(target)
    sources, request = _parts(file, recipe)
    text_cache = user_cache_folder(os.environ)
    beside = config_from_dict(Beside, recipe.get("beside", {}))
    pipeline = load_pipeline(str(recipe["model"]), device, str(recipe["precision"]), beside, text_cache=text_cache)
    if pipeline.fingerprint != recipe["weights"]:
        say(f"note: {file} was made with other weights of {recipe['model']}; the new clip will differ")
    material = read_material(sources, pipeline.defaults.clip.sample_rate_hz)
    fmt = request.format
    if material.extend is not None:
        # The recipe holds the whole length, the request of an extension what is added.
        there = len(before(material.extend, fmt).frames)
        fmt = replace(fmt, num_frames=fmt.num_frames - there + 1)
    result = make(pipeline, replace(request, format=fmt, given=given_of(material, sources.camera, fmt)), material)
    made = write(result, target, sources, beside)
    if json_output:
        print_json(made)
    else:
        say(f"{target}: {describe(result)}")


def _parts(file: Path, recipe: dict[str, Any]) -> tuple[Sources, GenerateRequest]:
    """The sources and the request (without what is given) of a recipe. Raises MediaError where it is damaged."""
    from vitascope.core.shapes import ClipFormat
    from vitascope.tasks.request import GenerateRequest
    from vitascope.weights.config import config_from_dict

    names = ("prompt", "negative_prompt", "seed", "num_inference_steps", "guidance_scale", "sampler")
    try:
        sources = config_from_dict(Sources, recipe["sources"])
        fmt = ClipFormat(recipe["width"], recipe["height"], recipe["fps"], recipe["num_frames"])
        for name in ("model", "weights", "precision"):
            recipe[name]
        return sources, GenerateRequest(format=fmt, **{name: recipe[name] for name in names})
    except (KeyError, TypeError, AttributeError, InputError, CheckpointError) as error:
        raise MediaError(f"the recipe in {file} is damaged: {error}") from error


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
