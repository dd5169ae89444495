"""Pipelines of public models: folders as diffusers writes them, with model_index.json, and files of the authors.

What a family is told (sizes, steps, guidance, levels) is what its authors and diffusers sample with. Nothing that a
folder names is imported: classes are looked up in tables.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vitascope.core.errors import CheckpointError, choice
from vitascope.core.protocols import Denoiser, VideoCodec
from vitascope.diffusion.paths import RectifiedFlow
from vitascope.models.image.clip.encoder import ENCODER as IMAGE_FOLDER
from vitascope.models.image.clip.encoder import ClipImageEncoder, load_clip
from vitascope.models.image.clip.original import load_original
from vitascope.models.offload.offloaded import Layers
from vitascope.models.offload.stores import FileStore
from vitascope.models.parts import Part
from vitascope.models.published import PUBLISHED
from vitascope.models.text.cache import CachedTextEncoder
from vitascope.models.text.t5.encoder import T5Files, open_t5
from vitascope.models.text.t5.streamed import CLASSES
from vitascope.parallel.ranks import Ranks
from vitascope.tasks.discover import CODEC, DENOISER, IMAGE, INDEX, TEXT, Found, discover
from vitascope.tasks.fitting import MemoryLimit, OnDemand, fit_published, text_device
from vitascope.tasks.kinds import PIPELINES, PublishedPipeline, as_indexed, read_schedule
from vitascope.tasks.original import original_defaults
from vitascope.tasks.pipeline import Defaults, Pipeline
from vitascope.tasks.tea import tea_coefficients
from vitascope.tasks.text_cost import text_cost
from vitascope.weights.foreign import read_object
from vitascope.weights.sources import open_source

DECODER = "decoder"
"""Of a codec, what works in the precision of the pipeline; what is given is read in fp32."""
WAN_TOKENIZER = "google/umt5-xxl"
"""Where it lies in the authors' folder."""


@dataclass(frozen=True)
class Extras:
    """What a model may need that is not at its path, and how it may be read.

    text_encoder: a folder that `T5Files.of` knows. codec: a folder or file that holds one. allow_pickle: whether files
    may be pickles, of which only tensors are read. variant: such as "fp16", part of the weights' file names.
    text_cache: where embeddings are kept; None keeps none.
    """

    text_encoder: Path | None = None
    codec: Path | None = None
    allow_pickle: bool = False
    variant: str = ""
    text_cache: Path | None = None


def load_published_pipeline(
    found: Found,
    name: str,
    device: torch.device,
    precision: torch.dtype,
    extras: Extras,
    ranks: Ranks | None = None,
    memory: MemoryLimit | None = None,
) -> Pipeline:
    """The pipeline of a model that was found, its matrices in `precision`; the text encoder is loaded when a prompt
    asks for it.

    name: in messages and recipes. ranks: processes between which the denoiser's matrices are divided. memory: a limit;
    weights then come when they are needed. Raises CheckpointError, and CapabilityError without `transformers`.
    """
    kind, defaults = _kind(found)
    parts = {
        DENOISER: _of_family(found, DENOISER, found.parts.get(DENOISER), kind.denoiser),
        CODEC: _of_family(found, CODEC, _codec(found, extras), kind.codec),
    }
    files = _text_files(found, extras)
    reader = device if memory is None else text_device(text_cost(files, kind.text, precision), device, memory)

    def open_text(layers: Layers | None = None) -> CachedTextEncoder:
        opened = open_t5(files, kind.text, cache=extras.text_cache, dtype=precision, device=reader, layers=layers)
        opened.device = device
        return opened

    text_encoder = open_text()
    _check_kind(found, files, kind)
    _check_text(found.path, parts[DENOISER], text_encoder.width)
    stores: dict[str, FileStore] = {}
    denoiser, codec = _loaded(parts, device, precision, ranks) if memory is None else _bare(parts, precision, stores)
    _check_channels(found.path, denoiser, codec)
    defaults = replace(defaults, tea_coefficients=tea_coefficients(kind.denoiser, denoiser.config.width, denoiser))
    width = getattr(denoiser.config, "image_width", 0)
    pictures = partial(_image_encoder, found, device, width, extras.variant) if width else None
    pipeline = Pipeline(
        name=name,
        denoiser=denoiser,
        text_encoder=text_encoder,
        video_codec=codec,
        audio_codec=None,
        path=RectifiedFlow(),
        defaults=defaults,
        device=device,
        precision=precision,
        patch=denoiser.patch[1:],
        fingerprint=_fingerprint(found.path),
        image_encoder=None if pictures is None else OnDemand(pictures) if memory is not None else pictures(),
        num_pictures=2 if getattr(denoiser.config, "image_positions", 0) else 1,
    )
    if memory is None:
        return pipeline
    place = None if pictures is None else found.encoders.get(IMAGE, found.path / IMAGE_FOLDER)
    return fit_published(pipeline, place, files, stores, kind.text, memory, open_text)


def _loaded(
    parts: Mapping[str, Part], device: torch.device, precision: torch.dtype, ranks: Ranks | None
) -> tuple[Any, Any]:
    """Denoiser and codec, of which the decoder alone works in less than fp32."""
    denoiser = parts[DENOISER].load(device=device, dtype=precision, ranks=ranks)
    return denoiser, parts[CODEC].load(device=device, dtype=precision, within=DECODER)


def _bare(parts: Mapping[str, Part], precision: torch.dtype, stores: dict[str, FileStore]) -> tuple[Any, Any]:
    """Denoiser and codec without their weights, which are in `stores` then."""
    denoiser, stores["denoiser"] = parts[DENOISER].bare(precision)
    codec, stores["video_codec"] = parts[CODEC].bare(precision, DECODER)
    return denoiser, codec


def _kind(found: Found) -> tuple[PublishedPipeline, Defaults]:
    """The kind of pipeline and how this one is sampled, by its folder's files or as its authors do."""
    kind = PIPELINES[choice("kind of pipeline", found.pipeline, PIPELINES)]
    if found.kind != "diffusers":
        return kind, original_defaults(found, kind.defaults)
    kind = as_indexed(found.path, kind)
    return kind, replace(kind.defaults, schedule=read_schedule(found.path, kind))


def _codec(found: Found, extras: Extras) -> Part | None:
    """The codec that is given, or that is there. Raises CheckpointError, saying what to do, where there is none."""
    if extras.codec is not None:
        place = extras.codec / CODEC if (extras.codec / INDEX).is_file() else extras.codec
        return discover(place, allow_pickle=extras.allow_pickle, variant=extras.variant).parts.get(CODEC)
    if CODEC not in found.parts and found.kind == "original":
        refused = f"; {found.refused[0].name} is a pickle: --allow-pickle reads it" if found.refused else ""
        raise CheckpointError(f"{found.path} holds no codec: give its file or folder as --vae{refused}")
    return found.parts.get(CODEC)


def _text_files(found: Found, extras: Extras) -> T5Files:
    """Where the text encoder lies. Raises CheckpointError, saying what to do, where none is known."""
    if extras.text_encoder is not None:
        return T5Files.of(extras.text_encoder, extras.variant)
    if found.kind == "diffusers" or (found.path / TEXT).is_dir():
        return T5Files.of(found.path, extras.variant)
    if TEXT in found.encoders:
        return T5Files(found.encoders[TEXT], found.path / WAN_TOKENIZER, extras.allow_pickle)
    raise CheckpointError(
        f"{found.path} holds no text encoder that is read: give --text-encoder, a folder (or OWNER/NAME of the hub) "
        "with text_encoder and tokenizer, such as that of a diffusers pipeline of the same family"
    )


def _image_encoder(found: Found, device: torch.device, width: int, variant: str) -> ClipImageEncoder:
    """Raises CheckpointError for one whose tokens are not of that width."""
    if IMAGE in found.encoders:
        source = open_source(found.encoders[IMAGE], allow_pickle=True)  # allowed when it was found
        encoder = ClipImageEncoder(load_original(source, device=device)).eval()
    else:
        encoder = load_clip(found.path, device=device, variant=variant)
    model: Any = encoder.model
    if model.config.hidden_size != width:
        own = model.config.hidden_size
        raise CheckpointError(
            f"the parts of {found.path} do not fit: pictures {width} of the transformer, {own} beside it"
        )
    return encoder


def _of_family(found: Found, role: str, part: Part | None, valid: str) -> Part:
    """The part, of the family of that class. Raises CheckpointError for another one, or none."""
    family = PUBLISHED[valid].family
    if part is None or part.family != family:
        what = f"a model of family {part.family} as its {role}" if part is not None else f"no {role}"
        raise CheckpointError(f"{found.path} holds {what}; a model of family {family} belongs there")
    return part


def _check_kind(found: Found, files: T5Files, pipeline: PublishedPipeline) -> None:
    """T5 and umT5 are of one width: of the wrong one, a clip would come that has nothing to do with its prompt. The one
    that the folder's index names is right for it."""
    wanted = "umt5" if pipeline.denoiser == "WanTransformer3DModel" else "t5"
    if found.kind == "diffusers":
        named = str(read_object(found.path / INDEX).get(TEXT))
        wanted = next((kind for kind, cls in CLASSES.items() if f"'{cls}'" in named), wanted)
    if files.encoder.exists() and files.kind != wanted and files.kind in CLASSES:
        raise CheckpointError(f"{files.encoder} holds a text encoder of type {files.kind}; {wanted} belongs there")


def _check_text(path: Path, denoiser: Part, width: int) -> None:
    own = denoiser.config.text_width
    if own != width:
        raise CheckpointError(f"the parts of {path} do not fit: text {own} of the transformer, {width} beside it")


def _check_channels(path: Path, denoiser: Denoiser, codec: VideoCodec) -> None:
    config: Any = getattr(denoiser, "config", None)
    own = getattr(config, "out_channels", getattr(config, "video_channels", 0))
    if own != codec.latent_channels:
        raise CheckpointError(
            f"the parts of {path} do not fit: latent channels {own} of the transformer, {codec.latent_channels} beside"
        )


def _fingerprint(folder: Path) -> str:
    """Of the names, sizes and heads of all weights; hashing tens of gigabytes would take longer than reading them."""
    digest = hashlib.blake2b(digest_size=8)
    files = [folder] if folder.is_file() else [*folder.rglob("*.safetensors"), *folder.glob("*.pth")]
    files = [file for file in files if file.is_file()]  # what is none is told where it is needed
    for path in sorted(files):
        with path.open("rb") as file:
            head = file.read(8)
            head += file.read(min(int.from_bytes(head, "little"), 1 << 24)) + file.read(1 << 16)
        name = path.name if folder.is_file() else path.relative_to(folder)
        digest.update(f"{name} {path.stat().st_size}".encode() + head)
    return digest.hexdigest()
