"""A pipeline from a folder: pipeline.json names the parts and how they are sampled, safetensors files hold them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import vitascope
from vitascope.core.errors import CheckpointError, InputError
from vitascope.diffusion.paths import RectifiedFlow
from vitascope.models import load_model
from vitascope.tasks.pipeline import Defaults, Pipeline
from vitascope.weights.checkpoint import file_digest
from vitascope.weights.config import config_from_dict

POCKET = "pocket"
"""The model that ships with the package."""
PARTS = ("video_codec", "audio_codec", "text_encoder", "denoiser")
_SETTINGS = "pipeline.json"


def load_pipeline(model: str = POCKET, device: str = "auto", precision: str = "auto") -> Pipeline:
    """The pipeline of a folder, or "pocket" for the one in the package.

    device: "cpu", "cuda", "cuda:1", or "auto" (a GPU if there is one). precision: "fp32", "bf16", or "auto" (bf16 where
    the device multiplies it faster). Raises CheckpointError when a part is missing, damaged or of another kind.
    """
    folder = Path(vitascope.__path__[0]) / "pocket" if model == POCKET else Path(model)
    place = choose_device(device)
    defaults = _defaults(folder)
    files = {name: folder / f"{name}.safetensors" for name in PARTS}
    parts: dict[str, Any] = {name: load_model(path, place) for name, path in files.items()}
    patch, audio_patch = _patches(parts["denoiser"])
    return Pipeline(
        name=model,
        **parts,
        path=RectifiedFlow(),
        defaults=defaults,
        device=place,
        precision=choose_precision(precision, place),
        patch=patch,
        audio_patch=audio_patch,
        fingerprint=_fingerprint(files),
    )


def choose_device(name: str) -> torch.device:
    """The device of that name. Raises InputError when it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device {name!r} is not known; valid values: auto, cpu, cuda, cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {name!r} is not there: {torch.cuda.device_count()} CUDA devices were found")
    if device.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"device {name!r} is not known; valid values: auto, cpu, cuda, cuda:N")
    return device


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """fp32 or bf16; "auto" is bf16 on a GPU and on CPUs with matrix units for it, else fp32."""
    known = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if name in known:
        return known[name]
    if name != "auto":
        raise InputError(f"precision {name!r} is not known; valid values: auto, {', '.join(known)}")
    if device.type == "cpu":
        return torch.bfloat16 if getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False) else torch.float32
    return torch.bfloat16


def _defaults(folder: Path) -> Defaults:
    path = folder / _SETTINGS
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a model of vitascope: it has no {_SETTINGS}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold an object of defaults")
    return config_from_dict(Defaults, values)


def _patches(denoiser: nn.Module) -> tuple[tuple[int, int], int]:
    """Rows and columns, and audio latents, that a token of the denoiser covers."""
    config = getattr(denoiser, "config", None)
    return tuple(getattr(config, "patch", (1, 1, 1))[1:]), getattr(config, "audio_patch", 1)  # type: ignore[return-value]


def _fingerprint(files: Mapping[str, Path]) -> str:
    digests = "".join(file_digest(path) for path in files.values())
    return hashlib.blake2b(digests.encode(), digest_size=8).hexdigest()
