"""A pipeline from a folder: pipeline.json names the parts and how they are sampled, safetensors files hold them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import vitascope
from vitascope.core.errors import CapabilityError, CheckpointError, InputError, VitascopeError, choice
from vitascope.core.shapes import latent_frames
from vitascope.core.tracks import AUDIO
from vitascope.diffusion.paths import RectifiedFlow
from vitascope.models import DENOISERS, FAMILIES, build_model
from vitascope.models.offload.stores import FileStore, same_names
from vitascope.models.parallel import divide_matrices
from vitascope.nn.precision import store_matrices
from vitascope.parallel.ranks import Ranks
from vitascope.tasks.discover import FOLDERS, SETTINGS, discover
from vitascope.tasks.fitting import MemoryLimit, fit_parts
from vitascope.tasks.pipeline import PRECISIONS, Defaults, Pipeline
from vitascope.tasks.published import Extras, load_published_pipeline
from vitascope.weights.checkpoint import Checkpoint, file_digest, load_checkpoint, read_head
from vitascope.weights.config import config_from_dict
from vitascope.weights.hub import fetch, is_hub_name
from vitascope.weights.sources import open_source

POCKET = "pocket"
"""The model that ships with the package."""
PARTS: dict[str, tuple[str, ...]] = {
    "video_codec": ("causal_video",),
    "audio_codec": ("waveform",),
    "text_encoder": ("bytes",),
    "denoiser": DENOISERS,
}
"""The files of a pipeline, and the families that each may be of. A denoiser without sound needs no audio codec."""
LARGE = ("denoiser", "video_codec")
"""The parts whose weights come and go where there is a limit of memory."""
TEXT_FOLDERS = ("text_encoder", "tokenizer")


@dataclass(frozen=True)
class Beside:
    """What a public model may need beside its own path, and how it may be read; see `published.Extras`.

    text_encoder: a folder, or OWNER/NAME[@REVISION] of the hub. codec: a folder or file.
    """

    text_encoder: str = ""
    codec: str = ""
    allow_pickle: bool = False
    variant: str = ""

    def extras(self, text_cache: Path | None) -> Extras:
        """With what is on the hub fetched. Raises CheckpointError, CapabilityError."""
        text, codec = self.text_encoder, Path(self.codec) if self.codec else None
        folder = None if not text else fetch(text, TEXT_FOLDERS) if is_hub_name(text) else Path(text)
        return Extras(folder, codec, self.allow_pickle, self.variant, text_cache)


def load_pipeline(
    model: str = POCKET,
    device: str = "auto",
    precision: str = "auto",
    beside: Beside | None = None,
    *,
    text_cache: Path | None = None,
    ranks: Ranks | None = None,
    memory: MemoryLimit | None = None,
) -> Pipeline:
    """The pipeline of a folder (ours, as diffusers writes it, or of a model's authors), of one file of its authors, of
    a model of the hub (OWNER/NAME or OWNER/NAME@REVISION), or "pocket" for the one in the package.

    device: "cpu", "cuda", "cuda:1", or "auto" (a GPU if there is one). precision: "fp32", "bf16", or "auto" (bf16 where
    the device multiplies it faster). beside: what a public model needs that is not at its path. text_cache: where
    embeddings by large text encoders are kept; None keeps none. ranks: processes between which the matrices of the
    denoiser are divided (`tasks.parallel`). memory: a limit to keep; weights are then read when they are needed, and a
    clip that does not fit is refused. Raises CheckpointError when a part is missing, damaged or of another kind, and
    CapabilityError for a limit on several processes.
    """
    if memory is not None and ranks is not None:
        raise CapabilityError("a limit of memory is kept by one process: leave out --memory or --parallel")
    place, beside = choose_device(device), beside or Beside()
    folder = model_place(model)
    found = discover(folder, allow_pickle=beside.allow_pickle, variant=beside.variant)
    if found.kind == "part":
        family = next(iter(found.parts.values())).family
        raise CheckpointError(f"{model} is one part of a model ({family}) and makes no clip alone")
    if found.kind != "own":
        reduced = choose_precision(precision, place)
        return load_published_pipeline(found, model, place, reduced, beside.extras(text_cache), ranks, memory)
    return _load_own(folder, model, place, choose_precision(precision, place), ranks, memory)


def _load_own(
    folder: Path,
    name: str,
    device: torch.device,
    precision: torch.dtype,
    ranks: Ranks | None,
    memory: MemoryLimit | None,
) -> Pipeline:
    """The pipeline of a folder of ours; see `load_pipeline`."""
    defaults, files = _defaults(folder), _files(folder)
    bare = LARGE if memory is not None else ()
    parts: dict[str, Any] = {
        part: _bare_part(part, path) if part in bare else _load_part(part, path).to(device)
        for part, path in files.items()
    }
    stores: dict[str, FileStore] = {}
    for part in bare:
        source = open_source(files[part])
        stores[part] = FileStore(parts[part].state_dict(), source, same_names(source))
    _check_parts(folder, parts, defaults)
    if ranks is not None:
        divide_matrices(parts["denoiser"], ranks)
    if precision != torch.float32:
        for part in ("denoiser", "text_encoder"):
            store_matrices(parts[part], precision)
    denoiser = parts["denoiser"]
    pipeline = Pipeline(
        name=name,
        **{"audio_codec": None, **parts},
        path=RectifiedFlow(),
        defaults=defaults,
        device=device,
        precision=precision,
        patch=denoiser.patch[1:],
        audio_patch=getattr(denoiser.config, "audio_patch", 1),
        fingerprint=_fingerprint(files),
    )
    return pipeline if memory is None else fit_parts(pipeline, stores, memory)


def model_place(model: str) -> Path:
    """Where a model lies: in the package, at a path, or in the cache of the hub. Raises CheckpointError."""
    if not model:
        raise CheckpointError("the model has no name: give pocket, a folder or file, or OWNER/NAME of the hub")
    if model == POCKET:
        return Path(vitascope.__path__[0]) / "pocket"
    return fetch(model, FOLDERS) if is_hub_name(model) else Path(model)


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
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError(f"device {name!r} is not there")
    return device


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """fp32 or bf16; "auto" is bf16 on a GPU and on CPUs with matrix units for it, else fp32."""
    if choice("precision", name, ("auto", *PRECISIONS)) != "auto":
        return PRECISIONS[name]
    if device.type == "cpu":
        return (
            torch.bfloat16 if getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False) else torch.float32
        )
    return torch.bfloat16


def _defaults(folder: Path) -> Defaults:
    path = folder / SETTINGS
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold an object of defaults")
    return config_from_dict(Defaults, values)


def _files(folder: Path) -> dict[str, Path]:
    """The files of the parts that the denoiser needs, by name. Raises CheckpointError where its own cannot be read."""
    files = {name: folder / f"{name}.safetensors" for name in PARTS}
    if AUDIO not in _bare_part("denoiser", files["denoiser"]).capabilities.tracks:
        del files["audio_codec"]
    return files


def _load_part(name: str, path: Path) -> nn.Module:
    checkpoint = load_checkpoint(path)
    _check_family(name, path, checkpoint)
    return build_model(checkpoint, str(path))


def _bare_part(name: str, path: Path) -> Any:
    """On the meta device, without its weights."""
    head = read_head(path)
    _check_family(name, path, head)
    with torch.device("meta"):
        return FAMILIES[head.family].build(head.config).eval().requires_grad_(False)


def _check_family(name: str, path: Path, checkpoint: Checkpoint) -> None:
    if checkpoint.family not in PARTS[name]:
        valid = ", ".join(PARTS[name])
        raise CheckpointError(f"{path} holds a model of family {checkpoint.family!r}; valid families: {valid}")


def _check_parts(folder: Path, parts: Mapping[str, Any], defaults: Defaults) -> None:
    """Raise CheckpointError where parts were not made for each other."""
    config = parts["denoiser"].config
    audio = parts["audio_codec"].latent_channels if "audio_codec" in parts else 0
    sources = {"audio_channels": "audio codec", "text_width": "text encoder"}
    codec, beside = parts["video_codec"], parts["denoiser"].capabilities.condition_channels
    needed = config.fitting(codec.latent_channels, audio, parts["text_encoder"].width)
    if beside:  # a mask of frames, and latents
        needed["in_channels"] += codec.strides.time + codec.latent_channels
    for field, value in needed.items():
        own = getattr(config, field)
        if own and own != value:
            other = sources.get(field, "video codec")
            raise CheckpointError(
                f"the parts in {folder} do not fit: the denoiser has {own} {field}, the {other} {value}"
            )
    if getattr(config, "image_width", 0):
        raise CheckpointError(f"the denoiser in {folder} reads pictures by an image encoder, which no such folder has")
    try:
        latent_frames(defaults.clip.num_frames, codec.strides.time)
    except VitascopeError as error:
        raise CheckpointError(f"{folder / SETTINGS} does not fit: {error}") from error
    if not 1 <= defaults.overlap_frames < defaults.clip.num_frames:
        raise CheckpointError(f"{folder / SETTINGS} does not fit: overlap_frames must be less than the clip's frames")


def _fingerprint(files: Mapping[str, Path]) -> str:
    digests = "".join(file_digest(path) for path in files.values())
    return hashlib.blake2b(digests.encode(), digest_size=8).hexdigest()
