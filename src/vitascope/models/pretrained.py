"""Encoders that are not ours, loaded by `transformers` from a folder on this machine.

Only safetensors are read, no code of a checkpoint is run and nothing is fetched. `transformers` is an optional
dependency, imported when a model is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from vitascope.core.errors import CapabilityError, CheckpointError, choice
from vitascope.weights.foreign import read_object
from vitascope.weights.sources import open_source

_WHAT_LOADING_RAISES = (OSError, ValueError, RuntimeError, LookupError, TypeError, ImportError, SafetensorError)
_UNUSED = re.compile(r"decoder\.|lm_head\.|visual_projection\.|.*\.position_ids$")
"""Weights that lie beside an encoder's in checkpoints of the whole model, and that an encoder has no use for."""


@dataclass(frozen=True)
class Quantiser:
    """How `transformers` stores matrices in fewer bits: the packages it needs, and its setting for a dtype.

    gpu_only: on a CPU the package is not used, as it may fetch code for it.
    """

    packages: tuple[str, ...]
    setting: Callable[[torch.dtype], Any]
    gpu_only: bool = False


def _bits_and_bytes(**fixed: Any) -> Callable[[torch.dtype], Any]:
    def setting(dtype: torch.dtype) -> Any:
        extra = {"bnb_4bit_compute_dtype": dtype} if "load_in_4bit" in fixed else {}
        return transformers("weights in 8 or 4 bits").BitsAndBytesConfig(**fixed, **extra)

    return setting


def _torchao(name: str) -> Callable[[torch.dtype], Any]:
    def setting(dtype: torch.dtype) -> Any:
        kind = getattr(import_module("torchao.quantization"), name)
        return transformers("weights in 8 bits").TorchAoConfig(kind())

    return setting


QUANTISERS: dict[str, Quantiser] = {
    "bnb_int8": Quantiser(("bitsandbytes", "accelerate"), _bits_and_bytes(load_in_8bit=True)),
    "bnb_nf4": Quantiser(
        ("bitsandbytes", "accelerate"), _bits_and_bytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"), gpu_only=True
    ),
    "torchao_int8": Quantiser(("torchao", "accelerate"), _torchao("Int8WeightOnlyConfig")),
    "torchao_fp8": Quantiser(("torchao", "accelerate"), _torchao("Float8WeightOnlyConfig")),
}
"""The valid values of `quantise`."""


def transformers(purpose: str) -> Any:
    """The package `transformers`. Raises CapabilityError, naming the extra to install, where it is missing."""
    try:
        return import_module("transformers")
    except ImportError as error:
        raise CapabilityError(
            f"{purpose} need the package transformers: pip install '.[checkpoints]' ({_one_line(error)})"
        ) from error


def import_pretrained(classes: Mapping[str, str]) -> None:
    """Import the code of models, by their names in `transformers` (the values). Raises CapabilityError without it."""
    library = transformers("encoders of public models")
    for name in classes.values():
        getattr(library, name)


def is_unused(name: str) -> bool:
    """Whether a weight of a checkpoint of the whole model is none of its encoder's."""
    return _UNUSED.match(name) is not None


def check_quantise(quantise: str | None, device: torch.device | str) -> None:
    """Raise InputError for a name that is not known, CapabilityError where a package or GPU it needs is missing."""
    if quantise is None:
        return
    quantiser = QUANTISERS[choice("quantise", quantise, QUANTISERS)]
    if quantiser.gpu_only and torch.device(device).type == "cpu":
        raise CapabilityError(f"quantise {quantise!r} needs a GPU; the device is {str(device)!r}")
    for package in quantiser.packages:
        if find_spec(package) is None:
            raise CapabilityError(f"quantise {quantise!r} needs the package {package}: pip install {package}")


def encoder_class(folder: Path, classes: Mapping[str, str]) -> Any:
    """The class in `transformers` of the model in a folder, of those in `classes` by the `model_type` of config.json.
    Raises CheckpointError for another model, CapabilityError without the package."""
    kind = str(read_object(folder / "config.json").get("model_type"))
    if kind not in classes:
        raise CheckpointError(f"{folder} holds a model of type {kind!r}; valid types: {', '.join(classes)}")
    return getattr(transformers(f"models of type {kind!r}"), classes[kind])


def load_pretrained(
    folder: str | Path,
    classes: Mapping[str, str],
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    quantise: str | None = None,
) -> nn.Module:
    """The model in `folder` (config.json and safetensors, whole or in shards), in eval mode and without gradients.

    classes: names in `transformers` by the `model_type` of config.json. quantise: one of QUANTISERS, which then stay on
    the device they were loaded to. Raises CheckpointError when files are missing, damaged or of another model.
    """
    folder = Path(folder)
    check_quantise(quantise, device)
    cls = encoder_class(folder, classes)
    open_source(folder)  # says in one line which shard is missing, and that there is no other format
    settings: dict[str, Any] = {}
    if quantise is not None:
        settings = {"quantization_config": QUANTISERS[quantise].setting(dtype), "device_map": {"": str(device)}}
    try:
        model, report = cls.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            attn_implementation="sdpa",  # never what a configuration may ask to be fetched
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report, and refused by their names
            **settings,
        )
    except _WHAT_LOADING_RAISES as error:
        raise CheckpointError(f"{folder} cannot be loaded: {_one_line(error)}") from error
    _check_report(folder, report)
    return (model if quantise else model.to(device)).eval().requires_grad_(False)


def _check_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Raise CheckpointError for weights that were missing, left over or of another shape."""
    left_over = [name for name in report.get("unexpected_keys", ()) if not is_unused(name)]
    mis_shaped = [str(key[0]) if isinstance(key, tuple) else str(key) for key in report.get("mismatched_keys", ())]
    for what, names in (
        ("missing", sorted(report.get("missing_keys", ()))),
        ("of another model", sorted(left_over)),
        ("of another shape", sorted(mis_shaped)),
    ):
        if names:
            rest = ", ..." if len(names) > 3 else ""
            raise CheckpointError(f"{folder}: {len(names)} weights {what} ({', '.join(names[:3])}{rest})")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
