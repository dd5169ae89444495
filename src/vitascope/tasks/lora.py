"""LoRAs in a pipeline: FILE[:SCALE] each, and a pipeline that says in its recipes what it was changed by."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path

from torch import nn

from vitascope.core.errors import CapabilityError, InputError
from vitascope.models.lora import LoraStack
from vitascope.tasks.pipeline import Pipeline
from vitascope.tasks.request import is_number
from vitascope.weights.checkpoint import file_digest
from vitascope.weights.lora import Lora, read_lora


def parse_lora(text: str) -> tuple[Path, float]:
    """FILE[:SCALE] to its parts, the scale being 1 unless given.

    Colons inside FILE are kept: what lies at the whole of `text` is taken as it is, and else only a number after the
    last colon is a scale. Raises InputError for an empty FILE and for a scale that is no finite number.
    """
    file, colon, scale = text.rpartition(":")
    if not colon or Path(text).exists():
        file, scale = text, "1"
    elif not is_number(scale):
        if file and Path(file).exists():
            raise InputError(f"the scale of {file} must be a number, got {scale!r}; a LoRA is FILE[:SCALE]")
        file, scale = text, "1"
    if not file:
        raise InputError(f"LoRA {text!r} is not FILE[:SCALE], for example style.safetensors:0.8")
    if not isfinite(float(scale)):
        raise InputError(f"the scale of {file} must be a finite number, got {scale}")
    return Path(file), float(scale)


def apply_loras(
    pipeline: Pipeline,
    texts: Sequence[str],
    *,
    merged: bool = True,
    stack: LoraStack | None = None,
    note: Callable[[str], None] = lambda text: None,
    allow_pickle: bool = False,
) -> Pipeline:
    """The pipeline with LoRAs, FILE[:SCALE] each, in its denoiser: all of them at once.

    The denoiser itself is changed, so `pipeline` is not to be used until they are removed: give a `stack` made for its
    denoiser, and after `stack.remove()` it is as it was. Without one nothing is kept to go back to, which saves the
    memory of the changed weights. merged: into the weights, or beside them. Under a limit of memory they are merged
    whenever a weight is read, for good. `note` is told what is left out of a file. allow_pickle: as of `read_lora`.
    Raises InputError for texts that are no FILE[:SCALE], CheckpointError for files that do not fit, CapabilityError for
    a denoiser that takes none, and for a stack or factors beside the weights under a limit; the denoiser is then as it
    was.
    """
    if not texts:
        return pipeline
    if pipeline.loras:
        raise InputError(f"{pipeline.name} has LoRAs already ({', '.join(pipeline.loras)}): give all of them at once")
    if not isinstance(pipeline.denoiser, nn.Module):
        raise CapabilityError(f"the denoiser of {pipeline.name} takes no LoRAs")
    if pipeline.memory is not None and (stack is not None or not merged):
        raise CapabilityError(
            "under a limit of memory LoRAs are merged as weights are read: no stack, none beside them"
        )
    asked = [parse_lora(text) for text in texts]
    loras = [read_lora(file, allow_pickle=allow_pickle) for file, _ in asked]
    for lora in loras:
        if lora.left_out:
            note(f"{lora.label}: {lora.left_out} tensors for the text encoder are left out")
    scales = [scale for _, scale in asked]
    scaled = list(zip(loras, scales, strict=True))
    if pipeline.memory is not None:
        pipeline.memory.merge(scaled)
    else:
        stack = stack or LoraStack(pipeline.denoiser, keep=False)
        stack.set(scaled, merged=merged)
    return replace(
        pipeline,
        loras=tuple(f"{file}:{scale!r}" for file, scale in asked),
        fingerprint=_fingerprint(pipeline.fingerprint, loras, scales),
    )


def _fingerprint(base: str, loras: Sequence[Lora], scales: Sequence[float]) -> str:
    """Of the weights before, and of the contents and scales of the LoRAs."""
    digest = hashlib.blake2b(base.encode(), digest_size=8)
    for lora, scale in zip(loras, scales, strict=True):
        digest.update("".join(file_digest(file) for file in lora.files).encode() + repr(scale).encode())
    return digest.hexdigest()
