"""What a model in files is: parts, sizes, element types, defaults, and the memory that its weights take."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from math import prod
from typing import Any

from vitascope.core.errors import CheckpointError
from vitascope.models.parts import Part
from vitascope.nn.precision import matrix_names
from vitascope.tasks.discover import Found
from vitascope.tasks.kinds import PIPELINES
from vitascope.tasks.schedulers import defaults_of
from vitascope.weights.config import config_to_dict
from vitascope.weights.converted import Converted
from vitascope.weights.streaming import check_kind

PRECISIONS = {"fp32": 4, "bf16": 2, "fp8": 1}
"""Bytes of an element of a matrix."""


@dataclass(frozen=True)
class PartReport:
    """One model. num_bytes and dtypes: as it lies in the files; weights_bytes: in memory, by precision of matrices."""

    role: str
    family: str
    layout: str
    num_parameters: int
    num_bytes: int
    dtypes: dict[str, int]
    weights_bytes: dict[str, int]
    config: dict[str, Any]
    problem: str = ""


@dataclass(frozen=True)
class Report:
    """A model: what it is, its parts, its defaults where it makes clips, and files that were not read."""

    path: str
    kind: str
    pipeline: str
    parts: list[PartReport]
    defaults: dict[str, Any] = field(default_factory=dict)
    encoders: dict[str, str] = field(default_factory=dict)
    not_read: list[str] = field(default_factory=list)


def inspect_model(found: Found) -> Report:
    """Everything that can be told without reading weights. Raises CheckpointError for a scheduler that is not known."""
    return Report(
        str(found.path),
        found.kind,
        found.pipeline,
        [_inspect(role, part) for role, part in found.parts.items()],
        _defaults(found) if found.pipeline else {},
        {role: str(place) for role, place in found.encoders.items()},
        [str(place) for place in found.refused],
    )


def _inspect(role: str, part: Part) -> PartReport:
    infos = [part.source.info(name) for name in part.source.names()]
    dtypes: Counter[str] = Counter()
    for info in infos:
        dtypes[str(info.dtype).removeprefix("torch.")] += prod(info.shape)
    model = part.on_meta()
    matrices, state = matrix_names(model), model.state_dict()
    rounded = sum(tensor.numel() for name, tensor in state.items() if name in matrices)
    kept = sum(tensor.numel() * 4 for name, tensor in state.items() if name not in matrices)
    return PartReport(
        role,
        part.family,
        part.layout,
        sum(tensor.numel() for tensor in state.values()),
        sum(info.num_bytes for info in infos),
        dict(dtypes),
        {name: kept + size * rounded for name, size in PRECISIONS.items()},
        config_to_dict(part.config),
        problem(part),
    )


def problem(part: Part) -> str:
    """Why the tensors do not fit the model, if they do not; told by heads alone."""
    wanted = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in part.on_meta().state_dict().items()}
    try:
        seen = Converted(part.source, part.keys)
        infos = {name: seen.info(name) for name in seen.names()}
        for name in infos.keys() & wanted.keys():
            check_kind(name, infos[name].dtype, wanted[name][1], part.source.label)
    except CheckpointError as error:
        return str(error)
    shapes = {name: info.shape for name, info in infos.items()}
    sizes = {name: shape for name, (shape, _) in wanted.items()}
    wrong = sorted(name for name in sizes.keys() | shapes.keys() if sizes.get(name) != shapes.get(name))
    if not wrong:
        return ""
    name = wrong[0]
    found, expected = shapes.get(name, "none"), sizes.get(name, "none")
    return f"{len(wrong)} tensors do not fit ({name} has the shape {found}, expected {expected})"


def _defaults(found: Found) -> dict[str, Any]:
    if found.pipeline not in PIPELINES:
        return {}
    own = defaults_of(found)
    clip = own.clip
    return {
        "width": clip.width_px,
        "height": clip.height_px,
        "fps": clip.fps,
        "num_frames": clip.num_frames,
        "num_inference_steps": own.num_inference_steps,
        "guidance_scale": own.guidance.scale,
        "sampler": own.sampler,
        "schedule": config_to_dict(own.schedule),
    }
