"""`vitascope rerun FILE`: make a clip again from the recipe inside its file."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitascope.cli.generate import RECIPE_TAG, before, describe, make, write
from vitascope.cli.models import ModelChoice, open_model
from vitascope.cli.reporting import print_json, say
from vitascope.cli.sampling import SecondPass, make_clip
from vitascope.cli.sources import Sources, given_of, read_material
from vitascope.core.errors import CheckpointError, InputError, MediaError

if TYPE_CHECKING:
    from vitascope.tasks.generate import Generated
    from vitascope.tasks.load import Beside
    from vitascope.tasks.pipeline import Pipeline
    from vitascope.tasks.request import GenerateRequest


def rerun(
    file: Annotated[Path, typer.Argument(help="A clip made by vitascope.")],
    output: Annotated[Path | None, typer.Option(help="File to write [FILE with .rerun before its suffix].")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto.")] = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="Print what was made as JSON on stdout.")] = False,
) -> None:
    """Make a clip again from the recipe inside its file: the same model, settings, seed and sources."""
    from vitascope.media.writing import check_output

    recipe = read_recipe(file)
    target = output or file.with_name(f"{file.stem}.rerun{file.suffix}")
    check_output(target)
    parts = _parts(file, recipe)
    parts.second.check(parts.sources)
    choice = ModelChoice(str(recipe["model"]), device, str(recipe["precision"]), parts.beside, parts.loras)
    with open_model(choice) as opened:
        result = _make(opened.pipeline, parts, recipe, file)
    made = write(result, target, parts.sources, parts.beside, parts.second)
    if json_output:
        print_json(made)
    else:
        say(f"{target}: {describe(result)}")


@dataclass(frozen=True)
class _Parts:
    """What a recipe says, as the verbs have it; the request is without what is given."""

    sources: Sources
    request: GenerateRequest
    beside: Beside
    second: SecondPass
    loras: tuple[str, ...]


def _make(pipeline: Pipeline, parts: _Parts, recipe: dict[str, Any], file: Path) -> Generated:
    """The clip of a recipe."""
    if pipeline.fingerprint != recipe["weights"]:
        say(f"note: {file} was made with other weights of {recipe['model']}; the new clip will differ")
    material = read_material(parts.sources, pipeline.defaults.clip.sample_rate_hz)
    fmt = parts.request.format
    if material.extend is not None:
        # The recipe holds the whole length, the request of an extension what is added.
        there = len(before(material.extend, fmt).frames)
        fmt = replace(fmt, num_frames=fmt.num_frames - there + 1)
    given = given_of(material, parts.sources.camera, fmt, pipeline.video_codec.strides.time)
    make_one = partial(make_clip, second=parts.second, upsampler=parts.second.load(pipeline))
    return make(pipeline, replace(parts.request, format=fmt, given=given), material, lambda step: None, make_one)


def _parts(file: Path, recipe: dict[str, Any]) -> _Parts:
    """The parts of a recipe. Raises MediaError where it is damaged."""
    from vitascope.core.shapes import ClipFormat
    from vitascope.tasks.load import Beside
    from vitascope.tasks.request import SETTINGS, GenerateRequest
    from vitascope.weights.config import config_from_dict

    try:
        size = {"width_px": recipe["width"], "height_px": recipe["height"]}
        rates = {name: recipe[name] for name in ("fps", "num_frames")}
        fmt = config_from_dict(ClipFormat, size | rates)
        for name in ("model", "weights", "precision", "prompt", "seed"):
            recipe[name]
        request = config_from_dict(GenerateRequest, {name: recipe[name] for name in SETTINGS if name in recipe})
        return _Parts(
            config_from_dict(Sources, recipe["sources"]),
            replace(request, format=fmt),
            config_from_dict(Beside, recipe.get("beside", {})),
            config_from_dict(SecondPass, recipe.get("second", {})),
            tuple(str(text) for text in recipe.get("loras", ())),
        )
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
