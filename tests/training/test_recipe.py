from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from vitascope.core.errors import InputError
from vitascope.training.recipe import EmaRecipe, Recipe, read_recipe, recipe_from_table
from vitascope.training.stage import STAGES, stage_kind

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))


@dataclass(frozen=True)
class Inner:
    widths: tuple[int, ...] = (1, 2)
    share: dict[str, float] | None = None


@dataclass(frozen=True)
class Options:
    size: int
    inner: Inner = Inner()


def parse(table: dict[str, Any]) -> Recipe:
    return recipe_from_table(table, lambda name: Options)


def test_sections_become_frozen_dataclasses() -> None:
    table = {"stage": "x", "seed": 3, "optimizer": {"learning_rate": 1, "betas": [0.8, 0.9]}}
    recipe = parse({**table, "x": {"size": 4, "inner": {"widths": [5], "share": {"a": 1}}}})
    assert recipe.optimizer.learning_rate == 1.0
    assert recipe.optimizer.betas == (0.8, 0.9)
    assert recipe.options == Options(4, Inner((5,), {"a": 1.0}))
    with pytest.raises(FrozenInstanceError):
        recipe.seed = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sed": 1}, r"key 'sed' is not known; valid values: stage, seed"),
        ({"loop": {"steps": 1}}, r"'loop.steps'.*num_steps"),
        ({"x": {"size": 1, "inner": {"width": 2}}}, r"'x.inner.width'.*valid values: widths, share"),
        ({"x": {}}, r"'x.size' is missing"),
        ({"x": {"size": "big"}}, r"'x.size' must be int, got 'big'"),
        ({"x": {"size": True}}, r"'x.size' must be int"),
        ({"optimizer": {"name": "sgd"}}, r"valid values: adamw, muon"),
        ({"optimizer": {"betas": [0.9]}}, r"takes 2 values"),
        ({"loop": {"num_steps": 0}}, r"at least 1"),
        ({"ema": {"decay": 1.0}}, r"\[0, 1\)"),
        ({"options": {}}, r"section \[x\]"),
        ({"loop": 3}, r"must be a table"),
    ],
)
def test_bad_recipes_are_refused_with_what_is_valid(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse({"stage": "x", "x": {"size": 1}, **change})


def test_settings_override_the_file(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text('stage = "x"\n[x]\nsize = 1\n')
    settings = ["loop.num_steps=7", "x.inner.widths=[3, 4]", "loop.precision=bf16", "seed = 9"]
    recipe = read_recipe(file, lambda name: Options, settings)
    assert (recipe.loop.num_steps, recipe.options.inner.widths, recipe.seed) == (7, (3, 4), 9)
    assert recipe.loop.precision == "bf16"
    for bad in ("loop.num_steps", "=3", "stage.more=1"):
        with pytest.raises(InputError, match="setting"):
            read_recipe(file, lambda name: Options, [bad])
    file.write_text("stage = ")
    with pytest.raises(InputError, match="cannot be read"):
        read_recipe(file, lambda name: Options)
    with pytest.raises(InputError, match="cannot be read"):
        read_recipe(tmp_path / "none.toml", lambda name: Options)


def test_changes_name_the_fields_and_leave_the_free_ones_out() -> None:
    recipe = parse({"stage": "x", "x": {"size": 1}})
    other = replace(recipe, seed=1, loop=replace(recipe.loop, num_steps=5, accumulation=2), options=Options(2))
    assert other.changes_from(recipe.to_dict()) == ["loop.accumulation: 1 -> 2", "options.size: 1 -> 2", "seed: 0 -> 1"]
    assert recipe.changes_from(recipe.to_dict()) == []


def test_a_field_that_is_new_since_a_run_began_had_its_default() -> None:
    recipe = parse({"stage": "x", "x": {"size": 1, "inner": {"share": {"a": 1.0}}}})
    earlier = recipe.to_dict()
    del earlier["loop"]["compile"], earlier["options"]["inner"]["widths"], earlier["ema"]
    assert recipe.changes_from(earlier) == []
    inner = replace(recipe.options.inner, widths=(5,), share={"a": 1.0, "b": 2.0})
    other = replace(recipe, ema=EmaRecipe(0.5), options=replace(recipe.options, inner=inner))
    assert other.changes_from(earlier) == [
        "ema.decay: 0.999 -> 0.5",
        "options.inner.share.b: None -> 2.0",
        "options.inner.widths: [1, 2] -> [5]",
    ]
    del earlier["options"]["size"]  # it has none
    assert recipe.changes_from(earlier) == ["options.size: None -> 1"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_read(path: Path) -> None:
    assert read_recipe(path, lambda name: stage_kind(name).options).stage in STAGES


def test_there_are_recipes() -> None:
    assert RECIPES
