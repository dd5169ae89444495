"""What lies beside the weights of a converted pipeline: encoders, tokenisers, scheduler, up-sampler, and the index."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitascope.core.errors import CheckpointError
from vitascope.models.image.clip.encoder import SETTINGS as PICTURES
from vitascope.models.image.clip.encoder import PictureSettings
from vitascope.models.image.clip.original import PREFIX as IMAGE_PREFIX
from vitascope.models.image.clip.original import load_original as load_image_encoder
from vitascope.models.parts import close
from vitascope.models.text.t5.original import load_original as load_text_encoder
from vitascope.tasks.discover import CODEC, DENOISER, FOLDERS, IMAGE, INDEX, TEXT, UPSAMPLER, Found
from vitascope.tasks.published import WAN_TOKENIZER
from vitascope.tasks.schedulers import write_scheduler
from vitascope.weights.converted import Rounded
from vitascope.weights.foreign import read_object
from vitascope.weights.sources import TensorSource, Under, open_source
from vitascope.weights.tensor_file import atomic_file

BESIDE = (*(name for name in FOLDERS if name not in (DENOISER, CODEC, "scheduler")), UPSAMPLER)
"""Folders that are the same in every layout, where they are there."""
TOKENIZERS = (WAN_TOKENIZER, "xlm-roberta-large")
"""Folders that the authors of Wan have beside their encoders."""
_LIBRARIES = {
    DENOISER: "diffusers", CODEC: "diffusers", "scheduler": "diffusers", TEXT: "transformers",
    "tokenizer": "transformers", IMAGE: "transformers", "image_processor": "transformers", UPSAMPLER: "diffusers",
}  # fmt: skip
_WIDE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def write_json(path: Path, values: Mapping[str, Any]) -> Path:
    """An object as JSON, whole or not at all; returns `path`. Raises CheckpointError where the disk refuses."""
    with atomic_file(path) as file:
        file.write(json.dumps(values, indent=2).encode() + b"\n")
    return path


def write_beside(found: Found, path: Path, dtype: torch.dtype | None) -> list[Path]:
    """Encoders, tokenisers and the scheduler of a pipeline for diffusers; returns what was made.

    Folders are copied; the authors' own files of encoders are written as transformers has them, as `dtype` or, without
    one, as they are. Raises CheckpointError for files that do not fit, or hold numbers that `dtype` has not.
    """
    made = _copy(found.path, path, BESIDE)
    # the authors' files are not sampled by a scheduler that lies beside them
    if found.kind == "diffusers" and (found.path / "scheduler").is_dir():
        made += _copy(found.path, path, ("scheduler",))
    else:
        made.append(write_json(path / "scheduler" / "scheduler_config.json", write_scheduler(found)))
    for role in found.encoders:
        if not (path / role).exists():
            model: Any = _encoder(role, found.encoders[role], dtype)
            model.save_pretrained(path / role)
            made.append(path / role)
    if TEXT in found.encoders and (found.path / WAN_TOKENIZER).is_dir() and not (path / "tokenizer").exists():
        made.append(Path(shutil.copytree(found.path / WAN_TOKENIZER, path / "tokenizer")))
    if IMAGE in found.encoders and not (path / PICTURES).exists():
        made.append(write_json(path / PICTURES, _processor(PictureSettings())))
    return made


def copy_beside(found: Found, path: Path) -> list[Path]:
    """Encoders and tokenisers of a pipeline for a folder as its authors write it, all as they are; what was made."""
    made = _copy(found.path, path, (*BESIDE, *TOKENIZERS))
    for place in found.encoders.values():
        made.append(Path(shutil.copy(place, path / place.name)))
    return made


def left_beside(found: Found, alone: bool) -> list[str]:
    """What of a model's files is not written, in words for people. alone: whether weights alone are."""
    notes = []
    if alone:
        lost = [name for name in BESIDE if (found.path / name).is_dir()]
        lost += [place.name for place in found.encoders.values()]
        if lost:
            notes.append(
                f"{', '.join(lost)} of {found.path} have no place there: keep them, and give them beside it "
                "(--text-encoder, --upsampler)"
            )
    if found.refused:
        names = ", ".join(place.name for place in found.refused)
        notes.append(f"{names} of {found.path} are pickles, which are not opened without --allow-pickle: left out")
    return notes


def write_index(found: Found, path: Path) -> list[Path]:
    """model_index.json: the library and class of every part, as the parts themselves say; of what has no class of its
    own to say, and of parts that the pipeline does without, what the index said before. Raises CheckpointError."""
    before = read_object(found.path / INDEX) if (found.path / INDEX).is_file() else {}
    index: dict[str, Any] = {"_class_name": found.pipeline}
    index |= {key: value for key, value in before.items() if not isinstance(value, list) or not any(value)}
    for name, library in _LIBRARIES.items():
        if (path / name).is_dir():
            listed = before.get(name)
            known = isinstance(listed, list) and any(listed) and name in BESIDE
            index[name] = listed if known else [library, _class_of(path / name)]
    if found.pipeline == "MochiPipeline":
        index.setdefault("force_zeros_for_empty_prompt", True)
    return [write_json(path / INDEX, index)]


def _copy(source: Path, target: Path, names: tuple[str, ...]) -> list[Path]:
    return [Path(shutil.copytree(source / name, target / name)) for name in names if (source / name).is_dir()]


def _encoder(role: str, place: Path, dtype: torch.dtype | None) -> nn.Module:
    """An encoder in a file of the authors, which were allowed when they were found."""
    source = open_source(place, allow_pickle=True)
    load = load_text_encoder if role == TEXT else load_image_encoder
    try:
        if dtype is not None:
            return load(Rounded(source, dtype), dtype=dtype)
        return load(source, dtype=_widest(Under(source, IMAGE_PREFIX) if role == IMAGE else source))
    finally:
        close(source)


def _widest(source: TensorSource) -> torch.dtype:
    """The dtype that holds all numbers of a source: that of its tensors, if they have one."""
    kinds = {source.info(name).dtype for name in source.names()}.intersection(_WIDE)
    return reduce(torch.promote_types, kinds) if kinds else torch.bfloat16


def _processor(settings: PictureSettings) -> dict[str, Any]:
    """The `preprocessor_config.json` of transformers."""
    return {
        "crop_size": {"height": settings.crop_px, "width": settings.crop_px},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(settings.mean),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": list(settings.std),
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": settings.short_px},
    }


def _class_of(folder: Path) -> str:
    for file, key in (
        ("config.json", "_class_name"),
        ("scheduler_config.json", "_class_name"),
        ("tokenizer_config.json", "tokenizer_class"),
        ("preprocessor_config.json", "image_processor_type"),
    ):
        values = read_object(folder / file) if (folder / file).is_file() else {}
        if key in values:
            return str(values[key])
        if values.get("architectures"):
            return str(values["architectures"][0])
    raise CheckpointError(f"{folder} does not say of which class it is")
