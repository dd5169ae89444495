"""What a path holds: a pipeline as diffusers writes it, the files of a model's authors, one part, or our own model.

Nothing but heads, configurations and names of tensors is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from vitascope.core.errors import CheckpointError
from vitascope.models.image.clip.original import MARKS as IMAGE_MARKS
from vitascope.models.original import ORIGINALS, find_parts
from vitascope.models.parts import Part
from vitascope.models.published import PUBLISHED, open_published
from vitascope.models.text.t5.original import MARKS as TEXT_MARKS
from vitascope.weights.checkpoint import CONFIG_KEY
from vitascope.weights.foreign import ForeignConfig, parse_json, read_object
from vitascope.weights.sources import (
    PICKLES,
    WEIGHTS,
    Joined,
    SafetensorsSource,
    TensorSource,
    open_source,
    read_metadata,
)

INDEX, SETTINGS = "model_index.json", "pipeline.json"
DENOISER, CODEC = "transformer", "vae"
"""Parts of a pipeline, as diffusers calls their folders."""
TEXT, IMAGE = "text_encoder", "image_encoder"
FOLDERS = (DENOISER, CODEC, TEXT, "tokenizer", "scheduler", IMAGE, "image_processor")
"""What is read of a pipeline as diffusers writes it."""
UPSAMPLER = "latent_upsampler"
"""What may lie beside it, for a second pass."""
ENCODERS = {TEXT: TEXT_MARKS, IMAGE: IMAGE_MARKS}
MOCHI_FILES = ("encoder.safetensors", "decoder.safetensors")
Kind = Literal["diffusers", "original", "part", "own"]


@dataclass(frozen=True)
class Found:
    """A model at a path. kind: the layout, "part" for one part without a pipeline, "own" for a folder of ours.

    pipeline: its class in diffusers, "" for a part. parts: by DENOISER and CODEC. encoders: files of the authors with
    the encoder of texts or of pictures, by TEXT and IMAGE. notes: configurations from the files ("transformer", "vae",
    "scheduler", "allowed_inference_steps"). refused: pickles that were not opened.
    """

    path: Path
    kind: Kind
    pipeline: str = ""
    parts: Mapping[str, Part] = field(default_factory=dict)
    encoders: Mapping[str, Path] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    refused: tuple[Path, ...] = ()


def discover(path: str | Path, *, allow_pickle: bool = False, variant: str = "") -> Found:
    """What is at a path. Raises CheckpointError where nothing is that is known, or where files are damaged.

    allow_pickle: whether files of authors may be pickles, of which only tensors are read. variant: such as "fp16".
    """
    path = Path(path)
    if path.is_file():
        return _of_parts(Found(path, "original", parts=find_in_file(path, allow_pickle), notes=read_notes(path)))
    if (path / INDEX).is_file():
        roles = [role for role in (DENOISER, CODEC) if (path / role).is_dir()]
        parts = {role: open_published(path / role, variant=variant) for role in roles}
        return Found(path, "diffusers", _pipeline_of(path / INDEX), parts)
    if (path / SETTINGS).is_file():
        return Found(path, "own")
    if not path.is_dir():
        raise CheckpointError(f"there is no model at {path}")
    config = path / "config.json"
    values = read_object(config) if config.is_file() else {}
    if values.get("_class_name") in PUBLISHED:
        part = open_published(path, variant=variant)
        return Found(path, "part", parts={_role(part): part})
    return _of_authors(path, values, allow_pickle)


def _pipeline_of(index: Path) -> str:
    """The class that model_index.json names. Raises CheckpointError for what such a pipeline has beside what is known:
    without it the clip would be another (Wan 2.2 has two transformers, or a level a frame)."""
    values = read_object(index)
    name = values.get("_class_name")
    if not isinstance(name, str):
        raise CheckpointError(f"{index} does not say which pipeline it is (_class_name)")
    listed = {key for key, value in values.items() if isinstance(value, list) and any(value)}
    if unknown := sorted(listed - {*FOLDERS, UPSAMPLER}):
        raise CheckpointError(
            f"{index}: {name} with {', '.join(unknown)} is not known; known parts: {', '.join(FOLDERS)}"
        )
    ForeignConfig(values, str(index)).only(boundary_ratio=None, expand_timesteps=False)
    return name


def read_notes(path: Path) -> dict[str, Any]:
    """The configurations in the metadata of a safetensors file. Raises CheckpointError where they are damaged."""
    text = read_metadata(path).get("config") if path.suffix == ".safetensors" else None
    try:
        notes = parse_json(text) if text else {}
    except ValueError as error:
        raise CheckpointError(f"{path} has a damaged configuration: {error}") from error
    if not isinstance(notes, dict):
        raise CheckpointError(f"the configuration of {path} must be an object")
    for name in (DENOISER, CODEC, "scheduler"):
        if not isinstance(notes.get(name) or {}, dict):
            raise CheckpointError(f"{name} in the configuration of {path} must be an object")
    return notes


def find_in_file(path: Path, allow_pickle: bool = False) -> dict[str, Part]:
    """The parts in one file of a model's authors, by role. Raises CheckpointError where there is none."""
    source = open_source(path, allow_pickle=allow_pickle)
    if isinstance(source, SafetensorsSource) and CONFIG_KEY in (metadata := read_metadata(path)):
        _refuse_own(path, metadata[CONFIG_KEY])
    parts = find_parts(source, read_notes(path))
    if not parts:
        raise CheckpointError(f"{path} holds no model that is known; known: {', '.join(ORIGINALS)}")
    return _by_role(parts)


def _refuse_own(path: Path, config: str) -> None:
    """Raise CheckpointError for a part of one of our own models, which says its family itself."""
    with suppress(ValueError):
        values = parse_json(config)
        if isinstance(values, dict) and "family" in values:
            raise CheckpointError(f"{path} is one part of a model of this package: give the folder it lies in")


def _role(part: Part) -> str:
    return CODEC if part.family.endswith("codec") else DENOISER


def _by_role(parts: list[Part]) -> dict[str, Part]:
    roles: dict[str, Part] = {}
    for part in parts:
        role = _role(part)
        if role in roles:
            raise CheckpointError(f"{part.source.label} holds two models: {roles[role].family} and {part.family}")
        roles[role] = part
    return {role: roles[role] for role in (DENOISER, CODEC) if role in roles}


def _of_parts(found: Found) -> Found:
    """The authors' files as a pipeline, if a denoiser is among them, else as a part."""
    if DENOISER not in found.parts:
        return replace(found, kind="part")
    return replace(found, pipeline=_pipeline(found.parts[DENOISER], found.notes))


def _pipeline(denoiser: Part, notes: Mapping[str, Any]) -> str:
    """The class of diffusers that samples a denoiser as its authors do."""
    match denoiser.family:
        case "wan":
            return "WanImageToVideoPipeline" if denoiser.config.image_width else "WanPipeline"
        case "ltx":
            causal = (notes.get(DENOISER) or {}).get("causal_temporal_positioning", False)
            return "LTXConditionPipeline" if causal else "LTXPipeline"
        case _:
            return "MochiPipeline"


def _of_authors(path: Path, values: Mapping[str, Any], allow_pickle: bool) -> Found:
    """A folder of a model's authors: weights beside a config.json (Wan), or three files (Mochi), and other parts."""
    files = [file for file in sorted(path.iterdir()) if file.suffix in (".safetensors", *PICKLES)]
    whole = any((path / f"{stem}.safetensors{end}").is_file() for stem in WEIGHTS for end in ("", ".index.json"))
    sources: list[tuple[Path, TensorSource]] = [(path, open_source(path))] if whole else []
    if whole:
        files = [file for file in files if re.split(r"[.-]", file.name)[0] not in WEIGHTS]
    if all((path / name).is_file() for name in MOCHI_FILES):
        halves = {f"{Path(name).stem}.": open_source(path / name) for name in MOCHI_FILES}
        sources.append((path, Joined(halves)))
        files = [file for file in files if file.name not in MOCHI_FILES]
    refused = tuple(file for file in files if file.suffix in PICKLES and not allow_pickle)
    sources += [(file, open_source(file, allow_pickle=True)) for file in files if file not in refused]
    notes = {DENOISER: {key: value for key, value in values.items() if not key.startswith("_")}}
    parts: list[Part] = []
    encoders: dict[str, Path] = {}
    for file, source in sources:
        names = frozenset(source.names())
        encoders |= {role: file for role, marks in ENCODERS.items() if all(mark in names for mark in marks)}
        parts += find_parts(source, notes)
    if not parts:
        there = f"; there are: {', '.join(file.name for file in files[:4])}" if files else ""
        raise CheckpointError(f"{path} is not a model: it has neither {SETTINGS} nor {INDEX} nor known weights{there}")
    return _of_parts(Found(path, "original", "", _by_role(parts), encoders, notes, refused))
