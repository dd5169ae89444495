"""A training recipe: one TOML file, read into frozen dataclasses.

    stage = "video_codec"        which stage to train; its own options are in the section of the same name
    seed = 0
    [optimizer] [schedule] [ema] [loop]
    [video_codec]                the stage's options

A key that no dataclass declares is refused with the keys that are known there; a recipe never changes once read.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from vitascope.core.errors import InputError, choice


def free(default: Any) -> Any:
    """A field that may change between a run and its continuation: it decides how long, how often or where, not what is
    learnt. The number of steps is one, so that a run can be extended; the schedule is then that of the new length."""
    return field(default=default, metadata={"free": True})


@dataclass(frozen=True)
class OptimizerRecipe:
    """AdamW for everything, or Muon for the hidden matrices and AdamW for the rest.

    adamw_names: a matrix whose parameter name contains one of these stays with AdamW (embeddings and output heads).
    muon_learning_rate: of the matrices; None means `learning_rate` (Muon's updates are scaled to AdamW's size).
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.01
    momentum: float = 0.95
    muon_learning_rate: float | None = None
    adamw_names: tuple[str, ...] = ("embed", "head", "modulation", "frequencies", "offsets")


@dataclass(frozen=True)
class ScheduleRecipe:
    """Learning rate over the steps: linear warm-up, then a plateau and a linear fall, a cosine, or a line.

    decay_fraction: share of all steps spent falling (trapezoid only). final_fraction: of the peak, at the end.
    """

    kind: Literal["trapezoid", "cosine", "linear", "constant"] = "trapezoid"
    warmup_steps: int = 100
    decay_fraction: float = 0.3
    final_fraction: float = 0.0


@dataclass(frozen=True)
class EmaRecipe:
    """Moving average of the weights: decay per optimiser step, reached slowly as min(decay, (1 + n) / (10 + n))."""

    decay: float = 0.999


@dataclass(frozen=True)
class LoopRecipe:
    """How long, how precisely and how often.

    num_steps: optimiser steps in all. accumulation: micro-batches per optimiser step. clip_norm: of the whole gradient;
    0 turns clipping off. max_skipped_steps: steps in a row with a loss or gradient that is not finite before giving up.
    max_minutes: stop, with a checkpoint, after this long; None is no limit. num_workers: loader processes; 0 loads in
    line. Every `*_every` counts optimiser steps.
    """

    num_steps: int = free(1000)
    accumulation: int = 1
    clip_norm: float = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    num_workers: int = free(0)
    prefetch: int = free(2)
    log_every: int = free(20)
    save_every: int = free(500)
    validate_every: int = free(1000)
    keep_checkpoints: int = free(2)
    max_skipped_steps: int = free(10)
    max_minutes: float | None = free(None)
    tensorboard: bool = free(False)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run, besides the files it reads. `options` is the stage's own dataclass."""

    stage: str
    seed: int = 0
    optimizer: OptimizerRecipe = OptimizerRecipe()
    schedule: ScheduleRecipe = ScheduleRecipe()
    ema: EmaRecipe = EmaRecipe()
    loop: LoopRecipe = LoopRecipe()
    options: Any = field(default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values (tuples become lists), for checkpoints."""
        return _plain(asdict(self))

    def changes_from(self, earlier: Mapping[str, Any]) -> list[str]:
        """The fields that differ from `earlier` (a `to_dict`) and are not free, as "name: old -> new". A field that
        there was not yet when `earlier` was written had its default."""
        old, new = dict(_flat(_completed(self, earlier))), dict(_flat(self.to_dict()))
        ignored = set(_free_names(self))
        names = [name for name in sorted(old.keys() | new.keys()) if name not in ignored]
        return [f"{name}: {old.get(name)!r} -> {new.get(name)!r}" for name in names if old.get(name) != new.get(name)]


def read_recipe(path: Path, options_of: Callable[[str], type], settings: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply `settings` ("loop.num_steps=200") to it.

    options_of: the options dataclass of a stage by its name (it refuses a name it does not know).
    Raises InputError when the file cannot be read or names something unknown.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"recipe {path} cannot be read: {error}") from error
    for setting in settings:
        apply_setting(table, setting)
    return recipe_from_table(table, options_of)


def recipe_from_table(table: Mapping[str, Any], options_of: Callable[[str], type]) -> Recipe:
    """Build a recipe from the tables of its TOML file. Raises InputError naming what is valid."""
    if not isinstance(table.get("stage"), str):
        raise InputError('a recipe must name its stage, for example stage = "denoiser"')
    stage: str = table["stage"]
    options_class = options_of(stage)
    common = {key: value for key, value in table.items() if key != stage}
    if "options" in common:
        raise InputError(f"the options of stage {stage!r} belong in a section [{stage}]")
    options = parse_table(options_class, table.get(stage, {}), stage)
    recipe: Recipe = parse_table(Recipe, common, "", extra=(stage,))
    _check(recipe)
    return replace(recipe, options=options)


def _check(recipe: Recipe) -> None:
    loop = recipe.loop
    for name in ("num_steps", "accumulation", "log_every", "save_every", "validate_every", "keep_checkpoints"):
        if getattr(loop, name) < 1:
            raise InputError(f"loop.{name} must be at least 1, got {getattr(loop, name)}")
    for name in ("num_workers", "max_skipped_steps", "clip_norm"):
        if getattr(loop, name) < 0:
            raise InputError(f"loop.{name} must not be negative, got {getattr(loop, name)}")
    if not 0 <= recipe.ema.decay < 1:
        raise InputError(f"ema.decay must lie in [0, 1), got {recipe.ema.decay}")
    if not 0 <= recipe.schedule.decay_fraction <= 1:
        raise InputError(f"schedule.decay_fraction must lie in [0, 1], got {recipe.schedule.decay_fraction}")


def apply_setting(table: dict[str, Any], setting: str) -> None:
    """Set one dotted key of `table` in place from "key=value"; the value is read as TOML, else taken as text."""
    key, equals, text = setting.partition("=")
    names = [name.strip() for name in key.split(".")]
    if not equals or not all(names):
        raise InputError(f"setting {setting!r} is not of the form key=value, for example loop.num_steps=200")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    for name in names[:-1]:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise InputError(f"setting {setting!r}: {name} is a value, not a section")
    table[names[-1]] = value


def parse_table(cls: type[Any], table: Any, where: str, extra: Iterable[str] = ()) -> Any:
    """An instance of the dataclass `cls` from a TOML table; `where` is its dotted name, `extra` further valid keys."""
    if not isinstance(table, Mapping):
        raise InputError(f"recipe section [{where}] must be a table, got {table!r}")
    hints = get_type_hints(cls)
    known = [item.name for item in fields(cls) if item.name != "options" or where]
    for key in table:
        choice(f"recipe key {_join(where, key)!r}: key", str(key), (*known, *extra))
    values = {}
    for item in fields(cls):
        if item.name in table:
            values[item.name] = _parse(hints[item.name], table[item.name], _join(where, item.name))
        elif item.default is MISSING and item.default_factory is MISSING:
            raise InputError(f"recipe key {_join(where, item.name)!r} is missing")
    return cls(**values)


def _parse(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        options = [argument for argument in arguments if argument is not NoneType]
        return None if value in (None, "none") and NoneType in arguments else _parse(options[0], value, where)
    if origin is Literal:
        return choice(where, value, arguments)
    if is_dataclass(hint) and isinstance(hint, type):
        return parse_table(hint, value, where)
    if origin is tuple and isinstance(value, list | tuple):
        kinds = [arguments[0]] * len(value) if arguments[1:] == (...,) else list(arguments)
        if len(kinds) != len(value):
            raise InputError(f"recipe key {where!r} takes {len(kinds)} values, got {len(value)}")
        return tuple(
            _parse(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True))
        )
    if origin is dict and isinstance(value, Mapping):
        return {str(key): _parse(arguments[1], item, _join(where, str(key))) for key, item in value.items()}
    if hint is Any or (hint is float and type(value) is int):
        return value if hint is Any else float(value)
    if hint in (int, float, str, bool) and type(value) is hint:
        return value
    raise InputError(f"recipe key {where!r} must be {getattr(hint, '__name__', hint)}, got {value!r}")


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _completed(value: Any, earlier: Mapping[str, Any]) -> dict[str, Any]:
    """`earlier` with the defaults of the fields of the dataclass `value` that it lacks."""
    complete = dict(earlier)
    for item in fields(value):
        inner = getattr(value, item.name)
        if item.name not in complete:
            default = item.default if item.default_factory is MISSING else item.default_factory()
            if default is not MISSING:
                plain = asdict(default) if is_dataclass(default) and not isinstance(default, type) else default
                complete[item.name] = _plain(plain)
        elif is_dataclass(inner) and isinstance(complete[item.name], Mapping):
            complete[item.name] = _completed(inner, complete[item.name])
    return complete


def _flat(value: Any, where: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flat(item, _join(where, str(key)))
    else:
        yield where, value


def _free_names(value: Any, where: str = "") -> Iterable[str]:
    for item in fields(value):
        name, inner = _join(where, item.name), getattr(value, item.name)
        if item.metadata.get("free"):
            yield name
        elif is_dataclass(inner):
            yield from _free_names(inner, name)
