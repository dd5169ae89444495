"""Public models from the layout of their authors into that of diffusers, and back, without loading them.

Weights stream from file to file. Text encoders, tokenisers and image encoders are copied where they lie in folders; the
authors' own files of them are written as transformers has them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vitascope.core.errors import CheckpointError, choice
from vitascope.models import named
from vitascope.models.original import ORIGINALS
from vitascope.models.parts import Layout, Part
from vitascope.models.published import PUBLISHED
from vitascope.tasks.beside import copy_beside, left_beside, write_beside, write_index, write_json
from vitascope.tasks.discover import CODEC, DENOISER, INDEX, Found
from vitascope.tasks.inspection import problem
from vitascope.tasks.kinds import PIPELINES
from vitascope.tasks.schedulers import lost_levels, write_ltx_scheduler
from vitascope.weights.converted import MAX_SHARD_BYTES, Converted, Rounded, write_sharded
from vitascope.weights.foreign import read_object
from vitascope.weights.sources import TensorSource, Under
from vitascope.weights.tensor_file import write_tensors

LAYOUTS: tuple[Layout, ...] = ("diffusers", "original")
LTX = ("ltx", "ltx_codec")
"""Families whose authors write one file."""
Report = Callable[[str, int, int], None]
"""Called with what is written, the bytes so far and the bytes in all."""


@dataclass(frozen=True)
class Target:
    """Where and how to write. dtype: of the floating-point weights of what is written anew, not of folders and files
    that are copied; None keeps what each has. A model that is one file is written as one, whose name gets the suffix
    .safetensors where it has it not; others as shards of at most max_shard_bytes."""

    path: Path
    layout: Layout
    dtype: torch.dtype | None = None
    max_shard_bytes: int = MAX_SHARD_BYTES


def convert_model(found: Found, target: Target, report: Report = lambda what, done, total: None) -> list[Path]:
    """Write a model that was found in another place and layout; return the files and folders that were made.

    The whole of it appears at once, or nothing. Raises CheckpointError where it does not fit together, cannot be said
    in that layout, where the place is taken, or the disk refuses; InputError for a layout or a class of pipelines that
    is not known.
    """
    _check_kind(found, target.layout)
    for part in found.parts.values():
        if told := problem(part):
            where = "" if part.source.label in told else f"{part.source.label}: "
            raise CheckpointError(f"{where}{told}")
    place = place_of(found, target)
    _check_place(place)
    if _is_one_file(found, target.layout):
        return [_write_ltx(found, replace(target, path=place), report)]
    with new_folder(place) as folder:
        made = _write_parts(found, replace(target, path=folder), report)
    return [place / path.relative_to(folder) for path in made]


def place_of(found: Found, target: Target) -> Path:
    """The folder or file that a conversion makes. Raises CheckpointError for a file without a name."""
    path = target.path
    if not _is_one_file(found, target.layout) or path.suffix == ".safetensors":
        return path
    if path.name in ("", ".."):
        raise CheckpointError(f"{path} is a folder: give the name of a file, such as {path / 'model.safetensors'}")
    return path.with_name(f"{path.name}.safetensors")


def _is_one_file(found: Found, layout: Layout) -> bool:
    return layout == "original" and any(part.family in LTX for part in found.parts.values())


def _write_parts(found: Found, target: Target, report: Report) -> list[Path]:
    """Into a folder that is not shown to anybody before it is whole."""
    if target.layout == "original":
        return _write_original(found, target, report)
    if not found.pipeline:
        (part,) = found.parts.values()
        return _write_folder(part, target.path, target, report)
    made = [
        path for role, part in found.parts.items() for path in _write_folder(part, target.path / role, target, report)
    ]
    return [*made, *write_beside(found, target.path, target.dtype), *write_index(found, target.path)]


def _check_kind(found: Found, layout: str) -> None:
    """Raise InputError for a layout or a class of pipelines that is not known; CheckpointError for a model of ours, and
    for a pipeline that lacks a part that its index names or that none is without, or has one of another family."""
    choice("layout", layout, LAYOUTS)
    if not found.parts and not found.pipeline:
        raise CheckpointError(f"{found.path} is a model of this package: it has one layout only")
    if not found.pipeline:
        return
    kind = PIPELINES[choice("kind of pipeline", found.pipeline, PIPELINES)]
    listed = read_object(found.path / INDEX) if found.kind == "diffusers" else {}
    lost = [role for role in (DENOISER, CODEC) if any(listed.get(role) or ()) and role not in found.parts]
    if lost:
        raise CheckpointError(f"{found.path} has no folder {lost[0]}, which its {INDEX} names: fetch it again")
    if DENOISER not in found.parts:
        there = ", ".join(str(found.path / role) for role in found.parts) or "a folder with one part"
        raise CheckpointError(f"{found.path} is a pipeline without {DENOISER}; what can be converted alone: {there}")
    for role, valid in ((DENOISER, kind.denoiser), (CODEC, kind.codec)):
        part = found.parts.get(role)
        if part is not None and part.family != PUBLISHED[valid].family:
            raise CheckpointError(
                f"{found.path} holds a model of family {part.family} as its {role}; a model of family "
                f"{PUBLISHED[valid].family} belongs there"
            )


def _check_place(place: Path) -> None:
    """Raise CheckpointError unless the place is free, or an empty folder."""
    if os.path.lexists(place) and not (place.is_dir() and not place.is_symlink() and not any(place.iterdir())):
        raise CheckpointError(f"{place} is there already: give a new place")


@contextmanager
def new_folder(place: Path) -> Iterator[Path]:
    """A hidden folder beside `place` that takes its name when the block ends well; else nothing is left behind.

    Raises CheckpointError where the disk refuses.
    """
    part = place.absolute().with_name(f".{place.absolute().name}.{os.getpid()}.part")
    try:
        try:
            part.mkdir(parents=True)
            yield part
            part.replace(place)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(part), str(place))) from error
    except OSError as error:
        raise CheckpointError(
            f"cannot write {place}: {error.strerror or ' '.join(str(error).split())[:200]}"
        ) from error


def left_out(found: Found, layout: Layout) -> list[str]:
    """What a model loses where it is written in a layout, in words for people. Raises CheckpointError, and InputError
    for a class of pipelines that is not known."""
    _check_kind(found, layout)
    notes = lost_levels(found, layout) if found.pipeline else []
    return [*notes, *left_beside(found, _is_one_file(found, layout) or (layout == "diffusers" and not found.pipeline))]


def _seen_in(part: Part, layout: Layout, dtype: torch.dtype | None) -> TensorSource:
    """The tensors of a part under the names of a layout."""
    source = part.source
    if part.layout != layout:
        table = _keys(part, layout)
        source = Converted(Converted(source, part.keys), table, writing=True)
    return source if dtype is None else Rounded(source, dtype)


def _keys(part: Part, layout: Layout) -> Any:
    if layout == "original":
        if part.family not in ORIGINALS:
            valid = ", ".join(ORIGINALS)
            raise CheckpointError(
                f"a model of family {part.family} has no layout of its authors; valid families: {valid}"
            )
        return ORIGINALS[part.family].keys(part.config)
    return named(_published(part).keys)(part.config)


def _published(part: Part) -> Any:
    return next(published for published in PUBLISHED.values() if published.family == part.family)


def _write_folder(part: Part, folder: Path, target: Target, report: Report) -> list[Path]:
    """One part as diffusers writes it."""
    values = named(_published(part).write)(part.config)
    source = _seen_in(part, "diffusers", target.dtype)
    made = write_sharded(
        folder, source, max_shard_bytes=target.max_shard_bytes,
        report=lambda done, total: report(folder.name, done, total),
    )  # fmt: skip
    return [*made, write_json(folder / "config.json", values)]


def _write_original(found: Found, target: Target, report: Report) -> list[Path]:
    """As the authors of Wan and Mochi write it: a folder of several files."""
    made: list[Path] = []
    for part in found.parts.values():
        source = _seen_in(part, "original", target.dtype)

        def tell(done: int, total: int, family: str = part.family) -> None:
            report(family, done, total)

        match part.family:
            case "wan":
                made += write_sharded(target.path, source, max_shard_bytes=target.max_shard_bytes, report=tell)
                values = named("vitascope.models.wan.original:write_config")(part.config)
                made.append(write_json(target.path / "config.json", values))
            case "wan_codec":
                made += write_sharded(target.path, source, "Wan2.1_VAE", max_shard_bytes=1 << 62, report=tell)
            case "mochi":
                made += write_sharded(target.path, source, "dit", max_shard_bytes=1 << 62, report=tell)
            case _:
                for half in ("encoder", "decoder"):
                    inside = Under(source, f"{half}.")
                    made += write_sharded(target.path, inside, half, max_shard_bytes=1 << 62, report=tell)
    return [*made, *copy_beside(found, target.path)]


def _write_ltx(found: Found, target: Target, report: Report) -> Path:
    """Denoiser and codec in one file, their configurations in its metadata."""
    path = target.path
    notes: dict[str, Any] = dict(found.notes) if found.kind == "original" else {}
    places: dict[str, tuple[TensorSource, str]] = {}
    for role, prefix in ((DENOISER, "model.diffusion_model."), (CODEC, "vae.")):
        if role in found.parts:
            part = found.parts[role]
            source = _seen_in(part, "original", target.dtype)
            places |= {prefix + name: (source, name) for name in source.names()}
            notes[role] = {**ORIGINALS[part.family].named("write_config")(part.config), **(notes.get(role) or {})}
    if found.kind == "diffusers":
        notes[DENOISER]["causal_temporal_positioning"] = found.pipeline == "LTXConditionPipeline"
        notes["scheduler"] = write_ltx_scheduler(found)
    infos = {name: source.info(inside) for name, (source, inside) in places.items()}
    total, done = sum(info.num_bytes for info in infos.values()), 0

    def get(name: str) -> torch.Tensor:
        nonlocal done
        done += infos[name].num_bytes
        report(path.name, done, total)
        source, inside = places[name]
        return source.get(inside)

    write_tensors(path, infos, get, {"config": json.dumps(notes), "format": "pt"})
    return path
